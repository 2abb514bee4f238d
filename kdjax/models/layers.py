"""The pieces of a decoder layer: projections, RMS norm, RoPE, activations. Attention is in kernels/attention.

Norms and RoPE tables are in float32 whatever the compute dtype. Projections are plain two-dimensional products: the
form that XLA compiles well on CPU too.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from kdjax.models.params import ModelConfig

Rope = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]  # cos, sin


def project(
    x: Float[Array, "B T I"], weight: Float[Array, "I O"], summed: NamedSharding | None = None
) -> Float[Array, "B T O"]:
    """x times weight, as one two-dimensional product.

    summed: of the result, where the devices have a part of I each; their parts are added up.
    """
    b, t, inputs = x.shape
    if summed is not None:
        return jax.lax.dot_general(x, weight, (((2,), (0,)), ((), ())), out_sharding=summed)
    return (x.reshape(b * t, inputs) @ weight).reshape(b, t, -1)


def project_few(x: Float[Array, "B T I"], turned: Float[Array, "O I"], summed: None = None) -> Float[Array, "B T O"]:
    """x times the transpose of `turned`, as few rows of x are multiplied fastest on CPU: from the right."""
    b, t, inputs = x.shape
    columns = jax.lax.dot_general(turned, x.reshape(b * t, inputs), (((1,), (1,)), ((), ())))
    # Behind a barrier: else the compiler swaps the factors to save the transpose of the small result.
    return jax.lax.optimization_barrier(columns).T.reshape(b, t, -1)


def rms_norm(x: Float[Array, "*rows D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*rows D"]:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in float32, returned in the dtype of x."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return (wide * inverse * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


def rope_frequencies(cfg: ModelConfig, local: bool = False) -> list[float]:
    """The H / 2 angles per position, theta^(-2i/H), stretched as `cfg.rope_scaling` says; see RopeScaling.

    Those of a local layer have a base of their own and are not stretched.
    """
    theta = cfg.local_rope_theta if local else cfg.rope_theta
    plain = [theta ** (-pair / cfg.head_dim) for pair in range(0, cfg.head_dim, 2)]
    scaling = cfg.rope_scaling
    if scaling is None or local:
        return plain
    if scaling.kind == "linear":
        return [frequency / scaling.factor for frequency in plain]
    if scaling.kind != "llama3":
        raise ValueError(f"ModelConfig.rope_scaling.kind must be 'linear' or 'llama3', got {scaling.kind!r}.")
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    stretched = []
    for frequency in plain:
        turns = scaling.original_positions * frequency / (2 * math.pi)  # in the context of pretraining
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))  # 0: a slow pair, stretched in full; 1: a fast one
        stretched.append(frequency * (kept + (1 - kept) / scaling.factor))
    return stretched


def rope_tables(cfg: ModelConfig, positions: Int[Array, "B T"], local: bool = False) -> Rope:
    """cos and sin of position times frequency, float32."""
    frequencies = jnp.asarray(rope_frequencies(cfg, local), jnp.float32)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T N H"], rope: Rope, scale: float = 1.0) -> Float[Array, "B T N H"]:
    """RoPE on pairs (i, i + H/2) of every head, times `scale`; in float32, returned in the dtype of x."""
    cos, sin = (table[:, :, None] * scale for table in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


# of the gate of a feed-forward block
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}
