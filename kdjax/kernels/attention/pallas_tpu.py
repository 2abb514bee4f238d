"""JAX's splash attention (Pallas, Mosaic): blocks of scores in VMEM, blocks that the mask empties are skipped.

Splash wants rows that its blocks divide: T is padded at its end with keys that no real query can see. What a row's
segments empty is computed and masked; only causality and the window skip work. Heads narrower than 128 lanes are padded
by the compiler.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

from kdjax.kernels import _dispatch, _tpu
from kdjax.kernels.attention import block_sizes

# The name of what the backward kernels need besides q, k and v: the mixed values [N, T, H] and a float32 per query and
# head. A policy of `jax.checkpoint` that saves it spares the forward kernel's second run.
RESIDUALS = "attention"


def declines(
    target: _dispatch.Target, q: Array, k: Array, v: Array, window: int = 0, soft_cap: float = 0.0
) -> str | None:
    """Why splash attention cannot run there, or None."""
    reason = _tpu.declines(target, q, k, v)
    if reason is None and block_sizes.choose(q.shape[1], q.shape[3], q.dtype.itemsize) is None:
        return f"no block of heads of {q.shape[3]} {q.dtype} fits into {block_sizes.VMEM // 2**20} MiB of VMEM."
    return reason


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
    length = q.shape[1]
    block = block_sizes.choose(length, q.shape[3], q.dtype.itemsize) or block_sizes.BLOCKS[-1]
    padding = -length % block

    def by_head(x: Array) -> Array:
        return jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, padding), (0, 0)))

    ids = jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, padding)))
    kernel = splash.make_splash_mha(
        _mask(q.shape[2], length + padding, window),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=soft_cap or None,
        residual_checkpoint_name=RESIDUALS,
        head_shards=1,
        q_seq_shards=1,
    )
    mixed = jax.vmap(kernel)(by_head(q), by_head(k), by_head(v), splash.SegmentIds(ids, ids))
    return mixed[:, :, :length].transpose(0, 2, 1, 3)


@functools.lru_cache(maxsize=64)
def _mask(heads: int, length: int, window: int) -> splash.MultiHeadMask:
    """One mask for all heads, the same object for the same shape: splash compares masks by it when it is traced."""
    shape = (length, length)
    one = splash.LocalMask(shape, (window - 1, 0), 0) if window else splash.CausalMask(shape)
    return splash.MultiHeadMask([one] * heads)
