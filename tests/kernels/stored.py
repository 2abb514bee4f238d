"""Stored teacher entries: as problems for sparse_divergence, and what the float64 oracle says of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.kernels.sparse_divergence import KINDS, sparse_divergence
from kdjax.types import Head
from tests.kernels import oracle
from tests.kernels.problems import Shape, make_problem


def xlogx(p):
    return p * np.log(np.where(p > 0, p, 1))


def conditional(logq, w):
    return (xlogx(w) - w * logq).sum(-1)


def ghost(logq, w, tail, entropy):
    """KL of K + 1 classes."""
    outside = w == 0
    tail = np.where(outside.any(-1), tail, 0)
    tail_logq = np.logaddexp.reduce(np.where(outside, logq, -1e300), axis=-1)
    return conditional(logq, w) + xlogx(tail) - tail * tail_logq


# (log q [N, V], numbers as dense [N, V], tail [N], teacher entropy [N]) -> [N]
NUMPY = {
    "sampled": lambda logq, w, tail, entropy: -(w * logq).sum(-1) - entropy,
    "renormalised": lambda logq, w, tail, entropy: conditional(logq, w / w.sum(-1)[:, None]),
    "zero_tail": lambda logq, w, tail, entropy: conditional(logq, w),
    "ghost_tail": ghost,
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """Entries of a problem's rows: what the kernel takes, in its order."""

    ids: jnp.ndarray
    probs: jnp.ndarray
    tail: jnp.ndarray | None
    teacher_entropy: jnp.ndarray | None

    def dense(self, vocab):
        rows = np.arange(len(self.ids))[:, None]
        whole = np.zeros((len(self.ids), vocab))
        np.add.at(whole, (rows, np.where(self.probs == 0, 0, self.ids)), oracle.f64(self.probs))
        return whole


def top(teacher_logits, k, seed=0, tail=False):
    """The teacher's top k, in any order; the best is split into two entries of its id, and one entry is empty."""
    logp, draw = oracle.log_softmax(teacher_logits), np.random.default_rng(seed)
    order = np.argsort(-logp, -1, kind="stable")[:, :k]
    probs = np.take_along_axis(np.exp(logp), order, -1)
    ids = np.concatenate([order, order[:, :1], order[:, :1] * 0], -1)
    probs = np.concatenate([probs, probs[:, :1] * 0.25, probs[:, :1] * 0], -1)
    probs[:, 0] *= 0.75
    shuffled = draw.permuted(np.tile(np.arange(k + 2), (len(ids), 1)), axis=1)
    ids, probs = (np.take_along_axis(array, shuffled, -1) for array in (ids, probs))
    rest = np.exp(np.sort(logp, -1)[:, :-k]).sum(-1)
    entropy = -(np.exp(logp) * logp).sum(-1)
    return Stored(
        jnp.asarray(ids, jnp.int32),
        jnp.asarray(probs, jnp.float32),
        jnp.asarray(rest, jnp.float32) if tail else None,
        jnp.asarray(entropy, jnp.float32),
    )


def stored_of(p, k=4, tau=1.0, **options):
    logits = p.teacher_oracle.logits(p.teacher_hidden.astype(jnp.float32)) / tau
    return top(logits, min(k, p.head.vocab_size), **options)


def kinds_of(implementation):
    """Kernels do not know kinds: where programs are slow to make (interpreted kernels), the fullest stands for all."""
    return ("ghost_tail",) if implementation.startswith("pallas") else tuple(KINDS)


@functools.cache  # one program per shape for all these kinds and all tests
def programs(implementation, kinds):
    """({kind: (total, values)}, {kind: (total, values, the gradients by hidden and head)}), jitted."""

    def run(kind, hidden, head, weight, stored, tau):
        ids, probs, tail, entropy = stored
        options = {"tail": tail, "teacher_entropy": entropy, "implementation": implementation}
        return sparse_divergence(hidden, head, ids, probs, weight, kind, tau, **options)

    def differentiated(kind, *rows):
        (total, values), gradients = jax.value_and_grad(run, (1, 2), has_aux=True)(kind, *rows)
        return total, values, gradients[0], gradients[1].weight

    return tuple(
        jax.jit(lambda *rows, one=one: {kind: one(kind, *rows) for kind in kinds}) for one in (run, differentiated)
    )


def inputs(p, stored, tau=1.0):
    return p.hidden, p.head, p.weight, (stored.ids, stored.probs, stored.tail, stored.teacher_entropy), tau


def run(implementation, p, stored, tau=1.0, kinds=None):
    return programs(implementation, kinds or kinds_of(implementation))[0](*inputs(p, stored, tau))


def with_gradients(implementation, p, stored, tau=1.0, kinds=None):
    return programs(implementation, kinds or kinds_of(implementation))[1](*inputs(p, stored, tau))


def expected(p, stored, tau=1.0):
    """The same from the oracle."""
    dense = stored.dense(p.head.vocab_size)
    tail = np.maximum(1 - dense.sum(-1), 0) if stored.tail is None else oracle.f64(stored.tail)
    hidden, weight = p.hidden.astype(jnp.float32), oracle.f64(p.weight)
    want = {}
    for kind in KINDS:

        def value(logits, kind=kind):
            return NUMPY[kind](oracle.log_softmax(logits / tau), dense, tail, oracle.f64(stored.teacher_entropy))

        values = value(p.oracle.logits(hidden))
        gradients = p.oracle.gradients(hidden, lambda logits, value=value: tau**2 * value(logits), weight)
        want[kind] = ((weight * tau**2 * values).sum(), values, *gradients)
    return want


def compare(got, want, gradients=1e-4, values=1e-5):
    """Values within `values` relative, gradients within `gradients` of their largest entry."""
    assert got
    for kind in got:
        for ours, oracles in zip(got[kind][:2], want[kind][:2], strict=True):
            np.testing.assert_allclose(ours, oracles, rtol=values, atol=2e-6, err_msg=kind)
        for ours, oracles in zip(got[kind][2:], want[kind][2:], strict=True):
            scale = gradients * np.abs(oracles).max(initial=1e-6)
            np.testing.assert_allclose(oracle.f64(ours), oracles, rtol=gradients, atol=scale, err_msg=kind)


EYE = Head(jnp.eye(5), 5)  # rows are their own logits


def logits_problem(student, soft_cap=0.0):
    """A problem whose hidden states are the logits before the soft cap."""
    p = make_problem(Shape(len(student), 5, width=5))
    return dataclasses.replace(
        p,
        hidden=jnp.asarray(student, jnp.float32),
        head=dataclasses.replace(EYE, soft_cap=soft_cap),
        oracle=oracle.HeadOracle(np.eye(5), 5, False, soft_cap=soft_cap),
        weight=jnp.ones(len(student)),
    )
