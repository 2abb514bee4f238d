"""attention: causal, within segments, over keys; grouped heads, a sliding window, capped scores.

The one op here that is over keys and not over the vocabulary. Nothing of [N, T, T] exists outside of `reference`, `xla`
(in blocks of queries) and `cudnn` (one mask for all heads).

    reference.py    whole scores in float32: the definition
    xla.py          blocks of queries, each against the keys that it may see; the default on CPU, and right everywhere
    pallas_tpu.py   JAX's splash attention; the default on TPU
    cudnn.py        cuDNN's fused attention through jax.nn; the default on GPU
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.kernels import _dispatch
from kdjax.kernels.attention import cudnn, pallas_tpu, reference, xla
from kdjax.kernels.attention.pallas_tpu import RESIDUALS
from kdjax.kernels.attention.xla import attend

__all__ = ["IMPLEMENTATIONS", "RESIDUALS", "attend", "attention"]

IMPLEMENTATIONS = {
    "reference": reference.attention,
    "xla": xla.attention,
    "pallas_tpu": pallas_tpu.attention,
    "cudnn": cudnn.attention,
}
DECLINES: dict[str, _dispatch.Declines] = {"pallas_tpu": pallas_tpu.declines, "cudnn": cudnn.declines}


def attention(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B T G H"],
    v: Float[Array, "B T G H"],
    segment_ids: Int[Array, "B T"],
    *,
    window: int = 0,
    soft_cap: float = 0.0,
    implementation: str | None = None,
) -> Float[Array, "B S N H"]:
    """softmax(cap(q k^T)) v over the keys s <= t of the query's segment; the softmax in float32, results as q.

    q holds its factor (1 / sqrt(H)) and its rotation already. Query head n uses kv head n // (N / G).
    S < T: the queries are those of the row's last S places; `xla` alone spares the work of the others.
    window: 0, or only keys with t - s < window are seen, the query itself among them, as transformers counts Gemma's;
    t and s are places in the row.
    soft_cap: 0, or cap(x) = soft_cap * tanh(x / soft_cap).
    Padding (segment 0) is a segment like others, so every query has a key. Arrays are those of one device: under a mesh
    call it in a shard_map over B and heads. In a `jax.checkpoint` see `RESIDUALS`.

    Raises ValueError for heads that G does not divide, more queries than keys, a negative window or cap, several
    dtypes, and for an `implementation` that does not run here.
    """
    _check(q, k, v, window, soft_cap)
    window = window if window < k.shape[1] else 0
    others = k.shape[1] - q.shape[1]
    every = jnp.pad(q, ((0, 0), (others, 0), (0, 0), (0, 0))) if others else q
    chosen = _dispatch.choose("attention", IMPLEMENTATIONS, DECLINES, implementation, every, k, v, window, soft_cap)
    if chosen is xla.attention:
        return chosen(q, k, v, segment_ids, window=window, soft_cap=soft_cap)
    return chosen(every, k, v, segment_ids, window=window, soft_cap=soft_cap)[:, others:]


def _check(q: Array, k: Array, v: Array, window: int, soft_cap: float) -> None:
    heads, kv_heads = q.shape[2], k.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"heads of q must be a multiple of the {kv_heads} heads of k and v, got {heads}; each kv head serves as "
            "many query heads as any other. Split heads over devices so that both numbers are divided alike."
        )
    if q.shape[1] > k.shape[1]:
        raise ValueError(
            f"q must be of the last places of the {k.shape[1]} of k and v, got {q.shape[1]} of them; a query needs a "
            "key of its own. Leave the first ones out."
        )
    if window < 0:
        raise ValueError(f"window must be a number of keys, got {window}. Set it to 0 for all earlier keys.")
    if soft_cap < 0:
        raise ValueError(f"soft_cap must be positive or 0, got {soft_cap}. Set it to 0 for scores without a cap.")
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(
            f"q, k and v must be of one floating-point dtype, got {q.dtype}, {k.dtype} and {v.dtype}. Cast them to the "
            "compute dtype."
        )
