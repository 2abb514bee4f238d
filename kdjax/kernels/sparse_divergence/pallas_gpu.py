"""Mosaic GPU (Hopper): neither logits nor rows of the head are gathered; the gradient is formed in the forward pass.

For some rows at a time:
  1 statistics  a pass of tiles over the vocabulary (`_gpu.visiting_pass`): the logits at the entries, which are read
                out and masked, and the maximum and the sum of exponentials of all other columns, the tail.
  2 gradient    of the logits, [C, V] in bfloat16 (`_gpu.vocab_pass`): a multiple of those exponentials. XLA puts the K
                numbers in at the entries, over whatever is there, and makes d_hidden and d_weight of it with two matrix
                products (cuBLAS).
Four products of N x D x V with gradient and one without, against xla.py's three and one, which move all logits in
float32; see linear_divergence. Counted, not measured: compiled, not run.

A tile must know its entries. They are laid out before in rounds: a round is one entry, or none, of each of 64 rows, all
in one tile, and a tile has as many rounds as the row with the most entries there. Where those of a tile begin is a
table. So a tile asks for nothing but its rounds, mostly one or two, and each is a compare and a select per element. If
no two rows had entries in one tile there would be 64 K rounds, and so long the lists are: 512 K B a row, whatever V is.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kdjax.kernels import _dispatch, _gpu, _gpu_block_sizes
from kdjax.kernels._gpu import MASKED, ROW_LAYOUT, START, Visit, along
from kdjax.kernels._gpu_block_sizes import GROUP, SLICE
from kdjax.kernels.sparse_divergence.api import SparseTerm
from kdjax.kernels.sparse_divergence.rows import Rows, evaluate
from kdjax.kernels.tiles import first_column, formed_gradients, head_width, split_rows, tile_gradients
from kdjax.types import Head

CHUNK_BYTES = 256 * 2**20  # of the gradient of the logits and the rounds: 768 rows at V = 151936 and K = 64

Rest = tuple[Rows, Array]  # without gradient; the second is tau


def declines(target: _dispatch.Target, hidden: Array, head: Head, *_: Any) -> str | None:
    """Why not, in one sentence, or None."""
    return _gpu.declines(target, hidden, head)


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
    if hidden.shape[0] == 0:
        return jnp.zeros((), jnp.float32), jnp.zeros((0,), jnp.float32)
    total, values = _divergence(term, hidden, head, ((ids, probs, weight, tail, teacher_entropy), tau))
    return total, lax.stop_gradient(values)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(term: SparseTerm, hidden: Array, head: Head, rest: Rest) -> tuple[Array, Array]:
    return _chunks(term, hidden, head, rest, False)[:2]


def _forward(term: SparseTerm, hidden: Array, head: Head, rest: Rest) -> tuple[Any, Any]:
    total, values, d_hidden, d_weight = _chunks(term, hidden, head, rest, True)
    return (total, values), (d_hidden.astype(hidden.dtype), d_weight.astype(head.weight.dtype), head, rest)


def _backward(term: SparseTerm, kept: Any, cotangents: Any) -> tuple[Array, Head, Any]:
    return formed_gradients(kept, cotangents[0])


_divergence.defvjp(_forward, _backward)


def _chunks(term: SparseTerm, hidden: Array, head: Head, rest: Rest, with_gradient: bool) -> tuple[Any, ...]:
    """(total, values [N], d_hidden [N, D], d_weight), some rows at a time; without gradient the last two are None."""
    rows, tau = rest
    (n, k), weight = rows[0].shape, rows[2]
    bytes_ = 2 * 4 * GROUP * k + (2 * head_width(head) if with_gradient else 0)  # of a row
    count, size = _gpu_block_sizes.chunks(n, max(bytes_, 1), CHUNK_BYTES, 1)
    cut = jax.tree.map(lambda a: split_rows(a, count, size), (hidden, rows))

    def chunk(d_weight: Any, part: tuple[Array, Rows]) -> tuple[Any, tuple[Array, Any]]:
        values, gradient = _rows(term, *part, head, tau, with_gradient)
        if gradient is None:
            return None, (values, None)
        # A row of weight 0 has gradient 0, and 0 * NaN would still poison the whole head.
        clean = jnp.where(part[1][2][:, None] != 0, part[0], 0)
        bare = dataclasses.replace(head, logit_scale=1.0, soft_cap=0.0)  # their slopes are in the gradient
        d_hidden, more = tile_gradients(gradient, gradient, clean, bare)
        return more if count == 1 else d_weight + more, (values, d_hidden)

    if count == 1:
        d_weight, (values, d_hidden) = chunk(None, jax.tree.map(lambda a: a[0], cut))
    else:
        start = jnp.zeros(head.weight.shape, jnp.float32) if with_gradient else None
        d_weight, stacked = lax.scan(chunk, start, cut)
        values, d_hidden = jax.tree.map(lambda a: a.reshape(count * size, *a.shape[2:]), stacked)
    values = values[:n]
    total = jnp.sum(jnp.where(weight != 0, tau * tau * weight * values, 0.0))
    return total, values, None if d_hidden is None else d_hidden[:n], d_weight


def _rows(
    term: SparseTerm, hidden: Float[Array, "C D"], rows: Rows, head: Head, tau: Float[Array, ""], with_gradient: bool
) -> tuple[Float[Array, "C"], Array | None]:
    """Values of some rows, whole blocks of them, and d total / d bare product [C, W] in bfloat16."""
    ids, probs, weight = rows[:3]
    axis, limit = head.vocab_axis, _gpu.local_columns(head)
    column = ids - first_column(head)
    # On this device; those of unknown id, whose number is NaN, are on none.
    here = (probs != 0) & (column >= 0) & (column < limit)
    scalars = jnp.stack([limit, 1.0 / tau])
    own, top, total = _statistics(hidden, head, column, here, scalars)
    if axis is not None:
        highest = lax.pmax(top, axis)
        own, total = lax.psum((own, total * jnp.exp(top - highest)), axis)
        top = highest
    values, slopes = evaluate(term, rows, own / tau, top, total, head.vocab_size, tau, with_gradient)
    if slopes is None:
        return values, None
    in_tail, at_entries = slopes
    gradient = _gradient(hidden, head, jnp.stack([top, in_tail, weight.astype(jnp.float32)]), scalars)
    at_entries = jnp.where(weight[:, None] != 0, at_entries * _slope(own, head), 0.0)
    # Places that are none are behind the end, each another, so that no two writes are to one place.
    place = jnp.where(here, column, gradient.shape[1] + jnp.arange(ids.shape[1])[None, :])
    row = lax.broadcasted_iota(jnp.int32, ids.shape, 0)
    put = gradient.at[row, place].set(at_entries.astype(gradient.dtype), mode="drop", unique_indices=True)
    return values, put[: ids.shape[0], : head_width(head)]


class Rounds(NamedTuple):
    """Entries in rounds; B blocks of 64 rows, T tiles of columns, S rounds at most.

    starts: of block b, tile t has the rounds starts[b, t] to starts[b, t + 1]. columns: the column that a round looks
    for in each row, -1 if it has none. place: the round that each entry is in.
    """

    starts: Int[Array, "B T1"]
    columns: Int[Array, "B S 64"]
    place: Int[Array, "C K"]


def _rounds(column: Int[Array, "C K"], here: Array, width: int, tile: int) -> Rounds:
    """Of the entries that are `here`: their columns ascend within each row."""
    (c, k), tiles = column.shape, -(-width // tile)
    blocks, most = c // GROUP, max(min(GROUP * k, tiles * min(k, tile)), 1)
    of = jnp.where(here, column // tile, tiles)
    # How many of the row's entries in the same tile come before: its number in the row less that of the tile's first.
    last = jnp.pad(lax.cummax(jnp.where(here, of, -1), axis=1), ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    number = jnp.cumsum(here, 1, dtype=jnp.int32)
    turn = number - lax.cummax(jnp.where(here & (of > last), number, 0), axis=1)
    row = lax.broadcasted_iota(jnp.int32, column.shape, 0)
    block = row // GROUP
    rounds = jnp.zeros((blocks, tiles), jnp.int32).at[block, of].max(turn + 1, mode="drop")
    starts = jnp.pad(jnp.cumsum(rounds, 1), ((0, 0), (1, 0)))
    place = jnp.where(here, starts[block, jnp.minimum(of, tiles - 1)] + turn, most)
    columns = jnp.full((blocks, most, GROUP), -1, jnp.int32).at[block, place, row % GROUP].set(column, mode="drop")
    return Rounds(starts, columns, place)


def _statistics(
    hidden: Float[Array, "C D"], head: Head, column: Int[Array, "C K"], here: Array, scalars: Float[Array, "2"]
) -> tuple[Float[Array, "C K"], Float[Array, "C"], Float[Array, "C"]]:
    """Pass 1: the logits at the entries that are here, else 0; of the tail's logits / tau the maximum and the sum."""
    tile, _ = _gpu_block_sizes.choose(1, 0)
    rounds = _rounds(column, here, head_width(head), tile)

    def visit(logits: list[Array], column: Array, block: Array, at: Array, reads: list[Any], writes: list[Any]) -> Any:
        starts, columns = reads

        def one(place: Array, z: Array) -> Array:
            wanted = plgpu.load(columns, (block, place), layout=ROW_LAYOUT, optimized=False)
            hit = column == along(wanted, column)
            writes[0][block, place] = jnp.sum(jnp.where(hit, z, 0.0), 1)
            return jnp.where(hit, MASKED, z)

        return [lax.fori_loop(starts[block, at], starts[block, at + 1], one, logits[0])]

    def start() -> dict[str, Array]:
        return {"sum": jnp.zeros(GROUP, jnp.float32), "top": jnp.full(GROUP, START, jnp.float32)}

    def tail(
        state: dict[str, Array], logits: list[Array], column: Array, rows: list[Array], known: list[Array], _: Any
    ) -> dict[str, Array]:
        z = jnp.where(column < known[0].astype(jnp.int32), logits[0] * known[1], MASKED)
        top = jnp.maximum(state["top"], jnp.max(z, 1))
        total = state["sum"] * jnp.exp(state["top"] - top)
        for at in range(0, z.shape[1], SLICE):
            piece = z[:, at : at + SLICE]
            total += jnp.sum(jnp.exp(piece - along(top, piece)), 1)
        return {"sum": total, "top": top}

    written = jax.ShapeDtypeStruct(rounds.columns.shape, jnp.float32)
    parts, (found,) = _gpu.visiting_pass(
        (hidden, head),
        Visit(visit, [rounds.starts, rounds.columns], [written]),
        jnp.zeros((1, hidden.shape[0]), jnp.float32),
        scalars,
        start,
        tail,
        name="sparse_divergence_statistics",
    )
    sums, tops = parts[:, 0], parts[:, 1]
    top = jnp.max(tops, 0)
    row = lax.broadcasted_iota(jnp.int32, column.shape, 0)
    read = found[row // GROUP, jnp.minimum(rounds.place, found.shape[1] - 1), row % GROUP]
    return jnp.where(here, read, 0.0), top, jnp.sum(sums * jnp.exp(tops - top[None, :]), 0)


def _slope(logits: Float[Array, "C K"], head: Head) -> Float[Array, "C K"]:
    """d logit / d bare product."""
    slope = jnp.full_like(logits, head.logit_scale)
    return slope if head.soft_cap <= 0.0 else slope * (1.0 - jnp.square(logits * (1.0 / head.soft_cap)))


def _gradient(
    hidden: Float[Array, "C D"], head: Head, rows: Float[Array, "3 C"], scalars: Float[Array, "2"]
) -> Float[Array, "M W"]:
    """Pass 2: d total / d bare product of the tail, and anything at the entries. rows: top, in_tail, weight."""

    def tail(_: Any, logits: list[Array], column: Array, rows: list[Array], known: list[Array], store: Any) -> Any:
        top, in_tail, weight = rows
        for at in range(0, column.shape[1], SLICE):
            z, here = logits[0][:, at : at + SLICE], column[:, at : at + SLICE]
            live = (here < known[0].astype(jnp.int32)) & (along(weight, z) != 0.0)
            piece = jnp.exp(z * known[1] - along(top, z)) * along(in_tail, z) * head.logit_scale
            if head.soft_cap > 0.0:
                piece = piece * (1.0 - jnp.square(z * (1.0 / head.soft_cap)))
            store(at, jnp.where(live, piece, 0.0))
        return ()

    name = "sparse_divergence_gradient"
    return _gpu.vocab_pass([(hidden, head)], rows, scalars, lambda: (), tail, name=name, gradient=True)[1]
