"""From a config to the objective: reductions, schedules, temperature, mixtures, metrics; numbers from the oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.build import build_objective
from kdjax.config import Loss
from kdjax.types import DenseTargets, Head, Selection
from tests.kernels import oracle

B, S, D, V = 3, 4, 5, 9
SLOTS = np.array([[1.0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])  # the last row has no slot at all
ROW_WEIGHTS = np.array([0.5, 2.0, 3.0])


@dataclasses.dataclass(frozen=True)
class Slots:
    """What the objective is called with, and the oracle's losses [B, S] of it."""

    hidden: jax.Array
    head: Head
    targets: DenseTargets
    labels: jax.Array

    def logits(self):
        student = oracle.f64(self.hidden) @ oracle.f64(self.head.weight)
        teacher = oracle.f64(self.targets.hidden) @ oracle.f64(self.targets.head.weight)
        return teacher.reshape(-1, V), student.reshape(-1, V)

    def forward_kl(self, tau=1.0):
        teacher, student = self.logits()
        return oracle.kl(teacher / tau, student / tau).reshape(B, S)

    def reverse_kl(self):
        teacher, student = self.logits()
        return oracle.kl(student, teacher).reshape(B, S)

    def cross_entropy(self):
        _, student = self.logits()
        return -oracle.log_softmax(student)[np.arange(B * S), np.asarray(self.labels).reshape(-1)].reshape(B, S)


@functools.cache
def slots() -> Slots:
    numbers = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(numbers.normal(size=shape), jnp.float32)

    targets = DenseTargets(normal(B, S, 7), Head(normal(7, V), V))
    labels = jnp.asarray(numbers.integers(V, size=(B, S)), jnp.int32)
    return Slots(normal(B, S, D), Head(normal(D, V), V), targets, labels)


def run(config, *, slot_weight=SLOTS, row_weight=(1.0, 1.0, 1.0), step=0, data=None):
    """(LossOutput, d total / d (hidden, head)) of the objective that `config` describes."""
    data, objective = data or slots(), build_objective(config)
    index = jnp.broadcast_to(jnp.arange(S)[None, :], (B, S))
    selection = Selection(index, jnp.asarray(slot_weight, jnp.float32))

    def total(model, step):
        weight = jnp.asarray(row_weight, jnp.float32)
        output = objective(*model, data.targets, data.labels, selection, weight, step)
        return output.total, output

    gradient, output = jax.jit(jax.grad(total, has_aux=True))((data.hidden, data.head), jnp.int32(step))
    return output, gradient


def terms(**weights):
    return Loss(terms=tuple(weights.items()))


def test_token_reduction():
    """Every slot weighs the same, whatever row it is in."""
    output, _ = run(terms(forward_kl=1.0))
    np.testing.assert_allclose(output.total, (SLOTS * slots().forward_kl()).sum(), rtol=1e-5)
    assert output.count == 6
    assert {leaf.dtype for leaf in jax.tree.leaves(output)} == {jnp.dtype("float32")}


def test_sample_reduction():
    """Every row with a slot weighs the same, however many it has (sekd 2.3, [P])."""
    output, _ = run(dataclasses.replace(terms(forward_kl=1.0), reduction="sample"))
    kl = slots().forward_kl()
    np.testing.assert_allclose(output.total, kl[0, :2].mean() + kl[1].mean(), rtol=1e-5)
    assert output.count == 2
    assert {leaf.dtype for leaf in jax.tree.leaves(output)} == {jnp.dtype("float32")}


def test_slot_weights():
    """Slots may have weights: a weighted sum by token, a weighted mean of each row by sample."""
    weight = np.array([[0.5, 0, 2.0, 0], [0, 0, 0, 1e-3], [1, 1, 1, 1]])
    kl = slots().forward_kl()
    by_token, _ = run(terms(forward_kl=1.0), slot_weight=weight)
    np.testing.assert_allclose(by_token.total, (weight * kl).sum(), rtol=1e-5)
    np.testing.assert_allclose(by_token.count, weight.sum(), rtol=1e-6)
    by_sample, _ = run(dataclasses.replace(terms(forward_kl=1.0), reduction="sample"), slot_weight=weight)
    means = (weight * kl).sum(1) / weight.sum(1)
    np.testing.assert_allclose(by_sample.total, means.sum(), rtol=1e-5)
    assert by_sample.count == 3


