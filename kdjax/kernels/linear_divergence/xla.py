"""Tiled over rows and, within them, over chunks of the vocabulary; the gradient is formed in the forward pass.

The slot weights are an input, so the gradient of the weighted total is known as soon as a tile's logits are: per tile
four matrix products (student logits, teacher logits, gradient to hidden, gradient to head), nothing kept for the
backward pass but the two gradients, nothing recomputed. Without differentiation only the first two products run.

A tile's logits are written once, by chunks, while the normalisers are accumulated; a second pass over the chunks turns
them into values and gradients in the cache. Only terms that do not know their gradient sum take a third pass between.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kdjax.kernels.linear_divergence.api import Pair, Term
from kdjax.kernels.linear_divergence.row_scalars import scalars_of_tile
from kdjax.kernels.tiles import (
    MASKED,
    Chunk,
    chunk_of,
    column_ids,
    formed_gradients,
    is_label,
    kept_columns,
    mask_chunk,
    row_tiles,
    split_rows,
    sum_over_axis,
    tile_gradients,
    tile_logits,
)
from kdjax.types import Head

# Per tile the heads are read and the gradient of the head is written once. On CPU, D = 576, time against four products:
# V = 49152: 1.2 with tiles of 128 rows, 1.07 with 256, 1.04 with 512; V = 151936: 1.4 with 104, 1.23 with 176.
ROWS = 256  # a tile at most
TILE = 2**25  # logits a tile at most: 128 MiB of float32 a side, 220 rows of V = 151936, 128 of V = 262144
COLUMNS = 1024  # of the vocabulary a chunk: 1 MiB of float32 logits, which stay in the cache


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
    rest = (teacher_hidden, teacher_head, labels, weight, coefficients, tau, given)
    total, values = _divergence(terms, hidden, head, rest)
    return total, lax.stop_gradient(values)


# All that has no gradient: teacher_hidden, teacher_head, labels, weight, coefficients, tau, given.
Rest = tuple[Array | None, Head | None, Array, Array, Array, Array, Array | None]
Rows = tuple[Array, Array | None, Array, Array, Array | None]  # hidden, teacher_hidden, labels, weight, given
Gradients = tuple[Any, Any]  # d_hidden, d_weight: float32 arrays, or None where nobody differentiates


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(terms: tuple[Term, ...], hidden: Array, head: Head, rest: Rest) -> tuple[Array, Array]:
    return _tiles(terms, hidden, head, rest, False)[:2]


def _forward(terms: tuple[Term, ...], hidden: Array, head: Head, rest: Rest) -> tuple[Any, Any]:
    total, values, (d_hidden, d_weight) = _tiles(terms, hidden, head, rest, True)
    return (total, values), (d_hidden.astype(hidden.dtype), d_weight.astype(head.weight.dtype), head, rest)


def _backward(terms: tuple[Term, ...], kept: Any, cotangents: Any) -> tuple[Array, Head, Any]:
    return formed_gradients(kept, cotangents[0])


_divergence.defvjp(_forward, _backward)


def _tiles(
    terms: tuple[Term, ...], hidden: Array, head: Head, rest: Rest, with_gradient: bool
) -> tuple[Array, Array, Gradients]:
    """(total, values [M, N], (d_hidden [N, D], d_weight)), tile by tile; without gradient both are None."""
    teacher_hidden, teacher_head, labels, weight, coefficients, tau, given = rest
    n = hidden.shape[0]
    count, size = row_tiles(n, max(8, min(ROWS, TILE // kept_columns(head))))
    tiles = jax.tree.map(lambda a: split_rows(a, count, size), (hidden, teacher_hidden, labels, weight, given))

    def tile(d_weight: Any, rows: Rows) -> tuple[Any, tuple[Array, Any]]:
        values, (d_hidden, d_weight) = _tile(terms, rows, head, teacher_head, coefficients, tau, d_weight)
        return d_weight, (values, d_hidden)

    start = jnp.zeros(head.weight.shape, jnp.float32) if with_gradient else None
    d_weight, (values, d_hidden) = lax.scan(tile, start, tiles)
    values = sum_over_axis(jnp.moveaxis(values, 1, 0).reshape(len(terms), count * size)[:, :n], head.vocab_axis)
    scales = jnp.stack([c * (tau * tau if t.tempered else 1.0) for t, c in zip(terms, coefficients, strict=True)])
    total = jnp.sum(jnp.where(weight != 0, weight * jnp.sum(scales[:, None] * values, 0), 0.0))
    if d_hidden is not None:
        d_hidden = d_hidden.reshape(count * size, -1)[:n]
    return total, values, (d_hidden, d_weight)


class Side(NamedTuple):
    """One model on one tile. logits [C, V]; top [C, 1]: the largest; total: tempered -> sum exp((logit - top) / t)."""

    logits: Array
    top: Array
    total: dict[bool, Array]


def _tile(
    terms: tuple[Term, ...],
    rows: Rows,
    head: Head,
    teacher_head: Head | None,
    coefficients: Float[Array, "M"],
    tau: Float[Array, ""],
    d_weight: Float[Array, "X Y"] | None,
) -> tuple[Float[Array, "M C"], Gradients]:
    """Values of all terms on this device's columns, and d_hidden, d_weight + this tile's part unless that is None."""
    x, y, labels, weight, given = rows
    count, size = row_tiles(kept_columns(head), COLUMNS)
    temperatures = {term.tempered: tau if term.tempered else jnp.ones_like(tau) for term in terms}
    # Filled with different numbers, which nobody reads: else the compiler makes one buffer and two copies of it.
    student = _side(x, head, temperatures, 0.0)
    teacher = None
    if y is not None and teacher_head is not None:
        read = {term.tempered: temperatures[term.tempered] for term in terms if term.teacher}
        teacher = _side(y, teacher_head, read, 1.0)
    scalars = [_scalars(term, student, teacher, head, labels, tau, given) for term in terms]
    scales = [
        (weight * coefficient * temperatures[term.tempered])[:, None]  # tau^2 of the value, 1 / tau of the chain rule
        for term, coefficient in zip(terms, coefficients, strict=True)
    ]

    def pairs(chunk: Chunk) -> list[Pair]:
        labelled = labels[:, None] == chunk.ids[None, :]
        ours = {key: _softmax(student, chunk, key, t) for key, t in temperatures.items()}
        theirs = {key: _softmax(teacher, chunk, key, temperatures[key]) for key in teacher.total} if teacher else {}
        result = []
        for term, row in zip(terms, scalars, strict=True):
            logp, p = theirs[term.tempered] if term.teacher else (None, None)
            result.append(Pair(logp, ours[term.tempered][0], p, ours[term.tempered][1], labelled, row))
        return result

    def sums(at: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        """Values and gradient sums [M, C]."""
        evaluated = [_evaluate(term, pair) for term, pair in zip(terms, pairs(chunk_of(head, at, size)), strict=True)]
        values, slopes = (jnp.stack([jnp.sum(part[which], -1) for part in evaluated]) for which in (0, 1))
        return state[0] + values, state[1] + slopes

    none = jnp.zeros((len(terms), *labels.shape), jnp.float32)
    if d_weight is None:
        return lax.fori_loop(0, count, sums, (none, none))[0], (None, None)  # what nobody reads is not computed
    known = all(term.gradient_sum is not None for term in terms)
    shares: list[Any] = [term.gradient_sum for term in terms]
    values = none
    if not known:
        values, slopes = lax.fori_loop(0, count, sums, (none, none))
        shares = list(sum_over_axis(slopes, head.vocab_axis)[:, :, None])
    # A row of weight 0 has gradient 0, and 0 * NaN would still poison the whole head.
    clean = jnp.where(weight[:, None] != 0, x, 0)

    def gradients(at: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        values, d_hidden, d_weight = state
        chunk = chunk_of(head, at, size)
        gradient = jnp.zeros((), jnp.float32)
        found = []
        for term, pair, scale, share in zip(terms, pairs(chunk), scales, shares, strict=True):
            value, slope = _evaluate(term, pair)
            found.append(jnp.sum(value, -1))
            gradient = gradient + scale * (slope - pair.q * share)
        gradient = jnp.where(weight[:, None] != 0, gradient, 0.0)
        raw = lax.dynamic_slice_in_dim(student.logits, chunk.start, size, 1)
        part, columns = tile_gradients(gradient, raw, clean, chunk.head)
        axis = 0 if head.vocab_major else 1
        columns = columns + lax.dynamic_slice_in_dim(d_weight, chunk.start, size, axis)
        d_weight = lax.dynamic_update_slice_in_dim(d_weight, columns, chunk.start, axis)
        return values + jnp.stack(found) if known else values, d_hidden + part, d_weight

    state = (values, jnp.zeros(x.shape, jnp.float32), d_weight)
    values, d_hidden, d_weight = lax.fori_loop(0, count, gradients, state)
    return values, (d_hidden, d_weight)


def _side(hidden: Float[Array, "C D"], head: Head, temperatures: dict[bool, Array], fill: float) -> Side:
    """The logits of a tile by chunks, and per temperature the sum of their exponentials over the whole vocabulary."""
    count, size = row_tiles(kept_columns(head), COLUMNS)

    def add(at: Array, side: Side) -> Side:
        chunk = chunk_of(head, at, size)
        raw = lax.optimization_barrier(tile_logits(hidden, chunk.head))
        logits = mask_chunk(raw, chunk)
        top = jnp.maximum(side.top, jnp.max(logits, -1, keepdims=True))
        fell = side.top - top
        total = {
            key: side.total[key] * jnp.exp(fell / t) + jnp.sum(jnp.exp((logits - top) / t), -1, keepdims=True)
            for key, t in temperatures.items()
        }
        return Side(lax.dynamic_update_slice_in_dim(side.logits, raw, chunk.start, 1), top, total)

    rows = (hidden.shape[0], 1)
    start = Side(
        jnp.full((hidden.shape[0], kept_columns(head)), fill, jnp.float32),
        jnp.full(rows, MASKED, jnp.float32),
        {key: jnp.zeros(rows, jnp.float32) for key in temperatures},
    )
    side = lax.fori_loop(0, count, add, start)
    if head.vocab_axis is None:
        return side
    top = lax.pmax(side.top, head.vocab_axis)
    total = {key: side.total[key] * jnp.exp((side.top - top) / t) for key, t in temperatures.items()}
    return Side(side.logits, top, lax.psum(total, head.vocab_axis))


def _softmax(side: Side, chunk: Chunk, tempered: bool, t: Array) -> tuple[Float[Array, "C X"], Float[Array, "C X"]]:
    """(log-probabilities, probabilities) of a chunk, written once for all terms that read them."""
    logits = mask_chunk(lax.dynamic_slice_in_dim(side.logits, chunk.start, chunk.ids.shape[0], 1), chunk)
    # Not logits - (top + log total): at logits of 1e4 the sum would round off the third decimal.
    shifted, total = (logits - side.top) / t, side.total[tempered]
    return lax.optimization_barrier((shifted - jnp.log(total), jnp.exp(shifted) * (1.0 / total)))


def _evaluate(term: Term, pair: Pair) -> tuple[Float[Array, "C X"], Float[Array, "C X"]]:
    """(value, dvalue / dlogq) of a term, elementwise."""
    return jax.jvp(
        lambda logq, q: term.value(pair._replace(logq=logq, q=q)),
        (pair.logq, pair.q),
        (jnp.ones_like(pair.logq), pair.q),
    )


def _scalars(
    term: Term,
    student: Side,
    teacher: Side | None,
    head: Head,
    labels: Int[Array, "C"],
    tau: Array,
    given: Float[Array, "C"] | None,
) -> Float[Array, "C R"]:
    """What the term wants to know of each row before; it may look at whole rows."""
    if term.row_scalars is None:
        return jnp.zeros((labels.shape[0], 0), jnp.float32)
    counts = (column_ids(head) < head.vocab_size)[None, :]
    q = jnp.where(counts, student.logits, MASKED)
    p = None if teacher is None else jnp.where(counts, teacher.logits, MASKED)
    return scalars_of_tile(term, q, p, is_label(head, labels), tau, head.vocab_axis, given)
