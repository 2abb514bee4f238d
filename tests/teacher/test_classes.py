"""The class axis: by enumeration of all draws, against float64, and what draws may and may not depend on."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kdjax.config import Classes
from kdjax.kernels.sparse_divergence import KINDS, sparse_divergence
from kdjax.teacher import classes
from kdjax.teacher.classes import CLASSES, decode, encode, make_class_sampler
from kdjax.types import Head
from tests.kernels import oracle

# sekd 9: V = 5, rows that are their own logits
TEACHER, STUDENT = np.asarray([2.0, 1, 0, -1, -2]), np.asarray([0.5, 1.5, -0.5, 0, -1])
EYE = Head(jnp.eye(5), 5)
LOG_P, LOG_Q = oracle.log_softmax(TEACHER), oracle.log_softmax(STUDENT)
TOY_P, TOY_Q = np.exp(LOG_P), np.exp(LOG_Q)
KL, CROSS_ENTROPY = 0.4778198667, 1.4777926950
# Half a step of a code, 1 / 4096 nats, and the rounding of log w and of exp: up to 24 and 8 nats in float32.
CODED = np.expm1(1 / 4096 + 2 * 24 * 2.0**-24)
CUT = [kind for kind in CLASSES if kind != "sampled"]


def sampler(kind="sampled", vocab=5, **settings):
    return make_class_sampler(Classes(kind=kind, **settings), vocab)


def tiled(row, count):
    return jnp.asarray(np.tile(row, (count, 1)), jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def program(one, hidden, head, row, epoch, position, tau):
    return one.draw(hidden, head, row, epoch, position, tau)


def draw(one, hidden, head=EYE, row=0, epoch=0, position=None, tau=1.0):
    """Of neighbouring positions of a row, unless told otherwise."""
    count = len(hidden)
    position = np.arange(count) if position is None else position
    where = [jnp.asarray(np.broadcast_to(a, count), jnp.int32) for a in (row, epoch, position)]
    return program(one, hidden, head, *where, tau)


def dense(one, drawn, vocab):
    """The numbers as [N, V] in float64."""
    whole = np.zeros((len(drawn.ids), vocab))
    np.add.at(whole, (np.arange(len(whole))[:, None], np.asarray(drawn.ids)), oracle.f64(one.probs(drawn.codes)))
    return whole


@functools.partial(jax.jit, static_argnums=0)
def with_gradient(one, drawn, student, head, weight):
    targets = one.targets(drawn.ids, drawn.codes, drawn.entropy)

    def total(hidden):
        rest = {"tail": targets.tail, "teacher_entropy": targets.entropy}
        return sparse_divergence(hidden, head, targets.ids, targets.probs, weight, targets.kind, **rest)

    (_, values), gradient = jax.value_and_grad(total, has_aux=True)(student)
    return values, gradient


def loss(one, drawn, student, head=EYE, weight=None):
    """(values [N], d total / d student [N, D]) of the kernel."""
    weight = np.ones(len(drawn.ids)) if weight is None else weight
    return [oracle.f64(a) for a in with_gradient(one, drawn, student, head, jnp.asarray(weight, jnp.float32))]


def enumerated(monkeypatch, power, draws):
    """(sampler, what it drew in all V^N cases, the probability of each): uniform numbers in the middle of intervals."""
    proposal = np.exp(oracle.log_softmax(power * LOG_P))
    middle = np.cumsum(proposal) - proposal / 2
    cases = np.asarray(list(itertools.product(range(5), repeat=draws)))
    monkeypatch.setattr(classes, "uniform_numbers", lambda *_: jnp.asarray(middle[cases], jnp.float32))
    one = sampler(entries=draws, power=power)
    drawn = draw(one, tiled(TEACHER, len(cases)))
    live = np.asarray(drawn.codes) > 0
    for case, ids, kept in zip(cases, np.asarray(drawn.ids), live, strict=True):
        assert sorted(set(case)) == sorted(set(ids[kept]))  # each case is the draw that it was meant to be
    return one, drawn, np.prod(proposal[cases], -1)


# --- unbiased


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_the_mean_over_all_draws_is_dense(monkeypatch, draws):
    """sekd 9, 13: E[-sum w log q] = KL + H(p), E[gradient] = q - p, E[w] = p and Var[w_v] = p_v (1 - p_v) / N."""
    one, drawn, chance = enumerated(monkeypatch, 1.0, draws)
    codes = oracle.f64(drawn.codes)
    assert one.counts
    np.testing.assert_array_equal(codes.sum(-1), draws)
    # The counts, in float64: exact but for the rounding of 5^N sums.
    numbers = np.zeros((len(codes), 5))
    np.add.at(numbers, (np.arange(len(codes))[:, None], np.asarray(drawn.ids)), codes / draws)
    np.testing.assert_allclose(chance @ numbers, TOY_P, atol=1e-15)
    np.testing.assert_allclose(chance @ (TOY_Q - numbers), TOY_Q - TOY_P, atol=1e-15)
    np.testing.assert_allclose(chance @ (numbers @ -LOG_Q), CROSS_ENTROPY, atol=5e-11)  # the digits of the reference
    np.testing.assert_allclose(chance @ (numbers - TOY_P) ** 2, TOY_P * (1 - TOY_P) / draws, atol=1e-15)
    # Through the loss kernel, which takes H(p) off: float32 values of up to 3.1 nats.
    values, gradient = loss(one, drawn, tiled(STUDENT, len(codes)), weight=chance)
    np.testing.assert_allclose(chance @ values, KL, atol=4 * 2.0**-23)
    np.testing.assert_allclose(gradient.sum(0), TOY_Q - TOY_P, atol=4 * 2.0**-23)


@pytest.mark.parametrize(("power", "draws"), [(0.6, 1), (0.6, 3), (1.5, 2)])
def test_the_mean_over_all_draws_of_a_proposal_is_dense(monkeypatch, power, draws):
    """Weights p / (proposal N), each within the rounding of its code."""
    one, drawn, chance = enumerated(monkeypatch, power, draws)
    assert not one.counts
    assert np.all(np.asarray(drawn.codes) > 0)
    assert np.all(np.diff(drawn.ids, axis=1) >= 0)
    proposal = np.exp(oracle.log_softmax(power * LOG_P))
    exact = (TOY_P / proposal / draws)[np.asarray(drawn.ids)]
    np.testing.assert_allclose(one.probs(drawn.codes), exact, rtol=CODED)
    np.testing.assert_allclose(chance @ dense(one, drawn, 5), TOY_P, rtol=CODED)
    _, gradient = loss(one, drawn, tiled(STUDENT, len(chance)), weight=chance)
    # q sum w - w: both are off by at most CODED of themselves.
    assert np.all(np.abs(gradient.sum(0) - (TOY_Q - TOY_P)) <= CODED * (TOY_Q + TOY_P) + 1e-6)


def random_model(seed, vocab=40, width=8):
    """(teacher's hidden [width], its head, student's hidden, its head, log p, log q in float64)."""
    rng = np.random.default_rng(seed)
    sides = []
    for scale in (1.0, 0.7):
        hidden, weight = rng.normal(size=width), rng.normal(size=(vocab, width)) * scale
        hidden, weight = hidden.astype(np.float32), weight.astype(np.float32)
        sides.append(
            (hidden, Head(jnp.asarray(weight), vocab, True), oracle.log_softmax(weight.astype(float) @ hidden))
        )
    return sides


@pytest.mark.parametrize("power", [1.0, 0.7])
def test_the_gradient_of_a_random_model_is_dense_to_four_standard_errors(power):
    """1000 positions of 7 draws each. The most likely 7 entries instead are off by far more."""
    (teacher, teacher_head, log_p), (student, head, log_q) = random_model(4)
    one, count = sampler(vocab=40, entries=7, power=power), 1000
    exact = (np.exp(log_q) - np.exp(log_p)) @ oracle.f64(head.weight)

    def distance(one):
        drawn = draw(one, tiled(teacher, count), teacher_head)
        values, gradient = loss(one, drawn, tiled(student, count), head)
        error = np.maximum(gradient.std(0) / np.sqrt(count), 1e-6)
        return np.abs(gradient.mean(0) - exact) / error, values

    distances, values = distance(one)
    assert distances.max() < 4
    kl = np.exp(log_p) @ (log_p - log_q)
    assert abs(values.mean() - kl) < 4 * values.std() / np.sqrt(count)
    if power == 1:
        assert distance(sampler("renormalised", vocab=40, entries=7))[0].max() > 100


def test_frequencies():
    """4096 positions of 50 draws: each id's share of them within 5 standard errors of p."""
    one = sampler(entries=50, seed=3)
    share = dense(one, draw(one, tiled(TEACHER, 4096)), 5).mean(0)
    assert np.all(np.abs(share - TOY_P) < 5 * np.sqrt(TOY_P * (1 - TOY_P) / (50 * 4096)))


