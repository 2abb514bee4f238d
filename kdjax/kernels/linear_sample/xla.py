"""Tiled over rows: per tile one pass over blocks of columns, then a search from the blocks down to the column.

The pass keeps a tile's logits, and of every group of neighbouring columns the sum of exp(power (logit - block's top)).
A draw is searched for on three levels, blocks, groups of a block, columns of a group: on each, the first place whose
cumulative mass exceeds what is left of the number to find. So a draw reads V / COLUMNS + COLUMNS / GROUP + GROUP
numbers, and a sum is one of at most 64 addends or of few such sums: its error is some 1e-7 of the level's mass.
Temporary memory is O(tile * V), independent of N.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kdjax.kernels.linear_sample.api import Sample
from kdjax.kernels.tiles import (
    chunk_of,
    first_column,
    kept_columns,
    mask_chunk,
    row_tiles,
    split_rows,
    sum_over_axis,
    tile_logits,
)
from kdjax.types import Head

ROWS = 512  # rows a tile at most: the head is read once per tile
TILE = 2**24  # logits a tile at most: 64 MiB of float32, 341 rows of V = 49152, 110 of V = 151936
COLUMNS = 1024  # of the vocabulary a block
GROUP = 32  # columns a group
# A group of less mass, where the largest entry of the row has 1, counts as empty. In any other group some column has
# 1 / GROUP of it, which is far from the smallest float32: the search never ends in a group without a column to take.
LEAST = 1e-30


class Blocks(NamedTuple):
    """What the pass knows of each block [X] of each row [C]; exp is relative to the block's own largest logit."""

    top: Array  # [X, C] largest logit / tau
    total: Array  # [X, C] sum e, e = exp(logit / tau - top)
    weighted: Array  # [X, C] sum e (logit / tau - top)
    kept: tuple[Array, Array] | None  # of each group sum e^power [X, C, G] and logits / tau [X, C, G, GROUP]


