"""The class axis in the step: live entries, the same from a cache, and what both are in the limit."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.step import make_supervise
from kdjax.teacher import drawn_entries, live_targets
from kdjax.types import CachedTeacher, targets_of

CACHED = {"teacher__source": "cache"}
SAMPLED = {"classes__kind": "sampled", "classes__entries": 7, "classes__seed": 5}


def cached(bench, batch, tau=1.0, stored=None):
    """The batch with what a cache of this teacher holds for it."""
    labels, eligible = targets_of(batch)
    index = jnp.broadcast_to(jnp.arange(labels.shape[1])[None], labels.shape)
    live = live_targets(
        bench.parts.teacher.hidden(bench.teacher_params, batch), bench.parts.teacher.head(bench.teacher_params), index
    )
    first = dataclasses.replace(batch, epoch=jnp.zeros_like(batch.epoch))
    ids, codes, entropy = drawn_entries(bench.parts.classes, live, index, first, jnp.float32(tau), None)
    label_logp = jax.nn.log_softmax(live.hidden @ live.head.weight[:, : live.head.vocab_size], -1)
    label_logp = jnp.take_along_axis(label_logp, labels[:, :, None], -1)[:, :, 0]
    stored = eligible if stored is None else eligible & stored
    keep = stored[:, :, None]
    teacher = CachedTeacher(jnp.where(keep, ids, 0), jnp.where(keep, codes, 0), stored, entropy, label_logp)
    return dataclasses.replace(batch, teacher=teacher)


def gradient(bench, batch, params=None):
    """(loss output, gradient) of the sum over the batch."""
    supervise = make_supervise(bench.parts)
    key, step = jax.random.key(3), jnp.zeros((), jnp.int32)
    state = bench.parts.chooser.policy.init()

    def total(params):
        output, *_ = supervise(params, bench.teacher_params, batch, state, key, step)
        return output.total, output

    (_, output), found = jax.jit(jax.value_and_grad(total, has_aux=True))(bench.params if params is None else params)
    return output, found


def assert_equal_trees(left, right, tolerance=0.0):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(jnp.abs(b).max() + 1e-30))


@pytest.mark.parametrize("kind", ["sampled", "renormalised", "zero_tail", "ghost_tail"])
@pytest.mark.parametrize("selection", [{"selection__policy": "all"}, {"selection__fraction": 0.3}])
def test_the_cache_gives_what_the_live_teacher_gives(bench, batch, kind, selection):
    config = {
        **SAMPLED,
        **selection,
        "classes__kind": kind,
        "loss__terms": (("forward_kl", 0.7), ("cross_entropy", 0.3)),
    }
    live = bench(**config)
    without = bench(**config, **CACHED)
    assert without.parts.teacher is None
    expected = gradient(live, batch)
    tau = selection.get("loss__tau", 1.0)
    found = gradient(dataclasses.replace(without, teacher_params=()), cached(live, batch, tau))
    assert_equal_trees(found[1], expected[1], 1e-6)
    np.testing.assert_allclose(found[0].total, expected[0].total, rtol=1e-6)
    assert found[0].metrics["cache_misses"][0] == 0


def test_all_entries_of_the_vocabulary_are_the_dense_kl(bench, batch):
    """Item 18 of the reference: nothing left out is dense distillation, in value and gradient."""
    dense_output, dense = gradient(bench(selection__fraction=0.3), batch)
    for kind in ("zero_tail", "ghost_tail"):
        output, found = gradient(bench(classes__kind=kind, classes__entries=97, selection__fraction=0.3), batch)
        np.testing.assert_allclose(output.total, dense_output.total, rtol=2e-3)  # codes round by 2.5e-4
        assert_equal_trees(found, dense, 2e-3)


def test_many_draws_approach_the_dense_gradient(bench, batch):
    """The distance to the dense gradient falls as 1 / sqrt(N); at 60000 draws it is a few thousandths."""
    dense = gradient(bench(), batch)[1]

    def distance(entries):
        found = gradient(bench(classes__kind="sampled", classes__entries=entries), batch)[1]
        gaps = [jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (found, dense)), strict=True)]
        return float(jnp.sqrt(sum(gaps) / sum(jnp.sum(b**2) for b in jax.tree.leaves(dense))))

    few, many = distance(30), distance(30 * 64)
    assert few > 0.05
    assert 1 / 16 < many / few < 1 / 4


def test_positions_under_a_cache_follow_the_student(bench, batch):
    """Item 19: perturb the student and other positions are read; the cache stays as it is."""
    live = bench(**SAMPLED, selection__fraction=0.2)
    without = dataclasses.replace(bench(**SAMPLED, **CACHED, selection__fraction=0.2), teacher_params=())
    batch = cached(live, batch)
    other = jax.tree.map(lambda a: a + 0.5 * jax.random.normal(jax.random.key(9), a.shape), without.params)

    supervise, key = make_supervise(without.parts), jax.random.key(3)

    @jax.jit
    def misses(params, stored):
        held = dataclasses.replace(batch, teacher=dataclasses.replace(batch.teacher, stored=stored))
        return supervise(params, (), held, (), key, jnp.zeros((), jnp.int32))[0].metrics["cache_misses"][0]

    def read(params):
        """How many rows read each position: those that miss it, if it alone is not stored."""
        places = range(batch.tokens.shape[1])
        return np.array([float(misses(params, batch.teacher.stored.at[:, at].set(False))) for at in places])

    mine, others = read(without.params), read(other)
    assert mine.sum() == others.sum() > 0
    assert (mine != others).any()


def test_what_a_superset_cache_lacks_is_counted_and_left_out(bench, batch):
    live = bench(**SAMPLED, selection__policy="all")
    without = dataclasses.replace(bench(**SAMPLED, **CACHED, selection__policy="all"), teacher_params=())
    even = jnp.broadcast_to((jnp.arange(batch.tokens.shape[1]) % 2 == 0)[None], batch.tokens.shape)
    output, found = gradient(without, cached(live, batch, stored=even))
    eligible = targets_of(batch)[1]
    assert output.metrics["cache_misses"] == (jnp.sum(eligible & ~even), jnp.sum(eligible))
    assert output.count == jnp.sum(eligible & even)
    noise = jax.random.randint(jax.random.key(0), (*batch.tokens.shape, 7), 0, 97)
    held = cached(live, batch, stored=even)
    ids = jnp.where(even[:, :, None], held.teacher.ids, noise)
    same = dataclasses.replace(held, teacher=dataclasses.replace(held.teacher, ids=ids, codes=held.teacher.codes + 1))
    codes = jnp.where(even[:, :, None], held.teacher.codes, 3)
    same = dataclasses.replace(held, teacher=dataclasses.replace(same.teacher, codes=codes.astype(jnp.uint16)))
    assert_equal_trees(gradient(without, same)[1], found)


@pytest.mark.parametrize(("signal", "held"), [("teacher_entropy", {}), ("unc", {"cache__label_logp": True})])
def test_signals_of_the_teacher_come_from_the_cache(bench, batch, signal, held):
    config = {**SAMPLED, **held, "selection__signal": signal, "selection__fraction": 0.3}
    live = bench(**config)
    without = dataclasses.replace(bench(**config, **CACHED), teacher_params=())
    expected, found = gradient(live, batch), gradient(without, cached(live, batch))
    assert_equal_trees(found[1], expected[1], 1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"selection__signal": "kl"}, "selection.signal must not need 'kl' of the teacher with this cache, got 'kl'"),
        ({"selection__signal": "unc"}, "Set cache.label_logp=True or teacher.source='live'"),
        ({"selection__signal": "teacher_entropy", "loss__tau": 2.0}, "Set cache.entropy=True and loss.tau=1.0"),
        ({"classes__kind": "all"}, "classes.kind must be 'sampled' or a top-k kind with teacher.source='cache'"),
        ({"loss__tau": ("linear", 2.0, 1.0, 9)}, "loss.tau must be a number with teacher.source='cache'"),
        ({"loss__terms": (("reverse_kl", 1.0),)}, "loss.terms must be 'forward_kl' (and 'cross_entropy') with classes"),
        ({"classes__kind": "sample"}, "classes.kind must be"),
    ],
)
def test_what_a_cache_cannot_serve_is_refused(bench, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        bench(**{**SAMPLED, **CACHED, **overrides})


@pytest.mark.parametrize("loss", ["reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "todi", "akl", "dkd"])
def test_losses_that_a_few_entries_bias_are_refused_live_too(bench, loss):
    with pytest.raises(ValueError, match=f"got '{loss}'; it needs the teacher wherever the student has mass"):
        bench(**SAMPLED, loss__terms=((loss, 1.0),))


def test_draws_of_another_epoch_are_others(bench, batch):
    live = bench(**SAMPLED)
    later = dataclasses.replace(batch, epoch=batch.epoch + 1)
    first, second = gradient(live, batch)[1], gradient(live, later)[1]
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True))


@pytest.mark.parametrize("source", [{}, CACHED])
def test_micro_batches_add_up_to_the_batch(bench, batch, source):
    config = {**SAMPLED, "selection__fraction": 0.3}
    columns = cached(bench(**config), batch) if source else batch
    results = [
        dataclasses.replace(made, teacher_params=() if source else made.teacher_params).run(columns)
        for made in (bench(**config, **source), bench(**config, **source, train__accumulate=4))
    ]
    (_, [first]), (_, [second]) = results
    for name, pair in first.metrics.items():
        np.testing.assert_allclose(second.metrics[name], pair, rtol=1e-5, atol=1e-7, err_msg=name)


def test_a_disabled_teacher_term_reads_no_entries(bench, batch):
    made = bench(**SAMPLED, loss__terms=(("cross_entropy", 1.0), ("forward_kl", 0.0)))
    assert not made.parts.objective.needs_teacher
    output, _ = gradient(made, batch)
    assert set(output.metrics) & {"forward_kl"} == set()
