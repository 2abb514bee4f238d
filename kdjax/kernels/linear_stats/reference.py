"""The oracle: the definitions, on whole [N, V] arrays, as they stand in a textbook."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kdjax.kernels.linear_stats.api import LinearStats, PairStats
from kdjax.kernels.tiles import column_ids, is_label, log_softmax, tile_logits, vocab_max, vocab_sum
from kdjax.kernels.topk import reference as topk
from kdjax.types import Head


def linear_stats(hidden: Float[Array, "N D"], head: Head, labels: Int[Array, "N"], *, top_k: int = 0) -> LinearStats:
    """See the package."""
    axis = head.vocab_axis
    logits = tile_logits(hidden, head)
    logp = log_softmax(logits, axis)
    p = jnp.exp(logp)
    labelled = is_label(head, labels)
    highest = vocab_max(logits, axis)
    # The lowest id that has the maximum: minus the largest of minus the ids, since a maximum is what devices share.
    found = vocab_max(jnp.where(logits == highest, -column_ids(head)[None, :].astype(jnp.float32), -jnp.inf), axis)
    missed = vocab_sum(jnp.where(labelled, 0.0, p), axis)  # 1 - q[label]
    max_logp = vocab_max(logp, axis)
    stats = {
        "logz": highest - max_logp,
        "entropy": -vocab_sum(p * logp, axis),
        "label_logp": vocab_sum(jnp.where(labelled, logp, 0.0), axis),
        "sum_p_sq": vocab_sum(p * p, axis),
        "max_logp": max_logp,
        "argmax": -found.astype(jnp.int32),
        "brier": vocab_sum(jnp.where(labelled, 0.0, p * p), axis) + missed * missed,
    }
    top = topk.topk(hidden, head, top_k) if top_k else None
    return lax.stop_gradient(LinearStats(**{name: value[:, 0] for name, value in stats.items()}, top=top))


def linear_pair_stats(
    hidden: Float[Array, "N D"],
    head: Head,
    teacher_hidden: Float[Array, "N E"],
    teacher_head: Head,
    labels: Int[Array, "N"],
    *,
    top_k: int = 0,
) -> PairStats:
    """See the package."""
    axis = head.vocab_axis
    logq = log_softmax(tile_logits(hidden, head), axis)
    logp = log_softmax(tile_logits(teacher_hidden, teacher_head), axis)
    return PairStats(
        student=linear_stats(hidden, head, labels, top_k=top_k),
        teacher=linear_stats(teacher_hidden, teacher_head, labels, top_k=top_k),
        kl=vocab_sum(jnp.exp(logp) * (logp - logq), axis)[:, 0],
        reverse_kl=vocab_sum(jnp.exp(logq) * (logq - logp), axis)[:, 0],
    )
