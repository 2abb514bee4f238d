"""Blocks of queries, each against the keys from the first that its window reaches to its own last.

The forms are those that XLA compiles well on CPU too: one batched product per kv head, its query heads stacked as rows,
so that no key or value is repeated. Scores of a block are [B, N, block, keys] in float32; a gradient keeps all of them
unless it runs under `jax.checkpoint`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # a score that exp turns into 0; finite, so that no row of scores can give inf - inf
QUERY_BLOCK = 128  # queries that are scored together, against no key after the last of them
MAX_BLOCKS = 8  # blocks are unrolled in the program, so long rows take longer blocks


def attention(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B T G H"],
    v: Float[Array, "B T G H"],
    segment_ids: Int[Array, "B T"],
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Float[Array, "B S N H"]:
    """As the op."""
    length, others = k.shape[1], k.shape[1] - q.shape[1]
    block = max(QUERY_BLOCK, -(-q.shape[1] // MAX_BLOCKS))
    mixed = []
    for start in range(others, length, block):
        end = min(start + block, length)
        first = first_key(start, window)
        distance = jnp.arange(start, end)[:, None] - jnp.arange(first, end)[None]
        near = (distance >= 0) & (distance < window) if window else distance >= 0
        same = segment_ids[:, start:end, None] == segment_ids[:, None, first:end]
        keys, values = k[:, first:end], v[:, first:end]
        mixed.append(attend(q[:, start - others : end - others], keys, values, same & near[None], soft_cap))
    return mixed[0] if len(mixed) == 1 else jnp.concatenate(mixed, 1)


def first_key(start: int, window: int) -> int:
    """Where the keys of a block of queries that begins at `start` begin: at a multiple of QUERY_BLOCK."""
    reached = max(0, start - window + 1) if window else 0
    return reached // QUERY_BLOCK * QUERY_BLOCK


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C G H"],
    v: Float[Array, "B C G H"],
    mask: Bool[Array, "B T C"],
    soft_cap: float = 0.0,
) -> Float[Array, "B T N H"]:
    """softmax(q k^T) v over the keys that `mask` allows, at least one each. Query head n uses kv head n // (N / G)."""
    b, t, n, h = q.shape
    g, c = k.shape[2], k.shape[1]
    r = n // g
    q = q.reshape(b, t, g, r, h).transpose(0, 2, 3, 1, 4).reshape(b, g, r * t, h)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bgqh,bgch->bgqc", q, k, preferred_element_type=jnp.float32).reshape(b, g, r, t, c)
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), -1).astype(v.dtype)
    mixed = jnp.einsum("bgqc,bgch->bgqh", weights.reshape(b, g, r * t, c), v, preferred_element_type=jnp.float32)
    return mixed.reshape(b, g, r, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h).astype(q.dtype)
