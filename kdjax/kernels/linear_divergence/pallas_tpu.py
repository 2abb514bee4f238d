"""Mosaic: tiles are recomputed, logits never leave the chip's VMEM.

Three passes over (rows, vocabulary), each over blocks of both:
  1 normalisers  per side: max and log-sum of the logits of each row, at the temperatures in use.
  2 values       each term's value per row and, if a gradient is wanted, c = sum_v slope_v and d_hidden.
  3 d_weight     in the backward rule: rows innermost, one block of the head's gradient accumulates in VMEM.
Memory is O(N) row statistics, O(N D) for d_hidden and the gradient of the head itself.

d_hidden = sum_v (slope_v - q_v c) W_v, but c is known only after the last block. So pass 2 accumulates
A = sum_v (slope_v - q_v c') W_v with c' = sum slope / sum q of the columns so far, which is c at the end, and
B = sum_v q_v W_v, by which A is put right whenever c' moves. (A = sum slope W and B, with A - c B at the end, is the
same on paper; in bfloat16 near student = teacher it would be a small difference of two large rounded sums.) A term with
a constant `gradient_sum` needs no B. With a head that is split over devices c' is this device's; A - (c - c') B at the
end mends that.

Counted, not measured. Matrix products of N x D x V per call (E: the teacher's width):
  value alone     2 D + 2 E    (xla.py: D + E, and writes and reads all logits)
  with gradient   5 D + 3 E    (xla.py: 3 D + E), one D more for each temperature whose c is not a constant
d_hidden rides in pass 2 (one product; on its own it would be a pass of D + E + D) and stays as a residual [N, D], which
is little. d_weight waits for the backward rule: no gradient of the head, D V, lives between forward and backward, and
the incoming cotangent goes into the row weights instead of into one more trip of D V through memory. 2 (2 D + 2 E) FLOP
are thus spent to save xla.py's traffic of logits, about 50 B per (row, column). They balance at
D + E = 12.5 FLOP/s per B/s: about 3000 on v5e, 2900 on v4, 2100 on v5p, 7000 on v6e, 3900 on tpu7x. Below that these
kernels should win (most students with teachers up to that width), above it xla.py may, as long as its tiles fit; with a
bound on memory rather than time these always do.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kdjax.kernels import _dispatch, _tpu
from kdjax.kernels.linear_divergence import block_sizes
from kdjax.kernels.linear_divergence.api import Pair, Term
from kdjax.kernels.linear_divergence.row_scalars import row_scalars
from kdjax.kernels.tiles import head_width, row_tiles, sum_over_axis, zero_tangents
from kdjax.types import Head

ROWS = 1024  # no block has more rows, whatever the table says
PART = 128  # rows that are worked on at a time, or twice that: elementwise work is unrolled, and compiled, for so many

Ref = Any
Numbers = dict[str, Array]  # of each row: [N] or [N, R]
# All that has no gradient: teacher_hidden, teacher_head, labels, weight, coefficients, tau, row scalars.
Rest = tuple[Array | None, Head | None, Array, Array, Array, Array, tuple[Array, ...]]


def declines(target: _dispatch.Target, hidden: Array, head: Head, teacher_hidden: Any, teacher_head: Any) -> str | None:
    """Why not, in one sentence, or None."""
    arrays = [hidden, head.weight] + ([] if teacher_hidden is None else [teacher_hidden, teacher_head.weight])
    reason = _tpu.declines(target, *arrays)
    sizes = _sizes(hidden, head, teacher_hidden, teacher_head)
    if reason is None and target.platform == "tpu" and not block_sizes.fit(target.kind, sizes):
        reason = (
            f"its smallest blocks of widths {sizes.width} and {sizes.teacher_width} do not fit into "
            f"{_tpu.vmem_bytes(target.kind) >> 20} MiB of VMEM."
        )
    return reason


def linear_divergence(
    hidden: Float[Array, "N D"],
    head: Head,
    teacher_hidden: Float[Array, "N E"] | None,
    teacher_head: Head | None,
    labels: Int[Array, "N"],
    weight: Float[Array, "N"],
    terms: tuple[Term, ...],
    coefficients: Float[Array, "M"],
    tau: Float[Array, ""],
    given: Float[Array, "N"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, "M N"]]:
    """See the package."""
    if hidden.shape[0] == 0:
        return jnp.zeros((), jnp.float32), jnp.zeros((len(terms), 0), jnp.float32)
    scalars = row_scalars(terms, *lax.stop_gradient((hidden, head)), teacher_hidden, teacher_head, labels, tau, given)
    rest = (teacher_hidden, teacher_head, labels, weight, coefficients, tau, scalars)
    total, values = _divergence(terms, hidden, head, rest)
    return total, lax.stop_gradient(values)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(terms: tuple[Term, ...], hidden: Array, head: Head, rest: Rest) -> tuple[Array, Array]:
    return _values(_Problem(terms, hidden, head, rest), False)[:2]


def _forward(terms: tuple[Term, ...], hidden: Array, head: Head, rest: Rest) -> tuple[Any, Any]:
    total, values, d_hidden, numbers = _values(_Problem(terms, hidden, head, rest), True)
    return (total, values), (hidden, head, rest, d_hidden, numbers)


def _backward(terms: tuple[Term, ...], kept: Any, cotangents: Any) -> tuple[Array, Head, Any]:
    hidden, head, rest, d_hidden, numbers = kept
    scale = sum_over_axis(cotangents[0], head.vocab_axis)  # the values are under stop-gradient
    d_weight = _d_weight(_Problem(terms, hidden, head, rest), numbers, scale)
    zeros = zero_tangents(rest)
    return d_hidden * scale.astype(d_hidden.dtype), dataclasses.replace(head, weight=d_weight), zeros


_divergence.defvjp(_forward, _backward)


def _sizes(hidden: Array, head: Head, y: Any, u: Any) -> block_sizes.Sizes:
    own = max(hidden.dtype.itemsize, head.weight.dtype.itemsize)
    if y is None:
        return block_sizes.Sizes(hidden.shape[1], 0, own, 0)
    return block_sizes.Sizes(hidden.shape[1], y.shape[1], own, max(y.dtype.itemsize, u.weight.dtype.itemsize))


class _Side:
    """Hidden states and a head as the kernels take them: the head in the order in which it lies in memory."""

    def __init__(self, name: str, hidden: Array, head: Head, temperings: set[bool]):
        self.name, self.hidden, self.head, self.width = name, hidden, head, hidden.shape[1]
        self.temperings = sorted(temperings)  # which temperatures are in use: tau if True, 1 if False
        self.weight, self.vocab_major = _tpu.in_memory_order(head)

    def logits(self, x: Array, w: Ref, rest: Array | None) -> Array:
        """Of a block of columns, in a kernel. From column `rest` on the head has ended, or is padding."""
        raw = _tpu.dot(x, w[...], 1, 1 if self.vocab_major else 0)
        logits = _tpu.squash(raw, self.head.logit_scale, self.head.soft_cap)
        if rest is None:
            return logits
        return jnp.where(lax.broadcasted_iota(jnp.int32, logits.shape, 1) < rest, logits, _tpu.MASKED)

    def rows(self, size: int, row: int) -> pl.BlockSpec:
        """Blocks of the hidden states; `row` is the place of the row block in the grid."""
        return pl.BlockSpec((size, self.width), lambda *at: (at[row], 0))

    def columns(self, size: int, column: int) -> pl.BlockSpec:
        """Blocks of the head; `column` is the place of the vocabulary block in the grid."""
        # The other head may have more padding than this one: its last blocks are none here, and masked.
        last = (head_width(self.head) - 1) // size
        if self.vocab_major:
            return pl.BlockSpec((size, self.width), lambda *at: (jnp.minimum(at[column], last), 0))
        return pl.BlockSpec((self.width, size), lambda *at: (0, jnp.minimum(at[column], last)))


class _Problem:
    """The arguments, and what follows from their shapes."""

    def __init__(self, terms: tuple[Term, ...], hidden: Array, head: Head, rest: Rest):
        y, u, self.labels, self.weight, self.coefficients, self.tau, self.scalars = rest
        self.terms, self.rows, self.axis = terms, hidden.shape[0], head.vocab_axis
        self.student = _Side("q", hidden, head, {term.tempered for term in terms})
        self.sides = [self.student]
        if y is not None and u is not None:
            self.sides.append(_Side("p", y, u, {term.tempered for term in terms if term.teacher}))
        # The temperatures at which there is a c to be summed up.
        self.summed = sorted({term.tempered for term in terms if term.gradient_sum is None})
        self.limit = _tpu.local_columns(head)
        self.sizes = _sizes(hidden, head, y, u)
        self.kept = head_width(head) if self.axis else min(head_width(head), head.vocab_size)
        devices = 1 if self.axis is None else lax.axis_size(self.axis)
        self.padded = self.axis is not None and head.vocab_size < head_width(head) * devices

    def cut(self, which: str) -> tuple[int, int, int]:
        """(blocks of rows, rows of each, columns of each) for a pass. Rows are padded with zeros to whole blocks."""
        kind = _dispatch.target().kind
        found = block_sizes.block_sizes(kind, which, self.sizes, len(self.summed))
        rows, columns = found or block_sizes.SMALLEST[-1]  # `declines` was not asked: the compiler will say it
        _, size = row_tiles(self.rows, min(rows, ROWS))
        step = 16 if size <= 2 * PART else PART  # a register of bfloat16 has 16 rows
        size = -(-size // step) * step
        return -(-self.rows // size), size, columns

    def inputs(self, size: int, columns: int, row: int, column: int) -> tuple[list[Array], list[pl.BlockSpec]]:
        """Hidden and weight of each side, and their blocks; row, column: the places of the two in the grid."""
        count = -(-self.rows // size)
        pairs = [
            ((_padded(s.hidden, count * size), s.rows(size, row)), (s.weight, s.columns(columns, column)))
            for s in self.sides
        ]
        return [a for pair in pairs for a, _ in pair], [spec for pair in pairs for _, spec in pair]

    def ragged(self, columns: int) -> bool:
        """Whether some vocabulary block has columns that are none."""
        return self.padded or head_width(self.student.head) % columns != 0 or self.kept % columns != 0

    def by_mask(self, columns: int, j: Array, limit: Ref, body: Callable[[Array | None], None]) -> None:
        """body(None) for a vocabulary block that is whole, else body(how many of its columns there are).

        Two branches, since to mask the head's block costs as much as a good part of the elementwise work.
        """
        if not self.ragged(columns):
            body(None)
            return
        rest = limit[0] - j * columns
        pl.when(rest >= columns)(lambda: body(None))
        pl.when(rest < columns)(lambda: body(rest))


def _pack(numbers: Numbers, rows: int) -> tuple[Array, dict[str, slice]]:
    """Side by side in one float32 [rows, K], and where each is: on a TPU narrow arrays are padded to 128 lanes each."""
    wide = {key: part if part.ndim == 2 else part[:, None] for key, part in numbers.items()}
    ends = np.cumsum([part.shape[1] for part in wide.values()])
    array = jnp.concatenate([part.astype(jnp.float32) for part in wide.values()], 1)
    at = {key: slice(int(end) - part.shape[1], int(end)) for (key, part), end in zip(wide.items(), ends, strict=True)}
    return _padded(array, rows), at


def _padded(array: Array, rows: int) -> Array:
    more = rows - array.shape[0]
    return jnp.pad(array, [(0, more)] + [(0, 0)] * (array.ndim - 1)) if more else array


def _by_parts(size: int, body: Callable[[Any], None]) -> None:
    """body(slice) for parts of a block of rows, in a kernel: blocks as large as memory traffic wants, parts as code."""
    part = next((part for part in (2 * PART, PART) if size % part == 0), size)
    if part == size:
        body(slice(None))
        return
    lax.fori_loop(0, size // part, lambda k, _: body(pl.ds(pl.multiple_of(k * part, part), part)), None)


def _normalisers(problem: _Problem, side: _Side) -> Numbers:
    """Pass 1: top = max_v z_v and, per temperature t, log sum_v exp((z_v - top) / t), over the whole vocabulary.

    Two numbers, not their sum: next to a maximum of 1e4 the logarithm would lose its third decimal.
    """
    count, size, columns = problem.cut("normalisers")
    n, width = count * size, 1 + len(side.temperings)

    def kernel(limit: Ref, sharpness: Ref, x: Ref, w: Ref, out: Ref) -> None:
        j = pl.program_id(1)

        @pl.when(j == 0)
        def _() -> None:
            out[:, :1] = jnp.full((size, 1), _tpu.START, jnp.float32)
            out[:, 1:] = jnp.zeros((size, width - 1), jnp.float32)

        def body(rest: Array | None, part: Any) -> None:
            z = side.logits(x[part, :], w, rest)
            old = out[part, :1]
            top = jnp.maximum(old, jnp.max(z, -1, keepdims=True))
            out[part, :1] = top
            for k, tempered in enumerate(side.temperings, 1):
                sharp = sharpness[part, :] if tempered else 1.0
                block = jnp.sum(jnp.exp((z - top) * sharp), -1, keepdims=True)
                out[part, k : k + 1] = out[part, k : k + 1] * jnp.exp((old - top) * sharp) + block

        problem.by_mask(columns, j, limit, lambda rest: _by_parts(size, partial(body, rest)))

    narrow = pl.BlockSpec((size, 1), lambda i, j: (i, 0))
    found = pl.pallas_call(
        kernel,
        grid=(count, -(-problem.kept // columns)),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), narrow, side.rows(size, 0), side.columns(columns, 1)],
        out_specs=pl.BlockSpec((size, width), lambda i, j: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((n, width), jnp.float32),
        compiler_params=_tpu.compiler_params("parallel", "arbitrary"),
        name="linear_divergence_normalisers",
    )(problem.limit, jnp.broadcast_to(1.0 / problem.tau, (n, 1)), _padded(side.hidden, n), side.weight)
    found = found[: problem.rows]
    top = found[:, 0] if problem.axis is None else lax.pmax(found[:, 0], problem.axis)
    result = {f"{side.name}_top": top}
    for k, tempered in enumerate(side.temperings, 1):
        total = found[:, k]
        if problem.axis is not None:
            sharp = 1.0 / problem.tau if tempered else 1.0
            total = lax.psum(total * jnp.exp((found[:, 0] - top) * sharp), problem.axis)
        result[f"{side.name}_log{tempered:d}"] = jnp.log(total)
    return result


def _numbers(problem: _Problem) -> Numbers:
    """All that is known of each row before pass 2."""
    n, tau = problem.rows, problem.tau
    labels = _tpu.local_labels(problem.student.head, problem.labels)  # float32 counts exactly to 2^24
    numbers = {"label": labels, "weight": problem.weight, "sharpness": jnp.broadcast_to(1.0 / tau, (n,))}
    for side in problem.sides:
        numbers |= _normalisers(problem, side)
    for m, (term, rows) in enumerate(zip(problem.terms, problem.scalars, strict=True)):
        # tau^2 of the value, 1 / tau of the chain rule
        numbers[f"scale{m}"] = jnp.broadcast_to(problem.coefficients[m] * (tau if term.tempered else 1.0), (n,))
        if term.row_scalars is not None:
            numbers[f"row{m}"] = rows
    return numbers


class _Block(NamedTuple):
    """The terms on one block of logits [rows, columns]: values per term, and d total / d logits but for what c is.

    The latter is known + sum over the temperatures k of (slope[k] - q[k] c[k]), times jacobian, times the row's weight.
    """

    values: list[Array]
    known: Array | None
    slope: dict[bool, Array]
    q: dict[bool, Array]
    jacobian: Array | float  # d logits / d bare product, without the logit scale

    def gradient(self, c: dict[bool, Array]) -> Array:
        """On the bare products, before logit scale and weight."""
        parts = [slope - self.q[k] * c[k] for k, slope in self.slope.items()]
        parts += [] if self.known is None else [self.known]
        return functools.reduce(jnp.add, parts) * self.jacobian


def _evaluate(
    problem: _Problem,
    get: Callable[[str], Array],
    blocks: Sequence[Ref],
    part: Any,
    j: Array,
    columns: int,
    rest: Array | None,
    differentiate: bool,
) -> _Block:
    """In a kernel. get(name): numbers of the rows [rows, R]; blocks: hidden (of which `part`) and weight by side."""
    logits = [side.logits(blocks[2 * k][part, :], blocks[2 * k + 1], rest) for k, side in enumerate(problem.sides)]
    pairs = {}
    for side, z in zip(problem.sides, logits, strict=True):
        shifted = z - get(f"{side.name}_top")
        for tempered in side.temperings:
            sharp = shifted * get("sharpness") if tempered else shifted
            log = sharp - get(f"{side.name}_log{tempered:d}")
            pairs[side.name, tempered] = log, jnp.exp(log)
    column = lax.broadcasted_iota(jnp.int32, logits[0].shape, 1)
    is_label = column == get("label").astype(jnp.int32) - j * columns

    values: list[Array] = []
    known: Array | None = None
    slopes: dict[bool, Array] = {}
    for m, term in enumerate(problem.terms):
        logq, q = pairs["q", term.tempered]
        logp, p = pairs["p", term.tempered] if term.teacher else (None, None)
        row = np.zeros((logq.shape[0], 0), np.float32) if term.row_scalars is None else get(f"row{m}")
        pair = Pair(logp, logq, p, q, is_label, row)
        if not differentiate:
            values.append(term.value(pair))
            continue
        value, slope = jax.jvp(
            lambda logq, q, term=term, pair=pair: term.value(pair._replace(logq=logq, q=q)),
            (logq, q),
            (jnp.ones_like(logq), q),
        )
        values.append(value)
        if term.gradient_sum is not None:
            part = (slope - q * term.gradient_sum) * get(f"scale{m}")
            known = part if known is None else known + part
        else:
            part = slope * get(f"scale{m}")
            slopes[term.tempered] = slopes[term.tempered] + part if term.tempered in slopes else part
    jacobian: Array | float = 1.0
    soft_cap = problem.student.head.soft_cap
    if soft_cap > 0.0:
        jacobian = _tpu.squash_slope(logits[0], 1.0, soft_cap)
        if rest is not None:
            jacobian = jnp.where(column < rest, jacobian, 0.0)
    return _Block(values, known, slopes, {k: pairs["q", k][1] for k in slopes}, jacobian)


def _values(problem: _Problem, differentiate: bool) -> tuple[Array, Array, Array | None, Numbers]:
    """Pass 2: (total, values [M, N], d total / d hidden [N, D] or None, the rows' numbers with c if differentiated)."""
    weight, axis, m = problem.weight, problem.axis, len(problem.terms)
    numbers = _numbers(problem)
    found, *arrays = (a[: problem.rows] for a in _sums(problem, numbers, differentiate))
    values = sum_over_axis(found[:, :m].T, axis)
    scales = [(problem.tau if term.tempered else 1.0) ** 2 for term in problem.terms]
    total = jnp.sum(
        jnp.where(weight != 0, weight * jnp.sum((problem.coefficients * jnp.stack(scales))[:, None] * values, 0), 0.0)
    )
    if not differentiate:
        return total, values, None, numbers
    d_hidden, *by_q = arrays
    for i, k in enumerate(problem.summed):
        c = sum_over_axis(found[:, m + 3 * i], axis)
        numbers[f"c{k:d}"] = c
        if axis is not None:
            d_hidden = d_hidden - (c - found[:, m + 3 * i + 2])[:, None] * by_q[i]
    if axis is not None:
        scale = (weight * problem.student.head.logit_scale)[:, None]
        d_hidden = jnp.where(scale != 0, scale * d_hidden, 0.0).astype(problem.student.hidden.dtype)
    return total, values, d_hidden, numbers


def _sums(problem: _Problem, numbers: Numbers, differentiate: bool) -> tuple[Array, ...]:
    """The kernel of pass 2, for whole blocks of rows; its grid ends with the vocabulary.

    First [N, M + 3 * summed]: values, then per summed temperature sum slope, sum q and c'. If differentiated also
    d_hidden; with a split head that is A, before row weight and logit scale, followed by each B.
    """
    student, sharded, m = problem.student, problem.axis is not None, len(problem.terms)
    count, size, columns = problem.cut("gradient" if differentiate else "values")
    blocks = -(-problem.kept // columns)
    packed, at = _pack(numbers, count * size)
    summed = problem.summed if differentiate else []
    over_columns = (1, 0 if student.vocab_major else 1)  # [rows, columns] and a block of the head -> [rows, D]

    dtype = jnp.dtype(jnp.float32) if sharded else student.hidden.dtype
    results = [(m + 3 * len(summed), jnp.dtype(jnp.float32))]
    scratch = []
    if differentiate:
        # Float32 results are summed up where they are; B stays in VMEM unless it is needed outside.
        results += [(student.width, dtype)] + [(student.width, dtype)] * (len(summed) if sharded else 0)
        kept = (dtype != jnp.float32) + (0 if sharded else len(summed))
        scratch = [pltpu.VMEM((size, student.width), jnp.float32)] * kept

    def kernel(limit: Ref, row: Ref, *refs: Ref) -> None:
        j = pl.program_id(1)
        inputs, out = refs[: 2 * len(problem.sides)], refs[2 * len(problem.sides)]
        wide = refs[2 * len(problem.sides) + 1 :]
        sums = [ref for k, ref in enumerate(wide) if k or dtype == jnp.float32]  # A, then each B

        @pl.when(j == 0)
        def _() -> None:
            for ref in (out, *sums):
                ref[...] = jnp.zeros_like(ref)

        def body(rest: Array | None, part: Any) -> None:
            def add(place: int, block: Array) -> Array:
                new = out[part, place : place + 1] + jnp.sum(block, -1, keepdims=True)
                out[part, place : place + 1] = new
                return new

            block = _evaluate(problem, lambda k: row[part, at[k]], inputs, part, j, columns, rest, differentiate)
            for place, value in enumerate(block.values):
                add(place, value)
            if not differentiate:
                return
            w = inputs[1][...]
            if rest is not None:  # what is no column may be NaN, and 0 * NaN would be added
                w = jnp.where(lax.broadcasted_iota(jnp.int32, w.shape, 0 if student.vocab_major else 1) < rest, w, 0)
            c = {}
            for i, k in enumerate(summed):
                slope, q = add(m + 3 * i, block.slope[k]), add(m + 3 * i + 1, block.q[k])
                # Any c' comes out right; the bound is for first blocks with next to none of the probability.
                c[k] = jnp.clip(jnp.where(q > 0.0, slope / q, 0.0), -1e18, 1e18)
                last = slice(m + 3 * i + 2, m + 3 * i + 3)
                sums[0][part, :] -= (c[k] - out[part, last]) * sums[1 + i][part, :]
                out[part, last] = c[k]
                by_q = (block.q[k] * block.jacobian).astype(student.hidden.dtype)
                sums[1 + i][part, :] += _tpu.dot(by_q, w, *over_columns)
            sums[0][part, :] += _tpu.dot(block.gradient(c).astype(student.hidden.dtype), w, *over_columns)

        problem.by_mask(columns, j, limit, lambda rest: _by_parts(size, partial(body, rest)))

        if differentiate and not sharded:

            @pl.when(j == blocks - 1)
            def _() -> None:
                weight = row[:, at["weight"]]
                scale = weight * student.head.logit_scale
                wide[0][...] = jnp.where(weight != 0.0, scale * sums[0][...], 0.0).astype(dtype)

    inputs, specs = problem.inputs(size, columns, 0, 1)
    found = pl.pallas_call(
        kernel,
        grid=(count, blocks),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((size, packed.shape[1]), lambda i, j: (i, 0)),
            *specs,
        ],
        out_specs=[pl.BlockSpec((size, width), lambda i, j: (i, 0)) for width, _ in results],
        out_shape=[jax.ShapeDtypeStruct((count * size, width), kind) for width, kind in results],
        scratch_shapes=scratch,
        compiler_params=_tpu.compiler_params("parallel", "arbitrary"),
        name="linear_divergence_values",
    )(problem.limit, packed, *inputs)
    return tuple(found)


def _d_weight(problem: _Problem, numbers: Numbers, scale: Array) -> Float[Array, "X Y"]:
    """Pass 3: scale * d total / d head.weight as the weight is stored."""
    student = problem.student
    count, size, columns = problem.cut("weight")
    # A row of weight 0 has gradient 0, and 0 * NaN would still poison the whole head.
    clean = jnp.where(problem.weight[:, None] != 0, student.hidden, 0)
    weight = problem.weight * scale * student.head.logit_scale
    packed, at = _pack({**numbers, "weight": weight}, count * size)
    dtype = student.weight.dtype
    block = (columns, student.width) if student.vocab_major else (student.width, columns)

    def kernel(limit: Ref, row: Ref, *refs: Ref) -> None:
        j, i = pl.program_id(0), pl.program_id(1)
        inputs, out, total = refs[: 2 * len(problem.sides)], refs[2 * len(problem.sides)], refs[-1]

        def get(name: str) -> Array:
            return row[:, at[name]]

        @pl.when(i == 0)
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        # One branch, unlike pass 2: only logits have to be masked here.
        rest = limit[0] - j * columns if problem.ragged(columns) else None
        found = _evaluate(problem, get, inputs, slice(None), j, columns, rest, True)
        gradient = get("weight") * found.gradient({k: get(f"c{k:d}") for k in found.slope})
        gradient = jnp.where(get("weight") != 0.0, gradient, 0.0).astype(student.hidden.dtype)
        x = inputs[0][...]
        total[...] += _tpu.dot(gradient, x, 0, 0) if student.vocab_major else _tpu.dot(x, gradient, 0, 0)
        if dtype != jnp.float32:

            @pl.when(i == count - 1)
            def _() -> None:
                out[...] = total[...].astype(dtype)

    inputs, specs = problem.inputs(size, columns, 1, 0)
    d_weight = pl.pallas_call(
        kernel,
        grid=(-(-head_width(student.head) // columns), count),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((size, packed.shape[1]), lambda j, i: (i, 0)),
            *specs,
        ],
        out_specs=pl.BlockSpec(block, lambda j, i: (j, 0) if student.vocab_major else (0, j)),
        out_shape=jax.ShapeDtypeStruct(student.weight.shape, dtype),
        scratch_shapes=[] if dtype == jnp.float32 else [pltpu.VMEM(block, jnp.float32)],
        compiler_params=_tpu.compiler_params("parallel", "arbitrary"),
        name="linear_divergence_d_weight",
    )(problem.limit, packed, _padded(clean, count * size), *inputs[1:])
    return d_weight if student.vocab_major == student.head.vocab_major else d_weight.T
