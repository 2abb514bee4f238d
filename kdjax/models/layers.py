"""The pieces of a decoder layer: RMS norm, RoPE, segment-aware causal attention with grouped heads, SwiGLU.

Norms, RoPE tables and the softmax are in float32 whatever the compute dtype; scores and mixed values accumulate in it.
The forms are those that XLA compiles well on CPU too: plain two-dimensional products for the projections, one batched
product per kv head for the scores (its query heads stacked as rows, so no key or value is repeated).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kdjax.models.params import ModelConfig

MASKED = -1e30  # a score that exp turns into 0; finite, so that no row of scores can give inf - inf
QUERY_BLOCK = 128  # queries that are scored together, against no key after the last of them
MAX_BLOCKS = 8  # blocks are unrolled in the program, so long rows take longer blocks

Rope = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]  # cos, sin


def project(x: Float[Array, "B T *inputs"], weight: Float[Array, "..."]) -> Float[Array, "B T *outputs"]:
    """x [B, T, *inputs] times weight [*inputs, *outputs], as one two-dimensional product."""
    b, t, *inputs = x.shape
    outputs = weight.shape[len(inputs) :]
    flat = x.reshape(b * t, -1)
    # Two reshapes: under a mesh the batch axis is split off alone, else its sharding would be ambiguous.
    return (flat @ weight.reshape(flat.shape[1], -1)).reshape(b, t, -1).reshape(b, t, *outputs)


def rms_norm(x: Float[Array, "*rows D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*rows D"]:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in float32, returned in the dtype of x."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return (wide * inverse * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


def rope_frequencies(cfg: ModelConfig) -> list[float]:
    """The H / 2 angles per position, theta^(-2i/H), stretched as `cfg.rope_scaling` says; see RopeScaling."""
    plain = [cfg.rope_theta ** (-pair / cfg.head_dim) for pair in range(0, cfg.head_dim, 2)]
    scaling = cfg.rope_scaling
    if scaling is None:
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


def rope_tables(cfg: ModelConfig, positions: Int[Array, "B T"]) -> Rope:
    """cos and sin of position times frequency, float32."""
    frequencies = jnp.asarray(rope_frequencies(cfg), jnp.float32)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T N H"], rope: Rope, scale: float = 1.0) -> Float[Array, "B T N H"]:
    """RoPE on pairs (i, i + H/2) of every head, times `scale`; in float32, returned in the dtype of x."""
    cos, sin = (table[:, :, None] * scale for table in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def causal_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T G H"], v: Float[Array, "B T G H"], segment_ids: Int[Array, "B T"]
) -> Float[Array, "B T N H"]:
    """Every position attends to itself and the earlier ones of its segment. q holds the factor 1 / sqrt(H) already.

    Padding (segment 0) is a segment of its own: harmless, and every row has at least one key.
    """
    length = q.shape[1]
    block = max(QUERY_BLOCK, -(-length // MAX_BLOCKS))
    mixed = []
    for start in range(0, length, block):
        end = min(start + block, length)
        same = segment_ids[:, start:end, None] == segment_ids[:, None, :end]
        earlier = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None]
        mixed.append(attend(q[:, start:end], k[:, :end], v[:, :end], same & earlier[None]))
    return mixed[0] if len(mixed) == 1 else jnp.concatenate(mixed, 1)


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B C G H"], v: Float[Array, "B C G H"], mask: Bool[Array, "B T C"]
) -> Float[Array, "B T N H"]:
    """softmax(q k^T) v over the keys that `mask` allows, at least one each. Query head n uses kv head n // (N / G)."""
    b, t, n, h = q.shape
    g, c = k.shape[2], k.shape[1]
    r = n // g
    q = q.reshape(b, t, g, r, h).transpose(0, 2, 3, 1, 4).reshape(b, g, r * t, h)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bgqh,bgch->bgqc", q, k, preferred_element_type=jnp.float32).reshape(b, g, r, t, c)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), -1).astype(v.dtype)
    mixed = jnp.einsum("bgqc,bgch->bgqh", weights.reshape(b, g, r * t, c), v, preferred_element_type=jnp.float32)
    return mixed.reshape(b, g, r, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h).astype(q.dtype)


def swiglu(gate: Float[Array, "B T F"], up: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    """silu(gate) * up."""
    return jax.nn.silu(gate) * up
