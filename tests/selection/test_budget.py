"""Exact budgets and the top of the scores, against the vectors of SE-KD and plain sorting."""

import itertools
import math
from decimal import Decimal

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.build import build_objective
from kdjax.config import Loss
from kdjax.config import Selection as SelectionConfig
from kdjax.selection import POLICIES, SIGNALS, Context, View, token_stats
from kdjax.selection.policies.base import budget, budgets
from kdjax.types import DenseTargets, Head, gather_slots


def now(eligible):
    """The first step of a run; policies of this file read nothing else."""
    return Context(jnp.int32(0), jnp.zeros(eligible.shape, jnp.float32))


def top(score, eligible=None, fraction=0.2):
    """The positions that top_fraction fills, row by row."""
    score = jnp.atleast_2d(jnp.asarray(score, jnp.float32))
    eligible = jnp.ones(score.shape, bool) if eligible is None else jnp.atleast_2d(jnp.asarray(eligible))
    policy = POLICIES["top_fraction"](SelectionConfig(fraction=fraction))
    selection, _ = policy.select(score, eligible, policy.init(), now(eligible))
    index, weight = np.asarray(selection.index), np.asarray(selection.weight)
    return [row[filled > 0].tolist() for row, filled in zip(index, weight, strict=True)]


# --- how many


@pytest.mark.parametrize(
    ("fraction", "eligible", "count"),
    [
        (0.2, 511, 103),  # sekd 9.7
        (0.2, 510, 102),
        (0.07, 100, 7),  # 0.07 * 100 = 7.000000000000001
        (0.28, 25, 7),  # 0.28 * 25 = 7.000000000000001
        (0.55, 100, 55),
        (0.56, 25, 14),
        (0.2, 0, 0),
        (0.2, 1, 1),
        (0.2, 2, 1),
        (0.2, 6, 2),
        (0.01, 10, 1),
        (0.0025, 2048, 6),  # the paper's 0.25 %
        (1e-9, 2048, 1),
        (1.0, 1, 1),
        (1.0, 511, 511),
        (0.999, 511, 511),
        (0.999, 2000, 1998),
        (1 / 3, 3, 1),  # as written, 0.3333333333333333: below a third
        (1, 5, 5),
        (np.float64(0.07), 100, 7),
    ],
)
def test_budget(fraction, eligible, count):
    assert budget(fraction, eligible) == count


@hypothesis.given(st.integers(1, 10000), st.integers(0, 4096))
@hypothesis.settings(max_examples=200)
def test_budget_is_exact(ten_thousandths, eligible):
    written = Decimal(ten_thousandths) / 10000
    want = min(eligible, max(1, math.ceil(written * eligible)))
    assert budget(float(written), eligible) == want


def test_budget_never_shrinks():
    for fraction in (0.01, 0.07, 0.2, 0.75, 1.0):
        counts = [budget(fraction, n) for n in range(300)]
        assert all(0 <= b - a <= 1 for a, b in itertools.pairwise(counts))


def test_budgets_of_rows():
    counts = jnp.array([[0], [1], [5], [99], [100]])[:, 0]
    assert jax.jit(lambda n: budgets(0.07, n, 100))(counts).tolist() == [0, 1, 1, 7, 7]
    assert budgets(0.07, counts, 100).dtype == jnp.int32


# --- which

SCORES = [0.1, 0.9, 0.3, 0.7, 0.5, 0.2, 0.8, 0.4, 0.6, 0.0]


@pytest.mark.parametrize(("fraction", "positions"), [(0.2, [1, 6]), (0.25, [1, 3, 6]), (0.01, [1])])
def test_sekd_vector_6(fraction, positions):
    assert top(SCORES, fraction=fraction) == [positions]


def test_sekd_vector_6_with_position_1_ineligible():
    assert top(SCORES, np.arange(10) != 1) == [[3, 6]]  # ceil(0.2 * 9) = 2


