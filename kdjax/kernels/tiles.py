"""What all vocabulary kernels share: how rows and columns are cut up, the logits of a tile, sums over the vocabulary.

A tile is some rows and all of a device's columns; a chunk is some of the columns.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kdjax.types import Head

MASKED = -1e30  # the logit of a padding column where it cannot be cut off: finite, so 0 * MASKED is 0
NO_ID = -(2**31)  # the id of a column that does not count; no label has it


def row_tiles(rows: int, at_most: int) -> tuple[int, int]:
    """(number of tiles, rows per tile): even tiles of about `at_most` rows, a multiple of 8 unless it is one tile."""
    count = max(1, -(-rows // at_most))
    size = max(1, -(-rows // count))
    if count > 1:
        size = -(-size // 8) * 8
        count = -(-rows // size)  # the rounding may have emptied the last tile
    return count, size


def split_rows(array: Array, count: int, size: int) -> Array:
    """[N, ...] -> [count, size, ...], padded with zeros behind the last row."""
    padding = count * size - array.shape[0]
    if padding:
        array = jnp.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))
    return array.reshape(count, size, *array.shape[1:])


def head_width(head: Head) -> int:
    """Columns of the weight on this device, padding included."""
    return int(head.weight.shape[0 if head.vocab_major else 1])


def kept_columns(head: Head) -> int:
    """How many columns `tile_logits` has: without the padding, if the head is whole."""
    return min(head.vocab_size, head_width(head)) if head.vocab_axis is None else head_width(head)


def first_column(head: Head) -> Array | int:
    """The id of this device's first column."""
    return 0 if head.vocab_axis is None else lax.axis_index(head.vocab_axis) * head_width(head)


def column_ids(head: Head) -> Int[Array, "V"]:
    """The vocabulary id of each column of `tile_logits`."""
    return first_column(head) + lax.iota(jnp.int32, kept_columns(head))


def is_label(head: Head, labels: Int[Array, "C"]) -> Bool[Array, "C V"]:
    """True where a column of `tile_logits` is the row's label."""
    return labels[:, None] == column_ids(head)[None, :]


def vocab_sum(values: Float[Array, "C V"], axis: str | None) -> Float[Array, "C 1"]:
    """Sum over the whole vocabulary, over the devices of `axis` too."""
    part = jnp.sum(values, -1, keepdims=True)
    return part if axis is None else lax.psum(part, axis)


def vocab_max(values: Float[Array, "C V"], axis: str | None) -> Float[Array, "C 1"]:
    """Maximum over the whole vocabulary; no gradient."""
    part = lax.stop_gradient(jnp.max(values, -1, keepdims=True))
    return part if axis is None else lax.pmax(part, axis)


def check_pair(head: Head, teacher_head: Head) -> None:
    """ValueError unless two heads have one vocabulary, cut in one way."""
    if teacher_head.vocab_size != head.vocab_size:
        raise ValueError(
            f"teacher_head.vocab_size must equal the student's {head.vocab_size}, got {teacher_head.vocab_size}; a sum "
            "over the vocabulary needs one vocabulary. Set both to the number of ids that the tokenizer can emit."
        )
    if teacher_head.vocab_axis != head.vocab_axis:
        raise ValueError(
            f"teacher_head.vocab_axis must equal the student's {head.vocab_axis!r}, got {teacher_head.vocab_axis!r}; "
            "a device needs the same columns of both. Shard both heads over the same mesh axis."
        )
    if head.vocab_axis is not None and head_width(teacher_head) != head_width(head):
        raise ValueError(
            f"teacher_head.weight must have the student's {head_width(head)} columns per device of "
            f"{head.vocab_axis!r}, got {head_width(teacher_head)}; a device needs the same columns of both. Pad both "
            "heads to one width."
        )