def test_one_hot_teacher_gives_one_id_with_all_counts():
    """For any seed and position; the loss is the cross-entropy on it."""
    hidden = jnp.asarray(np.tile(np.where(np.arange(5) == 3, 1e4, -1e4), (64, 1)), jnp.float32)
    for seed in (0, 2**40):
        one = sampler(entries=9, seed=seed)
        drawn = draw(one, hidden)
        np.testing.assert_array_equal(drawn.ids[:, 0], 3)
        np.testing.assert_array_equal(drawn.codes, np.tile([9] + [0] * 8, (64, 1)))
    values, _ = loss(one, drawn, tiled(STUDENT, 64))
    np.testing.assert_allclose(values, -LOG_Q[3], atol=1e-6)


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_many_draws_approach_dense(tau):
    """sekd 9, 18: 20,000 draws, within 5 standard errors of p, of KL(p || q) and of q - p at the teacher's tau."""
    one, draws = sampler(entries=20_000), 20_000
    log_p = oracle.log_softmax(TEACHER / tau)
    p = np.exp(log_p)
    drawn = draw(one, tiled(TEACHER, 2), tau=tau)
    error = np.sqrt(p * (1 - p) / draws)
    assert np.all(np.abs(dense(one, drawn, 5) - p) < 5 * error)
    values, gradient = loss(one, drawn, tiled(STUDENT, 2))
    spread = np.sqrt((p @ LOG_Q**2 - (p @ LOG_Q) ** 2) / draws)
    assert np.all(np.abs(values - p @ (log_p - LOG_Q)) < 5 * spread + 1e-6)
    assert np.all(np.abs(gradient - (TOY_Q - p)) < 5 * error + 1e-6)
    np.testing.assert_allclose(drawn.entropy, -p @ log_p, rtol=1e-6)


