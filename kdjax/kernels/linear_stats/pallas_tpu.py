"""Mosaic (TPU): grid (row blocks, vocabulary blocks), the vocabulary innermost, the state of `moments` in VMEM.

Each of the 128 lanes keeps its own running maximum and sums, over every 128th column, so that the inner loop is
elementwise: no reduction across lanes, and one move to a new maximum per block. The last block folds the lanes.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from kdjax.kernels import _dispatch, _tpu
from kdjax.kernels._tpu import LANES, START
from kdjax.kernels.linear_stats import block_sizes, moments
from kdjax.kernels.linear_stats.api import LinearStats, PairStats
from kdjax.kernels.linear_stats.moments import SUMS, State
from kdjax.kernels.tiles import first_column, kept_columns
from kdjax.kernels.topk import topk
from kdjax.types import Head

Side = tuple[Array, Head]  # hidden states and the head they go through

CHUNK = 32  # rows whose state stays in registers: 6 of 4 registers each, of 64; a pair has 15 and takes half


def linear_stats(hidden: Float[Array, "N D"], head: Head, labels: Int[Array, "N"], *, top_k: int = 0) -> LinearStats:
    """See the package."""
    state = _over_vocabulary(((hidden, head),), labels)
    return _with_top(moments.stats(state, _known(labels, head)), hidden, head, top_k)


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
    state = _over_vocabulary(((hidden, head), (teacher_hidden, teacher_head)), labels)
    pair = moments.pair_stats(state, _known(labels, head))
    return dataclasses.replace(
        pair,
        student=_with_top(pair.student, hidden, head, top_k),
        teacher=_with_top(pair.teacher, teacher_hidden, teacher_head, top_k),
    )


def _with_top(stats: LinearStats, hidden: Array, head: Head, top_k: int) -> LinearStats:
    """A second pass: k running candidates per lane would cost this kernel more than the product that it saves."""
    return dataclasses.replace(stats, top=topk(hidden, head, top_k)) if top_k else stats


def declines(target: _dispatch.Target, *arguments: Any) -> str | None:
    """See `_dispatch.choose`; arguments: hidden and head of the student, then those of the teacher, if any."""
    sides = tuple((hidden, head) for hidden, head in itertools.pairwise(arguments) if isinstance(head, Head))
    reason = _tpu.declines(target, *(array for hidden, head in sides for array in (hidden, head.weight)))
    if reason is None and _block(target, sides) is None:
        widths = " and ".join(str(hidden.shape[1]) for hidden, _ in sides)
        reason = f"blocks of width {widths} do not fit into {_tpu.vmem_bytes(target.kind) >> 20} MiB of VMEM."
    return reason


def _block(target: _dispatch.Target, sides: tuple[Side, ...]) -> tuple[int, int] | None:
    (hidden, head), itemsize = sides[0], max(a.dtype.itemsize for h, w in sides for a in (h, w.weight))
    widths = tuple(hidden.shape[1] for hidden, _ in sides)
    return block_sizes.choose(target.kind, hidden.shape[0], kept_columns(head), widths, itemsize)


def _known(labels: Int[Array, "N"], head: Head) -> Bool[Array, "N"]:
    return (labels >= 0) & (labels < head.vocab_size)


def _over_vocabulary(sides: tuple[Side, ...], labels: Int[Array, "N"]) -> State:
    """The state [N] after all columns, those of other devices too."""
    head, axis = sides[0][1], sides[0][1].vocab_axis
    if labels.shape[0] == 0:
        lanes = jnp.zeros((0, LANES), jnp.float32)
    else:
        lanes = _call(sides, _tpu.local_labels(head, labels), _tpu.local_columns(head))
    state = {name: lanes[:, at] for at, name in enumerate(moments.names(len(sides)))}
    for side in range(len(sides)):
        state[f"column{side}"] = state[f"column{side}"].astype(jnp.int32) + first_column(head)
    if axis is None:
        return state
    return moments.folded(state, lambda x: lax.pmax(x, axis), lambda x: lax.pmin(x, axis), lambda s: lax.psum(s, axis))


def _call(sides: tuple[Side, ...], labels: Int[Array, "N"], limit: Int[Array, "1"]) -> Float[Array, "N 128"]:
    """The kernel over this device's columns: per row its state, in the first lanes."""
    target = _dispatch.target()
    block = _block(target, sides)
    if block is None:
        raise ValueError(f"hidden must fit into the kernel; {declines(target, *itertools.chain(*sides))} Use 'xla'.")
    rows, columns = block
    count, width = labels.shape[0], kept_columns(sides[0][1])
    grid = (pl.cdiv(count, rows), pl.cdiv(width, columns))
    specs = [pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec((rows, 1), lambda i, j: (i, 0))]
    operands, heads, traffic = [limit, labels[:, None]], [], 0
    for hidden, head in sides:
        weight, vocab_major = _tpu.in_memory_order(head)
        d = hidden.shape[1]
        specs.append(pl.BlockSpec((rows, d), lambda i, j: (i, 0)))
        if vocab_major:
            specs.append(pl.BlockSpec((columns, d), lambda i, j: (j, 0)))
        else:
            specs.append(pl.BlockSpec((d, columns), lambda i, j: (0, j)))
        operands += [hidden, weight]
        heads.append(dataclasses.replace(head, vocab_major=vocab_major))  # as the kernel reads it, weight aside
        traffic += hidden.nbytes + grid[0] * weight.nbytes
    lanes = [jnp.int32 if name.startswith("column") else jnp.float32 for name in moments.names(len(sides))]
    return pl.pallas_call(
        functools.partial(_kernel, heads),
        grid=grid,
        in_specs=specs,
        out_specs=pl.BlockSpec((rows, LANES), lambda i, j: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((count, LANES), jnp.float32),
        scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32) for _ in sides]
        + [pltpu.VMEM((rows, LANES), dtype) for dtype in lanes],
        compiler_params=_tpu.compiler_params("parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=2 * count * width * sum(hidden.shape[1] for hidden, _ in sides),
            transcendentals=len(sides) * count * width,
            bytes_accessed=traffic,
        ),
        name="linear_stats" if len(sides) == 1 else "linear_pair_stats",
    )(*operands)