def linear_sample(
    hidden: Float[Array, "N D"], head: Head, uniforms: Float[Array, "N K"], tau: Float[Array, ""], power: float
) -> Sample:
    """See the package."""
    n = hidden.shape[0]
    count, size = row_tiles(n, max(8, min(ROWS, TILE // kept_columns(head))))
    tiles = tuple(split_rows(array, count, size) for array in (hidden, uniforms))
    result = lax.map(lambda rows: _tile(rows[0], rows[1], head, tau, power), tiles)
    return jax.tree.map(lambda a: a.reshape(count * size, *a.shape[2:])[:n], result)


def _tile(
    hidden: Float[Array, "C D"], uniforms: Float[Array, "C K"], head: Head, tau: Float[Array, ""], power: float
) -> Sample:
    axis = head.vocab_axis
    blocks = _pass(hidden, head, tau, power, uniforms.shape[1] > 0)
    top = jnp.max(blocks.top, 0)
    top = top if axis is None else lax.pmax(top, axis)
    below = blocks.top - top[None, :]
    scale = jnp.exp(below)
    total, weighted = sum_over_axis(
        (jnp.sum(scale * blocks.total, 0), jnp.sum(scale * (blocks.weighted + below * blocks.total), 0)), axis
    )
    log_total = jnp.log(total)
    ids, shifted = jnp.zeros(uniforms.shape, jnp.int32), jnp.zeros(uniforms.shape, jnp.float32)
    log_power_sum = jnp.zeros_like(log_total)
    if blocks.kept is not None:
        groups = blocks.kept[0] * jnp.exp(power * below)[:, :, None]
        if power != 1:
            log_power_sum = jnp.log(sum_over_axis(jnp.sum(groups, (0, 2)), axis)) - power * log_total
        groups = jnp.where(groups > LEAST, groups, 0.0)
        ids, shifted = _search(uniforms, groups, blocks.kept[1], top, head, power)
    return Sample(
        ids=ids,
        logp=shifted - log_total[:, None],
        log_power_sum=log_power_sum,
        entropy=log_total - weighted / total,
        max_logp=-log_total,
    )


def _block_size(head: Head) -> tuple[int, int, int]:
    """(number of blocks, columns a block, columns a group): whole groups, of GROUP columns if there are so many."""
    kept = kept_columns(head)
    group = min(GROUP, kept)
    count = -(-kept // COLUMNS)
    size = min(-(-kept // (count * group)) * group, kept // group * group)
    return -(-kept // size), size, group


def _pass(hidden: Float[Array, "C D"], head: Head, tau: Float[Array, ""], power: float, drawn: bool) -> Blocks:
    count, size, group = _block_size(head)
    rows = hidden.shape[0]

    def block(at: Int[Array, ""]) -> Blocks:
        chunk = chunk_of(head, at, size)
        # Behind barriers: written once, not computed again in every reduction that reads it.
        logits = lax.optimization_barrier(mask_chunk(tile_logits(hidden, chunk.head) / tau, chunk))
        top = jnp.max(logits, -1)
        shifted = logits - top[:, None]
        exp = lax.optimization_barrier(jnp.exp(shifted))
        weighted = jnp.sum(exp * shifted, -1)
        if not drawn:
            return Blocks(top, jnp.sum(exp, -1), weighted, None)
        mass = exp if power == 1 else jnp.exp(power * shifted)
        mass, logits = (whole.reshape(rows, size // group, group) for whole in (mass, logits))
        groups = jnp.sum(mass, -1)
        total = jnp.sum(groups, -1) if power == 1 else jnp.sum(exp, -1)
        return Blocks(top, total, weighted, (groups, logits))

    return lax.map(block, jnp.arange(count, dtype=jnp.int32))


def _search(
    uniforms: Float[Array, "C K"],
    groups: Float[Array, "X C G"],
    logits: Float[Array, "X C G L"],
    top: Float[Array, "C"],
    head: Head,
    power: float,
) -> tuple[Int[Array, "C K"], Float[Array, "C K"]]:
    """(ids, their logit / tau - top): the first columns whose cumulative mass exceeds uniforms * the row's mass."""
    axis, (_, size, group) = head.vocab_axis, _block_size(head)
    row = lax.broadcasted_iota(jnp.int32, uniforms.shape, 0)
    masses = jnp.sum(groups, -1).T
    mine = None
    if axis is None:
        rest = uniforms * jnp.sum(masses, -1, keepdims=True)
    else:  # the devices, in the order of their columns, are one level more
        parts = lax.all_gather(jnp.sum(masses, -1), axis, axis=1)
        device, rest = _find(parts[:, None, :], uniforms * jnp.sum(parts, -1, keepdims=True))
        mine = device == lax.axis_index(axis)
    block, rest = _find(masses[:, None, :], rest)
    place, rest = _find(groups.at[block, row].get(mode="promise_in_bounds"), rest)
    shifted = logits.at[block, row, place].get(mode="promise_in_bounds") - top[:, None, None]
    column, _ = _find(jnp.exp(power * shifted), rest)
    own = jnp.take_along_axis(shifted, column[:, :, None], 2)[:, :, 0]
    start = jnp.minimum(block * size, kept_columns(head) - size)
    ids = first_column(head) + start + place * group + column
    if mine is None:
        return ids, own
    return sum_over_axis((jnp.where(mine, ids, 0), jnp.where(mine, own, 0.0)), axis)


def _find(masses: Float[Array, "C J M"], point: Float[Array, "C K"]) -> tuple[Int[Array, "C K"], Float[Array, "C K"]]:
    """(place, what of the point lies behind the places before it); J = K, or 1 for the masses of all draws of a row.

    The place is the first that has mass and whose cumulative mass exceeds the point, so it is monotone in the point
    however the sums are rounded; if rounding leaves none, the last that has mass.
    """
    size = masses.shape[2]
    at = lax.iota(jnp.int32, size)[None, None, :]
    upto = (lax.iota(jnp.int32, size)[:, None] <= lax.iota(jnp.int32, size)[None, :]).astype(jnp.float32)
    edges = jnp.einsum("cjm,ml->cjl", masses, upto, precision=lax.Precision.HIGHEST)
    over = (edges > point[:, :, None]) & (masses > 0)
    first = jnp.min(jnp.where(over, at, size), -1)
    place = jnp.where(first < size, first, jnp.max(jnp.where(masses > 0, at, 0), -1))
    before = jnp.max(jnp.where(at < place[:, :, None], edges, 0.0), -1)
    return place, jnp.maximum(point - before, 0.0)
