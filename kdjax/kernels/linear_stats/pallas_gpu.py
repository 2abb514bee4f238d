"""Mosaic GPU (Hopper): `_gpu.vocab_pass` with the state of `moments` in registers, per row and part of the columns.

Each tile is reduced along its columns; a row moves to a new maximum once per tile.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kdjax.kernels import _gpu
from kdjax.kernels._gpu import MASKED, START, Side, along
from kdjax.kernels._gpu_block_sizes import GROUP, SLICE
from kdjax.kernels.linear_stats import moments
from kdjax.kernels.linear_stats.api import LinearStats, PairStats
from kdjax.kernels.linear_stats.moments import SUMS, State
from kdjax.kernels.tiles import first_column
from kdjax.kernels.topk import topk
from kdjax.types import Head

declines = _gpu.declines


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
    """Another pass: registers are full."""
    return dataclasses.replace(stats, top=topk(hidden, head, top_k)) if top_k else stats


def _known(labels: Int[Array, "N"], head: Head) -> Bool[Array, "N"]:
    return (labels >= 0) & (labels < head.vocab_size)


def _over_vocabulary(sides: tuple[Side, ...], labels: Int[Array, "N"]) -> State:
    """The state [N] after all columns, of all devices."""
    head, count = sides[0][1], len(sides)
    if labels.shape[0] == 0:
        state = {name: jnp.zeros(0, jnp.float32) for name in moments.names(count)}
    else:
        parts, _ = _gpu.vocab_pass(
            sides,
            _gpu.local_labels(head, labels)[None, :],
            _gpu.local_columns(head)[None],
            lambda: _start(count),
            _tile,
            name="linear_stats" if count == 1 else "linear_pair_stats",
        )
        state = moments.folded(
            _unpacked(parts, count),
            lambda x: jnp.max(x, 0, keepdims=True),
            lambda x: jnp.min(x, 0, keepdims=True),
            lambda tree: jax.tree.map(lambda x: jnp.sum(x, 0, keepdims=True), tree),
        )
        state = {name: value[0] for name, value in state.items()}
    for side in range(count):  # float32 in the kernel's results, which is exact below 2^24
        state[f"column{side}"] = state[f"column{side}"].astype(jnp.int32) + first_column(head)
    if head.vocab_axis is None:
        return state
    axis = head.vocab_axis
    return moments.folded(
        state, lambda x: lax.pmax(x, axis), lambda x: lax.pmin(x, axis), lambda tree: lax.psum(tree, axis)
    )


def _start(sides: int) -> State:
    """Before the first column."""
    zero = {name: jnp.zeros(GROUP, jnp.float32) for name in moments.names(sides)}
    tops = {f"top{side}": jnp.full(GROUP, START, jnp.float32) for side in range(sides)}
    return zero | tops | {f"column{side}": jnp.zeros(GROUP, jnp.int32) for side in range(sides)}


def _unpacked(parts: Float[Array, "P G N"], sides: int) -> State:
    structure = jax.tree.structure(jax.eval_shape(lambda: _start(sides)))
    return jax.tree.unflatten(structure, list(jnp.moveaxis(parts, 1, 0)))


def _tile(
    state: State, logits: list[Array], column: Int[Array, "R C"], rows: list[Array], scalars: list[Array], _: Any
) -> State:
    """In the kernel: the state after one more tile. rows: the label; scalars: how many columns there are."""
    limit, label = scalars[0].astype(jnp.int32), along(rows[0].astype(jnp.int32), column)
    logits = [jnp.where(column < limit, z, MASKED) for z in logits]
    tops, columns = [], {}
    for side, z in enumerate(logits):
        top = jnp.max(z, 1)
        lowest = jnp.min(jnp.where(z == along(top, z), column, 2**30), 1)
        columns[f"column{side}"] = jnp.where(top > state[f"top{side}"], lowest, state[f"column{side}"])
        tops.append(jnp.maximum(state[f"top{side}"], top))
    state = moments.moved(state, tops) | columns
    for at in range(0, column.shape[1], SLICE):
        is_label = column[:, at : at + SLICE] == label[:, at : at + SLICE]
        shifted, exps = [], []
        for side, (whole, top) in enumerate(zip(logits, tops, strict=True)):
            z = whole[:, at : at + SLICE]
            x = z - along(top, z)
            e = jnp.where(is_label, 0.0, jnp.exp(x))
            for name, value in zip(SUMS, (jnp.where(is_label, z, 0.0), e, e * x, e * e), strict=True):
                state[f"{name}{side}"] += jnp.sum(value, 1)
            shifted.append(x)
            exps.append(e)
        if len(logits) == 2:
            gap = shifted[1] - shifted[0]
            for name, value in (("A", exps[1] * gap), ("B", exps[0] * gap), ("G", exps[0] - exps[1])):
                state[name] += jnp.sum(value, 1)
    return state
