"""The positions of AT-KD and AdaKD: who is hard, how hot, and a share that follows the loss."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kdjax.config import Mesh
from kdjax.config import Selection as SelectionConfig
from kdjax.selection import POLICIES, Context
from kdjax.sharding import make_rules
from kdjax.types import LossOutput

U = np.array([[0.1, 0.9, 0.3, 0.7, 0.5], [0.2, 0.8, 0.4, 0.6, 0.0]])


def policy_of(name, **options):
    return POLICIES[name](SelectionConfig(policy=name, **options))


def select(policy, score, eligible=None, state=None):
    """The selection of one device."""
    score = jnp.asarray(score, jnp.float32)
    eligible = jnp.ones(score.shape, bool) if eligible is None else jnp.asarray(eligible)
    now = Context(jnp.int32(0), jnp.zeros(score.shape))
    return policy.select(score, eligible, policy.init() if state is None else state, now)[0]


# --- easy_hard


@pytest.mark.parametrize(("fraction", "hard"), [(0.5, 5), (0.11, 2), (0.01, 1), (1.0, 10), (0.7, 7)])
def test_the_hard_are_the_top_of_the_batch(fraction, hard):
    """Not of each row: ceil(f n) of all its n positions."""
    got = select(policy_of("easy_hard", fraction=fraction), U)
    assert got.given.sum() == hard
    assert U[np.asarray(got.given) > 0].min() > U[np.asarray(got.given) == 0].max(initial=-1)


def test_weights_add_up_to_the_published_mean():
    eligible = np.array([[True] * 5, [True, True, False, False, True]])
    plain = select(policy_of("easy_hard", fraction=0.5), U, eligible)
    np.testing.assert_array_equal(plain.given, [[0, 1, 0, 1, 1], [0, 1, 0, 0, 0]])
    np.testing.assert_allclose(plain.weight, [[0.2, 0.8, 0.2, 0.8, 0.8], [0.2, 0.8, 0, 0, 0.2]], rtol=1e-6)
    np.testing.assert_array_equal(plain.mass, [5, 3])  # so that the sum is divided by all positions
    means = select(policy_of("easy_hard_means", fraction=0.3), U, eligible)  # 3 of 8
    np.testing.assert_array_equal(means.given, [[0, 1, 0, 1, 0], [0, 1, 0, 0, 0]])
    np.testing.assert_allclose(np.unique(means.weight), [0, 0.2 * 8 / 5, 0.8 * 8 / 3], rtol=1e-6)
    np.testing.assert_array_equal(means.mass, [5, 3])
    half = [select(policy_of(name, fraction=0.5), U, eligible).weight for name in ("easy_hard", "easy_hard_means")]
    np.testing.assert_allclose(2 * half[0], half[1], rtol=1e-6)


def test_one_kind_alone():
    every = select(policy_of("easy_hard_means", fraction=1.0), U)
    np.testing.assert_allclose(every.weight, 0.8, rtol=1e-6)
    without = select(policy_of("easy_hard", fraction=0.5, easy_weight=0.0), U)
    np.testing.assert_array_equal(without.weight, without.given)


# --- adaptive


@pytest.mark.parametrize("share", [1.0, 0.55, 0.35, 0.01])
def test_the_kept_and_their_temperatures(share):
    policy = policy_of("adaptive", temperature_scale=0.6)
    state = dataclasses.replace(policy.init(), share=jnp.float32(share))
    eligible = np.array([[True] * 5, [True, True, False, True, True]])
    got = select(policy, U, eligible, state)
    count = max(1, math.floor(share * 9))
    order = np.sort(U[eligible])[::-1]
    np.testing.assert_array_equal(got.weight, eligible & (order[count - 1] <= U))
    median = np.sort(order[:count])[(count - 1) // 2]
    want = np.exp(-0.6 * np.tanh(np.log(np.maximum(U / median, 1e-8))))
    np.testing.assert_allclose(np.asarray(got.given)[eligible], want[eligible], rtol=1e-5)
    assert np.isfinite(got.given).all()


def test_scores_of_zero_and_no_scale_have_the_plain_temperature():
    np.testing.assert_array_equal(select(policy_of("adaptive"), np.zeros((2, 5))).given, 1.0)
    np.testing.assert_array_equal(select(policy_of("adaptive", temperature_scale=0.0), U).given, 1.0)
    nothing = select(policy_of("adaptive"), U, np.zeros((2, 5), bool))
    assert not nothing.weight.any()
    assert np.isfinite(nothing.given).all()


def test_the_share_follows_the_loss():
    """Against a plain loop, over losses that fall, stay, rise and fall; a batch without a slot changes nothing."""
    policy = policy_of("adaptive", fraction=0.4, adapt_after=3)
    observe, state = jax.jit(policy.observe), policy.init()
    share, average, reference, seen = 1.0, None, None, set()
    falling, rising = np.linspace(10.0, 1.0, 300), np.linspace(1.0, 50.0, 700)
    for step, loss in enumerate([*falling, *[1.0] * 400, *rising, *falling]):
        state = observe(state, LossOutput(jnp.float32(7 * loss), jnp.float32(7.0), {}), jnp.int32(step))
        skipped = observe(state, LossOutput(jnp.float32(0.0), jnp.float32(0.0), {}), jnp.int32(step))
        assert jax.tree.leaves(skipped) == jax.tree.leaves(state)
        average = loss if average is None else 0.99 * average + 0.01 * loss
        if reference is None:
            reference = average if step >= 3 else None
        elif abs(average - reference) > 0.1 * reference:
            share = min(share * 1.1, 1.0) if average > reference else max(share * 0.9, 0.4)
            reference = average
        seen.add(round(share, 6))
        np.testing.assert_allclose(state.share, share, rtol=1e-5)
        np.testing.assert_allclose(state.reference, -1.0 if reference is None else reference, rtol=1e-4)
    assert {0.4, 1.0} < seen  # both ends


# --- several devices


@pytest.mark.parametrize("name", ["easy_hard", "easy_hard_means", "adaptive"])
def test_eight_devices_rank_the_whole_batch(name):
    """Each has two rows of the sixteen, and the same ones are hard; scores are full of ties, which go to the first."""
    rules, policy = make_rules(Mesh("dp")), policy_of(name, fraction=0.4)
    numbers = np.random.default_rng(0)
    score = jnp.asarray(numbers.integers(4, size=(16, 7)), jnp.float32)
    eligible = jnp.asarray(numbers.uniform(size=(16, 7)) < 0.7)
    state = dataclasses.replace(policy.init(), share=jnp.float32(0.4)) if name == "adaptive" else policy.init()

    def local(score, eligible):
        now = Context(jnp.int32(0), score, rules.all_rows, rules.own_rows)
        return policy.select(score, eligible, state, now)[0]

    spread = rules.rowwise(local, in_specs=(P("data"), P("data")), out_specs=P("data"))
    put = [jax.device_put(a, jax.NamedSharding(rules.mesh, P("data"))) for a in (score, eligible)]
    got, want = jax.jit(spread)(*put), select(policy, score, eligible, state)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert int((want.given > 0).sum()) > 0
