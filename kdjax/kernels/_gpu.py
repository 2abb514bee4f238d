"""What the Mosaic GPU (Hopper) kernels share: a pass of tiles of logits over the vocabulary, its schedule, its limits.

A block of the grid has 128 rows and a part of the columns, a tile of them at a time. One warpgroup copies chunks of 64
of the width (TMA) into rings in shared memory; two others, 64 rows each, multiply (wgmma) and keep logits and row
statistics in registers. What a part says of its rows is combined outside, as the parts of a head that is split over
devices are.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Shaped

from kdjax.kernels import _dispatch, _gpu_block_sizes, tiles
from kdjax.kernels._gpu_block_sizes import CHUNK, GROUP, GROUPS, ROWS, SLICE
from kdjax.types import Head

START = -1e30  # a running maximum before the first logit: finite, so that START - START is 0
MASKED = -2e30  # the logit of a column that is none: exp(MASKED - START) is 0, and 0 * (MASKED - START) too
HOPPER = re.compile(r"\bG?H(?:20|100|200|800)\b")

# Where the registers of a warpgroup have the numbers of a tile, as wgmma leaves them, and of its rows.
TILE_LAYOUT, ROW_LAYOUT = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)

Ref = Any
Side = tuple[Array, Head]  # hidden states [N, D] and the head they go through
# tile(carry, logits, column, rows, scalars, store) -> carry; see `vocab_pass`.
Tile = Callable[..., Any]


def declines(target: _dispatch.Target, *arguments: Any) -> str | None:
    """Why no kernel can take these sides (hidden, head, hidden, head, ...; None is skipped) there, or None.

    On a CPU kernels run in interpret mode, in tests.
    """
    if target.platform not in ("gpu", "cpu"):
        return "Mosaic GPU kernels are for NVIDIA GPUs."
    if target.platform == "gpu" and not HOPPER.search(target.kind):
        return "it multiplies with wgmma, which only Hopper has (H100, H200, ...)."
    for hidden, head in zip(arguments[::2], arguments[1::2], strict=False):
        if hidden is None or head is None:
            continue
        for array in (hidden, head.weight):
            if array.dtype != jnp.bfloat16:
                return f"it reads bfloat16, not {array.dtype}: tensor cores would round float32 to 10 bits."
        if hidden.shape[1] % CHUNK:
            return f"it copies hidden states in chunks of {CHUNK}, and their width is {hidden.shape[1]}."
        tile = 8 if head.vocab_major else CHUNK
        if tiles.head_width(head) % tile:
            return (
                f"it copies {'rows' if head.vocab_major else 'columns'} of the head in tiles of {tile}, and there are "
                f"{tiles.head_width(head)}: pad the weight to a multiple."
            )
    return None


def local_columns(head: Head) -> Float[Array, ""]:
    """How many of this device's columns are vocabulary; the rest are padding. Exact: below 2^24."""
    rest = head.vocab_size - tiles.first_column(head)
    return jnp.asarray(jnp.clip(rest, 0, tiles.head_width(head)), jnp.float32)


def local_labels(head: Head, labels: Array) -> Float[Array, "N"]:
    """Labels as columns of this device's weight; -1 for those of other devices, of the padding, of no vocabulary."""
    column = labels.astype(jnp.int32) - tiles.first_column(head)
    return jnp.where((column >= 0) & (column < local_columns(head)), column, -1).astype(jnp.float32)


def along(vector: Shaped[Array, "R"], tile: Array) -> Shaped[Array, "R C"]:
    """A number per row, repeated along the columns of a tile."""
    return lax.broadcast_in_dim(vector, tile.shape, (0,))


def squash(raw: Float[Array, "R C"], head: Head) -> Float[Array, "R C"]:
    """Logits from the bare product."""
    logits = raw if head.logit_scale == 1.0 else raw * head.logit_scale
    return logits if head.soft_cap <= 0.0 else head.soft_cap * jnp.tanh(logits * (1.0 / head.soft_cap))


class RowNumbers:
    """What a term sees as `pair.row` in a kernel: row[:, k : k + 1], repeated along the columns of the tile."""

    def __init__(self, numbers: list[Array]):
        self.numbers, self.shape = numbers, (GROUP, len(numbers))

    def __getitem__(self, index: Any) -> Array:
        rows, column = index
        start, stop, _ = column.indices(len(self.numbers)) if isinstance(column, slice) else (0, 0, 1)
        if rows not in (slice(None), ...) or stop != start + 1:
            raise TypeError(f"pair.row must be read as pair.row[:, k : k + 1], got the index {index}.")
        return self.numbers[start]


