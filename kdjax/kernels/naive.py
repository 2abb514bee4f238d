"""What the kernels are timed against: the obvious code, whole logits of both sides and JAX's own differentiation.

Not an oracle (that is each op's reference.py) and never run by anything but the bench: it keeps several [N, V] arrays.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from kdjax import registry
from kdjax.kernels.head_gradient import HeadGradient
from kdjax.kernels.linear_sample import Sample
from kdjax.kernels.linear_stats import LinearStats, PairStats
from kdjax.kernels.shapes import Arguments, in_answers
from kdjax.kernels.topk import TopK
from kdjax.types import Array, Head


def build(op: str) -> Callable[[Arguments], Any]:
    """The naive counterpart of `shapes.CASES[op].build(...)`: the same inputs, the same results."""
    name, _, gradient = op.partition("+")
    naive = registry.lookup(NAIVE, name, "kernel op")
    if not gradient:
        return naive

    def function(arguments: Arguments) -> Any:
        def total(hidden: Array, weight: Array) -> Any:
            head = dataclasses.replace(arguments.head, weight=weight)
            return naive(dataclasses.replace(arguments, hidden=hidden, head=head))

        return jax.value_and_grad(total, (0, 1), has_aux=True)(arguments.hidden, arguments.head.weight)

    return function


def product(a: Arguments) -> Array:
    """hidden @ head and nothing else, float32 [N, V]: the rate that the machine can reach at this shape."""
    weight = a.head.weight.T if a.head.vocab_major else a.head.weight
    return jnp.matmul(a.hidden, weight, preferred_element_type=jnp.float32)


def logits(hidden: Array, head: Head) -> Array:
    """float32 [N, V], without the padding columns."""
    whole = head.logit_scale * product(Arguments(hidden, head))[:, : head.vocab_size]
    return head.soft_cap * jnp.tanh(whole / head.soft_cap) if head.soft_cap else whole


def _stats(hidden: Array, head: Head, labels: Array) -> LinearStats:
    whole = logits(hidden, head)
    logp = jax.nn.log_softmax(whole)
    p = jnp.exp(logp)
    label_logp = jnp.take_along_axis(logp, labels[:, None], 1)[:, 0]
    square = jnp.sum(p * p, -1)
    return LinearStats(
        logz=jax.nn.logsumexp(whole, -1),
        entropy=-jnp.sum(p * logp, -1),
        label_logp=label_logp,
        sum_p_sq=square,
        max_logp=jnp.max(logp, -1),
        argmax=jnp.argmax(logp, -1).astype(jnp.int32),
        brier=square - 2 * jnp.exp(label_logp) + 1,
    )


def _linear_stats(a: Arguments) -> LinearStats:
    return _stats(a.hidden, a.head, a.labels)


def _kl(to_logp: Array, from_logp: Array) -> Array:
    return optax.losses.kl_divergence_with_log_targets(to_logp, from_logp)


def _linear_pair_stats(a: Arguments) -> PairStats:
    logq, logp = (
        jax.nn.log_softmax(logits(*side)) for side in ((a.hidden, a.head), (a.teacher_hidden, a.teacher_head))
    )
    return PairStats(
        student=_stats(a.hidden, a.head, a.labels),
        teacher=_stats(a.teacher_hidden, a.teacher_head, a.labels),
        kl=_kl(logq, logp),
        reverse_kl=_kl(logp, logq),
    )


def _linear_divergence(a: Arguments) -> tuple[Array, Array]:
    logq = jax.nn.log_softmax(logits(a.hidden, a.head))
    logp = jax.nn.log_softmax(lax.stop_gradient(logits(a.teacher_hidden, a.teacher_head)))
    values = _kl(logq, logp)
    return jnp.sum(a.weight * values), lax.stop_gradient(values)[None, :]


def _sparse_divergence(a: Arguments) -> tuple[Array, Array]:
    logq = jnp.take_along_axis(jax.nn.log_softmax(logits(a.hidden, a.head)), a.ids, 1)
    values = jnp.sum(a.probs * (jnp.log(a.probs) - logq), -1)
    return jnp.sum(a.weight * values), lax.stop_gradient(values)


def _topk(a: Arguments) -> TopK:
    logp, ids = lax.top_k(jax.nn.log_softmax(logits(a.hidden, a.head)), a.entries)
    return TopK(ids=ids, logp=logp)


def _linear_sample(a: Arguments) -> Sample:
    logp = jax.nn.log_softmax(logits(a.hidden, a.head))
    edges = jnp.cumsum(jnp.exp(logp), -1)
    ids = jax.vmap(lambda edge, at: jnp.searchsorted(edge, at, side="right"))(edges, a.uniforms * edges[:, -1:])
    return Sample(
        ids=ids.astype(jnp.int32),
        logp=jnp.take_along_axis(logp, ids, 1),
        log_power_sum=jnp.zeros(len(ids)),
        entropy=-jnp.sum(jnp.exp(logp) * logp, -1),
        max_logp=jnp.max(logp, -1),
    )


def _head_gradient(a: Arguments) -> HeadGradient:
    def losses(weight: Array, hidden: Array, labels: Array) -> Array:
        logp = jax.nn.log_softmax(logits(hidden, dataclasses.replace(a.head, weight=weight)))
        return -jnp.take_along_axis(logp, labels[:, None], 1)[:, 0]

    def gradient(hidden: Array, labels: Array, weights: Array) -> Array:
        return jax.grad(lambda weight: jnp.vdot(weights, losses(weight, hidden, labels)))(a.head.weight)

    def answer(rows: tuple[Array, Array, Array]) -> HeadGradient:
        hidden, labels, weights = rows
        own = gradient(hidden, labels, weights)
        towards = jax.jvp(lambda weight: losses(weight, hidden, labels), (a.head.weight,), (own,))[1]
        whole, stats = logits(hidden, a.head), _stats(hidden, a.head, labels)
        above = whole > jnp.take_along_axis(whole, labels[:, None], 1)
        error = jax.nn.softmax(whole) - jax.nn.one_hot(labels, whole.shape[1])
        slope = a.head.logit_scale * (1 - (whole / a.head.soft_cap) ** 2 if a.head.soft_cap else 1)
        return HeadGradient(
            norm=jnp.sum(own**2),
            share=weights * towards,
            token_norm=jnp.sum((error * slope) ** 2, -1) * jnp.sum(jnp.square(hidden.astype(jnp.float32)), -1),
            label_logp=stats.label_logp,
            brier=stats.brier,
            rank=1 + jnp.sum(above, -1, dtype=jnp.int32),
            cross=jnp.vdot(own, asked),
        )

    answers, question = in_answers(a)
    asked = gradient(*(array[0] for array in question))
    stats = _stats(question[0][0], a.head, question[1][0])
    return dataclasses.replace(
        lax.map(answer, answers),
        question_norm=jnp.sum(asked**2)[None],
        question_label_logp=stats.label_logp[None],
        question_brier=stats.brier[None],
    )


NAIVE: dict[str, Callable[[Arguments], Any]] = {
    "linear_stats": _linear_stats,
    "linear_pair_stats": _linear_pair_stats,
    "linear_divergence": _linear_divergence,
    "sparse_divergence": _sparse_divergence,
    "topk": _topk,
    "linear_sample": _linear_sample,
    "head_gradient": _head_gradient,
}