def test_sekd_vector_8():
    """Constant scores: the lowest indices. Rows permute. A constant or a factor > 0 changes nothing."""
    assert top(np.full(10, 3.0)) == [[0, 1]]
    assert top(np.full(10, 3.0), np.arange(10) >= 4, 0.3) == [[4, 5]]
    rows = np.stack([SCORES, SCORES[::-1], np.zeros(10)])
    assert top(rows[[2, 0, 1]]) == [top(rows)[row] for row in (2, 0, 1)]
    for shift, factor in ((8.0, 1.0), (-64.0, 1.0), (0.0, 0.25), (0.0, 1024.0), (1.0, 4.0)):
        eighths = np.round(np.array(SCORES) * 8) / 8  # with ties; exact in float32 all along
        assert top(eighths * factor + shift) == top(eighths)


def test_ties_go_to_the_lower_index():
    assert top([1, 2, 2, 2, 1], fraction=0.4) == [[1, 2]]
    assert top([-0.0, 0.0, -0.0, 0.0, 0.0], fraction=0.4) == [[0, 1]]
    assert top([-1.0, -0.0, 0.0, -0.0, -1.0], fraction=0.4) == [[1, 2]]


T = 24


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=60)
def test_against_sorting(data):
    """Ragged eligibility, scores full of ties."""
    fraction = data.draw(st.sampled_from([0.07, 0.2, 0.5, 1.0]))
    score = data.draw(st.lists(st.integers(-2, 2), min_size=T, max_size=T))
    eligible = data.draw(st.lists(st.booleans(), min_size=T, max_size=T))
    ranked = sorted((-value, at) for at, value in enumerate(score) if eligible[at])
    want = sorted(at for _, at in ranked[: min(len(ranked), max(1, math.ceil(Decimal(str(fraction)) * len(ranked))))])
    assert top(score, eligible, fraction) == [want]


def test_nan_is_selected_first():
    """A position whose score is not a number is where the trouble is: the loss must meet it."""
    nan = jnp.array([np.nan])
    for bad in (nan, -nan):
        score = jnp.asarray(SCORES, jnp.float32).at[7].set(bad[0])
        assert top(score) == [[1, 7]]


# --- the whole way, sekd 9.10


@pytest.mark.parametrize("fraction", [0.2, 1.0])
def test_sekd_vector_10(fraction):
    """Student and teacher changed at ineligible positions move neither selection, loss nor gradient; none gives 0."""
    numbers = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(numbers.normal(size=shape), jnp.float32)

    b, t, d, v = 3, 12, 4, 7
    hidden, teacher, head, teacher_head = normal(b, t, d), normal(b, t, d), Head(normal(d, v), v), Head(normal(d, v), v)
    labels = jnp.asarray(numbers.integers(v, size=(b, t)), jnp.int32)
    eligible = jnp.asarray(numbers.uniform(size=(b, t)) < 0.5).at[1].set(False)
    policy = POLICIES["top_fraction"](SelectionConfig(fraction=fraction))
    objective = build_objective(Loss(terms=(("forward_kl", 0.9), ("cross_entropy", 0.1))))

    @jax.jit
    def supervise(hidden, teacher, eligible):
        def total(hidden, head):
            signal = SIGNALS["student_entropy"]
            stats = token_stats(signal.needs, (hidden, head), None, labels)
            score = signal.score(View(stats, eligible, jnp.zeros((b, t))))
            selection, _ = policy.select(score, eligible, policy.init(), now(eligible))
            targets = DenseTargets(gather_slots(teacher, selection.index), teacher_head)
            slots, y = gather_slots(hidden, selection.index), gather_slots(labels, selection.index)
            output = objective(slots, head, targets, y, selection, jnp.ones(b), 0)
            return output.total, (selection, output.count)

        (total, (selection, count)), gradient = jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, head)
        return total, count, selection, gradient

    plain = supervise(hidden, teacher, eligible)
    assert plain[1] > 0
    outside = ~eligible[:, :, None]
    shifted = supervise(jnp.where(outside, 9.0 - hidden, hidden), jnp.where(outside, 5.0, teacher), eligible)
    for got, want in zip(jax.tree.leaves(shifted), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(got, want)
    total, count, _, gradient = supervise(hidden, teacher, jnp.zeros((b, t), bool))
    assert (total, count) == (0.0, 0.0)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))
