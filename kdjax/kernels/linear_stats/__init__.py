"""linear_stats: what one pass over the vocabulary says about hidden @ head, without ever keeping [N, V].

Needed by every signal and by evaluation. Under stop-gradient: selection and metrics are not trained through.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kdjax.kernels import _dispatch
from kdjax.kernels.linear_stats import reference, xla
from kdjax.kernels.linear_stats.api import LinearStats, PairStats, head_gradient_norm
from kdjax.kernels.tiles import check_pair
from kdjax.types import Head

__all__ = [
    "IMPLEMENTATIONS",
    "PAIR_IMPLEMENTATIONS",
    "LinearStats",
    "PairStats",
    "head_gradient_norm",
    "linear_pair_stats",
    "linear_stats",
]

IMPLEMENTATIONS = {"reference": reference.linear_stats, "xla": xla.linear_stats}
PAIR_IMPLEMENTATIONS = {"reference": reference.linear_pair_stats, "xla": xla.linear_pair_stats}
DECLINES: dict[str, _dispatch.Declines] = {}


def linear_stats(
    hidden: Float[Array, "N D"], head: Head, labels: Int[Array, "N"], *, implementation: str | None = None
) -> LinearStats:
    """Statistics of softmax(hidden @ head) per row, float32, nats, at temperature 1; no gradient.

    A label outside the vocabulary gives NaN where the label is read and leaves the rest of the row as it is.
    """
    chosen = _dispatch.choose("linear_stats", IMPLEMENTATIONS, DECLINES, implementation, hidden, head)
    # At the entrance, not only of the results: else differentiation around the call would carry tangents through it.
    return _without_unknown_labels(chosen(*lax.stop_gradient((hidden, head)), labels), labels, head)


def linear_pair_stats(
    hidden: Float[Array, "N D"],
    head: Head,
    teacher_hidden: Float[Array, "N E"],
    teacher_head: Head,
    labels: Int[Array, "N"],
    *,
    implementation: str | None = None,
) -> PairStats:
    """`linear_stats` of student and teacher and the two KL divergences between them, in one pass; no gradient.

    Both heads must have the same `vocab_size`, else ValueError; their weights may differ in padding columns.
    """
    check_pair(head, teacher_head)
    sides = (hidden, head, teacher_hidden, teacher_head)
    chosen = _dispatch.choose("linear_pair_stats", PAIR_IMPLEMENTATIONS, DECLINES, implementation, *sides)
    pair = chosen(*lax.stop_gradient(sides), labels)
    return dataclasses.replace(
        pair,
        student=_without_unknown_labels(pair.student, labels, head),
        teacher=_without_unknown_labels(pair.teacher, labels, head),
    )


def _without_unknown_labels(stats: LinearStats, labels: Int[Array, "N"], head: Head) -> LinearStats:
    known = (labels >= 0) & (labels < head.vocab_size)
    label_logp, brier = (jnp.where(known, value, jnp.nan) for value in (stats.label_logp, stats.brier))
    return dataclasses.replace(stats, label_logp=label_logp, brier=brier)
