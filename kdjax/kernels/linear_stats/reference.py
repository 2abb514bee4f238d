"""The oracle: the definitions, on whole [N, V] arrays, as they stand in a textbook."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.kernels.linear_stats.api import LinearStats, PairStats
from kdjax.kernels.tiles import log_softmax, tile_logits
from kdjax.types import Head


def linear_stats(hidden: Float[Array, "N D"], head: Head, labels: Int[Array, "N"]) -> LinearStats:
    """See the package."""
    logits = tile_logits(hidden, head)
    logp = log_softmax(logits)
    p = jnp.exp(logp)
    rows = jnp.arange(logits.shape[0])
    argmax = jnp.argmax(logits, -1).astype(jnp.int32)
    return LinearStats(
        logz=logits[rows, argmax] - logp[rows, argmax],
        entropy=-jnp.sum(p * logp, -1),
        label_logp=logp[rows, labels],
        sum_p_sq=jnp.sum(p * p, -1),
        max_logp=logp[rows, argmax],
        argmax=argmax,
    )


def linear_pair_stats(
    hidden: Float[Array, "N D"],
    head: Head,
    teacher_hidden: Float[Array, "N E"],
    teacher_head: Head,
    labels: Int[Array, "N"],
) -> PairStats:
    """See the package."""
    logq = log_softmax(tile_logits(hidden, head))
    logp = log_softmax(tile_logits(teacher_hidden, teacher_head))
    return PairStats(
        student=linear_stats(hidden, head, labels),
        teacher=linear_stats(teacher_hidden, teacher_head, labels),
        kl=jnp.sum(jnp.exp(logp) * (logp - logq), -1),
        reverse_kl=jnp.sum(jnp.exp(logq) * (logq - logp), -1),
    )