@pytest.mark.parametrize("reduction", ["token", "sample"])
def test_row_weights(reduction):
    """They weigh the loss of the row and do not count: a mean-one weight leaves the scale of the loss alone."""
    config = dataclasses.replace(terms(forward_kl=1.0), reduction=reduction)
    plain, _ = run(config)
    output, (by_hidden, _) = run(config, row_weight=ROW_WEIGHTS)
    per_slot = SLOTS / SLOTS.sum(1, keepdims=True).clip(1) if reduction == "sample" else SLOTS
    want = (ROW_WEIGHTS[:, None] * per_slot * slots().forward_kl()).sum()
    np.testing.assert_allclose(output.total, want, rtol=1e-5)
    assert output.count == plain.count
    without, (first_row_gone, _) = run(config, row_weight=[0.0, 2.0, 3.0])
    assert not first_row_gone[0].any()
    np.testing.assert_allclose(first_row_gone[1], by_hidden[1], rtol=1e-6)
    assert without.total < output.total


def test_mixture_is_the_sum_of_its_parts():
    parts = [run(terms(**{name: weight})) for name, weight in (("forward_kl", 0.7), ("jsd", 2.0), ("tvd", 0.3))]
    output, gradient = run(terms(forward_kl=0.7, jsd=2.0, tvd=0.3))
    np.testing.assert_allclose(output.total, sum(part.total for part, _ in parts), rtol=1e-6)
    summed = jax.tree.map(lambda *leaves: sum(leaves), *(part for _, part in parts))
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(summed), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_scheduled_weights():
    """Each term has its own schedule of the update number, traced."""
    config = terms(forward_kl=("linear", 1.0, 0.0, 10), cross_entropy=("linear", 0.0, 4.0, 8), reverse_kl=0.5)
    kl, ce, reverse = (
        (SLOTS * values).sum() for values in (slots().forward_kl(), slots().cross_entropy(), slots().reverse_kl())
    )
    for step, weights in ((0, (1.0, 0.0)), (4, (0.6, 2.0)), (10, (0.0, 4.0)), (99, (0.0, 4.0))):
        output, _ = run(config, step=step)
        np.testing.assert_allclose(output.total, weights[0] * kl + weights[1] * ce + 0.5 * reverse, rtol=1e-5)


def test_temperature():
    """tau^2 times the divergence at tau; cross-entropy stays at 1 and counts once; tau follows its schedule."""
    config = dataclasses.replace(terms(forward_kl=1.0, cross_entropy=1.0), tau=("linear", 1.0, 3.0, 2))
    for step, tau in ((0, 1.0), (1, 2.0), (2, 3.0)):
        output, _ = run(config, step=step)
        want = (SLOTS * (tau**2 * slots().forward_kl(tau) + slots().cross_entropy())).sum()
        np.testing.assert_allclose(output.total, want, rtol=1e-5)


@pytest.mark.parametrize("tau", [1.0, 2.0, 0.5])
def test_gradient_at_a_temperature(tau):
    """d tau^2 KL / d logits = tau (q - p): divided once, not by tau again (sekd 9.2)."""
    _, (by_hidden, _) = run(dataclasses.replace(terms(forward_kl=1.0), tau=tau))
    p, q = (np.exp(oracle.log_softmax(logits / tau)) for logits in slots().logits())
    want = (SLOTS.reshape(-1, 1) * tau * (q - p)) @ oracle.f64(slots().head.weight).T
    np.testing.assert_allclose(by_hidden.reshape(-1, D), want, rtol=1e-4, atol=1e-5)


