"""What single policies promise beyond the contract of all: the vectors of SE-KD, and numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.config import Selection as SelectionConfig
from kdjax.selection import POLICIES, SIGNALS, Chooser, Context
from kdjax.selection.policies.sampled import probabilities
from kdjax.selection.policies.threshold import Queue, push, quantile
from kdjax.types import Batch, TokenStats

U = np.array([0.1, 0.9, 0.3, 0.7, 0.5, 0.2, 0.8, 0.4, 0.6, 0.0])


def select(name, score, eligible=None, *, step=0, state=None, noise=None, all_rows=None, **options):
    """(positions, weights, mass, state) of each row."""
    score = jnp.atleast_2d(jnp.asarray(score, jnp.float32))
    eligible = jnp.ones(score.shape, bool) if eligible is None else jnp.atleast_2d(jnp.asarray(eligible))
    noise = jnp.zeros(score.shape, jnp.float32) if noise is None else jnp.asarray(noise, jnp.float32)
    policy = POLICIES[name](SelectionConfig(policy=name, **options))
    now = Context(jnp.int32(step), noise, *(() if all_rows is None else (all_rows,)))
    selection, state = policy.select(score, eligible, policy.init() if state is None else state, now)
    index, weight = np.asarray(selection.index), np.asarray(selection.weight)
    rows = [row[filled > 0].tolist() for row, filled in zip(index, weight, strict=True)]
    return rows, [row[row > 0] for row in weight], selection.mass, state


def lengths(*counts):
    return np.arange(max(counts))[None, :] < np.array(counts)[:, None]


# --- shared quota


def test_shared_quota():
    """sekd 9.9: 10 and 5 eligible positions at 20 % are 2 of both rows; by itself each row has 2 and 1."""
    scores = np.stack([U, U])
    assert [len(row) for row in select("top_fraction", scores, lengths(10, 5), fraction=0.2)[0]] == [2, 1]
    rows, *_ = select("top_fraction", scores, lengths(10, 5), fraction=0.2, quota="batch")
    assert rows == [[1, 6], [1, 3]]
    # A row has no more than it has, and the mean is over the rows of all devices.
    assert [len(r) for r in select("top_fraction", scores, lengths(10, 1), fraction=0.9, quota="batch")[0]] == [5, 1]
    three_more = lambda count: jnp.concatenate([count, jnp.zeros(3, jnp.int32)])  # noqa: E731
    rows, *_ = select("top_fraction", scores, lengths(10, 5), fraction=0.5, quota="batch", all_rows=three_more)
    assert [len(row) for row in rows] == [2, 2]  # ceil(0.5 * 15 / 5)


def test_shared_quota_is_exact():
    """7 % of a mean of 100 is 7."""
    rows, *_ = select("top_fraction", np.random.default_rng(0).uniform(size=(2, 100)), fraction=0.07, quota="batch")
    assert [len(row) for row in rows] == [7, 7]


# --- reserve


@pytest.mark.parametrize(("reserve", "top"), [(0.0, 4), (0.25, 3), (0.5, 2), (1.0, 0)])
def test_reserve_mix(reserve, top):
    noise = np.random.default_rng(1).uniform(size=(1, 10))
    (row,), *_ = select("reserve_mix", U, noise=noise, fraction=0.4, reserve=reserve)
    best = np.argsort(-U)[:top].tolist()
    rest = [at for at in np.argsort(-noise[0]) if at not in best][: 4 - top]
    assert row == sorted(best + rest)


# --- the queue of scores


def test_the_threshold_is_taken_before_the_push():
    """sekd 9.11. First batch: each row's own top; then the quantile of what was seen, linearly interpolated."""
    rows, _, _, state = select("threshold", U, fraction=0.2, queue=100)
    assert rows == [[1, 6]]
    assert int(state.filled) == 10
    limit = np.quantile(U, 0.8)
    second = np.array([0.0, limit + 1e-6, 1.0, limit - 1e-3, 0.2, 5.0, 6.0, 0.0, 0.0, 0.0])
    rows, _, _, after = select("threshold", second, fraction=0.2, queue=100, slack=5.0, state=state)
    assert rows == [[1, 2, 5, 6]]
    np.testing.assert_allclose(quantile(after, 0.5), np.quantile(np.concatenate([U, second]), 0.5), rtol=1e-6)
    rows, *_ = select("threshold", np.zeros(10), fraction=0.2, queue=100, state=state)
    assert rows == [[]]  # no quota: a row may select nothing
    rows, *_ = select("threshold", second, fraction=0.2, queue=100, slack=1.0, state=state)
    assert rows == [[5, 6]]  # and no more than there is room for: the largest


