"""What the Mosaic (TPU) kernels share: the block order of a head, the logits of a block, limits of each generation."""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kdjax.kernels import _dispatch, tiles
from kdjax.types import Head

LANES, SUBLANES = 128, 8
START = -1e30  # a running maximum before the first logit: finite, so that START - START is 0
MASKED = -2e30  # the logit of a column that is none: exp(MASKED - START) is 0, and 0 * (MASKED - START) too

# VMEM that the compiler grants to one kernel (asked for by vmem_limit_bytes), by device kind, found by compiling.
VMEM = {
    "TPU v4": 16 * 2**20,
    "TPU v5 lite": 128 * 2**20,
    "TPU v5": 64 * 2**20,
    "TPU v6 lite": 128 * 2**20,
    "TPU7x": 64 * 2**20,
}
SMALLEST = min(VMEM.values())


def vmem_bytes(kind: str) -> int:
    """What a kernel may ask for on a device kind; the smallest of all for an unknown one, and in interpret mode."""
    return VMEM.get(kind, SMALLEST)


def compiler_params(*semantics: Literal["parallel", "arbitrary"]) -> pltpu.CompilerParams:
    """Semantics per dimension of the grid and all the VMEM of the chip that is traced for."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem_bytes(_dispatch.target().kind))


def declines(target: _dispatch.Target, *arrays: Array) -> str | None:
    """Why no Mosaic kernel can read these arrays there, or None. On a CPU kernels run in interpret mode, in tests."""
    if target.platform not in ("tpu", "cpu"):
        return "Mosaic kernels are for TPUs."
    for array in arrays:
        if array.dtype not in (jnp.bfloat16, jnp.float32):
            return f"it reads bfloat16 and float32, not {array.dtype}."
    return None


def in_memory_order(head: Head) -> tuple[Float[Array, "X Y"], bool]:
    """(weight, vocab_major) with the last axis the one that the compiler keeps contiguous: no copy of the head.

    An array lies in tiles of 8 x 128 with the axis last that wastes less padding; the order it was declared in settles
    ties. So [V, 576] lies as its transpose, and a transpose of it is free, while row blocks of it would cost a copy of
    the whole head; [V, 2048] lies as declared.
    """

    def padded(rows: int, columns: int) -> int:
        return -(-rows // SUBLANES) * SUBLANES * -(-columns // LANES) * LANES

    rows, columns = head.weight.shape
    if padded(columns, rows) < padded(rows, columns):
        return head.weight.T, not head.vocab_major
    return head.weight, head.vocab_major


def local_columns(head: Head) -> Int[Array, "1"]:
    """How many of this device's columns are vocabulary; the rest are padding. Goes to the kernel through SMEM."""
    rest = head.vocab_size - tiles.first_column(head)
    return jnp.full((1,), jnp.clip(rest, 0, tiles.head_width(head)), jnp.int32)


def local_labels(head: Head, labels: Int[Array, "N"]) -> Int[Array, "N"]:
    """Labels as columns of this device's weight; -1 for those of other devices, of the padding, of no vocabulary."""
    column = labels.astype(jnp.int32) - tiles.first_column(head)
    return jnp.where((column >= 0) & (column < local_columns(head)), column, -1)


def dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Float[Array, "X Y"]:
    """left @ right over the two axes, in a kernel, float32: bfloat16 is multiplied as it is, float32 exactly."""
    dtype = jnp.promote_types(left.dtype, right.dtype)
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    contract = (((left_axis,), (right_axis,)), ((), ()))
    return lax.dot_general(
        left.astype(dtype), right.astype(dtype), contract, precision=precision, preferred_element_type=jnp.float32
    )


def block_logits(
    hidden: Float[Array, "R D"], weight: Float[Array, "X Y"], vocab_major: bool, head: Head, start: Array, limit: Array
) -> Float[Array, "R C"]:
    """float32 logits of a block of columns, in a kernel: scaled, capped, MASKED where start + column >= limit.

    weight: [C, D] if vocab_major (of `in_memory_order`) else [D, C]; only logit_scale and soft_cap are read of `head`.
    start: the block's first local column; limit: `local_columns`. What lies behind the end of the head may be NaN.
    """
    logits = squash(dot(hidden, weight, 1, 1 if vocab_major else 0), head.logit_scale, head.soft_cap)
    column = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return jnp.where(column < limit - start, logits, MASKED)


def squash(raw: Float[Array, "R C"], logit_scale: float, soft_cap: float) -> Float[Array, "R C"]:
    """Logits from the bare product."""
    logits = raw if logit_scale == 1.0 else raw * logit_scale
    return logits if soft_cap <= 0.0 else soft_cap * jnp.tanh(logits / soft_cap)


def squash_slope(logits: Float[Array, "R C"], logit_scale: float, soft_cap: float) -> Float[Array, "R C"] | float:
    """d logits / d raw product, from the logits; mask first: a MASKED logit has no slope."""
    return logit_scale if soft_cap <= 0.0 else logit_scale * (1.0 - jnp.square(logits / soft_cap))
