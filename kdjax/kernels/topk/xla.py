"""Tiled over rows: per tile one matrix product, then an exact search in two stages.

Temporary memory is O(tile * V), independent of N.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kdjax.kernels.tiles import first_column, row_tiles, split_rows, tile_logits, vocab_max, vocab_sum
from kdjax.kernels.topk.api import TopK
from kdjax.types import Head

ROWS = 64  # rows a tile: 12 MiB of float32 logits at V = 49152
# Columns a group. On CPU, 64 rows of V = 49152, in ms (plain top_k -> groups of 32): k = 1: 3.3 -> 0.8,
# k = 16: 3.6 -> 1.2, k = 64: 4.9 -> 3.3, k = 100: 5.9 -> 4.0; groups of 16 and of 64 are a little slower somewhere.
GROUP = 32


def topk(hidden: Float[Array, "N D"], head: Head, k: int) -> TopK:
    """See the package."""
    n = hidden.shape[0]
    count, size = row_tiles(n, ROWS)
    tiles = split_rows(hidden, count, size)

    def tile(rows: Array) -> TopK:
        logits = tile_logits(rows, head)
        values, ids = tile_top_k(logits, head, k)
        top = vocab_max(logits, head.vocab_axis)
        # Not values - logz: at logits of 1e4 logz has lost its third decimal.
        return TopK(ids, (values - top) - jnp.log(vocab_sum(jnp.exp(logits - top), head.vocab_axis)))

    result = lax.map(tile, tiles) if count > 1 else jax.tree.map(lambda a: a[None], tile(tiles[0]))
    return jax.tree.map(lambda a: a.reshape(count * size, k)[:n], result)


def tile_top_k(logits: Float[Array, "C V"], head: Head, k: int) -> tuple[Float[Array, "C K"], Int[Array, "C K"]]:
    """(values, global ids) of the k largest entries of a tile of `tile_logits`, best first, lower id first on ties.

    k <= head.vocab_size. With `vocab_axis` they are those of all devices, from k candidates of each; a padding column
    is never among them.
    """
    values, columns = _local_top_k(logits, min(k, logits.shape[1]))
    return merge(values, first_column(head) + columns, head.vocab_axis, k)


def merge(
    values: Float[Array, "C L"], ids: Int[Array, "C L"], axis: str | None, k: int
) -> tuple[Float[Array, "C K"], Int[Array, "C K"]]:
    """The k best of every device's L best (in order, each with lower ids first on ties): k = L without an axis."""
    if axis is None:
        return values, ids
    # Devices in the order of their columns: an earlier place is a better value or, on ties, a lower id.
    values, ids = (lax.all_gather(part, axis, axis=1, tiled=True) for part in (values, ids))
    values, places = lax.top_k(values, k)
    return values, jnp.take_along_axis(ids, places, 1)


def _local_top_k(logits: Float[Array, "C V"], k: int) -> tuple[Float[Array, "C K"], Int[Array, "C K"]]:
    """`lax.top_k`."""
    padding = ((0, 0), (0, -logits.shape[1] % GROUP))
    maxima = lax.reduce_window(logits, -jnp.inf, lax.max, (1, GROUP), (1, GROUP), padding)
    return top_of_groups(logits, maxima, GROUP, k)


def top_of_groups(
    logits: Float[Array, "C V"], maxima: Float[Array, "C X"], group: int, k: int
) -> tuple[Float[Array, "C K"], Int[Array, "C K"]]:
    """`lax.top_k`, by way of the k groups of so many neighbouring columns whose maxima, X of them, are largest.

    They hold the whole top k: an entry of another group comes behind the maxima of k groups, each of which is larger or
    equal with a lower column (ties go to the lower group).
    """
    rows, width = logits.shape
    if 2 * k >= maxima.shape[1]:
        values, columns = lax.top_k(_one_zero(logits), k)
        return values, columns
    found = jnp.sort(
        lax.top_k(_one_zero(maxima), k)[1], -1
    )  # ascending: the candidates keep the order of their columns
    columns = (found[:, :, None] * group + lax.iota(jnp.int32, group)[None, None, :]).reshape(rows, k * group)
    inside = jnp.take_along_axis(logits, jnp.minimum(columns, width - 1), 1)
    values, places = lax.top_k(jnp.where(columns < width, _one_zero(inside), -jnp.inf), k)
    return values, jnp.take_along_axis(columns, places, 1)


def _one_zero(values: Float[Array, "C L"]) -> Float[Array, "C L"]:
    return jnp.where(values == 0.0, 0.0, values)  # top_k puts 0 before -0, whichever comes first