def test_the_ring_keeps_the_last():
    queue = POLICIES["threshold"](SelectionConfig(queue=7)).init()
    seen = []
    for seed in range(6):
        draws = np.random.default_rng(seed)
        scores, known = draws.normal(size=(2, 3)).astype(np.float32), draws.uniform(size=(2, 3)) < 0.6
        queue = push(queue, jnp.asarray(scores), jnp.asarray(known))
        seen += scores[known].tolist()
        kept = np.sort(np.asarray(queue.scores)[: int(queue.filled)])
        np.testing.assert_array_equal(kept, np.sort(np.array(seen[-7:], np.float32)))
        for level in (0.0, 0.3, 0.8, 1.0):
            np.testing.assert_allclose(quantile(queue, level), np.quantile(seen[-7:], level), rtol=1e-5)
    many = push(queue, jnp.arange(40.0).reshape(4, 10), jnp.ones((4, 10), bool))
    assert sorted(np.asarray(many.scores).tolist()) == list(range(33, 40))


def test_a_stationary_stream_is_accepted_at_the_fraction():
    """sekd 9.11, over 60 batches of 4 x 50; the same when every other position is not eligible, or not finite."""
    policy = POLICIES["threshold"](SelectionConfig(policy="threshold", fraction=0.2, queue=2000, slack=5.0))
    program = jax.jit(lambda score, ok, state: policy.select(score, ok, state, Context(jnp.int32(0), score)))
    for eligible in (np.ones((4, 50), bool), np.arange(200).reshape(4, 50) % 2 == 0):
        state, accepted, offered = policy.init(), 0, 0
        for seed in range(60):
            score = np.random.default_rng(seed).normal(size=(4, 50)).astype(np.float32)
            selection, state = program(jnp.asarray(score), jnp.asarray(eligible), state)
            if seed >= 10:
                accepted += int((selection.weight > 0).sum())
                offered += int(eligible.sum())
        assert abs(accepted / offered - 0.2) < 0.012
    assert isinstance(state, Queue)


def test_every_device_has_the_same_queue():
    """Scores of all rows enter: what is pushed is what `all_rows` gives."""
    both = np.stack([U, U + 1])

    def all_rows(array):
        return jnp.concatenate([array, array + 1 if array.dtype == jnp.float32 else array])

    _, _, _, state = select("threshold", U, fraction=0.2, queue=100, all_rows=all_rows)
    _, _, _, whole = select("threshold", both, fraction=0.2, queue=100)
    np.testing.assert_array_equal(state.scores, whole.scores)
    assert int(state.filled) == 20


# --- windows


@pytest.mark.parametrize(("step", "start"), [(0, 0), (1000, 2), (2000, 4), (3000, 6), (4000, 8), (5000, 8)])
def test_curriculum(step, start):
    """sekd 9.12: n = 10, k = 2; at the end it is top_fraction, at the beginning the easiest."""
    (row,), *_ = select("curriculum", U, step=step, fraction=0.2)
    assert row == sorted(np.argsort(U)[start : start + 2].tolist())


def test_curriculum_ends_as_top_fraction():
    """With ties, and with positions that are not eligible."""
    draws = np.random.default_rng(0)
    score, eligible = draws.uniform(size=(5, 40)).round(1), draws.uniform(size=(5, 40)) < 0.7
    top = select("top_fraction", score, eligible, fraction=0.3)[0]
    assert select("curriculum", score, eligible, step=4000, fraction=0.3)[0] == top
    early = select("curriculum", score, eligible, step=0, fraction=0.3)[0]
    for row, (low, high) in enumerate(zip(early, top, strict=True)):
        assert len(low) == len(high)
        assert score[row][low].max() <= score[row][high].min()


@pytest.mark.parametrize(("upper", "fraction"), [(0.8, 0.1), (0.5, 0.5), (1.0, 0.3), (0.75, 0.2)])
def test_bucket(upper, fraction):
    """Both ends included, quantiles with linear interpolation, over the eligible positions."""
    draws = np.random.default_rng(2)
    score, eligible = draws.normal(size=(4, 60)).astype(np.float32), draws.uniform(size=(4, 60)) < 0.6
    rows, *_ = select("bucket", score, eligible, fraction=fraction, upper=upper)
    for row, positions in enumerate(rows):
        low, high = np.quantile(score[row][eligible[row]].astype(np.float64), [upper - fraction, upper])
        inside = eligible[row] & (score[row] >= low - 1e-6) & (score[row] <= high + 1e-6)
        assert positions == np.flatnonzero(inside).tolist()


