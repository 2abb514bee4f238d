"""The numbers of the PACED reference, section 8: V1-V5, V8, V10-V15."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import config
from kdjax.build import build_chooser, build_objective
from kdjax.config import Loss
from kdjax.config import Selection as SelectionConfig
from kdjax.curation import batches, paced
from kdjax.curation.paced import effective_sample, kernel, mean_one, weigh
from kdjax.curation.pass_rates import PassRates
from kdjax.curation.snr import efficiency
from kdjax.data import heldout_batches, to_batch
from kdjax.sharding import Rules
from kdjax.step import StepParts, init_state, make_supervise, make_train_step

Settings = functools.partial(config.PassRates, weight="paced")
EIGHTHS = np.arange(9.0)


def rates(right, tried):
    right = np.array(right)
    none, names = np.zeros(len(right), np.int64), tuple(map(str, range(len(right))))
    return PassRates(names, right, np.full(len(right), tried), none, none, {}, (0,))


def test_v1_weights_of_k_of_8():
    found = weigh([rates(range(9), 8)], Settings(normalise="none")).weight
    want = [0, 0.109375, 0.1875, 0.234375, 0.25, 0.234375, 0.1875, 0.109375, 0]
    np.testing.assert_allclose(found, want, atol=1e-6)
    found = weigh([rates(range(9), 8)], Settings(normalise="none", beta=2.0)).weight
    want = [0, 0.095703, 0.140625, 0.146484, 0.125, 0.087891, 0.046875, 0.013672, 0]
    np.testing.assert_allclose(found, want, atol=1e-6)


@pytest.mark.parametrize(
    ("alpha", "beta", "largest"), [(1, 1, 0.25), (1, 2, 0.148148), (2, 1, 0.148148), (0.5, 0.5, 0.5)]
)
def test_v2_the_peak(alpha, beta, largest):
    n = np.full(3001, 3000.0)
    found = kernel(np.arange(3001.0), n, alpha, beta)
    assert np.argmax(found) == round(3000 * alpha / (alpha + beta))
    assert found.max() == pytest.approx(largest, abs=1e-6)
    np.testing.assert_allclose(found, kernel(np.arange(3001.0), n, beta, alpha)[::-1], atol=1e-12)


def test_v3_mean_one_and_v4_the_weighted_loss():
    w = np.array([0, 0.109375, 0.25, 0.109375, 0])
    assert w.mean() == 0.09375
    np.testing.assert_allclose(mean_one(w), [0, 1.166667, 2.666667, 1.166667, 0], atol=1e-6)
    np.testing.assert_allclose(mean_one(kernel(np.array([0, 2, 2, 1.0]), np.full(4, 2.0), 1, 1)), [0, 0, 0, 4])
    np.testing.assert_allclose(mean_one(37.5 * w), mean_one(w), rtol=1e-12)
    # Where the problems of weight 0 leave, the others have mean 1: less, by the kept fraction.
    np.testing.assert_allclose(mean_one(w, w > 0), mean_one(w) * 3 / 5, rtol=1e-12)
    loss = np.array([2, 1, 0.5, 0.25, 0.1])
    assert np.mean(mean_one(w) * loss) == pytest.approx(0.558333, abs=1e-6)
    assert np.mean(w * loss) == pytest.approx(0.05234375, abs=1e-6)
    assert np.mean(batches.batch_mean(w, np.ones(5, bool)) * loss) == pytest.approx(0.558333, abs=1e-6)


@pytest.mark.parametrize("tried", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_v5_the_bias_of_the_plain_estimate(tried, p):
    k = np.arange(tried + 1.0)
    law = np.array([math.comb(tried, int(i)) * p**i * (1 - p) ** (tried - i) for i in k])
    found = np.sum(law * kernel(k, np.full(tried + 1, float(tried)), 1, 1))
    assert found == pytest.approx((1 - 1 / tried) * p * (1 - p), abs=1e-12)


# --- the weights in the step


def make_parts(small, **loss):
    return StepParts(
        student=small.model,
        teacher=small.model,
        chooser=build_chooser(SelectionConfig(policy="all")),
        objective=build_objective(Loss(**({"reduction": "sample"} | loss))),
        optimiser=optax.sgd(0.5),
        learning_rate=lambda step: jnp.asarray(0.5),
        rules=Rules(),
    )


def batch_of(small, weight, rows=8):
    batch = to_batch(next(heldout_batches(small.rows, rows)))
    return dataclasses.replace(batch, weight=jnp.asarray(weight, jnp.float32))


@pytest.fixture(scope="module")
def supervised(small):
    """(loss, gradient) of a batch, before the update."""
    parts = make_parts(small)
    supervise = make_supervise(parts)

    def loss(params, batch):
        found, _, _ = supervise(params, small.teacher, batch, (), jax.random.key(0), jnp.int32(0))
        return found.total / found.count

    step = jax.jit(jax.value_and_grad(loss))
    return lambda batch: step(small.student, batch)


def close(found, want, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, want)


def test_v8_only_the_scale_differs(small, supervised):
    raw = kernel(np.array([1.0, 4, 2, 7, 5, 3, 6, 1]), np.full(8, 8.0), 1, 1)
    sides = [batch_of(small, weights) for weights in (raw, mean_one(raw))]
    (_, plain), (_, scaled) = map(supervised, sides)
    close(plain, jax.tree.map(lambda g: g * np.float32(raw.mean()), scaled), rtol=1e-4, atol=1e-7)

    parts = dataclasses.replace(make_parts(small), optimiser=optax.adam(1e-2, eps=1e-12))
    step, ends = jax.jit(make_train_step(parts)), []
    for batch in sides:
        state = init_state(parts, small.student, 0)
        for _ in range(20):
            state, _ = step(state, small.teacher, jax.tree.map(lambda a: a[None], batch))
        ends.append(state.params)
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (ends[0], small.student)), strict=True)) > 0.05
    close(*ends, atol=1e-5)


def test_v10_the_hard_filter_counts_in_integers():
    for tried, kept in [(8, {2, 3, 4, 5, 6}), (10, {3, 4, 5, 6, 7})]:
        k = np.arange(tried + 1.0)
        found = paced.hard_filter(k, np.full(tried + 1, float(tried)), Settings())
        assert set(np.flatnonzero(found)) == kept
    for tried in range(1, 41):
        k = np.arange(tried + 1.0)
        found = paced.hard_filter(k, np.full(tried + 1, float(tried)), Settings())
        exact = [5 * i > tried and 5 * i < 4 * tried for i in range(tried + 1)]
        np.testing.assert_array_equal(found, exact)


def test_v11_zero_sets(small, supervised):
    with pytest.raises(ValueError, match=r"2 are never solved, 1 always"):
        weigh([rates([0, 8, 0], 8)], Settings())
    loss, gradient = supervised(batch_of(small, np.zeros(8)))
    assert loss == 0.0
    close(gradient, jax.tree.map(np.zeros_like, gradient), atol=0)


def test_v12_rows_that_only_fill_the_batch_change_nothing(small, supervised):
    weight = np.arange(1.0, 9.0)
    columns = next(heldout_batches(small.rows, 8, limit=5))
    filled, other = (
        dataclasses.replace(to_batch(columns), weight=jnp.asarray([*weight[:5], *rest], jnp.float32))
        for rest in ((0, 0, 0), (5, 1e9, 7))
    )
    assert (filled.segment_ids[5:] == 0).all()
    close(supervised(other), supervised(filled), atol=0)
    loss, _ = supervised(batch_of(small, weight))
    five, _ = supervised(filled)
    with_targets = [i for i in range(8) if i != small.no_target]
    alone = [supervised(batch_of(small, np.eye(8)[i]))[0] * 7 for i in range(8)]  # each row's own mean
    assert loss == pytest.approx(np.mean([weight[i] * alone[i] for i in with_targets]), rel=1e-5)
    assert five == pytest.approx(np.mean([weight[i] * alone[i] for i in with_targets if i < 5]), rel=1e-5)


def test_v13_drawing_in_proportion_has_the_same_mean():
    w = kernel(np.array([0, 1, 4, 7, 8, 2.0]), np.full(6, 8.0), 1, 1)
    gradients = np.random.default_rng(0).normal(size=(6, 3))
    choose = batches.choose_rows(w, None, Settings(normalise="sample"), size=1000, seed=1, steps=100)
    rows = np.concatenate([choose(step) for step in range(100)])
    drawn, want = gradients[rows], np.mean(mean_one(w)[:, None] * gradients, 0)
    assert (np.abs(drawn.mean(0) - want) < 3 * drawn.std(0) / np.sqrt(100_000)).all()
    assert not np.isin(rows, [0, 4]).any()
    np.testing.assert_array_equal(choose(7), rows[7000:8000])
    assert (choose(7) != choose(8)).any()


@pytest.mark.parametrize(("delta", "bound"), [(0.1, 0.990066), (0.25, 0.940015), (0.5, 0.786448), (1.0, 0.419974)])
def test_v14_wrong_by_at_most_delta(delta, bound):
    assert 1 / math.cosh(delta) ** 2 == pytest.approx(bound, abs=1e-6)
    rng, found = np.random.default_rng(0), []
    for _ in range(3000):
        w, share = rng.uniform(0.1, 1, 2), rng.dirichlet(np.ones(2))
        found.append(efficiency(w, w * np.exp(rng.choice([-delta, delta], 2)), share))
    # The worst case: equal second moments on both sides.
    w = np.array([0.25, 0.05])
    found.append(efficiency(w, w * np.exp([delta, -delta]), 1 / w**2))
    assert min(found) >= bound - 1e-6
    assert min(found) == pytest.approx(bound, abs=1e-5)
    assert efficiency(w, 3 * w) == pytest.approx(1)


def test_v15_the_effective_sample():
    w = kernel(EIGHTHS, np.full(9, 8.0), 1, 1)
    assert effective_sample(w) == pytest.approx(0.717949, abs=1e-6)
    assert weigh([rates(range(9), 8)], Settings()).summary["effective_sample"] == pytest.approx(0.717949, abs=1e-6)
