"""The pieces of a decoder layer: RMS norm, RoPE, segment-aware causal attention with grouped heads, SwiGLU.

Norms, RoPE tables and the softmax are in float32 whatever the compute dtype; matrix products accumulate in float32.
"""

import math

import jax
import jax.numpy as jnp

from kdjax.models.params import ModelConfig
from kdjax.types import Array

MASKED = -1e30  # a score that exp makes 0; finite, so that no row can give inf - inf


def rms_norm(x, scale, eps):
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(cfg):
    pairs = jnp.arange(0, cfg.head_dim, 2, dtype=jnp.float32) / cfg.head_dim
    return 1.0 / cfg.rope_theta**pairs


def rope_tables(cfg, positions):
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(cfg)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, cos, sin):
    """x [B,T,N,H]; cos, sin [B,T,H/2]"""
    lo, hi = jnp.split(x.astype(jnp.float32), 2, -1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([lo * cos - hi * sin, hi * cos + lo * sin], -1).astype(x.dtype)


def attention(q, k, v, mask):
    b, t, n, h = q.shape
    g = k.shape[2]
    q = q.reshape(b, t, g, n // g, h) * h**-0.5
    s = jnp.einsum("btgrh,bsgh->bgrts", q, k, preferred_element_type=jnp.float32)
    s = jnp.where(mask[:, None, None], s, MASKED)
    p = jax.nn.softmax(s, -1).astype(v.dtype)
    o = jnp.einsum("bgrts,bsgh->btgrh", p, v)
    return o.reshape(b, t, n * h)