def test_bucket_below_zero():
    with pytest.raises(ValueError, match=r"^selection.fraction must be at most selection.upper = 0.3 .* got 0.4; .*"):
        POLICIES["bucket"](SelectionConfig(policy="bucket", fraction=0.4, upper=0.3))


# --- draws


@functools.cache
def drawn(corrected):
    """Sums of the slot weights of 4000 rows of equal scores and fresh noise, by position; and the mass."""
    noise = np.random.default_rng(5).uniform(size=(4000, 10))
    score = np.broadcast_to(U, (4000, 10))
    rows, weights, mass, _ = select("sampled", score, noise=noise, fraction=0.4, corrected=corrected)
    sums = np.zeros((4000, 10))
    for at, (positions, weight) in enumerate(zip(rows, weights, strict=True)):
        sums[at, positions] = weight
    return sums, np.asarray(mass)


def test_draws_follow_the_scores():
    sums, mass = drawn(False)
    assert (sums == sums.round()).all()
    assert (sums.sum(1) == 4).all()
    assert (mass == 4).all()
    proposal = U / U.sum()
    deviation = np.sqrt(proposal * (1 - proposal) / 16000)
    assert (np.abs(sums.mean(0) / 4 - proposal) <= 4.5 * deviation).all()  # exactly 0 where the score is


def test_corrected_draws_estimate_the_plain_mean():
    """E[sum w L / mass] = mean of L over the positions, here for L = 1..10; without correction it is far off."""
    losses = np.where(U > 0, np.arange(1.0, 11), 0.0)  # a position of score 0 is never seen
    for corrected, want in ((True, losses.sum() / 10), (False, (U / U.sum() * losses).sum())):
        sums, mass = drawn(corrected)
        estimates = sums @ losses / mass
        assert abs(estimates.mean() - want) < 4.5 * estimates.std() / np.sqrt(len(estimates))
    assert abs(losses.sum() / 10 - (U / U.sum() * losses).sum()) > 0.3


def test_proposals():
    eligible = jnp.asarray(lengths(10, 4, 0, 3)[:, :10])
    score = jnp.asarray(np.stack([U, -U, U, [np.nan, 1, 1] + [9] * 7]), jnp.float32)
    got = np.asarray(probabilities(score, eligible))
    np.testing.assert_allclose(got[0], U / U.sum(), rtol=1e-6)
    np.testing.assert_allclose(got[1], [0.25] * 4 + [0] * 6)  # nothing positive: evenly
    assert not got[2].any()
    np.testing.assert_allclose(got[3], [1] + [0] * 9, atol=1e-6)  # NaN goes first: the loss is to show it


def test_noise_next_to_one_draws_what_may_be_drawn():
    """Rounding at the end of the cumulative sum must not reach the positions behind the last eligible one."""
    score, eligible = np.full((1, 50), 0.1), np.arange(50)[None] < 33
    (row,), *_ = select("sampled", score, eligible, noise=np.full((1, 50), np.nextafter(1, 0, dtype=np.float32)))
    assert row == [32]


# --- weighting by the score


def test_weighting_by_the_signal():
    score = jnp.asarray(np.stack([U, -U, U]), jnp.float32)
    eligible = jnp.asarray(lengths(10, 10, 0)[:, :10])
    zeros = jnp.zeros((3, 10), jnp.int32)
    batch = Batch(zeros, zeros, zeros, zeros.astype(bool), jnp.arange(3), jnp.zeros(3, jnp.int32), jnp.ones(3))
    policy = POLICIES["top_fraction"](SelectionConfig(fraction=0.3))
    for by_score in (False, True):
        chooser = Chooser(SIGNALS["student_entropy"], policy, by_score)
        selection, _ = chooser(TokenStats(student_entropy=score), batch, eligible, (), jax.random.key(0), jnp.int32(0))
        weight = np.asarray(selection.weight)
        assert selection.index[0].tolist() == [1, 3, 6]
        want = np.array([0.9, 0.7, 0.8]) * 3 / 2.4 if by_score else np.ones(3)
        np.testing.assert_allclose(weight, [want, np.ones(3), np.zeros(3)], rtol=1e-6)
