"""From the figures of single runs to arms: means over seeds, paired differences, and what may be said of them.

Seeds are the sample. With n of them the 95 % interval of a mean is m +- t(n - 1) s / sqrt n, s their standard deviation
and t the 97.5 % point of Student's distribution; a paired difference is the mean over the seeds that both arms have of
the arm's figure minus the reference's. Standard library only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping, Sequence

BETTER, WORSE, NONE_SEEN, UNKNOWN = "better", "worse", "no difference seen", "cannot say"


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over n values with its 95 % interval; nan where it is not known (n = 0; the interval for n = 1 too)."""

    n: int
    value: float
    low: float
    high: float


@functools.cache
def t_quantile(df: int, level: float = 0.95) -> float:
    """The t with P(|T| < t) = level, T of Student's distribution with `df` whole degrees of freedom, df >= 1.

    P(|T| < t) is a finite sum for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    if df < 1:
        raise ValueError(f"df must be at least 1, got {df}.")
    low, high = 0.0, 1.0
    while _within(high, df) < level:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, df) < level else (low, middle)
    return (low + high) / 2


def _within(t: float, df: int) -> float:
    """P(|T| < t)."""
    angle = math.atan2(t, math.sqrt(df))
    sine, squared = math.sin(angle), math.cos(angle) ** 2
    if df % 2:
        term = total = math.cos(angle) if df > 1 else 0.0
        for k in range(3, df - 1, 2):
            term *= squared * (k - 1) / k
            total += term
        return 2 / math.pi * (angle + sine * total)
    term = total = 1.0
    for k in range(2, df - 1, 2):
        term *= squared * (k - 1) / k
        total += term
    return sine * total


def mean(values: Sequence[float]) -> Mean:
    """Mean and interval of the finite ones among `values`."""
    values = [value for value in values if math.isfinite(value)]
    n = len(values)
    if n < 2:
        return Mean(n, values[0] if values else math.nan, math.nan, math.nan)
    middle = statistics.fmean(values)
    half = t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Mean(n, middle, middle - half, middle + half)


def paired(arm: Mapping[int, float], reference: Mapping[int, float]) -> Mean:
    """Mean of arm - reference over the seeds that both have; seed -> figure."""
    return mean([arm[seed] - reference[seed] for seed in sorted(set(arm) & set(reference))])


def ratio(arm: Mapping[int, float], reference: Mapping[int, float]) -> Mean:
    """Mean of arm / reference over the seeds that both have and where the reference is not 0."""
    seeds = sorted(seed for seed in set(arm) & set(reference) if reference[seed])
    return mean([arm[seed] / reference[seed] for seed in seeds])


def verdict(difference: Mean, lower_is_better: bool) -> str:
    """`BETTER` or `WORSE` if the whole interval of a paired difference lies on one side of 0, else `NONE_SEEN`.

    `UNKNOWN` without an interval, and for one of no width: then no seed changes anything, and there is no sample.
    """
    if not difference.low < difference.high:
        return UNKNOWN
    if difference.low <= 0 <= difference.high:
        return NONE_SEEN
    return BETTER if (difference.high < 0) == lower_is_better else WORSE
