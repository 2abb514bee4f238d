"""Tiled over rows: per tile one matrix product (two for a pair) and a few fused reductions over its logits.

Temporary memory is O(tile * V), independent of N. A row tile keeps the whole vocabulary, so no online rescaling is
needed and the products stay large.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kdjax.kernels.linear_stats.api import LinearStats, PairStats
from kdjax.kernels.tiles import row_tiles, split_rows, tile_logits
from kdjax.types import Head

ROWS = 64  # rows a tile: 12 MiB of float32 logits at V = 49152


def linear_stats(hidden: Float[Array, "N D"], head: Head, labels: Int[Array, "N"]) -> LinearStats:
    """See the package."""

    def tile(rows: tuple[Array, Array]) -> LinearStats:
        return _stats(tile_logits(rows[0], head), rows[1])[0]

    return _map_tiles(tile, (hidden, labels))


def linear_pair_stats(
    hidden: Float[Array, "N D"],
    head: Head,
    teacher_hidden: Float[Array, "N E"],
    teacher_head: Head,
    labels: Int[Array, "N"],
) -> PairStats:
    """See the package."""

    def tile(rows: tuple[Array, Array, Array]) -> PairStats:
        zq, zp = tile_logits(rows[0], head), tile_logits(rows[1], teacher_head)
        student, logq, q = _stats(zq, rows[2])
        teacher, logp, p = _stats(zp, rows[2])
        gap = logp - logq
        return PairStats(student, teacher, kl=jnp.sum(p * gap, -1), reverse_kl=-jnp.sum(q * gap, -1))

    return _map_tiles(tile, (hidden, teacher_hidden, labels))


def _stats(
    logits: Float[Array, "C V"], labels: Int[Array, "C"]
) -> tuple[LinearStats, Float[Array, "C V"], Float[Array, "C V"]]:
    """The statistics of a tile, its log-probabilities and its probabilities."""
    top = jnp.max(logits, -1, keepdims=True)
    shifted = logits - top
    exp = lax.optimization_barrier(jnp.exp(shifted))  # written once for all reductions, see tiles.tile_softmax
    total = jnp.sum(exp, -1)
    log_total = jnp.log(total)
    columns = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    # The first column that holds the maximum: two plain reductions are faster here than one over (value, index) pairs.
    argmax = jnp.min(jnp.where(logits == top, columns, logits.shape[1]), -1)
    label_logit = jnp.take_along_axis(shifted, labels[:, None], 1)[:, 0]
    stats = LinearStats(
        logz=top[:, 0] + log_total,
        entropy=log_total - jnp.sum(exp * shifted, -1) / total,
        label_logp=label_logit - log_total,
        sum_p_sq=jnp.sum(exp * exp, -1) / (total * total),
        max_logp=-log_total,
        argmax=argmax,
        brier=_brier(exp, total, columns, labels),
    )
    # Not logits - logz: at logits of 1e4 logz has lost its third decimal.
    return stats, shifted - log_total[:, None], exp / total[:, None]


def _brier(exp: Array, total: Array, columns: Array, labels: Array) -> Array:
    other = jnp.where(columns == labels[:, None], 0.0, exp)
    return (jnp.sum(other * other, -1) + jnp.square(jnp.sum(other, -1))) / (total * total)


def _map_tiles(tile: Callable[[Any], Any], rows: tuple[Array, ...]) -> Any:
    """`tile` over row tiles of all arrays; results are cut back to N rows. N = 0 gives empty results."""
    n = rows[0].shape[0]
    count, size = row_tiles(n, ROWS)
    tiles = tuple(split_rows(array, count, size) for array in rows)
    result = tile(tuple(array[0] for array in tiles)) if count == 1 else None
    if result is None:
        result = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), lax.map(tile, tiles))
    return jax.tree.map(lambda a: a[:n], result)
