"""Mosaic: tiles are recomputed, neither logits nor rows of the head are ever gathered.

Three passes over (rows, vocabulary), in blocks of both:
  1 statistics   the logits at the entries, read out of the blocks that they fall into, and the largest logit and the
                 sum of exponentials of all other columns.
  2 d_hidden     if a gradient is wanted; a multiple of those exponentials with K numbers put in at the entries.
  3 d_weight     in the backward rule: rows innermost, one block of the head's gradient accumulates in VMEM.
Five matrix products of N x D x V, against xla.py's three, and none of its traffic of logits: see linear_divergence.

A block looks for its entries only, some rows at a time: per step the lowest id that is left of each row, and as many
steps as the row with the most ids in this block has. A step is a compare and a select per element, in registers. So
nothing depends on how the head lies in memory, as it does with reads of single rows of it, which would cost a copy of
the whole head if D is no multiple of 128 or if it is bfloat16.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kdjax.kernels import _dispatch, _tpu
from kdjax.kernels._tpu import LANES, MASKED, START
from kdjax.kernels.sparse_divergence import block_sizes
from kdjax.kernels.sparse_divergence.api import SparseTerm
from kdjax.kernels.sparse_divergence.rows import Rows, evaluate
from kdjax.kernels.tiles import first_column, head_width, kept_columns, sum_over_axis, zero_tangents
from kdjax.types import Head

FAR = 2.0**30  # behind every column
CHUNK = 32  # rows; with 512 columns 16 registers of the 64

Ref = Any
Rest = tuple[Rows, Array]  # without gradient; the second is tau


def declines(target: _dispatch.Target, hidden: Array, head: Head, ids: Array, *_: Any) -> str | None:
    """Why not, in one sentence, or None."""
    reason = _tpu.declines(target, hidden, head.weight)
    if reason is None and _blocks(target, hidden, head, ids) is None:
        mib = _tpu.vmem_bytes(target.kind) >> 20
        reason = f"no block of width {hidden.shape[1]} with {ids.shape[1]} entries fits into its {mib} MiB of VMEM."
    return reason


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
    return _values(term, _Problem(hidden, head, rest), False)[:2]


def _forward(term: SparseTerm, hidden: Array, head: Head, rest: Rest) -> tuple[Any, Any]:
    problem = _Problem(hidden, head, rest)
    total, values, numbers = _values(term, problem, True)
    return (total, values), (hidden, head, rest, _d_hidden(problem, *numbers), numbers)


def _backward(term: SparseTerm, kept: Any, cotangents: Any) -> tuple[Array, Head, Any]:
    hidden, head, rest, d_hidden, (row, at_entries) = kept
    scale = sum_over_axis(cotangents[0], head.vocab_axis)  # the values are under stop-gradient
    row = row | {"in_tail": row["in_tail"] * scale}
    d_weight = _d_weight(_Problem(hidden, head, rest), row, at_entries * scale)
    zeros = zero_tangents(rest)
    return d_hidden * scale.astype(d_hidden.dtype), dataclasses.replace(head, weight=d_weight), zeros


_divergence.defvjp(_forward, _backward)


def _blocks(target: _dispatch.Target, hidden: Array, head: Head, ids: Array) -> tuple[int, int] | None:
    itemsize = max(hidden.dtype.itemsize, head.weight.dtype.itemsize)
    (n, width), k = hidden.shape, ids.shape[1]
    return block_sizes.choose(target.kind, n, kept_columns(head), width, k, itemsize)


class _Problem:
    """The arguments, and what follows from their shapes."""

    def __init__(self, hidden: Array, head: Head, rest: Rest):
        self.hidden, self.head, (self.rows, self.tau) = hidden, head, rest
        blocks = _blocks(_dispatch.target(), hidden, head, self.rows[0])
        if blocks is None:
            raise ValueError(f"hidden must be of a width that the kernel takes, got {hidden.shape[1]}. Use 'xla'.")
        self.size, self.columns = blocks
        self.count, self.width = -(-hidden.shape[0] // self.size), hidden.shape[1]
        self.weight, self.vocab_major = _tpu.in_memory_order(head)
        self.limit = _tpu.local_columns(head)
        self.sharpness = jnp.broadcast_to(1.0 / self.tau, (1,))
        # The entries' columns on this device, as float32, exact to 2^24; -1 where empty or another device's.
        ids, probs = self.rows[:2]
        column = ids - first_column(head)
        here = (probs != 0) & (column >= 0) & (column < head_width(head))
        self.ids = self.stored(jnp.where(here, column, -1).astype(jnp.float32), -1)

    def whole(self, array: Float[Array, "N X"], fill: float = 0) -> Float[Array, "M X"]:
        """Rows padded to whole blocks."""
        return jnp.pad(array, ((0, self.count * self.size - array.shape[0]), (0, 0)), constant_values=fill)

    def stored(self, array: Float[Array, "N K"], fill: float = 0) -> Float[Array, "M X"]:
        """Entries padded to whole registers, too."""
        more = block_sizes.up(max(array.shape[1], 1), LANES) - array.shape[1]
        return self.whole(jnp.pad(array, ((0, 0), (0, more)), constant_values=fill), fill)

    def head_block(self, place: int) -> pl.BlockSpec:
        """Of the head; `place` is that of the vocabulary blocks in the grid."""
        if self.vocab_major:
            return pl.BlockSpec((self.columns, self.width), lambda *at: (at[place], 0))
        return pl.BlockSpec((self.width, self.columns), lambda *at: (0, at[place]))

    def row_blocks(self, arrays: Sequence[Any], place: int) -> list[pl.BlockSpec]:
        """Of anything per row [M, X]; `place` is that of the row blocks in the grid."""
        return [pl.BlockSpec((self.size, array.shape[1]), lambda *at: (at[place], 0)) for array in arrays]

    def logits(self, hidden: Ref, weight: Ref) -> Float[Array, "R C"]:
        """Of a block, in a kernel, at temperature 1; behind the last column, anything."""
        raw = _tpu.dot(hidden[...], weight[...], 1, 1 if self.vocab_major else 0)
        return _tpu.squash(raw, self.head.logit_scale, self.head.soft_cap)


def _chunks(size: int, visit: Callable[[Any], None]) -> None:
    """In a kernel: rows of a block, so few at a time that they stay in registers while their entries are looked for."""
    chunk = CHUNK if size % CHUNK == 0 else 16  # whole registers, of bfloat16 as well

    def step(at: Array, _: None) -> None:
        visit(pl.ds(pl.multiple_of(at * chunk, chunk), chunk))

    lax.fori_loop(0, size // chunk, step, None)


def _find(
    ids: Float[Array, "R K"], start: Array, columns: int, visit: Callable[[Array, Array, Any], Any], state: Any
) -> Any:
    """In a kernel: state = visit(hit [R, C], mine [R, K], state) for all entries with start <= id < start + columns.

    In each visit a row has one entry or none: hit is its place in the block, mine among the entries.
    """
    first = start.astype(jnp.float32)
    inside = (ids >= first) & (ids < first + columns)
    steps = jnp.max(jnp.sum(inside.astype(jnp.float32), -1, keepdims=True)).astype(jnp.int32)
    column = lax.broadcasted_iota(jnp.int32, (ids.shape[0], columns), 1)

    def step(_: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        last, state = carry
        left = (ids > last) & (ids < first + columns)
        lowest = jnp.min(jnp.where(left, ids, FAR), -1, keepdims=True)
        return lowest, visit(column == (lowest - first).astype(jnp.int32), ids == lowest, state)

    return lax.fori_loop(0, steps, step, (jnp.full((ids.shape[0], 1), first - 0.5), state))[1]


def _statistics(problem: _Problem) -> tuple[Array, Array, Array]:
    """Pass 1: the logits / tau at the entries [N, K] (0 if another device's); of all other columns top and sum [N]."""
    columns = problem.columns
    blocks = -(-kept_columns(problem.head) // columns)

    def kernel(
        limit: Ref,
        sharpness: Ref,
        ids: Ref,
        hidden: Ref,
        weight: Ref,
        own: Ref,
        packed: Ref,
        tile: Ref,
        top: Ref,
        total: Ref,
    ) -> None:
        j = pl.program_id(1)

        @pl.when(j == 0)
        def _() -> None:
            own[...] = jnp.zeros_like(own)
            top[...] = jnp.full_like(top, START)
            total[...] = jnp.zeros_like(total)

        start = j * columns
        tile[...] = problem.logits(hidden, weight)

        def visit(hit: Array, mine: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            block, found = state
            value = jnp.sum(jnp.where(hit, block, 0.0), -1, keepdims=True)
            return jnp.where(hit, MASKED, block), jnp.where(mine, value, found)

        def chunk(rows: Any) -> None:
            logits = tile[rows, :] * sharpness[0]
            column = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
            block = jnp.where(column < limit[0] - start, logits, MASKED)
            block, own[rows, :] = _find(ids[rows, :], start, columns, visit, (block, own[rows, :]))
            old = top[rows, :]
            new = jnp.maximum(old, jnp.max(block, -1, keepdims=True))
            part = jnp.sum(jnp.exp(block - new), -1, keepdims=True)
            total[rows, :] = total[rows, :] * jnp.exp(old - new) + part
            top[rows, :] = new

        _chunks(problem.size, chunk)

        @pl.when(j == blocks - 1)
        def _() -> None:
            lane = lax.broadcasted_iota(jnp.int32, packed.shape, 1)
            packed[...] = jnp.where(lane == 0, top[...], total[...])

    hidden = problem.whole(problem.hidden)
    inputs = [problem.ids, hidden]
    packed = jax.ShapeDtypeStruct((hidden.shape[0], LANES), jnp.float32)
    results = [jax.ShapeDtypeStruct(problem.ids.shape, jnp.float32), packed]
    own, packed = pl.pallas_call(
        kernel,
        grid=(problem.count, blocks),
        in_specs=[_SMEM, _SMEM, *problem.row_blocks(inputs, 0), problem.head_block(1)],
        out_specs=problem.row_blocks(results, 0),
        out_shape=results,
        scratch_shapes=[
            pltpu.VMEM((problem.size, columns), jnp.float32),
            pltpu.VMEM((problem.size, 1), jnp.float32),
            pltpu.VMEM((problem.size, 1), jnp.float32),
        ],
        compiler_params=_tpu.compiler_params("parallel", "arbitrary"),
        name="sparse_divergence_statistics",
    )(problem.limit, problem.sharpness, *inputs, problem.weight)
    n, k = problem.rows[0].shape
    return own[:n, :k], packed[:n, 0], packed[:n, 1]


_SMEM = pl.BlockSpec(memory_space=pltpu.SMEM)


def _values(term: SparseTerm, problem: _Problem, with_gradient: bool) -> tuple[Array, Array, Any]:
    """(total, values [N], (numbers of a row, numbers of its entries [N, K]) for the gradient's passes or None)."""
    own, top, total = _statistics(problem)
    axis, weight = problem.head.vocab_axis, problem.rows[2]
    if axis is not None:
        highest = lax.pmax(top, axis)
        own, total = lax.psum((own, total * jnp.exp(top - highest)), axis)
        top = highest
    rest = (problem.head.vocab_size, problem.tau, with_gradient)
    values, slopes = evaluate(term, problem.rows, own, top, total, *rest)
    result = jnp.sum(jnp.where(weight != 0, problem.tau * problem.tau * weight * values, 0.0))
    if slopes is None:
        return result, values, None
    return result, values, ({"top": top, "in_tail": slopes[0]}, slopes[1])


def _gradient(
    problem: _Problem, limit: Ref, sharpness: Ref, ids: Ref, at_entries: Ref, row: Ref, tile: Ref, start: Array
) -> Float[Array, "R C"]:
    """In a kernel: d total / d bare product of a block, in the dtype of hidden; `tile` holds the logits."""
    columns = tile.shape[1]

    def chunk(rows: Any) -> None:
        top, in_tail, counts = (row[rows, at : at + 1] for at in range(3))
        logits, own = tile[rows, :], at_entries[rows, :]

        def visit(hit: Array, mine: Array, block: Array) -> Array:
            return jnp.where(hit, jnp.sum(jnp.where(mine, own, 0.0), -1, keepdims=True), block)

        # An entry may be far above the tail's top; it is overwritten.
        block = jnp.exp(logits * sharpness[0] - top) * in_tail
        block = _find(ids[rows, :], start, columns, visit, block)
        block = block * _tpu.squash_slope(logits, problem.head.logit_scale, problem.head.soft_cap)
        column = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        tile[rows, :] = jnp.where((column < limit[0] - start) & (counts != 0.0), block, 0.0)

    _chunks(problem.size, chunk)
    return tile[...].astype(problem.hidden.dtype)


def _numbers(problem: _Problem, row: dict[str, Array], at_entries: Array) -> list[Array]:
    """What the passes of the gradient read of each row: ids, numbers at the entries, (top, in_tail, counts)."""
    counts = (problem.rows[2] != 0).astype(jnp.float32)
    packed = jnp.stack([row["top"], row["in_tail"], counts], 1)
    return [problem.ids, problem.stored(at_entries), problem.whole(packed)]


def _d_hidden(problem: _Problem, row: dict[str, Array], at_entries: Array) -> Float[Array, "N D"]:
    """Pass 2. With a split head it is this device's part."""
    columns, dtype = problem.columns, problem.hidden.dtype
    blocks = -(-kept_columns(problem.head) // columns)

    def kernel(
        limit: Ref,
        sharpness: Ref,
        ids: Ref,
        at: Ref,
        row: Ref,
        hidden: Ref,
        weight: Ref,
        out: Ref,
        tile: Ref,
        *total: Ref,
    ) -> None:
        j, result = pl.program_id(1), total[0] if total else out

        @pl.when(j == 0)
        def _() -> None:
            result[...] = jnp.zeros_like(result)

        tile[...] = problem.logits(hidden, weight)
        gradient = _gradient(problem, limit, sharpness, ids, at, row, tile, j * columns)
        # What is no column may be NaN, and 0 * NaN would be added.
        w = weight[...]
        column = lax.broadcasted_iota(jnp.int32, w.shape, 0 if problem.vocab_major else 1)
        w = jnp.where(column < limit[0] - j * columns, w, 0)
        result[...] += _tpu.dot(gradient, w, 1, 0 if problem.vocab_major else 1)
        if total:

            @pl.when(j == blocks - 1)
            def _() -> None:
                out[...] = result[...].astype(dtype)

    inputs = [*_numbers(problem, row, at_entries), problem.whole(problem.hidden)]
    d_hidden = pl.pallas_call(
        kernel,
        grid=(problem.count, blocks),
        in_specs=[_SMEM, _SMEM, *problem.row_blocks(inputs, 0), problem.head_block(1)],
        out_specs=problem.row_blocks(inputs[-1:], 0)[0],
        out_shape=jax.ShapeDtypeStruct(inputs[-1].shape, dtype),
        scratch_shapes=[pltpu.VMEM((problem.size, columns), jnp.float32)]
        + [pltpu.VMEM((problem.size, problem.width), jnp.float32)] * (dtype != jnp.float32),
        compiler_params=_tpu.compiler_params("parallel", "arbitrary"),
        name="sparse_divergence_d_hidden",
    )(problem.limit, problem.sharpness, *inputs, problem.weight)
    return d_hidden[: problem.hidden.shape[0]]


def _d_weight(problem: _Problem, row: dict[str, Array], at_entries: Array) -> Float[Array, "X Y"]:
    """Pass 3: as the weight is stored."""
    columns, dtype = problem.columns, problem.weight.dtype

    def kernel(
        limit: Ref,
        sharpness: Ref,
        ids: Ref,
        at: Ref,
        row: Ref,
        hidden: Ref,
        weight: Ref,
        out: Ref,
        tile: Ref,
        *total: Ref,
    ) -> None:
        j, i, result = pl.program_id(0), pl.program_id(1), total[0] if total else out

        @pl.when(i == 0)
        def _() -> None:
            result[...] = jnp.zeros_like(result)

        tile[...] = problem.logits(hidden, weight)
        gradient, x = _gradient(problem, limit, sharpness, ids, at, row, tile, j * columns), hidden[...]
        result[...] += _tpu.dot(gradient, x, 0, 0) if problem.vocab_major else _tpu.dot(x, gradient, 0, 0)
        if total:

            @pl.when(i == problem.count - 1)
            def _() -> None:
                out[...] = result[...].astype(dtype)

    # A row of weight 0 has gradient 0, and 0 * NaN would still poison the whole head.
    clean = jnp.where(problem.rows[2][:, None] != 0, problem.hidden, 0)
    inputs = [*_numbers(problem, row, at_entries), problem.whole(clean)]
    shape = (columns, problem.width) if problem.vocab_major else (problem.width, columns)
    d_weight = pl.pallas_call(
        kernel,
        grid=(-(-head_width(problem.head) // columns), problem.count),
        in_specs=[_SMEM, _SMEM, *problem.row_blocks(inputs, 1), problem.head_block(0)],
        out_specs=problem.head_block(0),
        out_shape=jax.ShapeDtypeStruct(problem.weight.shape, dtype),
        scratch_shapes=[pltpu.VMEM((problem.size, columns), jnp.float32)]
        + [pltpu.VMEM(shape, jnp.float32)] * (dtype != jnp.float32),
        compiler_params=_tpu.compiler_params("parallel", "arbitrary"),
        name="sparse_divergence_d_weight",
    )(problem.limit, problem.sharpness, *inputs, problem.weight)
    return d_weight if problem.vocab_major == problem.head.vocab_major else d_weight.T
