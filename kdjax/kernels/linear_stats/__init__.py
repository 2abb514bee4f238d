"""linear_stats: what one pass over the vocabulary says about hidden @ head, without ever keeping [N, V].

Needed by every signal and by evaluation. Under stop-gradient: selection and metrics are not trained through.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kdjax.kernels import _dispatch
from kdjax.kernels.linear_stats import pallas_gpu, pallas_tpu, reference, xla
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

IMPLEMENTATIONS = {
    "reference": reference.linear_stats,
    "xla": xla.linear_stats,
    "pallas_tpu": pallas_tpu.linear_stats,
    "pallas_gpu": pallas_gpu.linear_stats,
}
PAIR_IMPLEMENTATIONS = {
    "reference": reference.linear_pair_stats,
    "xla": xla.linear_pair_stats,
    "pallas_tpu": pallas_tpu.linear_pair_stats,
    "pallas_gpu": pallas_gpu.linear_pair_stats,
}
DECLINES: dict[str, _dispatch.Declines] = {"pallas_tpu": pallas_tpu.declines, "pallas_gpu": pallas_gpu.declines}


def linear_stats(
    hidden: Float[Array, "N D"],
    head: Head,
    labels: Int[Array, "N"],
    *,
    top_k: int = 0,
    implementation: str | None = None,
) -> LinearStats:
    """Statistics of softmax(hidden @ head) per row, float32, nats, at temperature 1; no gradient.

    A label outside the vocabulary gives NaN where the label is read and leaves the rest of the row as it is. With
    top_k > 0 also the `top` entries of each row, as of the op `topk`; ValueError if the vocabulary has fewer.
    """
    _check_top_k(top_k, head)
    chosen = _dispatch.choose("linear_stats", IMPLEMENTATIONS, DECLINES, implementation, hidden, head)
    # At the entrance, not only of the results: else differentiation around the call would carry tangents through it.
    stats = chosen(*lax.stop_gradient((hidden, head)), labels, top_k=top_k)
    return _without_unknown_labels(stats, labels, head)


def linear_pair_stats(
    hidden: Float[Array, "N D"],
    head: Head,
    teacher_hidden: Float[Array, "N E"],
    teacher_head: Head,
    labels: Int[Array, "N"],
    *,
    top_k: int = 0,
    implementation: str | None = None,
) -> PairStats:
    """`linear_stats` of student and teacher and the two KL divergences between them, in one pass; no gradient.

    Both heads must have the same `vocab_size`, else ValueError; their weights may differ in padding columns.
    """
    check_pair(head, teacher_head)
    _check_top_k(top_k, head)
    sides = (hidden, head, teacher_hidden, teacher_head)
    chosen = _dispatch.choose("linear_pair_stats", PAIR_IMPLEMENTATIONS, DECLINES, implementation, *sides)
    pair = chosen(*lax.stop_gradient(sides), labels, top_k=top_k)
    return dataclasses.replace(
        pair,
        student=_without_unknown_labels(pair.student, labels, head),
        teacher=_without_unknown_labels(pair.teacher, labels, head),
    )


def _check_top_k(top_k: int, head: Head) -> None:
    if not 0 <= top_k <= head.vocab_size:
        raise ValueError(
            f"top_k must be between 0 and the {head.vocab_size} entries of the vocabulary, got {top_k}; padding is "
            "never returned. Set it to at most head.vocab_size."
        )


def _without_unknown_labels(stats: LinearStats, labels: Int[Array, "N"], head: Head) -> LinearStats:
    known = (labels >= 0) & (labels < head.vocab_size)
    label_logp, brier = (jnp.where(known, value, jnp.nan) for value in (stats.label_logp, stats.brier))
    return dataclasses.replace(stats, label_logp=label_logp, brier=brier)
