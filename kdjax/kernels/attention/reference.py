"""The definition: whole scores [B, N, T, T] in float32, JAX's own differentiation."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def allowed(segment_ids: Int[Array, "B T"], window: int) -> Bool[Array, "B T T"]:
    """[row, query, key]: whether the query sees the key."""
    place = jnp.arange(segment_ids.shape[1])
    distance = place[:, None] - place[None, :]
    near = (distance >= 0) & (distance < window) if window else distance >= 0
    return (segment_ids[:, :, None] == segment_ids[:, None, :]) & near[None]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T G H"],
    v: Float[Array, "B T G H"],
    segment_ids: Int[Array, "B T"],
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Float[Array, "B T N H"]:
    """As the op."""
    shared = q.shape[2] // k.shape[2]
    keys, values = (jnp.repeat(x.astype(jnp.float32), shared, 2) for x in (k, v))
    exact = lax.Precision.HIGHEST
    scores = jnp.einsum("btnh,bsnh->bnts", q.astype(jnp.float32), keys, precision=exact)
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    weights = jax.nn.softmax(jnp.where(allowed(segment_ids, window)[:, None], scores, -jnp.inf), -1)
    return jnp.einsum("bnts,bsnh->btnh", weights, values, precision=exact).astype(q.dtype)
