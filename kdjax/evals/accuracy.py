"""Verified accuracy: the share of right answers among those that could be judged."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from kdjax.verifiers import Finding, Verdict

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Counts of answers; value: right / (right + wrong), low and high: its 95 % Wilson interval, nan without any."""

    right: int
    wrong: int
    undecided: int
    value: float
    low: float
    high: float


def accuracy(findings: Sequence[Finding]) -> Accuracy:
    """Counts and rate of findings; the undecided ones are counted and left out of the rate."""
    right, wrong, undecided = (sum(f.verdict == kind for f in findings) for kind in Verdict)
    low, high = wilson(right, right + wrong)
    value = right / (right + wrong) if right + wrong else math.nan
    return Accuracy(right, wrong, undecided, value, low, high)


def wilson(right: int, tried: int, z: float = Z) -> tuple[float, float]:
    """The Wilson interval of a rate (Wilson, 1927); (nan, nan) of nothing tried."""
    if not tried:
        return math.nan, math.nan
    rate, square = right / tried, z * z / tried
    middle = (rate + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(rate * (1 - rate) / tried + square / (4 * tried))
    return max(0.0, middle - half), min(1.0, middle + half)
