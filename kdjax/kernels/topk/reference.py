"""The oracle: a stable sort of whole [N, V] log-probabilities."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kdjax.kernels.tiles import log_softmax, tile_logits
from kdjax.kernels.topk.api import TopK
from kdjax.types import Head


def topk(hidden: Float[Array, "N D"], head: Head, k: int) -> TopK:
    """See the package. With `vocab_axis` the whole logits are gathered: this is no implementation for large V."""
    logits = tile_logits(hidden, head)
    if head.vocab_axis is not None:
        logits = lax.all_gather(logits, head.vocab_axis, axis=1, tiled=True)[:, : head.vocab_size]
    # By the logits, as everywhere: rounding of the log-probabilities could make two of them equal.
    ids = jnp.argsort(-logits, axis=-1, stable=True)[:, :k].astype(jnp.int32)
    return TopK(ids, jnp.take_along_axis(log_softmax(logits), ids, 1))