def test_metrics():
    """Plain means over the filled slots, in nats: no tau^2, no term weight, no row weight, no slot weight."""
    config = dataclasses.replace(terms(forward_kl=0.25, cross_entropy=3.0), tau=2.0)
    weight = SLOTS * np.array([[0.5], [2.0], [1.0]])
    output, _ = run(config, slot_weight=weight, row_weight=[0.0, 2.0, 3.0])
    assert set(output.metrics) == {"forward_kl", "cross_entropy"}
    for name, values in (("forward_kl", slots().forward_kl(2.0)), ("cross_entropy", slots().cross_entropy())):
        total, count = output.metrics[name]
        np.testing.assert_allclose(total, values[SLOTS > 0].sum(), rtol=1e-5)
        assert count == 6


@pytest.mark.parametrize("reduction", ["token", "sample"])
def test_no_slots(reduction):
    """A batch without any slot: 0 of 0, gradient exactly 0."""
    output, gradient = run(
        dataclasses.replace(terms(forward_kl=1.0), reduction=reduction), slot_weight=np.zeros((B, S))
    )
    assert (output.total, output.count) == (0.0, 0.0)
    assert output.metrics["forward_kl"] == (0.0, 0.0)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_what_an_empty_slot_holds_does_not_matter():
    data, empty = slots(), (SLOTS == 0)[:, :, None]
    targets = dataclasses.replace(data.targets, hidden=jnp.where(empty, jnp.inf, data.targets.hidden))
    spoiled = dataclasses.replace(data, hidden=jnp.where(empty, jnp.nan, data.hidden), targets=targets)
    config = terms(forward_kl=1.0, reverse_kl=0.5, cross_entropy=0.1)
    for got, want in zip(jax.tree.leaves(run(config, data=spoiled)), jax.tree.leaves(run(config)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_cross_entropy_alone_needs_no_teacher():
    data = dataclasses.replace(slots(), targets=None)
    objective = build_objective(terms(cross_entropy=1.0))
    assert not objective.needs_teacher
    assert build_objective(terms(cross_entropy=1.0, tvd=0.1)).needs_teacher
    assert not build_objective(terms(cross_entropy=1.0, tvd=0.0)).needs_teacher
    output, _ = run(terms(cross_entropy=1.0), data=data)
    np.testing.assert_allclose(output.total, (SLOTS * slots().cross_entropy()).sum(), rtol=1e-5)


def lowered(config):
    data, objective = slots(), build_objective(config)
    selection = Selection(jnp.zeros((B, S), jnp.int32), jnp.asarray(SLOTS, jnp.float32))

    def total(hidden, head):
        return objective(hidden, head, data.targets, data.labels, selection, jnp.ones(B), 0).total

    return jax.jit(jax.value_and_grad(total, (0, 1))).lower(data.hidden, data.head).as_text()


def test_a_term_of_weight_0_leaves_no_trace():
    """sekd: alpha = 0 costs nothing. Not so a schedule that happens to start at 0."""
    alone = lowered(terms(forward_kl=1.0))
    assert lowered(terms(cross_entropy=0.0, forward_kl=1.0, jsd=0.0)) == alone
    assert lowered(terms(forward_kl=1.0, cross_entropy=("linear", 0.0, 1.0, 5))) != alone


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ((("foward_kl", 1.0),), "^loss.terms must be a known name .*'foward_kl'.* Did you mean 'forward_kl'"),
        ((("jsd", 1.0), ("jsd", 2.0)), "^loss.terms must name each loss once, got 'jsd' twice. Add up"),
        ((("jsd", 0.0),), "^loss.terms must have a weight that is not 0, .*nothing would be learned"),
        ((("jsd", ("linaer", 0.0, 1.0, 3)),), "^loss.terms must be a known name .* Did you mean 'linear'"),
        (("jsd",), r"^loss.terms must hold \(name, weight\) pairs, got 'jsd'"),
    ],
)
def test_errors(entries, message):
    with pytest.raises(ValueError, match=message):
        build_objective(Loss(terms=entries))
