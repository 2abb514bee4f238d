"""What every entry of POLICIES must keep with every entry of SIGNALS, found through the tables."""

import functools
import math
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.config import Selection as SelectionConfig
from kdjax.selection import POLICIES, SIGNALS, Context
from kdjax.selection.signals import View, position_noise
from kdjax.types import Batch, TokenStats

B, T = 6, 25
DRAW = jax.jit(position_noise, static_argnums=2)
FRACTIONS = (0.01, 0.2, 0.28, 1.0)


def ceiling(fraction, eligible):
    """max(1, ceil(f n)) in decimal arithmetic, 0 of 0."""
    return min(eligible, max(1, math.ceil(Decimal(str(fraction)) * eligible)))


# policy -> how many of a row's eligible positions it fills; None = not a function of that number
BUDGETS = {
    "all": lambda fraction, eligible: eligible,
    "top_fraction": ceiling,
    "random_fraction": ceiling,
    "reserve_mix": ceiling,
    "curriculum": ceiling,
    "threshold": None,
    "bucket": None,
    "sampled": None,
    "easy_hard": lambda fraction, eligible: eligible,
    "easy_hard_means": lambda fraction, eligible: eligible,
    "adaptive": lambda fraction, eligible: eligible,  # at first
}
MAY_BE_EMPTY = ("bucket",)  # a band of one or two positions may lie between them
NOT_DENSE_AT_1 = ("sampled",)  # draws with replacement

every_policy = pytest.mark.parametrize("policy", POLICIES)
every_pair = pytest.mark.parametrize(
    ("policy", "signal"), [(policy, signal) for policy in POLICIES for signal in SIGNALS]
)
every_fraction = pytest.mark.parametrize("fraction", FRACTIONS)


@functools.cache
def ragged():
    """Eligible positions: all, none, one at either end, scattered, all but the last."""
    eligible = np.random.default_rng(0).uniform(size=(B, T)) < 0.6
    eligible[0] = True
    eligible[1] = False
    eligible[2] = np.arange(T) == 0
    eligible[3] = np.arange(T) == T - 1
    eligible[5] = np.arange(T) < T - 1
    return eligible


def config_of(policy, fraction, **options):
    """A band of all quantiles at fraction 1."""
    return SelectionConfig(policy=policy, fraction=fraction, upper=max(0.8, fraction), **options)


def context(rows, *, step=0, seed=0, epoch=0):
    """(step, noise) of a step of these rows: what a policy knows besides scores."""
    ids = jnp.asarray(list(rows), jnp.int32)
    zeros = jnp.zeros((len(ids), T), jnp.int32)
    batch = Batch(zeros, zeros, zeros, zeros.astype(bool), ids, jnp.full_like(ids, epoch), jnp.ones(len(ids)))
    return jnp.int32(step), DRAW(jax.random.key(seed), batch, 2)


def score_of(policy, signal, row_id=range(B), epoch=0, seed=0):
    """The scores as the step makes them: of the policy's own signal, if it has one."""
    entry = SIGNALS[policy.signal or signal]
    row_id, fields = np.asarray(list(row_id)), {}
    for name in entry.needs:
        draws = np.random.default_rng(seed).uniform(size=(100, T)).round(1)  # with ties
        fields[name] = jnp.asarray(draws[row_id], jnp.float32)
    zeros = jnp.zeros((len(row_id), T), jnp.int32)
    ids = jnp.asarray(row_id, jnp.int32)
    batch = Batch(zeros, zeros, zeros, zeros.astype(bool), ids, jnp.full_like(ids, epoch), jnp.ones(len(row_id)))
    eligible = jnp.asarray(ragged()[row_id % B])
    return entry.score(View(TokenStats(**fields), eligible, DRAW(jax.random.key(seed), batch, 1)))


@functools.cache
def made(name, fraction):
    policy = POLICIES[name](config_of(name, fraction))
    return policy, jax.jit(lambda score, eligible, state, now: policy.select(score, eligible, state, Context(*now)))


