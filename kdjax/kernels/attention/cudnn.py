"""cuDNN's fused attention, through jax.nn.dot_product_attention.

It knows causality and lengths, and no segments: jax.nn hands segments over as a mask, which cuDNN adds to the scores of
all heads. So there is an array [B, 1, T, T] in q's dtype, N times smaller than the scores of XLA and half as wide, and
one more like it in the backward pass. The window is part of the mask: cuDNN has one, but not together with a bias.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.kernels import _dispatch
from kdjax.kernels.attention import reference


def declines(
    target: _dispatch.Target, q: Array, k: Array, v: Array, window: int = 0, soft_cap: float = 0.0
) -> str | None:
    """Why cuDNN cannot run there, or None."""
    if target.platform != "gpu":
        return "cuDNN is for NVIDIA's GPUs."
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it reads bfloat16 and float16, not {q.dtype}."
    if soft_cap:
        return "it has no soft cap of scores."
    if q.shape[1] % 2:
        return f"it wants rows of even length with a mask, not of {q.shape[1]}."
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    try:  # its other limits depend on its version and on the GPU that is present, and only JAX's checks know them
        ids = jax.ShapeDtypeStruct(q.shape[:2], jnp.int32)
        jax.eval_shape(attention, *arrays, ids)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"JAX says of it: {str(error).splitlines()[0].rstrip('.')}."
    return None


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T G H"],
    v: Float[Array, "B T G H"],
    segment_ids: Int[Array, "B T"],
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Float[Array, "B T N H"]:
    """As the op, without soft_cap."""
    mask = reference.allowed(segment_ids, window)[:, None]
    # Causality is said once more, so that blocks of later keys are skipped.
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=1.0, is_causal=True, implementation="cudnn")
