"""Mosaic GPU (Hopper): the kernel writes the logits of some rows at a time, XLA searches them by way of their maxima.

Per row and SLICE of columns the kernel (`_gpu.logits_pass`) also writes the largest logit, and per row the maximum and
sum of exponentials. XLA then takes the K slices of a row whose maxima are largest and the top K of what is in them; no
logit but theirs is read again, unless there are no more than 2 K slices. All of it is done with the numbers that the
kernel wrote, so the result is the exact top K of one set of float32 logits, with the lower column first where two of
them are equal; another implementation, which adds up products in another order, may see two logits that are closer than
rounding the other way round.

Rows: such that their logits have about `CHUNK_BYTES`, whatever N is. With 2 D FLOP against 4 B of each logit, 295 FLOP
per B on an H100, writing them takes as long as the product at D = 590 and overlaps with it. Not to write them would
mean to compute those of the K slices anew: 64 D K B of the head a row, against 4 V B; at D = 2048, V = 128256, K = 16
that is 2 MiB against 0.5 MiB, in columns that no two rows share. Counted, not measured: compiled, not run.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kdjax.kernels import _gpu, _gpu_block_sizes
from kdjax.kernels._gpu import MASKED, START, along
from kdjax.kernels._gpu_block_sizes import GROUP, SLICE
from kdjax.kernels.tiles import first_column, head_width, split_rows, sum_over_axis
from kdjax.kernels.topk.api import TopK
from kdjax.kernels.topk.xla import merge, top_of_groups
from kdjax.types import Head

CHUNK_BYTES = 256 * 2**20  # of logits: 1280 rows at V = 49152, 256 at V = 262144

declines = _gpu.declines

State = dict[str, Array]  # of each row [64], in the kernel: the largest logit, the sum of exp(logit - largest)


def topk(hidden: Float[Array, "N D"], head: Head, k: int) -> TopK:
    """See the package."""
    n, kept = hidden.shape[0], min(k, head_width(head))
    if n == 0:
        return TopK(jnp.zeros((0, k), jnp.int32), jnp.zeros((0, k), jnp.float32))
    count, size = _gpu_block_sizes.chunks(n, head_width(head), CHUNK_BYTES, 4)
    limit = _gpu.local_columns(head)[None]

    def chunk(rows: Float[Array, "C D"]) -> tuple[Array, Array, Array, Array]:
        """On this device's columns: (values, columns) [C, K]; maximum and sum of exp(logit - maximum) [C, 1]."""
        nothing = jnp.zeros((1, size), jnp.float32)
        parts, logits, maxima = _gpu.logits_pass((rows, head), nothing, limit, _start, _tile, name="topk")
        sums, tops = parts[:, 0, :, None], parts[:, 1, :, None]
        top = jnp.max(tops, 0)
        return *top_of_groups(logits, maxima, SLICE, kept), top, jnp.sum(sums * jnp.exp(tops - top[None, :, :]), 0)

    tiles, axis = split_rows(hidden, count, size), head.vocab_axis
    found = lax.map(chunk, tiles) if count > 1 else jax.tree.map(lambda a: a[None], chunk(tiles[0]))
    values, columns, top, total = jax.tree.map(lambda a: a.reshape(count * size, a.shape[2])[:n], found)
    values, ids = merge(values, first_column(head) + columns, axis, k)
    highest = top if axis is None else lax.pmax(top, axis)
    total = sum_over_axis(total * jnp.exp(top - highest), axis)
    # Of a row that is not a number, padding may seem to be the best.
    return TopK(jnp.minimum(ids, head.vocab_size - 1), (values - highest) - jnp.log(total))


def _start() -> State:
    """Before the first column."""
    return {"sum": jnp.zeros(GROUP, jnp.float32), "top": jnp.full(GROUP, START, jnp.float32)}


def _tile(
    state: State, logits: list[Array], column: Int[Array, "R C"], rows: list[Array], scalars: list[Array], store: Any
) -> State:
    """In the kernel: the state after one more tile. scalars: how many columns there are."""
    z = jnp.where(column < scalars[0].astype(jnp.int32), logits[0], MASKED)
    top = jnp.maximum(state["top"], jnp.max(z, 1))
    total = state["sum"] * jnp.exp(state["top"] - top)
    for at in range(0, z.shape[1], SLICE):
        piece = z[:, at : at + SLICE]
        store(at, piece)
        total += jnp.sum(jnp.exp(piece - along(top, piece)), 1)
    return {"sum": total, "top": top}