def select(name, fraction, score, eligible=None, rows=None):
    policy, program = made(name, fraction)
    now = context(range(len(score)) if rows is None else rows)
    selection, _ = program(score, jnp.asarray(ragged() if eligible is None else eligible), policy.init(), now)
    return np.asarray(selection.index), np.asarray(selection.weight)


def chosen(name, fraction, score, eligible=None, rows=None):
    """The filled positions of each row."""
    index, weight = select(name, fraction, score, eligible, rows)
    return [row[filled > 0].tolist() for row, filled in zip(index, weight, strict=True)]


def test_every_policy_says_what_it_fills():
    assert set(POLICIES) == set(BUDGETS), "BUDGETS says how many positions each policy fills"


@every_pair
@every_fraction
def test_contract(policy, signal, fraction):
    """Static slots; eligible positions only, each once, ascending; the exact budget; something wherever it can."""
    entry, _ = made(policy, fraction)
    index, weight = select(policy, fraction, score_of(entry, signal))
    assert index.shape == weight.shape == (B, entry.slots(T))
    assert (index.dtype, weight.dtype) == (np.int32, np.float32)
    assert ((index >= 0) & (index < T)).all()  # empty slots are gathered too
    assert (np.isfinite(weight) & (weight >= 0)).all()
    for row, (positions, filled) in enumerate(zip(index, weight > 0, strict=True)):
        assert ragged()[row, positions[filled]].all()
        assert (np.diff(positions[filled]) > 0).all()
        eligible = int(ragged()[row].sum())
        assert filled.any() == (eligible > 0) or policy in MAY_BE_EMPTY
        if BUDGETS[policy]:
            assert filled.sum() == BUDGETS[policy](fraction, eligible)


@every_pair
def test_fraction_1_is_dense(policy, signal):
    """Every eligible position, whatever the scores are."""
    if policy in NOT_DENSE_AT_1:
        return
    got = chosen(policy, 1.0, score_of(made(policy, 1.0)[0], signal))
    assert got == [np.flatnonzero(row).tolist() for row in ragged()]


@every_pair
def test_permuting_rows(policy, signal):
    order = np.array([4, 2, 5, 0, 3, 1])
    entry, _ = made(policy, 0.28)
    plain = chosen(policy, 0.28, score_of(entry, signal))
    moved = chosen(policy, 0.28, score_of(entry, signal, row_id=order), ragged()[order], order)
    assert moved == [plain[row] for row in order]


@every_policy
@every_fraction
def test_what_is_not_eligible_is_not_read(policy, fraction):
    score = score_of(made(policy, fraction)[0], "student_entropy")
    plain = chosen(policy, fraction, score)
    for junk in (np.nan, np.inf, -np.inf, 1e30):
        assert chosen(policy, fraction, jnp.where(ragged(), score, junk)) == plain


@every_policy
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf, -0.0, -3e38])
def test_strange_scores_select_no_ineligible_position(policy, value):
    """All or some eligible positions at an end of the order: they still rank before what is not eligible."""
    eligible = np.arange(T)[None, :] % 3 == np.arange(B)[:, None] % 3
    score = jnp.full((B, T), value, jnp.float32)
    if np.isnan(value):
        score = jnp.copysign(score, value)  # both kinds of NaN: top_k ranks them at opposite ends
    for scores in (score, score.at[:, ::2].set(1.0)):
        for row, positions in enumerate(chosen(policy, 0.28, scores, eligible)):
            assert positions or policy in MAY_BE_EMPTY
            assert eligible[row, positions].all()


@every_policy
def test_nothing_eligible_anywhere(policy):
    index, weight = select(policy, 0.28, jnp.ones((B, T)), np.zeros((B, T), bool))
    assert not weight.any()
    assert ((index >= 0) & (index < T)).all()


