"""The oracle: the stored entries as dense [N, V] targets, whole log-probabilities, JAX's own differentiation."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kdjax.kernels.sparse_divergence.api import Entries, SparseTerm
from kdjax.kernels.tiles import MASKED, log_softmax, tile_logits
from kdjax.types import Head


def sparse_divergence(
    hidden: Float[Array, "N D"],
    head: Head,
    ids: Int[Array, "N K"],
    probs: Float[Array, "N K"],
    weight: Float[Array, "N"],
    tail: Float[Array, "N"],
    teacher_entropy: Float[Array, "N"] | None,
    term: SparseTerm,
    tau: Float[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, "N"]]:
    """See the package."""
    values = _values(hidden, head, ids, probs, tail, teacher_entropy, term, tau)
    # Rows of weight 0 are taken out before the maths: afterwards a NaN of theirs would come back as 0 * NaN.
    live = weight != 0
    hidden, probs = (jnp.where(live[:, None], array, 0) for array in (hidden, probs))
    tail = jnp.where(live, tail, 0)
    teacher_entropy = None if teacher_entropy is None else jnp.where(live, teacher_entropy, 0)
    kept = _values(hidden, head, ids, probs, tail, teacher_entropy, term, tau)
    return jnp.sum(tau * tau * weight * kept), lax.stop_gradient(values)


def _values(
    hidden: Float[Array, "N D"],
    head: Head,
    ids: Int[Array, "N K"],
    probs: Float[Array, "N K"],
    tail: Float[Array, "N"],
    teacher_entropy: Float[Array, "N"] | None,
    term: SparseTerm,
    tau: Float[Array, ""],
) -> Float[Array, "N"]:
    logq = log_softmax(tile_logits(hidden, head) / tau, head.vocab_axis)
    if head.vocab_axis is not None:
        logq = lax.all_gather(logq, head.vocab_axis, axis=1, tiled=True)
    logq = logq[:, : head.vocab_size]
    rows = jnp.arange(ids.shape[0])[:, None]
    # One column more: that is where empty entries and those of unknown id are.
    dense = jnp.zeros((logq.shape[0], head.vocab_size + 1), jnp.float32).at[rows, ids].add(probs)
    unknown, dense = dense[:, -1:], dense[:, :-1]
    live = dense != 0
    left = jnp.any(~live, -1)
    tail_logq = jax.nn.logsumexp(jnp.where(live, MASKED, logq), axis=-1)
    return term.value(Entries(dense + unknown, logq, live, jnp.where(left, tail, 0.0), tail_logq, teacher_entropy))
