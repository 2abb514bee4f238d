"""The oracle: cumulative sums of whole [N, V] probabilities, in the order of the ids."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kdjax.kernels.linear_sample.api import Sample
from kdjax.kernels.tiles import log_softmax, tile_logits
from kdjax.types import Head


def linear_sample(
    hidden: Float[Array, "N D"], head: Head, uniforms: Float[Array, "N K"], tau: Float[Array, ""], power: float
) -> Sample:
    """See the package. With `vocab_axis` the whole logits are gathered: this is no implementation for large V."""
    logits = tile_logits(hidden, head)
    if head.vocab_axis is not None:
        logits = lax.all_gather(logits, head.vocab_axis, axis=1, tiled=True)[:, : head.vocab_size]
    logp = log_softmax(logits / tau)
    log_power_sum = jax.nn.logsumexp(power * logp, axis=-1) if power != 1 else jnp.zeros_like(logp[:, 0])
    mass = jnp.exp(power * logp - log_power_sum[:, None])
    edges = jnp.cumsum(mass, -1)
    last = mass.shape[1] - 1 - jnp.argmax(mass[:, ::-1] > 0, -1).astype(jnp.int32)

    def draw(uniform: Float[Array, "N"]) -> Int[Array, "N"]:
        over = (edges > (uniform * edges[:, -1])[:, None]) & (mass > 0)
        return jnp.where(jnp.any(over, -1), jnp.argmax(over, -1).astype(jnp.int32), last)

    ids = lax.map(draw, uniforms.T).T  # one at a time: [N, K, V] is too much even here
    return Sample(
        ids=ids,
        logp=jnp.take_along_axis(logp, ids, 1),
        log_power_sum=log_power_sum,
        entropy=-jnp.sum(jnp.exp(logp) * logp, -1),
        max_logp=jnp.max(logp, -1),
    )