def tile_logits(hidden: Float[Array, "C D"], head: Head) -> Float[Array, "C V"]:
    """float32 logits of one tile, scale and soft-cap applied, on this device's columns; float64 of float64 states.

    Padding columns are cut off; those of a head that is split over devices have the logit MASKED.
    """
    contract = (((1,), (1 if head.vocab_major else 0,)), ((), ()))
    at_least = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = lax.dot_general(hidden, head.weight, contract, preferred_element_type=at_least)
    width = head_width(head)
    if head.vocab_axis is None and head.vocab_size < width:
        logits = logits[:, : head.vocab_size]
    if head.logit_scale != 1.0:
        logits = logits * head.logit_scale
    if head.soft_cap > 0.0:
        logits = head.soft_cap * jnp.tanh(logits / head.soft_cap)
    if head.vocab_axis is not None and head.vocab_size < width * lax.axis_size(head.vocab_axis):
        logits = jnp.where((column_ids(head) < head.vocab_size)[None, :], logits, MASKED)
    return logits


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Neighbouring columns of a head, all chunks of one size.

    head: the columns as a head of their own. start: the place of the first in `tile_logits`. first: its vocabulary id.
    ids: the id of each, or NO_ID for those that do not count: padding, and in the last chunk what the one before has
    had already. masked: whether there can be any of those.
    """

    head: Head
    start: Array
    first: Array
    ids: Array
    masked: bool


def chunk_of(head: Head, at: Int[Array, ""], size: int) -> Chunk:
    """Chunk number `at` of ceil(kept_columns / size); size <= kept_columns."""
    kept = kept_columns(head)
    start = jnp.minimum(at * size, kept - size)
    weight = lax.dynamic_slice_in_dim(head.weight, start, size, 0 if head.vocab_major else 1)
    first = first_column(head) + start
    ids, counts = first + lax.iota(jnp.int32, size), start + lax.iota(jnp.int32, size) >= at * size
    padded = head.vocab_axis is not None and head.vocab_size < kept * lax.axis_size(head.vocab_axis)
    if padded:
        counts = counts & (ids < head.vocab_size)
    masked = padded or kept % size != 0
    own = dataclasses.replace(head, weight=weight, vocab_size=size, vocab_axis=None)
    return Chunk(own, start, first, jnp.where(counts, ids, NO_ID) if masked else ids, masked)


def mask_chunk(logits: Float[Array, "C X"], chunk: Chunk) -> Float[Array, "C X"]:
    """`tile_logits(hidden, chunk.head)` with MASKED in the columns that do not count."""
    return jnp.where((chunk.ids != NO_ID)[None, :], logits, MASKED) if chunk.masked else logits


def tile_gradients(
    gradient: Float[Array, "C V"], logits: Float[Array, "C V"], hidden: Float[Array, "C D"], head: Head
) -> tuple[Float[Array, "C D"], Float[Array, "X Y"]]:
    """From d loss / d logits of a tile: d loss / d hidden and d loss / d head.weight, both float32.

    A row whose gradient is 0 throughout must have finite `hidden`; its logits may be anything. With `vocab_axis`, both
    are this device's part: d hidden is to be added up over the axis, which the transpose of `shard_map` does.
    """
    if head.soft_cap > 0.0:
        gradient = jnp.where(gradient == 0.0, 0.0, gradient * (1.0 - jnp.square(logits / head.soft_cap)))
    if head.logit_scale != 1.0:
        gradient = gradient * head.logit_scale
    padding = head_width(head) - gradient.shape[1]
    if padding:
        gradient = jnp.pad(gradient, ((0, 0), (0, padding)))
    gradient = gradient.astype(hidden.dtype)
    by_vocab = (((1,), (0 if head.vocab_major else 1,)), ((), ()))
    d_hidden = lax.dot_general(gradient, head.weight, by_vocab, preferred_element_type=jnp.float32)
    left, right = (gradient, hidden) if head.vocab_major else (hidden, gradient)
    d_weight = lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return d_hidden, d_weight


def log_softmax(logits: Float[Array, "C V"], axis: str | None = None) -> Float[Array, "C V"]:
    """Over the vocabulary, in float32; finite for finite logits of any size. Differentiable."""
    shifted = logits - vocab_max(logits, axis)
    return shifted - jnp.log(vocab_sum(jnp.exp(shifted), axis))


def tile_softmax(
    logits: Float[Array, "C V"], axis: str | None = None
) -> tuple[Float[Array, "C V"], Float[Array, "C V"]]:
    """(log-probabilities, probabilities) of a tile.

    The exponentials are written once, behind a barrier: left to itself the compiler recomputes them in every reduction
    and product that reads them, and on a CPU they are the larger part of what is not a matrix product.
    """
    top = vocab_max(logits, axis)
    exp = lax.optimization_barrier(jnp.exp(logits - top))
    total = vocab_sum(exp, axis)
    # Not logits - (top + log total): at logits of 1e4 the sum would round off the third decimal.
    return (logits - top) - jnp.log(total), exp / total


def sum_over_axis(tree: Any, axis: str | None) -> Any:
    """The sum over the devices of `axis`; a cotangent that comes back through it is summed likewise."""
    return tree if axis is None else jax.lax.psum(tree, axis)


def zero_tangents(tree: Any) -> Any:
    """The cotangents of what a kernel does not differentiate."""

    def zero(array: Array) -> Any:
        inexact = jnp.issubdtype(array.dtype, jnp.inexact)
        return jnp.zeros_like(array) if inexact else jnp.zeros(array.shape, jax.dtypes.float0)

    return jax.tree.map(zero, tree)


def formed_gradients(kept: Any, cotangent: Float[Array, ""]) -> tuple[Array, Head, Any]:
    """The cotangents of (hidden, head, rest) from kept = (d_hidden, d_weight, head, rest) of the forward pass."""
    d_hidden, d_weight, head, rest = kept
    # The total is a sum over the devices of the axis, whose transpose is a sum.
    scale = sum_over_axis(cotangent, head.vocab_axis)
    d_head = dataclasses.replace(head, weight=d_weight * scale.astype(d_weight.dtype))
    return d_hidden * scale.astype(d_hidden.dtype), d_head, zero_tangents(rest)