@every_policy
def test_state_survives_the_checkpoint(policy):
    """As leaves and a structure, after some steps: the same state selects the same; it never changes its type."""
    entry, program = made(policy, 0.28)
    state = entry.init()
    for seed in range(3):
        score = score_of(entry, "student_entropy", seed=seed)
        _, after = program(score, jnp.asarray(ragged()), state, context(range(B), step=seed))
        assert jax.tree.structure(after) == jax.tree.structure(state)
        types = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)] for tree in (state, after)]
        assert types[0] == types[1]
        state = after
    leaves, structure = jax.tree.flatten(state)
    restored = jax.tree.unflatten(structure, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    score = score_of(entry, "student_entropy", seed=9)
    for got, want in zip(
        jax.tree.leaves(program(score, jnp.asarray(ragged()), restored, context(range(B), step=9))),
        jax.tree.leaves(program(score, jnp.asarray(ragged()), state, context(range(B), step=9))),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


@every_policy
def test_rows_are_selected_by_themselves(policy):
    """A row's selection is the same alone and next to others."""
    score = score_of(made(policy, 0.28)[0], "student_entropy")
    together = chosen(policy, 0.28, score)
    assert chosen(policy, 0.28, score[4:5], ragged()[4:5], [4]) == together[4:5]


@every_policy
def test_what_it_says_of_its_signal(policy):
    entry, _ = made(policy, 0.28)
    assert entry.signal is None or entry.signal in SIGNALS
    rising = jnp.broadcast_to(jnp.arange(T, dtype=jnp.float32)[None, :], (B, T))
    program, eligible = made(policy, 0.28)[1], jnp.asarray(ragged())

    def selection(score, seed=0):
        """As one array, with whatever else it says of the slots."""
        leaves = jax.tree.leaves(program(score, eligible, entry.init(), context(range(B), seed=seed))[0])
        return np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in leaves])

    assert entry.uses_signal == (not np.array_equal(selection(rising + 1), selection(T - rising)))
    assert entry.noisy == (not np.array_equal(selection(rising + 1), selection(rising + 1, seed=1)))
    given = program(rising + 1, eligible, entry.init(), context(range(B)))[0].given
    assert bool(entry.gives) == (given is not None)
    assert given is None or given.shape == (B, entry.slots(T))


# --- random_fraction, the control arm


def draw(row_id, epoch=0, seed=0):
    entry, _ = made("random_fraction", 0.2)
    score = score_of(entry, "student_entropy", row_id, epoch, seed)
    return np.array(chosen("random_fraction", 0.2, score, np.ones((len(list(row_id)), T), bool)))


def test_random_fraction_ignores_the_configured_signal():
    assert made("random_fraction", 0.2)[0].signal == "random"


def test_random_fraction_depends_on_row_and_epoch():
    """Not on the place in the batch, its size or its neighbours; other rows, epochs and seeds draw anew."""
    whole = draw([5, 17, 40, 41])
    np.testing.assert_array_equal(draw([41, 5]), whole[[3, 0]])
    np.testing.assert_array_equal(draw([40]), whole[[2]])
    assert len({tuple(row) for row in whole}) == 4
    for other in (draw([5, 17, 40, 41], epoch=1), draw([5, 17, 40, 41], seed=1)):
        assert not (other == whole).all(1).any()


def test_random_fraction_is_uniform():
    """5 of 25 positions, 600 rows: every position in a fifth of the rows, every pair of neighbours in 1 of 30."""
    rows = np.concatenate([draw(range(100), epoch) for epoch in range(6)])
    hits = np.zeros((600, T))
    np.put_along_axis(hits, rows, 1.0, 1)
    assert (hits.sum(1) == 5).all()
    assert np.abs(hits.mean(0) - 0.2).max() < 4.5 * np.sqrt(0.2 * 0.8 / 600)
    pairs = (hits[:, 1:] * hits[:, :-1]).mean()
    assert abs(pairs - 5 * 4 / (25 * 24)) < 0.005
