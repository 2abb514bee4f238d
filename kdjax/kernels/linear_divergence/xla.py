"""Tiled over rows; the gradient is formed in the forward pass.

The slot weights are an input, so the gradient of the weighted total is known as soon as a tile's logits are: per tile
four matrix products (student logits, teacher logits, gradient to hidden, gradient to head), nothing kept for the
backward pass but the two gradients, nothing recomputed. Without differentiation only the first two products run.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kdjax.kernels.linear_divergence.api import Pair, Term
from kdjax.kernels.tiles import row_tiles, split_rows, tile_gradients, tile_logits, tile_softmax
from kdjax.types import Head

ROWS = 256  # rows a tile: 48 MiB of float32 logits a side at V = 49152; larger ones save passes over the head


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
) -> tuple[Float[Array, ""], Float[Array, "M N"]]:
    """See the package."""
    rest = (teacher_hidden, teacher_head, labels, weight, coefficients, tau)
    total, values = _divergence(terms, hidden, head, rest)
    return total, lax.stop_gradient(values)


# All that has no gradient: teacher_hidden, teacher_head, labels, weight, coefficients, tau.
Rest = tuple[Array | None, Head | None, Array, Array, Array, Array]
Rows = tuple[Array, Array | None, Array, Array]  # hidden, teacher_hidden, labels, weight
Gradients = tuple[Array, Array]  # d_hidden, d_weight, both float32


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(terms: tuple[Term, ...], hidden: Array, head: Head, rest: Rest) -> tuple[Array, Array]:
    return _tiles(terms, hidden, head, rest, False)[:2]


def _forward(terms: tuple[Term, ...], hidden: Array, head: Head, rest: Rest) -> tuple[Any, Any]:
    total, values, (d_hidden, d_weight) = _tiles(terms, hidden, head, rest, True)
    return (total, values), (d_hidden.astype(hidden.dtype), d_weight.astype(head.weight.dtype), head, rest)


def _backward(terms: tuple[Term, ...], kept: Any, cotangents: Any) -> tuple[Array, Head, Any]:
    d_hidden, d_weight, head, rest = kept
    scale = cotangents[0]  # the values are under stop-gradient
    d_head = dataclasses.replace(head, weight=d_weight * scale.astype(d_weight.dtype))
    return d_hidden * scale.astype(d_hidden.dtype), d_head, jax.tree.map(_zero_tangent, rest)


_divergence.defvjp(_forward, _backward)


def _zero_tangent(array: Array) -> Any:
    inexact = jnp.issubdtype(array.dtype, jnp.inexact)
    return jnp.zeros_like(array) if inexact else jnp.zeros(array.shape, jax.dtypes.float0)


def _tiles(
    terms: tuple[Term, ...], hidden: Array, head: Head, rest: Rest, with_gradient: bool
) -> tuple[Array, Array, Gradients]:
    """(total, values [M, N], (d_hidden [N, D], d_weight)), tile by tile; without gradient both are 0."""
    teacher_hidden, teacher_head, labels, weight, coefficients, tau = rest
    n = hidden.shape[0]
    count, size = row_tiles(n, ROWS)
    tiles = jax.tree.map(lambda a: split_rows(a, count, size), (hidden, teacher_hidden, labels, weight))
    zero = jnp.zeros((), jnp.float32)

    def tile(rows: Rows) -> tuple[Array, Gradients]:
        x, y, label, w = rows
        student = tile_logits(x, head)
        teacher = None if y is None or teacher_head is None else tile_logits(y, teacher_head)
        values, gradient = _rows(terms, student, teacher, label, w, coefficients, tau, with_gradient)
        if gradient is None:
            return values, (zero, zero)
        # A row of weight 0 has gradient 0, and 0 * NaN would still poison the whole head.
        return values, tile_gradients(gradient, student, jnp.where(w[:, None] != 0, x, 0), head)

    if count == 1:
        values, (d_hidden, d_weight) = tile(jax.tree.map(lambda a: a[0], tiles))
    elif with_gradient:

        def add(d_weight: Array, rows: Rows) -> tuple[Array, tuple[Array, Array]]:
            values, (d_hidden, part) = tile(rows)
            return d_weight + part, (values, d_hidden)

        d_weight, (values, d_hidden) = lax.scan(add, jnp.zeros(head.weight.shape, jnp.float32), tiles)
        d_hidden = d_hidden.reshape(count * size, -1)
    else:
        values, d_hidden, d_weight = lax.map(lambda rows: tile(rows)[0], tiles), zero, zero
    if count > 1:
        values = jnp.moveaxis(values, 1, 0).reshape(len(terms), count * size)
    values = values[:, :n]
    scales = jnp.stack([c * (tau * tau if t.tempered else 1.0) for t, c in zip(terms, coefficients, strict=True)])
    total = jnp.sum(jnp.where(weight != 0, weight * jnp.sum(scales[:, None] * values, 0), 0.0))
    return total, values, (d_hidden[:n] if with_gradient else zero, d_weight)


def _rows(
    terms: tuple[Term, ...],
    student: Float[Array, "C V"],
    teacher: Float[Array, "C V"] | None,
    labels: Int[Array, "C"],
    weight: Float[Array, "C"],
    coefficients: Float[Array, "M"],
    tau: Float[Array, ""],
    with_gradient: bool,
) -> tuple[Float[Array, "M C"], Float[Array, "C V"] | None]:
    """Values of all terms for one tile, and d total / d student logits."""
    is_label = labels[:, None] == lax.broadcasted_iota(jnp.int32, student.shape, 1)
    values: list[Array] = []
    gradient: Array | None = None
    for term, coefficient in zip(terms, coefficients, strict=True):
        t = tau if term.tempered else jnp.ones_like(tau)
        logq, q = tile_softmax(student / t)
        logp, p = tile_softmax(teacher / t) if term.teacher and teacher is not None else (None, None)
        pair = Pair(logp, logq, p, q, is_label)
        if term.row_scalars is None:
            row = jnp.zeros((student.shape[0], 0), jnp.float32)
        else:
            row = term.row_scalars(pair, lambda x: jnp.sum(x, -1, keepdims=True))
        pair = pair._replace(row=row)
        value, slope = jax.jvp(
            lambda logq, q, term=term, pair=pair: term.value(pair._replace(logq=logq, q=q)),
            (logq, q),
            (jnp.ones_like(logq), q),
        )
        values.append(jnp.sum(value, -1))
        if with_gradient:
            c = jnp.sum(slope, -1, keepdims=True) if term.gradient_sum is None else term.gradient_sum
            scale = (weight * coefficient * t)[:, None]  # tau^2 of the value, 1 / tau of the chain rule
            part = jnp.where(weight[:, None] != 0, scale * (slope - q * c), 0.0)
            gradient = part if gradient is None else gradient + part
    return jnp.stack(values), gradient