@pytest.mark.parametrize("kind", CUT)
def test_all_entries_are_dense(kind):
    one = sampler(kind, entries=50)
    assert (one.entries, one.counts, one.kind) == (5, False, kind)
    drawn = draw(one, tiled(TEACHER, 2))
    np.testing.assert_array_equal(drawn.ids, np.tile(np.arange(5), (2, 1)))
    values, gradient = loss(one, drawn, tiled(STUDENT, 2))
    # p log(p / q) with p off by CODED of itself; `renormalised` divides by the sum, off by as much.
    slack = 2 * CODED * (TOY_P @ (np.abs(LOG_P - LOG_Q) + 1)) + 1e-6
    np.testing.assert_allclose(values, KL, atol=slack)
    np.testing.assert_allclose(gradient, np.tile(TOY_Q - TOY_P, (2, 1)), atol=2 * CODED)


# --- what is stored


def test_counts_are_of_distinct_ids_in_ascending_order():
    (teacher, head, log_p), _ = random_model(5)
    one = sampler(vocab=40, entries=50)
    drawn = draw(one, tiled(teacher, 300), head)
    assert (drawn.ids.dtype, drawn.codes.dtype, drawn.entropy.dtype) == (jnp.int32, jnp.uint16, jnp.float32)
    assert drawn.ids.shape == drawn.codes.shape == (300, 50)
    zeros = jnp.zeros(300, jnp.int32)
    uniforms = oracle.f64(classes.uniform_numbers(0, zeros, zeros, jnp.arange(300), 50))
    edges = np.cumsum(np.exp(log_p))
    sure = 0
    for ids, codes, numbers in zip(np.asarray(drawn.ids), np.asarray(drawn.codes), uniforms, strict=True):
        kept = codes > 0
        assert codes.sum() == 50
        assert np.all(kept[:-1] >= kept[1:])
        assert np.all(np.diff(ids[kept]) > 0)
        assert not ids[~kept].any()
        if np.abs(numbers[:, None] - edges[None, :-1]).min() > 4e-6:  # float32 cannot have taken a neighbour
            sure += 1
            want, counts = np.unique(np.searchsorted(edges, numbers, side="right"), return_counts=True)
            np.testing.assert_array_equal(ids[kept], want)
            np.testing.assert_array_equal(codes[kept], counts)
    assert sure > 250
    np.testing.assert_allclose(drawn.entropy, -np.exp(log_p) @ log_p, rtol=1e-5)