def _kernel(heads: list[Head], limit: Any, labels: Any, *refs: Any) -> None:
    """limit: SMEM [1]; labels [R, 1], local; refs: hidden and weight of each side, result, logits, state."""
    count = len(heads)
    inputs, result, tiles = refs[: 2 * count], refs[2 * count], refs[2 * count + 1 : 3 * count + 1]
    lanes = dict(zip(moments.names(count), refs[3 * count + 1 :], strict=True))
    (rows, columns), block = tiles[0].shape, pl.program_id(1)
    chunk = min(rows, CHUNK // count)

    @pl.when(block == 0)
    def _begin() -> None:
        for name, ref in lanes.items():
            ref[...] = jnp.full(ref.shape, START if name.startswith("top") else 0, ref.dtype)

    for head, hidden, weight, tile in zip(heads, inputs[::2], inputs[1::2], tiles, strict=True):
        tile[...] = _tpu.block_logits(hidden[...], weight[...], head.vocab_major, head, block * columns, limit[0])

    def add(at: Array, _: None) -> None:
        here = pl.ds(pl.multiple_of(at * chunk, chunk), chunk)
        state = _with_block(
            {name: ref[here, :] for name, ref in lanes.items()},
            [tile[here, :] for tile in tiles],
            labels[here, :] - block * columns,
            block * (columns // LANES),
        )
        for name, ref in lanes.items():
            ref[here, :] = state[name]

    lax.fori_loop(0, rows // chunk, add, None)

    @pl.when(block == pl.num_programs(1) - 1)
    def _end() -> None:
        def fold(at: Array, _: None) -> None:
            here = pl.ds(pl.multiple_of(at * chunk, chunk), chunk)
            result[here, :] = _fold_lanes({name: ref[here, :] for name, ref in lanes.items()})

        lax.fori_loop(0, rows // chunk, fold, None)


def _with_block(state: State, tiles: list[Array], label: Int[Array, "R 1"], first: Array) -> State:
    """The state [R, 128] after a block: its logits [R, C], the label's column in it, its first group of columns."""
    groups = [[tile[:, at : at + LANES] for at in range(0, tile.shape[1], LANES)] for tile in tiles]
    lane = lax.broadcasted_iota(jnp.int32, groups[0][0].shape, 1)
    tops, places = [], {}
    for side, group in enumerate(groups):
        top, place = state[f"top{side}"], state[f"column{side}"]
        for g, z in enumerate(group):
            place = jnp.where(z > top, first + g, place)  # which group of columns; the lane says which of it
            top = jnp.maximum(top, z)
        tops.append(top)
        places[f"column{side}"] = place
    state = moments.moved(state, tops) | places
    for g, logits in enumerate(zip(*groups, strict=True)):
        is_label = lane == label - g * LANES
        shifted = [z - top for z, top in zip(logits, tops, strict=True)]
        exps = [jnp.where(is_label, 0.0, jnp.exp(x)) for x in shifted]
        for side, (z, x, e) in enumerate(zip(logits, shifted, exps, strict=True)):
            for name, value in zip(SUMS, (jnp.where(is_label, z, 0.0), e, e * x, e * e), strict=True):
                state[f"{name}{side}"] += value
        if len(tiles) == 2:
            gap = shifted[1] - shifted[0]
            for name, value in (("A", exps[1] * gap), ("B", exps[0] * gap), ("G", exps[0] - exps[1])):
                state[name] += value
    return state


def _fold_lanes(state: State) -> Float[Array, "R 128"]:
    """The state of a row, of all lanes, in the first lanes."""
    lane = lax.broadcasted_iota(jnp.int32, state["top0"].shape, 1)
    # Columns in float32: exact below 2^24, and a minimum over lanes is sure to exist.
    columns = {name: (v * LANES + lane).astype(jnp.float32) for name, v in state.items() if name.startswith("column")}
    one = moments.folded(
        state | columns,
        lambda x: jnp.max(x, -1, keepdims=True),
        lambda x: jnp.min(x, -1, keepdims=True),
        lambda parts: jax.tree.map(lambda x: jnp.sum(x, -1, keepdims=True), parts),
    )
    row = jnp.zeros(lane.shape, jnp.float32)
    for at, name in enumerate(state):
        row = jnp.where(lane == at, one[name], row)
    return row