def lowerable(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of arrays without primitives that Mosaic GPU does not know but that follow from others."""

    def run(*args: Array) -> Any:
        jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        return jax.tree.unflatten(jax.tree.structure(shape), _evaluated(jaxpr.jaxpr, jaxpr.consts, args))

    return run


def _evaluated(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Array]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for eqn in jaxpr.eqns:
        inputs = [var.val if hasattr(var, "val") else values[var] for var in eqn.invars]
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))  # of jit and custom_jvp_call
        outputs: Any
        if eqn.primitive.name in REPLACED:
            outputs = REPLACED[eqn.primitive.name](*inputs, **eqn.params)
        elif inner is not None:
            outputs = _evaluated(inner.jaxpr, inner.consts, inputs)
        else:
            outputs = eqn.primitive.bind(*inputs, **eqn.params)
        values.update(zip(eqn.outvars, outputs if isinstance(outputs, list) else [outputs], strict=True))
    return [var.val if hasattr(var, "val") else values[var] for var in jaxpr.outvars]


def _log1p(x: Array, **_: Any) -> Array:
    """log(1 + x) = 2 artanh(x / (2 + x)), as a series where 1 + x would lose of x."""
    near = jnp.abs(x) < 0.4
    t = jnp.where(near, x, 0.0)
    t = t / (2.0 + t)
    u = t * t
    series = 2.0 * t * (1.0 + u * (1 / 3 + u * (1 / 5 + u * (1 / 7 + u * (1 / 9)))))
    return jnp.where(near, series, jnp.log(1.0 + x))


def _expm1(x: Array, **_: Any) -> Array:
    """exp(x) - 1 = 2 t / (1 - t), t = tanh(x / 2), which near 0 loses nothing."""
    t = jnp.tanh(0.5 * jnp.clip(x, -1.0, 1.0))
    return jnp.where(jnp.abs(x) < 1.0, 2.0 * t / (1.0 - t), jnp.exp(x) - 1.0)


def _integer_pow(x: Array, y: int) -> Array:
    return 1.0 / lax.integer_pow(x, -y) if y < -1 else lax.integer_pow(x, y)


# By the name of the primitive.
REPLACED: dict[str, Callable[..., Array]] = {
    "add_any": lax.add,
    "expm1": _expm1,
    "integer_pow": _integer_pow,
    "log1p": _log1p,
    "stop_gradient": lambda x, **_: x,
}


class Stored(NamedTuple):
    """What a kernel writes of each row and column: numbers of this type, with the largest of each SLICE of columns?"""

    dtype: Any
    maxima: bool


GRADIENT, LOGITS = Stored(jnp.bfloat16, False), Stored(jnp.float32, True)


class Visit(NamedTuple):
    """What is done with the logits of a tile before `tile` sees them, with more of the global memory at hand.

    visit(logits, column, block, at, reads, writes) -> logits: for the 64 rows number `block` and the tile of columns
    number `at`; reads and writes: references to all of the arrays of that name, which no two blocks may write alike.
    """

    visit: Callable[..., list[Array]]
    reads: list[Array]
    writes: list[jax.ShapeDtypeStruct]


class Refs(NamedTuple):
    """What a kernel works on: operands and results in global memory, the rest in shared memory."""

    inputs: list[Ref]  # hidden and weight of each side
    rows: Ref
    scalars: Ref
    reads: list[Ref]  # of a Visit
    sums: Ref
    stored: Ref
    maxima: Ref
    writes: list[Ref]  # of a Visit
    hidden_rings: list[Ref]  # [stages, 128, 64] each
    head_rings: list[Ref]  # [stages, columns, 64] or [stages, 64, columns]
    own_rows: Ref  # per warpgroup [F, 64]
    results: Ref  # per warpgroup [G, 64]
    waiting: Ref  # per warpgroup [64, columns]: the tile of `stored` that is on its way
    largest: Ref  # per warpgroup [slices, 64]: its maxima
    full: list[Ref]  # barriers: a chunk has come
    empty: list[Ref]  # barriers: both warpgroups are through with a chunk
    rows_here: Ref


class Operand(NamedTuple):
    """A side as a kernel sees it: its head without the weight, its ring of chunks and its place in there."""

    head: Head
    ring: int
    first: int  # of the ring's chunks per tile of columns, the first that is this side's
    chunks: int


def vocab_pass(
    sides: Sequence[Side],
    rows: Float[Array, "F N"],
    scalars: Float[Array, "S"],
    start: Callable[[], Any],
    tile: Tile,
    *,
    name: str,
    gradient: bool = False,
) -> tuple[Float[Array, "P G N"], Float[Array, "M W"]]:
    """One pass over this device's columns: what each of P parts of them says of the rows, and a gradient of the logits.

    start() -> carry: a pytree of [64] arrays. tile(carry, logits, column, rows, scalars, store) -> carry: called in the
    kernel for 64 rows and a tile of columns. logits: squashed, [64, C] per side, of columns that may be padding;
    column: int32 [64, C], local; rows: F times [64]; scalars: S numbers; store(at, [64, SLICE]): the gradient of the
    columns from `at` on, to be called for all of them if `gradient`. The leaves of the last carry, G in number, come
    back as float32 (G may be 0), the gradient as bfloat16 for M >= N rows and W >= V columns, whole blocks of both.
    """
    parts, *stored = _run(sides, rows, scalars, start, tile, name, GRADIENT if gradient else None)
    return parts, stored[0] if gradient else jnp.zeros((0, 0), jnp.bfloat16)


def logits_pass(
    side: Side,
    rows: Float[Array, "F N"],
    scalars: Float[Array, "S"],
    start: Callable[[], Any],
    tile: Tile,
    *,
    name: str,
) -> tuple[Float[Array, "P G N"], Float[Array, "M W"], Float[Array, "M X"]]:
    """`vocab_pass` that writes logits, in float32, and the largest of each SLICE of a row: of X = W / SLICE of them.

    M >= N rows and W >= V columns of logits: for few rows at a time. tile must store all of its columns.
    """
    parts, logits, maxima = _run([side], rows, scalars, start, tile, name, LOGITS)
    return parts, logits, maxima.T


def visiting_pass(
    side: Side,
    visit: Visit,
    rows: Float[Array, "F N"],
    scalars: Float[Array, "S"],
    start: Callable[[], Any],
    tile: Tile,
    *,
    name: str,
) -> tuple[Float[Array, "P G N"], list[Array]]:
    """`vocab_pass` without a gradient, with a visit to each tile: the parts, and what the visits wrote."""
    parts, *written = _run([side], rows, scalars, start, tile, name, None, visit)
    return parts, written


def _run(
    sides: Sequence[Side],
    rows: Float[Array, "F N"],
    scalars: Float[Array, "S"],
    start: Callable[[], Any],
    tile: Tile,
    name: str,
    stored: Stored | None,
    visit: Visit | None = None,
) -> list[Array]:
    """[parts], and what is stored: [M, W], and maxima [X, M]; then what a visit writes."""
    count = rows.shape[1]
    # Copies are of tiles of 8 x 64: hidden states may need rows, which cost little; heads that would are declined.
    operands = [array for hidden, head in sides for array in (jnp.pad(hidden, ((0, -count % 8), (0, 0))), head.weight)]
    padded = jnp.pad(rows, ((0, 0), (0, -count % ROWS)))
    heads = [dataclasses.replace(head, weight=jnp.zeros((0, 0))) for _, head in sides]

    # vmap: one problem after the other; a kernel has no batch dimension, and a head is large enough by itself.
    @jax.custom_batching.sequential_vmap
    def call(operands: list[Array], rows: Array, scalars: Array, reads: list[Array]) -> tuple[Array, ...]:
        own = None if visit is None else visit._replace(reads=reads)
        return _call(operands, heads, rows, scalars, start, tile, name, stored, own)

    results = list(call(operands, padded, scalars, [] if visit is None else visit.reads))
    parts = results.pop(0)[:, :, :count] if jax.eval_shape(start) else jnp.zeros((1, 0, count), jnp.float32)
    return [parts, *results]


def _call(
    operands: list[Array],
    heads: list[Head],
    rows: Float[Array, "F N"],
    scalars: Float[Array, "S"],
    start: Callable[[], Any],
    tile: Tile,
    name: str,
    stored: Stored | None,
    visit: Visit | None,
) -> tuple[Array, ...]:
    orders = sorted({head.vocab_major for head in heads})  # sides that are stored alike share a ring
    dtype = jnp.dtype(stored.dtype if stored else jnp.bfloat16)
    columns, stages = _gpu_block_sizes.choose(len(orders), dtype.itemsize if stored else 0)
    slices = columns // SLICE if stored and stored.maxima else 0
    blocks = pl.cdiv(operands[1].shape[0 if heads[0].vocab_major else 1], columns)
    parts = _gpu_block_sizes.parts(rows.shape[1] // ROWS, blocks)
    per_part = pl.cdiv(blocks, parts)
    kept = len(jax.tree.leaves(jax.eval_shape(start)))
    steps, sides = [0] * len(orders), []
    for hidden, head in zip(operands[::2], heads, strict=True):
        ring, chunks = orders.index(head.vocab_major), hidden.shape[1] // CHUNK
        sides.append(Operand(head, ring, steps[ring], chunks))
        steps[ring] += chunks
    accumulator = plgpu.ACC((GROUP, columns), jnp.float32)

    def slot_of(step: Array) -> Array:
        return lax.rem(step, jnp.int32(stages))

    def copy(refs: Refs, begin: Array, count: Array) -> None:
        """What the copying warpgroup does: chunks of all sides for one tile of columns after the other."""
        row0 = lax.axis_index("rows") * ROWS

        def chunk(side: Operand, hidden: Ref, weight: Ref, i: Array, here: Any, k: Array) -> None:
            step, inner = i * steps[side.ring] + side.first + k, pl.ds(k * CHUNK, CHUNK)
            slot = slot_of(step)

            @pl.when(step >= stages)
            def _wait_until_free() -> None:
                plgpu.barrier_wait(refs.empty[side.ring].at[slot])

            source, full = (here, inner) if side.head.vocab_major else (inner, here), refs.full[side.ring].at[slot]
            to = refs.hidden_rings[side.ring].at[slot]
            plgpu.copy_gmem_to_smem(hidden.at[pl.ds(row0, ROWS), inner], to, full)
            plgpu.copy_gmem_to_smem(weight.at[source], refs.head_rings[side.ring].at[slot], full)

        @pl.loop(0, count)
        def _tile(i: Array) -> None:
            here = pl.ds((begin + i) * columns, columns)
            for side, hidden, weight in zip(sides, refs.inputs[::2], refs.inputs[1::2], strict=True):
                pl.loop(0, side.chunks)(functools.partial(chunk, side, hidden, weight, i, here))

        for ring, per_tile in enumerate(steps):  # a block must not end while its barriers are in use
            total, empty = count * per_tile, refs.empty[ring]

            @pl.loop(jnp.maximum(total - stages, 0), total)
            def _drain(step: Array, empty: Ref = empty) -> None:
                plgpu.barrier_wait(empty.at[slot_of(step)])

    def product(refs: Refs, group: Array, side: Operand, i: Array) -> Array:
        """The logits of tile `i`: 64 rows, in registers."""
        base, (full, empty) = i * steps[side.ring] + side.first, (refs.full[side.ring], refs.empty[side.ring])

        def accumulate(total: Ref) -> Array:
            @pl.loop(0, side.chunks)
            def _chunk(k: Array) -> None:
                slot = slot_of(base + k)
                plgpu.barrier_wait(full.at[slot])
                left = refs.hidden_rings[side.ring].at[slot, pl.ds(group * GROUP, GROUP)]
                right = refs.head_rings[side.ring].at[slot]
                plgpu.wgmma(total, left, plgpu.transpose_ref(right, (1, 0)) if side.head.vocab_major else right)
                plgpu.wgmma_wait(1)  # the one before is through: its chunk may be overwritten

                @pl.when(k > 0)
                def _free() -> None:
                    plgpu.barrier_arrive(empty.at[slot_of(base + k - 1)])

            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(empty.at[slot_of(base + side.chunks - 1)])
            return total[...]

        return squash(pl.run_scoped(accumulate, accumulator), side.head)

    def compute(refs: Refs, group: Array, begin: Array, count: Array) -> None:
        """What the other warpgroups do, 64 rows each."""
        mine = pl.ds(lax.axis_index("rows") * ROWS + group * GROUP, GROUP)
        plgpu.copy_gmem_to_smem(refs.rows.at[:, mine], refs.own_rows.at[group], refs.rows_here.at[group])
        plgpu.barrier_wait(refs.rows_here.at[group])
        own_rows = [plgpu.layout_cast(refs.own_rows[group, at], ROW_LAYOUT) for at in range(rows.shape[0])]
        own_scalars = [refs.scalars[at] for at in range(scalars.shape[0])]

        def store(at: int, piece: Array) -> None:
            refs.waiting[group, :, at : at + SLICE] = piece.astype(dtype)
            if slices:
                refs.largest[group, at // SLICE] = jnp.max(piece, 1)

        def one_tile(i: Array, carry: Any) -> Any:
            logits = [product(refs, group, side, i) for side in sides]
            first = (begin + i) * columns
            column = plgpu.broadcasted_iota(jnp.int32, (GROUP, columns), 1, layout=TILE_LAYOUT) + first
            if visit:
                block = lax.axis_index("rows") * GROUPS + group
                logits = visit.visit(logits, column, block, begin + i, refs.reads, refs.writes)
            if stored:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
            carry = tile(carry, logits, column, own_rows, own_scalars, store)
            if stored:
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(refs.waiting.at[group], refs.stored.at[mine, pl.ds(first, columns)])
            if slices:
                here = pl.ds((begin + i) * slices, slices)
                plgpu.copy_smem_to_gmem(refs.largest.at[group], refs.maxima.at[here, mine])
            return carry

        carry = jax.tree.map(lambda value: plgpu.layout_cast(value, ROW_LAYOUT), start())
        carry = lax.fori_loop(0, count, one_tile, carry)
        for at, value in enumerate(jax.tree.leaves(carry)):
            refs.results[group, at] = value.astype(jnp.float32)
        if kept:
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(refs.results.at[group], refs.sums.at[lax.axis_index("part"), :, mine])
        plgpu.wait_smem_to_gmem(0)

    def kernel(*arguments: Ref) -> None:
        *inputs, rows_ref, scalars_ref = arguments[: len(operands) + 2]
        read = len(operands) + 2 + len(reads)
        outputs = list(arguments[read : read + len(out)])
        refs = Refs(
            inputs,
            rows_ref,
            scalars_ref,
            list(arguments[len(operands) + 2 : read]),
            outputs.pop(0) if kept else None,
            outputs.pop(0) if stored else None,
            outputs.pop(0) if slices else None,
            outputs,
            *arguments[read + len(out) :],
        )
        group, begin = lax.axis_index("group"), lax.axis_index("part") * per_part
        count = jnp.minimum(per_part, blocks - begin)

        @pl.when(group == GROUPS)
        def _copy() -> None:
            plgpu.set_max_registers(40, action="decrease")
            copy(refs, begin, count)

        @pl.when(group < GROUPS)
        def _compute() -> None:
            plgpu.set_max_registers(232, action="increase")
            compute(refs, group, begin, count)

    kernel.__name__ = name
    out = [jax.ShapeDtypeStruct((parts, kept, rows.shape[1]), jnp.float32)] if kept else []
    if stored:
        out.append(jax.ShapeDtypeStruct((rows.shape[1], blocks * columns), dtype))
    if slices:
        out.append(jax.ShapeDtypeStruct((blocks * slices, rows.shape[1]), jnp.float32))
    reads, writes = (visit.reads, visit.writes) if visit else ([], [])
    out += writes

    # For arrays that are used in pieces of so many columns.
    def swizzled(shape: tuple[int, ...], width: int, dtype: Any = jnp.bfloat16) -> Any:
        transforms = plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(jnp.dtype(dtype).itemsize * width)
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    def barriers(arrivals: int, number: int) -> Any:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)

    return plgpu.kernel(
        kernel,
        out_type=tuple(out),
        scratch_types=(
            [swizzled((stages, ROWS, CHUNK), CHUNK) for _ in orders],
            [swizzled((stages, *((columns, CHUNK) if major else (CHUNK, columns))), CHUNK) for major in orders],
            plgpu.SMEM((GROUPS, rows.shape[0], GROUP), jnp.float32),
            plgpu.SMEM((GROUPS, kept, GROUP), jnp.float32) if kept else None,
            swizzled((GROUPS, GROUP, columns), SLICE, dtype) if stored else None,
            plgpu.SMEM((GROUPS, slices, GROUP), jnp.float32) if slices else None,
            [barriers(2, stages) for _ in orders],
            [barriers(GROUPS, stages) for _ in orders],
            barriers(1, GROUPS),
        ),
        grid=(parts, rows.shape[1] // ROWS),  # rows the faster: blocks that run together read the same part of the head
        grid_names=("part", "rows"),
        num_threads=GROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(*operands, rows, scalars, *reads)
