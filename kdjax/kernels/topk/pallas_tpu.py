"""Mosaic: streams over blocks of the vocabulary with the K best of each row so far in VMEM.

The vocabulary comes in ascending order, so an entry that equals the K-th best so far loses to it, and a block without a
larger one is passed over after one maximum. Else, while any row's largest remaining logit beats its K-th best, each
such row moves its largest (the lowest column of equals) into its sorted K best. For logits in random order that is
about K (1 + ln(V / K)) moves a row, in all. The log-normaliser is accumulated along the way.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kdjax.kernels import _dispatch, _tpu
from kdjax.kernels.tiles import first_column, head_width, kept_columns, sum_over_axis
from kdjax.kernels.topk.api import TopK
from kdjax.kernels.topk.block_sizes import LARGEST_K, Blocks, blocks_for
from kdjax.kernels.topk.xla import merge
from kdjax.types import Head


def declines(target: _dispatch.Target, hidden: Array, head: Head, k: int) -> str | None:
    """See `_dispatch.choose`."""
    if k > LARGEST_K:
        return f"it keeps at most {LARGEST_K} entries a row in VMEM, not {k}."
    if _blocks(target.kind, hidden, head, k) is None:
        return f"no block of rows and columns of width {hidden.shape[1]} fits into VMEM."
    return _tpu.declines(target, hidden, head.weight)


def _blocks(kind: str, hidden: Array, head: Head, k: int) -> Blocks | None:
    itemsize = max(hidden.dtype.itemsize, head.weight.dtype.itemsize)
    return blocks_for(_tpu.vmem_bytes(kind), hidden.shape[1], itemsize, k)


def topk(hidden: Float[Array, "N D"], head: Head, k: int) -> TopK:
    """See the package."""
    n, kept = hidden.shape[0], min(k, head_width(head))
    if n == 0:
        return TopK(jnp.zeros((0, k), jnp.int32), jnp.zeros((0, k), jnp.float32))
    blocks = _blocks(_dispatch.target().kind, hidden, head, k)
    if blocks is None:
        raise ValueError(f"hidden must be narrower, got a width of {hidden.shape[1]}; no block fits into VMEM.")
    values, columns, top, total = _search(hidden, head, kept, blocks)
    axis = head.vocab_axis
    values, ids = merge(values, first_column(head) + columns, axis, k)
    highest = top if axis is None else lax.pmax(top, axis)
    total = sum_over_axis(total * jnp.exp(top - highest), axis)
    return TopK(ids, (values - highest) - jnp.log(total))


def _search(hidden: Array, head: Head, k: int, blocks: Blocks) -> tuple[Array, Array, Array, Array]:
    """On this device's columns: (values, columns) [N, K] of the K best; maximum and sum of exp(logit - maximum) [N, 1].

    Of fewer than K columns of vocabulary the rest are values of START.
    """
    n, width = hidden.shape
    weight, vocab_major = _tpu.in_memory_order(head)
    searched = kept_columns(head)
    columns = min(blocks.columns, _up(searched, _tpu.LANES))
    rows = min(blocks.rows, _up(n, 16))
    lanes = _up(k, _tpu.LANES)
    shape, at = ((columns, width), lambda i, j: (j, 0)) if vocab_major else ((width, columns), lambda i, j: (0, j))
    per_row = {lanes: pl.BlockSpec((rows, lanes), lambda i, j: (i, 0)), 1: pl.BlockSpec((rows, 1), lambda i, j: (i, 0))}
    sizes = ((lanes, jnp.float32), (lanes, jnp.int32), (1, jnp.float32), (1, jnp.float32))
    values, found, top, total = pl.pallas_call(
        functools.partial(_kernel, head=head, vocab_major=vocab_major, k=k, n=n),
        grid=(pl.cdiv(n, rows), pl.cdiv(searched, columns)),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((rows, width), lambda i, j: (i, 0)),
            pl.BlockSpec(shape, at),
        ],
        out_specs=[per_row[size] for size, _ in sizes],
        out_shape=[jax.ShapeDtypeStruct((n, size), dtype) for size, dtype in sizes],
        scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        compiler_params=_tpu.compiler_params("parallel", "arbitrary"),
        name="topk",
    )(_tpu.local_columns(head), hidden, weight)
    return values[:, :k], found[:, :k], top, total


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _kernel(
    limit: Any,
    hidden: Any,
    weight: Any,
    values: Any,
    found: Any,
    top: Any,
    total: Any,
    tile: Any,
    *,
    head: Head,
    vocab_major: bool,
    k: int,
    n: int,
) -> None:
    rows, columns = tile.shape
    start = pl.program_id(1) * columns

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        values[...] = jnp.full(values.shape, _tpu.START, jnp.float32)
        found[...] = jnp.zeros(found.shape, jnp.int32)
        top[...] = jnp.full(top.shape, _tpu.START, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)

    logits = _tpu.block_logits(hidden[...], weight[...], vocab_major, head, start, limit[0])
    tile[...] = logits
    largest = jnp.max(logits, -1, keepdims=True)
    higher = jnp.maximum(top[...], largest)
    total[...] = total[...] * jnp.exp(top[...] - higher) + jnp.sum(jnp.exp(logits - higher), -1, keepdims=True)
    top[...] = higher

    # Rows behind the last one hold anything and must not keep the loop alive.
    real = lax.broadcasted_iota(jnp.int32, (rows, 1), 0) < n - pl.program_id(0) * rows
    place = lax.broadcasted_iota(jnp.int32, values.shape, 1)

    def beats(largest: Array) -> Array:
        """[rows, 1]: 1 where the largest remaining logit is larger than the K-th best so far."""
        kth = jnp.max(jnp.where(place == k - 1, values[...], -jnp.inf), -1, keepdims=True)
        return jnp.where((largest > kth) & real, 1.0, 0.0)

    def more(state: tuple[Array, Array, Array]) -> Array:
        return state[0] > 0.0

    def move(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        _, largest, wanted = state
        logits, column = tile[...], lax.broadcasted_iota(jnp.int32, tile.shape, 1)
        first = jnp.min(jnp.where(logits == largest, column, columns), -1, keepdims=True)
        # Equals that are in already have lower ids: the new one goes behind them.
        before = values[...], found[...]
        stays, moved = before[0] >= largest, pltpu.roll(before[0], 1, 1)
        here = (place == 0) | (moved >= largest)
        live = wanted > 0.0
        values[...] = jnp.where(stays | ~live, before[0], jnp.where(here, largest, moved))
        found[...] = jnp.where(stays | ~live, before[1], jnp.where(here, start + first, pltpu.roll(before[1], 1, 1)))
        logits = jnp.where((column == first) & live, -jnp.inf, logits)
        tile[...] = logits
        largest = jnp.max(logits, -1, keepdims=True)
        wanted = beats(largest)
        return jnp.max(wanted), largest, wanted

    wanted = beats(largest)
    lax.while_loop(more, move, (jnp.max(wanted), largest, wanted))
