"""The oracle: whole errors [T, V] and the gradient [V, D] of each answer, one answer at a time.

In float64 where hidden states and head are, else in float32.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kdjax.kernels.head_gradient.api import HeadGradient, Rows
from kdjax.kernels.tiles import is_label, log_softmax, sum_over_axis, tile_logits, vocab_sum
from kdjax.types import Head


class Parts(NamedTuple):
    """Of one sequence. gradient: [V, D], this device's columns; slope: [T, V], d(-log q[label]) / d(hidden @ head)."""

    gradient: Array
    slope: Array
    label_logp: Array
    brier: Array
    rank: Array


def answer_gradient(answers: Rows, asked: Rows, head: Head, rank: bool) -> tuple[HeadGradient, dict[str, Array]]:
    """See the package: answers [P, M, T] to questions [P, U] -> (of answers [P, M], the fields of questions [P])."""
    axis = head.vocab_axis

    def of_question(rows: tuple[Rows, Rows]) -> tuple[HeadGradient, dict[str, Array]]:
        asked = _parts(rows[1], head)

        def of_answer(rows: Rows) -> HeadGradient:
            parts = _parts(rows, head)
            towards = _live(*rows) @ parts.gradient.T  # <g_t, G> = sum_v slope_tv (G h_t)_v
            share = rows[2] * vocab_sum(_where_live(parts.slope, rows[2]) * towards, axis)[:, 0]
            size = jnp.sum(jnp.square(rows[0].astype(share.dtype)), -1)
            return HeadGradient(
                norm=_inner(parts.gradient, parts.gradient, axis),
                share=share,
                token_norm=vocab_sum(jnp.square(parts.slope), axis)[:, 0] * size,
                label_logp=parts.label_logp,
                brier=parts.brier,
                rank=parts.rank if rank else None,
                cross=_inner(parts.gradient, asked.gradient, axis),
            )

        norm = _inner(asked.gradient, asked.gradient, axis)
        of_asked = {"question_label_logp": asked.label_logp, "question_brier": asked.brier}
        return lax.map(of_answer, rows[0]), {"question_norm": norm, **of_asked}

    return lax.map(of_question, (answers, asked))


def _parts(rows: Rows, head: Head) -> Parts:
    hidden, labels, weights = rows
    axis = head.vocab_axis
    logits = tile_logits(hidden, head)
    logp = log_softmax(logits, axis)
    p, label = jnp.exp(logp), is_label(head, labels)
    missed = vocab_sum(jnp.where(label, 0.0, p), axis)  # 1 - q[label]
    error = jnp.where(label, -missed, p)
    slope = error * head.logit_scale
    if head.soft_cap > 0.0:
        slope = jnp.where(slope == 0.0, 0.0, slope * (1.0 - jnp.square(logits / head.soft_cap)))
    weighted = weights[:, None].astype(slope.dtype) * _where_live(slope, weights)
    of_label = vocab_sum(jnp.where(label, logits, 0.0), axis)
    return Parts(
        gradient=weighted.T @ _live(hidden, labels, weights),
        slope=slope,
        label_logp=vocab_sum(jnp.where(label, logp, 0.0), axis)[:, 0],
        brier=vocab_sum(jnp.square(error), axis)[:, 0],
        rank=1 + vocab_sum((logits > of_label).astype(jnp.float32), axis)[:, 0].astype(jnp.int32),
    )


def _where_live(values: Float[Array, "T X"], weights: Float[Array, "T"]) -> Float[Array, "T X"]:
    """0 in the rows of weight 0, whatever they hold."""
    return jnp.where(weights[:, None] != 0, values, 0.0)


def _live(hidden: Array, labels: Array, weights: Array) -> Array:
    return _where_live(hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32)), weights)


def _inner(left: Float[Array, "V D"], right: Float[Array, "V D"], axis: str | None) -> Float[Array, ""]:
    return sum_over_axis(jnp.sum(left * right), axis)