@pytest.mark.parametrize("kind", CUT)
def test_the_largest_entries_against_float64(kind):
    """tau divides logits that are scaled and capped already; padding, which is larger, is not seen."""
    rng, vocab, k = np.random.default_rng(6), 30, 4
    hidden, weight = rng.normal(size=(9, 6)).astype(np.float32), rng.normal(size=(33, 6)).astype(np.float32)
    weight[vocab:] = 50.0
    head = Head(jnp.asarray(weight), vocab, True, logit_scale=1.5, soft_cap=4.0)
    logits = oracle.HeadOracle(weight, vocab, True, 1.5, 4.0).logits(hidden)
    ids = np.argsort(-logits, -1, kind="stable")[:, :k]
    one = sampler(kind, vocab, entries=k)
    for tau in (1.0, 2.0, 0.5):
        log_p = oracle.log_softmax(logits / tau)
        p = np.exp(np.take_along_axis(log_p, ids, 1))
        drawn = draw(one, jnp.asarray(hidden), head, tau=tau)
        np.testing.assert_array_equal(drawn.ids, ids)
        slack = np.expm1(np.log1p(CODED) + 1e-5)  # and float32's logits of up to 4 / tau
        np.testing.assert_allclose(one.probs(drawn.codes), p, rtol=slack)
        np.testing.assert_allclose(drawn.entropy, -(np.exp(log_p) * log_p).sum(-1), rtol=1e-5)
        slots = drawn.ids.reshape(3, 3, k), drawn.codes.reshape(3, 3, k), drawn.entropy.reshape(3, 3)
        targets = one.targets(*slots)
        assert targets.kind == kind
        np.testing.assert_array_equal(targets.probs.reshape(9, k), one.probs(drawn.codes))
        if kind == "ghost_tail":
            np.testing.assert_allclose(targets.tail.reshape(-1), 1 - p.sum(-1), atol=slack)
            np.testing.assert_allclose(targets.tail + targets.probs.sum(-1), 1.0, atol=2.0**-22)
        else:
            assert targets.tail is None


def test_a_tail_is_never_negative_and_entropy_may_be_missing():
    one = sampler("ghost_tail")
    codes = jnp.asarray([[16384, 16384, 0, 0, 0], [16385, 0, 0, 0, 0]], jnp.uint16)  # a little above 1 each, and 1
    targets = one.targets(jnp.zeros((2, 5), jnp.int32), codes, None)
    np.testing.assert_array_equal(targets.tail, [0.0, 0.0])
    np.testing.assert_array_equal(targets.probs[1], [1, 0, 0, 0, 0])
    assert targets.entropy is None


def test_codes_of_numbers():
    """Within 2.5e-4 from e^-24 to e^8, monotone, each code its own number's; 0 is empty; what is beyond is clipped."""
    log_w = np.linspace(-23.999, 8.0, 300_001).astype(np.float32)
    codes = np.asarray(encode(jnp.asarray(log_w)))
    assert np.all(np.diff(codes.astype(int)) <= 0)
    assert (codes.min(), codes.max()) == (1, 65535)
    relative = oracle.f64(decode(jnp.asarray(codes))) / np.exp(oracle.f64(log_w)) - 1
    assert np.abs(relative).max() <= CODED <= 2.5e-4
    every = jnp.arange(1, 65536, dtype=jnp.uint16)
    numbers = decode(every)
    np.testing.assert_array_equal(sampler("zero_tail").probs(np.asarray(every)), numbers)
    assert np.all(np.diff(numbers) < 0)
    np.testing.assert_array_equal(encode(jnp.log(numbers)), every)
    assert float(decode(jnp.zeros(1, jnp.uint16))[0]) == 0.0
    np.testing.assert_array_equal(encode(jnp.asarray([9.0, np.inf, -30.0, -np.inf, np.nan])), [1, 1] + [65535] * 3)
    assert float(decode(encode(jnp.zeros(1)))[0]) == 1.0


def test_a_row_that_is_not_finite_is_no_target():
    """Its ids are unknown, which a loss shows as NaN; its neighbours are as they were."""
    for kind in ("sampled", "zero_tail"):
        one = sampler(kind, entries=3)
        hidden = tiled(TEACHER, 4)
        good, bad = draw(one, hidden), draw(one, hidden.at[1, 2].set(jnp.nan))
        live = np.asarray(bad.codes[1]) > 0
        assert live.any()
        np.testing.assert_array_equal(bad.ids[1][live], -1)
        np.testing.assert_array_equal(bad.ids[2:], good.ids[2:])
        np.testing.assert_array_equal(bad.codes[2:], good.codes[2:])
    values, _ = loss(one, dataclasses.replace(bad, entropy=good.entropy), tiled(STUDENT, 4))
    np.testing.assert_array_equal(np.isnan(values), [False, True, False, False])


# --- what draws depend on


def everything(drawn):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(drawn)]


