"""Tiled over rows; the gradient is formed in the forward pass, as in linear_divergence: three matrix products a tile.

The columns of a tile are taken apart into the K entries and all the others, the tail: the entries' logits are read
out, then masked, and one pass of exponentials gives the softmax of the tail. The gradient is a multiple of that, with K
numbers of their own put in at the entries.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kdjax.kernels.sparse_divergence.api import SparseTerm
from kdjax.kernels.sparse_divergence.rows import Rows, evaluate
from kdjax.kernels.tiles import (
    MASKED,
    NO_ID,
    chunk_of,
    first_column,
    formed_gradients,
    kept_columns,
    row_tiles,
    split_rows,
    sum_over_axis,
    tile_gradients,
    tile_logits,
    vocab_max,
    vocab_sum,
)
from kdjax.types import Head

ROWS = 512  # rows a tile at most: the head is read, and its gradient written, once per tile
TILE = 2**24  # logits a tile at most: 64 MiB of float32, 341 rows of V = 49152, 110 of V = 151936
COLUMNS = 2048  # of the vocabulary a chunk of the two products of the gradient


def sparse_divergence(
    hidden: Float[Array, "N D"],
    head: Head,
    ids: Int[Array, "N K"],
    probs: Float[Array, "N K"],
    weight: Float[Array, "N"],
    tail: Float[Array, "N"],
    teacher_entropy: Float[Array, "N"] | None,
    term: SparseTerm,
    tau: Float[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, "N"]]:
    """See the package."""
    total, values = _divergence(term, hidden, head, ((ids, probs, weight, tail, teacher_entropy), tau))
    return total, lax.stop_gradient(values)


Rest = tuple[Rows, Array]  # without gradient; the second is tau
Gradients = tuple[Any, Any]  # d_hidden, d_weight: float32 arrays, or None where nobody differentiates


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(term: SparseTerm, hidden: Array, head: Head, rest: Rest) -> tuple[Array, Array]:
    return _tiles(term, hidden, head, rest, False)[:2]


def _forward(term: SparseTerm, hidden: Array, head: Head, rest: Rest) -> tuple[Any, Any]:
    total, values, (d_hidden, d_weight) = _tiles(term, hidden, head, rest, True)
    return (total, values), (d_hidden.astype(hidden.dtype), d_weight.astype(head.weight.dtype), head, rest)


def _backward(term: SparseTerm, kept: Any, cotangents: Any) -> tuple[Array, Head, Any]:
    return formed_gradients(kept, cotangents[0])


_divergence.defvjp(_forward, _backward)


def _tiles(
    term: SparseTerm, hidden: Array, head: Head, rest: Rest, with_gradient: bool
) -> tuple[Array, Array, Gradients]:
    """(total, values [N], (d_hidden [N, D], d_weight)), tile by tile; without gradient both are None."""
    rows, tau = rest
    n = hidden.shape[0]
    count, size = row_tiles(n, max(8, min(ROWS, TILE // kept_columns(head))))
    tiles = jax.tree.map(lambda a: split_rows(a, count, size), (hidden, rows))

    def tile(d_weight: Any, part: tuple[Array, Rows]) -> tuple[Any, tuple[Array, Any]]:
        x, entries = part
        logits = tile_logits(x, head)
        values, gradient = _rows(term, logits, head, entries, tau, with_gradient)
        if gradient is None:
            return None, (values, None)
        # A row of weight 0 has gradient 0, and 0 * NaN would still poison the whole head.
        clean = jnp.where(entries[2][:, None] != 0, x, 0)
        d_hidden, d_weight = _products(gradient, logits, clean, head, d_weight)
        return d_weight, (values, d_hidden)

    start = jnp.zeros(head.weight.shape, jnp.float32) if with_gradient else None
    d_weight, (values, d_hidden) = lax.scan(tile, start, tiles)
    values, weight = values.reshape(count * size)[:n], rows[2]
    total = jnp.sum(jnp.where(weight != 0, tau * tau * weight * values, 0.0))
    if d_hidden is not None:
        d_hidden = d_hidden.reshape(count * size, -1)[:n]
    return total, values, (d_hidden, d_weight)


def _products(
    gradient: Float[Array, "C V"],
    logits: Float[Array, "C V"],
    hidden: Float[Array, "C D"],
    head: Head,
    d_weight: Float[Array, "X Y"],
) -> tuple[Float[Array, "C D"], Float[Array, "X Y"]]:
    """(d_hidden, d_weight + this tile's part), by chunks of columns: d_weight is added to in place, not as a whole."""
    count, size = row_tiles(kept_columns(head), COLUMNS)
    axis = 0 if head.vocab_major else 1

    def chunk(at: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        d_hidden, d_weight = state
        part = chunk_of(head, at, size)
        raw, slope = (lax.dynamic_slice_in_dim(whole, part.start, size, 1) for whole in (logits, gradient))
        if part.masked:
            slope = jnp.where((part.ids != NO_ID)[None, :], slope, 0.0)
        more, columns = tile_gradients(slope, raw, hidden, part.head)
        columns = columns + lax.dynamic_slice_in_dim(d_weight, part.start, size, axis)
        return d_hidden + more, lax.dynamic_update_slice_in_dim(d_weight, columns, part.start, axis)

    return lax.fori_loop(0, count, chunk, (jnp.zeros(hidden.shape, jnp.float32), d_weight))


def _rows(
    term: SparseTerm, logits: Float[Array, "C V"], head: Head, rows: Rows, tau: Float[Array, ""], with_gradient: bool
) -> tuple[Float[Array, "C"], Float[Array, "C V"] | None]:
    """Values of one tile, and d total / d logits."""
    ids, probs, weight = rows[:3]
    axis, width = head.vocab_axis, kept_columns(head)
    row = lax.broadcasted_iota(jnp.int32, ids.shape, 0)
    # The column on this device; out of range, hence dropped, for an entry that is empty or another device's.
    column = ids - first_column(head)
    here = (probs != 0) & (column >= 0) & (column < width)
    column = jnp.where(here, column, width)

    logits = logits / tau
    own = jnp.where(here, jnp.take_along_axis(logits, jnp.minimum(column, width - 1), 1), 0.0)
    others = logits.at[row, column].set(MASKED, mode="drop")
    # Written once for the sum and the gradient, see tiles.tile_softmax.
    top = vocab_max(others, axis)
    exp = lax.optimization_barrier(jnp.exp(others - top))
    total = vocab_sum(exp, axis)
    parts = (sum_over_axis(own, axis), top[:, 0], total[:, 0])
    values, slopes = evaluate(term, rows, *parts, head.vocab_size, tau, with_gradient)
    if slopes is None:
        return values, None
    in_tail, at_entries = slopes
    gradient = jnp.where(weight[:, None] != 0, exp * in_tail[:, None], 0.0)
    return values, gradient.at[row, column].add(at_entries, mode="drop")
