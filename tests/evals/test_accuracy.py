"""Verified accuracy and its interval."""

import math

import numpy as np
import pytest

from kdjax.evals.accuracy import accuracy, wilson
from kdjax.verifiers import Finding, Verdict

RIGHT, WRONG, UNDECIDED = (Finding(verdict) for verdict in Verdict)


def test_undecided_answers_are_counted_and_left_out():
    found = accuracy([RIGHT] * 3 + [WRONG] + [UNDECIDED] * 2)
    assert (found.right, found.wrong, found.undecided, found.value) == (3, 1, 2, 0.75)
    none = accuracy([UNDECIDED])
    assert none.undecided == 1
    assert all(math.isnan(x) for x in (none.value, none.low, none.high))


@pytest.mark.parametrize(
    ("right", "tried", "low", "high"),  # 81 of 263: Newcombe 1998, table I
    [(0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (81, 263, 0.2553, 0.3662), (1, 2, 0.094531, 0.905469)],
)
def test_wilson(right, tried, low, high):
    np.testing.assert_allclose(wilson(right, tried), (low, high), atol=5e-5)
    z = 1.959963984540054
    for bound in wilson(right, tried):
        rate = right / tried
        np.testing.assert_allclose((bound - rate) ** 2, z * z * bound * (1 - bound) / tried, atol=1e-12)


def test_the_interval_covers():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        low, high = wilson(int(rng.binomial(40, 0.3)), 40)
        covered += low <= 0.3 <= high
    assert 0.93 < covered / 2000 < 0.97