def test_draws_depend_on_row_epoch_and_position_alone():
    """sekd 9, 24, bitwise: any batch size, order and neighbours, one device and eight. EYE's products are exact."""
    one, rng = sampler(entries=6, seed=7), np.random.default_rng(8)
    count = 40
    hidden = jnp.asarray(rng.normal(size=(count, 5)), jnp.float32)
    where = {"row": rng.integers(2**31 - 1, size=count), "epoch": rng.integers(3, size=count)}
    where["position"] = rng.integers(512, size=count)
    whole = everything(draw(one, hidden, **where))
    for part in (rng.permutation(count), rng.permutation(count)[::-1], np.asarray([17])):
        mine = {name: numbers[part] for name, numbers in where.items()}
        for got, want in zip(everything(draw(one, hidden[part], **mine)), whole, strict=True):
            np.testing.assert_array_equal(got, want[part])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(hidden, row, epoch, position):
        return one.draw(hidden, EYE, row, epoch, position, 1.0)

    split = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False))
    for got, want in zip(
        everything(split(hidden, *(jnp.asarray(a, jnp.int32) for a in where.values()))), whole, strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_another_seed_row_epoch_or_position_has_other_numbers():
    """All 40 combinations, the same sums among them, 1000 numbers each: none begin alike, no two are correlated."""
    where = np.asarray(list(itertools.product((3, 4), (0, 1), (5, 6, 7, 2**20, 4)))).T
    drawn = [classes.uniform_numbers(seed, *(jnp.asarray(a) for a in where), 1000) for seed in (1, 2)]
    numbers = oracle.f64(np.concatenate(drawn))
    correlation = np.corrcoef(numbers) - np.eye(40)
    assert np.abs(correlation).max() < 5 / np.sqrt(1000)
    assert len(np.unique(numbers[:, 0])) == 40
    assert (numbers.min() >= 0) & (numbers.max() < 1)


def test_the_key_is_the_documented_one():
    numbers = classes.uniform_numbers(11, *(jnp.asarray([a]) for a in (5, 2, 77)), 4)
    key = jax.random.key(11, impl="threefry2x32")
    for part in (5, 2, 77):
        key = jax.random.fold_in(key, part)
    np.testing.assert_array_equal(numbers[0], jax.random.uniform(key, (4,)))
    # Frozen: a cache that was written before must be met by the same draws.
    frozen = [0.809433102607727, 0.06401586532592773, 0.9564954042434692, 0.9551745653152466]
    np.testing.assert_array_equal(numbers[0], np.asarray(frozen, np.float32))


def test_the_largest_entries_depend_on_nothing_else():
    one, hidden = sampler("zero_tail", entries=3), tiled(TEACHER, 2)
    first, second = (draw(one, hidden, row=row, epoch=row, position=np.asarray([row, 9])) for row in (0, 5))
    for a, b in zip(everything(first), everything(second), strict=True):
        np.testing.assert_array_equal(a, b)


# --- settings


def test_the_kinds_are_those_of_the_loss_kernel():
    assert set(CLASSES) == set(KINDS)
    for kind in CLASSES:
        assert sampler(kind).kind == kind


@pytest.mark.parametrize("kind", CUT)
def test_a_power_needs_draws(kind):
    with pytest.raises(ValueError, match=f"^classes.power must be 1 with classes.kind '{kind}', got 0.5; .*'sampled'"):
        sampler(kind, power=0.5)


def test_counts_fit_into_their_code():
    assert sampler(entries=65535).entries == 65535
    with pytest.raises(ValueError, match=r"^classes.entries must be at most 65535, got 65536; .* 16 bits"):
        sampler(entries=65536)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"^classes.kind must be .*got 'ghost'.*Did you mean 'ghost_tail'"):
        sampler("ghost")


@pytest.mark.parametrize("kind", CLASSES)
def test_the_temperature_is_positive(kind):
    with pytest.raises(ValueError, match=r"^tau must be positive, got 0.0"):
        sampler(kind).draw(tiled(TEACHER, 1), EYE, *(jnp.zeros(1, jnp.int32) for _ in range(3)), 0.0)


def test_kernels_of_other_ops_leave_the_draws_to_the_default():
    """mesh.kernels names one implementation for all ops; the draws have no Pallas kernel."""
    one, zeros = sampler(entries=4), jnp.zeros(3, jnp.int32)
    where = tiled(TEACHER, 3), EYE, zeros, zeros, jnp.arange(3), 1.0
    named, default = one.draw(*where, implementation="pallas_tpu"), one.draw(*where)
    np.testing.assert_array_equal(named.ids, default.ids)
    np.testing.assert_array_equal(named.codes, default.codes)
    with pytest.raises(ValueError, match=r"implementation of linear_sample must be .*got 'palas_tpu'"):
        one.draw(*where, implementation="palas_tpu")
