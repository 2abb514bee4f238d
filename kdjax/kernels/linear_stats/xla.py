"""Tiled over rows and, within them, over chunks of the vocabulary: per chunk one matrix product (two for a pair).

A chunk's logits are used up while they are in the cache: each row keeps a running maximum and sums relative to it, as
flash attention does. Temporary memory is O(ROWS * COLUMNS), independent of N and V.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kdjax.kernels.linear_stats.api import LinearStats, PairStats
from kdjax.kernels.tiles import (
    MASKED,
    Chunk,
    chunk_of,
    kept_columns,
    mask_chunk,
    row_tiles,
    split_rows,
    sum_over_axis,
    tile_logits,
)
from kdjax.kernels.topk.api import TopK
from kdjax.kernels.topk.xla import merge, tile_top_k
from kdjax.types import Head

ROWS = 1024  # rows a tile: the head is read once per tile
COLUMNS = 1024  # of the vocabulary a chunk: 4 MiB of float32 logits

Best = tuple[Array, Array]  # values, ids [C, K], best first


class Sums(NamedTuple):
    """What is known of the columns so far, [C] each, with e = exp(logit - top) summed over all but the label's column.

    The label is left out, so that nothing has to be subtracted later where it has nearly all of the probability.
    """

    top: Array  # the largest logit, the label's too
    argmax: Array  # the lowest id that has it
    label: Array  # the label's logit, or MASKED as long as it has not come
    other: Array  # sum e
    squares: Array  # sum e^2
    weighted: Array  # sum e (logit - top)
    best: Best | None


def linear_stats(hidden: Float[Array, "N D"], head: Head, labels: Int[Array, "N"], *, top_k: int = 0) -> LinearStats:
    """See the package."""

    def tile(rows: tuple[Array, Array]) -> Sums:
        def add(at: Array, sums: Sums) -> Sums:
            return _add(sums, rows[0], chunk_of(head, at, size), rows[1])[0]

        return lax.fori_loop(0, count, add, _start(rows[1], top_k))

    count, size = row_tiles(kept_columns(head), COLUMNS)
    sums = _map_tiles(tile, (hidden, labels))
    return _finish(_over_axis(sums, head.vocab_axis)[0])


class Seen(NamedTuple):
    """What one more chunk did. shifted: logit - top [C, X]; other: e, 0 at the label; rise: new top - old top [C]."""

    shifted: Array
    other: Array
    rise: Array


def linear_pair_stats(
    hidden: Float[Array, "N D"],
    head: Head,
    teacher_hidden: Float[Array, "N E"],
    teacher_head: Head,
    labels: Int[Array, "N"],
    *,
    top_k: int = 0,
) -> PairStats:
    """See the package."""
    axis = head.vocab_axis
    count, size = row_tiles(kept_columns(head), COLUMNS)

    def tile(rows: tuple[Array, Array, Array]) -> tuple[Sums, Sums, Array, Array]:
        x, y, label = rows

        def add(at: Array, state: tuple[Sums, Sums, Array, Array]) -> tuple[Sums, Sums, Array, Array]:
            sums_q, sums_p, by_p, by_q = state
            new_q, q = _add(sums_q, x, chunk_of(head, at, size), label)
            new_p, p = _add(sums_p, y, chunk_of(teacher_head, at, size), label)
            gap = p.shifted - q.shifted
            by_p = _risen(by_p, sums_p.other, p.rise, q.rise - p.rise) + jnp.sum(p.other * gap, -1)
            by_q = _risen(by_q, sums_q.other, q.rise, q.rise - p.rise) + jnp.sum(q.other * gap, -1)
            return new_q, new_p, by_p, by_q

        zero = jnp.zeros(label.shape, jnp.float32)
        return lax.fori_loop(0, count, add, (_start(label, top_k), _start(label, top_k), zero, zero))

    # by_p, by_q: sums of e_p gap and e_q gap, again without the label; gap = (logit - top) of teacher - of student.
    part_q, part_p, by_p, by_q = _map_tiles(tile, (hidden, teacher_hidden, labels))
    (sums_q, rise_q), (sums_p, rise_p) = _over_axis(part_q, axis), _over_axis(part_p, axis)
    by_p = sum_over_axis(_risen(by_p, part_p.other, rise_p, rise_q - rise_p), axis)
    by_q = sum_over_axis(_risen(by_q, part_q.other, rise_q, rise_q - rise_p), axis)
    (e_q, total_q), (e_p, total_p) = _totals(sums_q), _totals(sums_p)
    gap = (sums_p.label - sums_p.top) - (sums_q.label - sums_q.top)
    log_ratio = jnp.log(total_p) - jnp.log(total_q)
    return PairStats(
        student=_finish(sums_q),
        teacher=_finish(sums_p),
        kl=(by_p + e_p * gap) / total_p - log_ratio,
        reverse_kl=log_ratio - (by_q + e_q * gap) / total_q,
    )


def _start(labels: Int[Array, "C"], top_k: int) -> Sums:
    zero = jnp.zeros(labels.shape, jnp.float32)
    none = jnp.zeros((*labels.shape, top_k), jnp.int32)
    best = (jnp.full(none.shape, -jnp.inf, jnp.float32), none) if top_k else None
    return Sums(zero + MASKED, jnp.zeros_like(labels), zero + MASKED, zero, zero, zero, best)


def _add(sums: Sums, hidden: Array, chunk: Chunk, labels: Array) -> tuple[Sums, Seen]:
    """The sums with one more chunk."""
    # Behind a barrier: written once. Else the compiler computes it again in every reduction that reads it.
    logits = lax.optimization_barrier(mask_chunk(tile_logits(hidden, chunk.head), chunk))
    highest = jnp.max(logits, -1)
    top = jnp.maximum(sums.top, highest)
    rise = top - sums.top
    shifted = logits - top[:, None]
    is_label = labels[:, None] == chunk.ids[None, :]
    other = lax.optimization_barrier(jnp.where(is_label, 0.0, jnp.exp(shifted)))
    place = jnp.clip(labels - chunk.first, 0, logits.shape[1] - 1)
    here = chunk.ids[place] == labels
    # The first column that holds the maximum: two plain reductions are faster here than one over (value, index) pairs.
    argmax = jnp.min(jnp.where(logits == highest[:, None], chunk.ids[None, :], 2**31 - 1), -1)
    again = jnp.exp(-rise)
    added = Sums(
        top=top,
        argmax=jnp.where(highest > sums.top, argmax, sums.argmax),
        label=jnp.where(here, jnp.take_along_axis(logits, place[:, None], 1)[:, 0], sums.label),
        other=sums.other * again + jnp.sum(other, -1),
        squares=sums.squares * again * again + jnp.sum(other * other, -1),
        weighted=_risen(sums.weighted, sums.other, rise, -rise) + jnp.sum(other * shifted, -1),
        best=None if sums.best is None else _better(sums.best, logits, chunk),
    )
    return added, Seen(shifted, other, rise)


def _risen(weighted: Array, other: Array, rise: Array, shift: Array) -> Array:
    """sum e x after top has risen, which makes e smaller, and x has become x + shift."""
    return (weighted + shift * other) * jnp.exp(-rise)


def _better(best: Best, logits: Float[Array, "C X"], chunk: Chunk) -> Best:
    k = best[0].shape[1]
    values, columns = tile_top_k(logits, chunk.head, min(k, logits.shape[1]))
    # Chunks come in the order of their columns: on ties the lower id is already among the best, and comes first.
    both = jnp.concatenate([best[0], values], 1), jnp.concatenate([best[1], chunk.ids[columns]], 1)
    values, places = lax.top_k(both[0], k)
    return values, jnp.take_along_axis(both[1], places, 1)


def _over_axis(sums: Sums, axis: str | None) -> tuple[Sums, Array]:
    """(sums over the columns of all devices, rise of top from this device's to that of all)."""
    if axis is None:
        return sums, jnp.zeros_like(sums.top)
    top = lax.pmax(sums.top, axis)
    rise = top - sums.top
    again = jnp.exp(-rise)
    other, squares, weighted = lax.psum(
        (sums.other * again, sums.squares * again * again, _risen(sums.weighted, sums.other, rise, -rise)), axis
    )
    argmax = lax.pmin(jnp.where(sums.top == top, sums.argmax, 2**31 - 1), axis)
    best = None if sums.best is None else merge(*sums.best, axis, sums.best[0].shape[1])
    return Sums(top, argmax, lax.pmax(sums.label, axis), other, squares, weighted, best), rise


def _totals(sums: Sums) -> tuple[Array, Array]:
    """(e of the label, sum of e over all columns)."""
    own = jnp.exp(sums.label - sums.top)
    return own, sums.other + own


def _finish(sums: Sums) -> LinearStats:
    own, total = _totals(sums)
    label, log_total = sums.label - sums.top, jnp.log(total)
    top = None
    if sums.best is not None:
        # Not values - logz: at logits of 1e4 logz has lost its third decimal.
        top = TopK(sums.best[1], (sums.best[0] - sums.top[:, None]) - log_total[:, None])
    return LinearStats(
        logz=sums.top + log_total,
        entropy=log_total - (sums.weighted + own * label) / total,
        label_logp=label - log_total,
        sum_p_sq=(sums.squares + own * own) / (total * total),
        max_logp=-log_total,
        argmax=sums.argmax,
        brier=(sums.squares + sums.other * sums.other) / (total * total),
        top=top,
    )


def _map_tiles(tile: Callable[[Any], Any], rows: tuple[Array, ...]) -> Any:
    """`tile` over row tiles of all arrays; results are cut back to N rows. N = 0 gives empty results."""
    n = rows[0].shape[0]
    count, size = row_tiles(n, ROWS)
    result = lax.map(tile, tuple(split_rows(array, count, size) for array in rows))
    return jax.tree.map(lambda a: a.reshape(count * size, *a.shape[2:])[:n], result)
