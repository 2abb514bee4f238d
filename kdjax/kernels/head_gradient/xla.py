"""Tiled over the vocabulary, in one of two forms; memory is O(ROWS * COLUMNS) and what a form keeps, never rows x V.

Gram form. ||G||^2 is a sum over pairs of positions, and <e_s, e_t> one over the vocabulary: ONE pass keeps, as flash
attention does, each row's largest logit so far and sums relative to it, and for each pair of positions of an answer,
or of an answer and its question, K_st = sum_v o_s o_t, o = q without the label's column. With x the labels and
m = sum_v o = 1 - q[x], nothing is subtracted from numbers of its own size where the labels are likely:

    <e_s, e_t> = K_st - m_s q_t[x_s] - m_t q_s[x_t]   or, for x_s = x_t,   K_st + m_s m_t

q_t[x_s] is read off the head's columns at the labels. With a soft cap c, o and m have the factor 1 - (logit / c)^2.

Sum form. A first pass finds the normalisers; the second forms the gradient of one answer, some columns at a time:
G = E^T H [X, D], which is squared, multiplied with the question's, and with H for the shares.

Which: per column the Gram form takes (T + U) D + T (T + U) multiplications and additions for an answer and a question
of U, or fewer, the question's being shared; the sum form 4 T D + 3 U D, but keeps nothing of size T^2. So short
sequences (T + U < 3 D) go one way and long ones the other; `_in_gram_form` counts it out, and what is kept.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kdjax.kernels.head_gradient.api import HeadGradient, Rows
from kdjax.kernels.tiles import (
    MASKED,
    Chunk,
    chunk_of,
    first_column,
    head_width,
    kept_columns,
    mask_chunk,
    row_tiles,
    sum_over_axis,
    tile_logits,
)
from kdjax.types import Head

ROWS = 4096  # rows a tile of the Gram form at most, question and all, unless one answer has more
COLUMNS = 1024  # of the vocabulary a chunk at most
LOGITS = 2**21  # of a chunk at most: 8 MiB of float32
KEPT = 2**24  # pairs of positions that a tile of the Gram form may keep: 64 MiB of float32
# How far two float32 sums of the same products may differ by their order, in parts of the sum of their sizes: up to
# 2.4 * 2^-24 was seen at widths of 64 to 2048.
ORDER = 2.0**-22


def answer_gradient(answers: Rows, asked: Rows, head: Head, rank: bool) -> tuple[HeadGradient, dict[str, Array]]:
    """See the package: answers [P, M, T] to questions [P, U] -> (of answers [P, M], the fields of questions [P])."""
    _, each, size, width = answers[0].shape
    form = _gram_tiles if _in_gram_form(each, size, asked[1].shape[1], width) else _sum_tiles
    return form(answers, asked, head, rank)


def _in_gram_form(answers: int, size: int, question: int, width: int) -> bool:
    """Of answers of `size` positions to a question: fewer FLOPs that way, and no more than KEPT for one answer."""
    pairs = answers * size * (size + question) + question * question
    gram = (answers * size + question) * width + pairs
    summed = 4 * answers * size * width + 3 * question * width
    return gram <= summed and _pairs(1, size, question) <= KEPT


def _pairs(answers: int, size: int, question: int) -> int:
    return answers * size * (size + question) + question * question


# --- what both forms do with a chunk


class Sums(NamedTuple):
    """What is known of the columns so far, [C] each, e = exp(logit - top) summed over all but the label's column.

    sloped: sum (e slope)^2, with a soft cap. above: how many logits exceed the row's bar.
    """

    top: Array
    label: Array  # the label's logit, or MASKED as long as it has not come
    other: Array
    squares: Array
    sloped: Array
    above: Array


def _start(labels: Int[Array, "C"]) -> Sums:
    zero = jnp.zeros(labels.shape, jnp.float32)
    # Above MASKED, below any logit: where a device has nothing but padding, e is 0 and not exp(MASKED - MASKED).
    return Sums(zero + MASKED / 2, zero + MASKED, zero, zero, zero, jnp.zeros(labels.shape, jnp.int32))


def _add(
    sums: Sums, hidden: Float[Array, "C D"], chunk: Chunk, labels: Int[Array, "C"], bar: Float[Array, "C"] | None
) -> tuple[Sums, Float[Array, "C X"], Float[Array, "C"]]:
    """(the sums with one more chunk, its e slope, what the old top's e are to be multiplied with)."""
    # Behind barriers: written once. Else the compiler computes them again in every reduction that reads them.
    logits = lax.optimization_barrier(mask_chunk(tile_logits(hidden, chunk.head), chunk))
    top = jnp.maximum(sums.top, jnp.max(logits, -1))
    again = jnp.exp(sums.top - top)
    label = labels[:, None] == chunk.ids[None, :]
    other = lax.optimization_barrier(jnp.where(label, 0.0, jnp.exp(logits - top[:, None])))
    place = jnp.clip(labels - chunk.first, 0, logits.shape[1] - 1)
    own = jnp.take_along_axis(logits, place[:, None], 1)[:, 0]
    sloped = other
    if chunk.head.soft_cap > 0.0:
        sloped = lax.optimization_barrier(jnp.where(other == 0.0, 0.0, other * _slope(logits, chunk.head)))
    above = sums.above
    if bar is not None:
        above = above + jnp.sum((logits > bar[:, None]) & ~label, -1, dtype=jnp.int32)
    added = Sums(
        top=top,
        label=jnp.where(chunk.ids[place] == labels, own, sums.label),
        other=sums.other * again + jnp.sum(other, -1),
        squares=sums.squares * again * again + jnp.sum(other * other, -1),
        sloped=sums.sloped * again * again + (jnp.sum(sloped * sloped, -1) if chunk.head.soft_cap > 0.0 else 0.0),
        above=above,
    )
    return added, sloped, again


def _slope(logits: Float[Array, "..."], head: Head) -> Float[Array, "..."] | float:
    """d logit / d uncapped logit; the scale is left to `_weighted`."""
    return 1.0 - jnp.square(logits / head.soft_cap) if head.soft_cap > 0.0 else 1.0


class Found(NamedTuple):
    """Of whole rows. top, total: q = exp(logit - top) / total. scale: of e that are relative to this device's own top.

    own: minus the label's entry of e slope. label: its logit. token: ||e slope||^2.
    """

    top: Array
    total: Array
    scale: Array
    own: Array
    missed: Array
    label: Array
    label_logp: Array
    brier: Array
    token: Array
    above: Array


def _find(sums: Sums, head: Head) -> Found:
    axis, part = head.vocab_axis, sums.top
    if axis is not None:
        top = lax.pmax(sums.top, axis)
        again = jnp.exp(sums.top - top)
        other, squares, sloped, above = lax.psum(
            (sums.other * again, sums.squares * again**2, sums.sloped * again**2, sums.above), axis
        )
        sums = Sums(top, lax.pmax(sums.label, axis), other, squares, sloped, above)
    label = sums.label - sums.top
    total = sums.other + jnp.exp(label)
    missed = sums.other / total
    slope = jnp.where(sums.label > MASKED, _slope(sums.label, head), 0.0)
    brier = sums.squares / (total * total) + missed * missed
    own = missed * slope
    return Found(
        top=sums.top,
        total=total,
        scale=jnp.exp(part - sums.top) / total,
        own=own,
        missed=missed,
        label=sums.label,
        label_logp=label - jnp.log(total),
        brier=brier,
        token=sums.sloped / (total * total) + own * own if head.soft_cap > 0.0 else brier,
        above=sums.above,
    )


def _weighted(rows: Rows, head: Head) -> Float[Array, "... T D"]:
    """w scale h in float32, 0 where w is: there h may be anything."""
    hidden, _, weights = rows
    weights = weights.astype(jnp.float32)[..., None]
    return jnp.where(weights != 0, weights * head.logit_scale * hidden.astype(jnp.float32), 0.0)


def _result(rows: Rows, found: Found, share: Array, above: Array | None, cross: Array, head: Head) -> HeadGradient:
    size = head.logit_scale**2 * jnp.sum(jnp.square(rows[0].astype(jnp.float32)), -1)
    return HeadGradient(
        norm=jnp.sum(share, -1),
        share=share,
        token_norm=found.token * size,
        label_logp=found.label_logp,
        brier=found.brier,
        rank=None if above is None else 1 + above,
        cross=cross,
    )


def _of_question(found: Found, norm: Array) -> dict[str, Array]:
    return {"question_norm": norm, "question_label_logp": found.label_logp, "question_brier": found.brier}


def _columns(rows: int, head: Head) -> tuple[int, int]:
    """(chunks, columns a chunk) for so many rows."""
    return row_tiles(kept_columns(head), min(COLUMNS, max(128, LOGITS // max(1, rows))))


# --- the Gram form


class Pairs(NamedTuple):
    """K of two positions each, relative to the tops so far: of answers [G, M, T, T], answers and question, question."""

    answer: Array
    cross: Array  # [G, M T, U]
    question: Array  # [G, U, U]


def _gram_tiles(answers: Rows, asked: Rows, head: Head, rank: bool) -> tuple[HeadGradient, dict[str, Array]]:
    """Several questions a tile with all of their answers, or some answers of one, whose question is then read again."""
    questions, each, size = answers[1].shape
    length = asked[1].shape[1]
    together, some = _tile_sizes(questions, each, size, length)

    def split(array: Array, axis: int, at_most: int) -> Array:
        count = -(-array.shape[axis] // at_most)
        padding = [(0, 0)] * array.ndim
        padding[axis] = (0, count * at_most - array.shape[axis])
        shape = (*array.shape[:axis], count, at_most, *array.shape[axis + 1 :])
        return jnp.pad(array, padding).reshape(shape)

    tiles = tuple(jnp.moveaxis(split(split(a, 0, together), 2, some), 2, 1) for a in answers)
    of_question = tuple(split(a, 0, together) for a in asked)

    def tile(rows: tuple[Rows, Rows]) -> Any:
        return lax.map(lambda some: _gram_tile(some, rows[1], head, rank), rows[0])

    result, found = lax.map(tile, (tiles, of_question))

    def joined(array: Array) -> Array:  # [tiles, parts, G, M', ...] -> [P, M, ...]
        array = jnp.moveaxis(array, 1, 2)
        shape = (array.shape[0] * array.shape[1], array.shape[2] * array.shape[3], *array.shape[4:])
        return array.reshape(shape)[:questions, :each]

    found = jax.tree.map(lambda a: a[:, 0].reshape(a.shape[0] * a.shape[2], *a.shape[3:])[:questions], found)
    return jax.tree.map(joined, result), found


def _tile_sizes(questions: int, each: int, size: int, length: int) -> tuple[int, int]:
    """(questions, answers of each) of a tile, evened out."""
    fit = max(1, min((ROWS - length) // max(1, size), (KEPT - length * length) // max(1, size * (size + length))))
    if fit < each:
        return 1, -(-each // -(-each // fit))
    rows, pairs = each * size + length, _pairs(each, size, length)
    fit = max(1, min(ROWS // max(1, rows), KEPT // max(1, pairs)))
    return max(1, -(-questions // max(1, -(-questions // fit)))), each


def _gram_tile(answers: Rows, asked: Rows, head: Head, rank: bool) -> tuple[HeadGradient, dict[str, Array]]:
    """One tile: answers [G, M, T], questions [G, U]."""
    (groups, each, size), length = answers[1].shape, asked[1].shape[1]
    cut, width = groups * each * size, answers[0].shape[-1]
    hidden = jnp.concatenate([answers[0].reshape(-1, width), asked[0].reshape(-1, width)])
    labels = jnp.concatenate([answers[1].reshape(-1), asked[1].reshape(-1)])
    here, columns = _label_columns(labels, head)
    bar = _bar(hidden[:cut], columns[:cut], here[:cut], head) if rank else None
    if bar is not None:
        bar = jnp.concatenate([bar, jnp.zeros(len(labels) - cut, jnp.float32)])

    def apart(flat: Array) -> tuple[Array, Array]:
        tail = flat.shape[1:]
        return flat[:cut].reshape(groups, each, size, *tail), flat[cut:].reshape(groups, length, *tail)

    def add(at: Array, state: tuple[Sums, Pairs]) -> tuple[Sums, Pairs]:
        sums, sloped, again = _add(state[0], hidden, chunk_of(head, at, chunk), labels, bar)
        return sums, _add_pairs(state[1], apart(sloped), apart(again))

    count, chunk = _columns(len(labels), head)
    zeros = [(groups, each, size, size), (groups, each * size, length), (groups, length, length)]
    start = _start(labels), Pairs(*(jnp.zeros(shape, jnp.float32) for shape in zeros))
    sums, pairs = lax.fori_loop(0, count, add, start)

    found = _find(sums, head)
    of_answer, of_question = zip(*(apart(field) for field in found), strict=True)
    (a_columns, q_columns), (a_here, q_here) = apart(columns), apart(here)
    answer = Side(answers, Found(*of_answer), a_columns, a_here)
    question = Side(asked, Found(*of_question), q_columns, q_here)
    flat = jax.tree.map(lambda a: a.reshape(groups, each * size, *a.shape[3:]), answer)
    axis = head.vocab_axis
    share = sum_over_axis(jnp.sum(_terms(pairs.answer, answer, answer, head), -1), axis)
    cross = jnp.sum(_terms(pairs.cross, flat, question, head).reshape(groups, each, size, length), (2, 3))
    question_norm = jnp.sum(_terms(pairs.question, question, question, head), (1, 2))
    cross, question_norm = sum_over_axis((cross, question_norm), axis)
    above = answer.found.above if rank else None
    return _result(answers, answer.found, share, above, cross, head), _of_question(question.found, question_norm)


def _add_pairs(pairs: Pairs, sloped: tuple[Array, Array], again: tuple[Array, Array]) -> Pairs:
    a, q = sloped
    flat = a.reshape(a.shape[0], -1, a.shape[-1])
    fade, fade_q = again
    fade_a = fade.reshape(fade.shape[0], -1)

    def moved(kept: Array, left: Array, right: Array) -> Array:
        return kept * left[..., :, None] * right[..., None, :]

    return Pairs(
        moved(pairs.answer, fade, fade) + jnp.einsum("gmsv,gmtv->gmst", a, a),
        moved(pairs.cross, fade_a, fade_q) + jnp.einsum("gsv,guv->gsu", flat, q),
        moved(pairs.question, fade_q, fade_q) + jnp.einsum("gsv,guv->gsu", q, q),
    )


class Side(NamedTuple):
    """Sequences of a pair product, after the pass. columns: the head's at the labels; here: if this device has them."""

    rows: Rows
    found: Found
    columns: Array
    here: Array


def _terms(kept: Float[Array, "... S T"], left: Side, right: Side, head: Head) -> Float[Array, "... S T"]:
    """w_s w_t <e_s, e_t> <h_s, h_t>, slopes and scale and all: this device's columns' part."""
    same = left.rows[1][..., :, None] == right.rows[1][..., None, :]
    own_s, own_t = left.found.own[..., :, None], right.found.own[..., None, :]
    at_s = jnp.where(same, own_s * own_t, -own_s * jnp.swapaxes(_at_labels(right, left, head), -1, -2))
    at_t = jnp.where(same, 0.0, -own_t * _at_labels(left, right, head))
    errors = kept * left.found.scale[..., :, None] * right.found.scale[..., None, :]
    errors = errors + jnp.where(left.here[..., :, None], at_s, 0.0) + jnp.where(right.here[..., None, :], at_t, 0.0)
    sides = _weighted(left.rows, head), _weighted(right.rows, head)
    states = jnp.einsum("...sd,...td->...st", *sides, precision=lax.Precision.HIGHEST)
    live = (left.rows[2] != 0)[..., :, None] & (right.rows[2] != 0)[..., None, :]
    return jnp.where(live, errors * states, 0.0)


def _at_labels(rows: Side, labels: Side, head: Head) -> Float[Array, "... S T"]:
    """q_s[x_t] slope_s[x_t] of the rows s, at the labels of t."""
    logits = _logits_at(rows.rows[0], labels.columns, head)
    q = jnp.exp(logits - rows.found.top[..., None]) / rows.found.total[..., None]
    return q * _slope(logits, head)


def _logits_at(hidden: Float[Array, "... S D"], columns: Float[Array, "... T D"], head: Head) -> Array:
    """Logits of rows at gathered columns of the head; leading axes are those of both."""
    if hidden.ndim > 2:
        return jax.vmap(lambda h, c: _logits_at(h, c, head))(hidden, columns)
    own = dataclasses.replace(head, weight=columns, vocab_size=columns.shape[0], vocab_major=True, vocab_axis=None)
    return tile_logits(hidden, own)


def _label_columns(labels: Int[Array, "C"], head: Head) -> tuple[Bool[Array, "C"], Array]:
    """(whether this device has the label's column, the column [C, D] or, if not, any)."""
    place = labels - first_column(head)
    here = (place >= 0) & (place < head_width(head)) & (labels < head.vocab_size)
    place = jnp.clip(place, 0, head_width(head) - 1)
    return here, head.weight[place] if head.vocab_major else head.weight[:, place].T


def _bar(
    hidden: Float[Array, "C D"], columns: Float[Array, "C D"], here: Bool[Array, "C"], head: Head
) -> Float[Array, "C"]:
    """What a logit must exceed to stand above the label's, which is found here by other sums than in the pass.

    So what exceeds it by less than their roundings counts as equal: an equal column never stands above. Float32 cannot
    tell such logits apart; there are hardly any but at ranks in the thousands.
    """
    logits = _logits_at(hidden[:, None, :], columns[:, None, :], head)[:, 0, 0]
    sizes = jnp.sum(jnp.abs(hidden.astype(jnp.float32) * columns.astype(jnp.float32)), -1)
    bar = logits + ORDER * abs(head.logit_scale) * sizes
    return sum_over_axis(jnp.where(here, bar, 0.0), head.vocab_axis)


# --- the sum form


def _sum_tiles(answers: Rows, asked: Rows, head: Head, rank: bool) -> tuple[HeadGradient, dict[str, Array]]:
    """Question by question; in each chunk answer by answer."""
    return lax.map(lambda rows: _sum_tile(rows[0], rows[1], head, rank), (answers, asked))


def _sum_tile(answers: Rows, asked: Rows, head: Head, rank: bool) -> tuple[HeadGradient, dict[str, Array]]:
    (each, size), length = answers[1].shape, asked[1].shape[0]
    count, columns = _columns(max(size, length), head)

    def find(rows: Rows) -> Found:
        def add(at: Array, sums: Sums) -> Sums:
            return _add(sums, rows[0], chunk_of(head, at, columns), rows[1], None)[0]

        return _find(lax.fori_loop(0, count, add, _start(rows[1])), head)

    found, found_q = lax.map(find, answers), find(asked)

    def add(at: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        share, above, cross, norm = state
        chunk = chunk_of(head, at, columns)
        gradient, _, _ = _chunk_gradient(asked, found_q, chunk)

        def answer(one: tuple[Rows, Found]) -> tuple[Array, Array, Array]:
            own, shares, above = _chunk_gradient(*one, chunk)
            return shares, above, jnp.sum(own * gradient)

        more = lax.map(answer, (answers, found))
        return share + more[0], above + more[1], cross + more[2], norm + jnp.sum(jnp.square(gradient))

    zero = jnp.zeros((each, size), jnp.float32)
    start = zero, jnp.zeros(zero.shape, jnp.int32), jnp.zeros(each, jnp.float32), jnp.float32(0)
    share, above, cross, norm = sum_over_axis(lax.fori_loop(0, count, add, start), head.vocab_axis)
    return _result(answers, found, share, above if rank else None, cross, head), _of_question(found_q, norm)


def _chunk_gradient(
    rows: Rows, found: Found, chunk: Chunk
) -> tuple[Float[Array, "X D"], Float[Array, "T"], Int[Array, "T"]]:
    """(the loss's gradient in the chunk's columns, their part of the shares, their logits above the label's)."""
    hidden, labels, weights = rows
    # The products of the first pass again, tile by tile: the label's logit and those equal to it come out the same.
    logits = lax.optimization_barrier(mask_chunk(tile_logits(hidden, chunk.head), chunk))
    label = labels[:, None] == chunk.ids[None, :]
    q = jnp.exp(logits - found.top[:, None]) / found.total[:, None]
    error = jnp.where(label, -found.missed[:, None], q)
    error = jnp.where((error == 0.0) | (weights == 0)[:, None], 0.0, error * _slope(logits, chunk.head))
    error = lax.optimization_barrier(error)
    states = _weighted(rows, chunk.head)
    gradient = jnp.einsum("tv,td->vd", error, states)
    share = jnp.sum(error * jnp.einsum("td,vd->tv", states, gradient), -1)
    above = jnp.sum((logits > found.label[:, None]) & ~label, -1, dtype=jnp.int32)
    return gradient, share, above
