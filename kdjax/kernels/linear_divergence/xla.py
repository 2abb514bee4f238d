"""Tiled over rows; the gradient is formed in the forward pass.

The slot weights are an input, so the gradient of the weighted total is known as soon as a tile's logits are: per tile four
matrix products (student logits, teacher logits, gradient to hidden, gradient to head), nothing kept for the backward
pass but the two gradients, nothing recomputed. Without differentiation only the first two products run.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kdjax.kernels.linear_divergence.api import Term
from kdjax.kernels.tiles import log_softmax, row_tiles, split_rows, tile_gradients, tile_logits
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
    rest = lax.stop_gradient((teacher_hidden, teacher_head, labels, weight, coefficients, tau))
    total, values = _divergence(terms, hidden, head, *rest)
    return total, lax.stop_gradient(values)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(terms, hidden, head, teacher_hidden, teacher_head, labels, weight, coefficients, tau):
    total, values, _ = _tiles(terms, hidden, head, teacher_hidden, teacher_head, labels, weight, coefficients, tau, False)
    return total, values


def _forward(terms, hidden, head, teacher_hidden, teacher_head, labels, weight, coefficients, tau):
    rest = (teacher_hidden, teacher_head, labels, weight, coefficients, tau)
    total, values, gradients = _tiles(terms, hidden, head, *rest, True)
    d_hidden, d_weight = gradients
    return (total, values), (d_hidden.astype(hidden.dtype), d_weight.astype(head.weight.dtype), head, rest)


def _backward(terms, kept, cotangents):
    d_hidden, d_weight, head, rest = kept
    scale = cotangents[0]  # the values are under stop-gradient
    d_head = dataclasses.replace(head, weight=d_weight * scale.astype(d_weight.dtype))
    return d_hidden * scale.astype(d_hidden.dtype), d_head, *jax.tree.map(_zero_tangent, rest)


_divergence.defvjp(_forward, _backward)


def _zero_tangent(array: Array) -> Array:
    inexact = jnp.issubdtype(array.dtype, jnp.inexact)
    return jnp.zeros_like(array) if inexact else jnp.zeros(array.shape, jax.dtypes.float0)


def _tiles(terms, hidden, head, teacher_hidden, teacher_head, labels, weight, coefficients, tau, with_gradient):
    """(total, values [M, N], (d_hidden [N, D], d_weight) or None), tile by tile."""
    n = hidden.shape[0]
    count, size = row_tiles(n, ROWS)
    rows = jax.tree.map(lambda a: split_rows(a, count, size), (hidden, teacher_hidden, labels, weight))

    def tile(rows):
        x, y, label, w = rows
        student = tile_logits(x, head)
        teacher = None if y is None else tile_logits(y, teacher_head)
        values, gradient = _rows(terms, student, teacher, label, w, coefficients, tau, with_gradient)
        return values, tile_gradients(gradient, student, x, head) if with_gradient else None

    if count == 1:
        values, gradients = tile(jax.tree.map(lambda a: a[0], rows))
    elif with_gradient:

        def add(d_weight, rows):
            values, (d_hidden, part) = tile(rows)
            return d_weight + part, (values, d_hidden)

        d_weight, (values, d_hidden) = lax.scan(add, jnp.zeros(head.weight.shape, jnp.float32), rows)
        gradients = (d_hidden.reshape(count * size, -1)[:n], d_weight)
    else:
        values, gradients = lax.map(lambda rows: (tile(rows)[0], None), rows)
    if count > 1:
        values = jnp.moveaxis(values, 1, 0).reshape(len(terms), count * size)[:, :n]
    scales = jnp.stack([c * (tau * tau if t.tempered else 1.0) for t, c in zip(terms, coefficients, strict=True)])
    total = jnp.sum(jnp.where(weight > 0, weight * jnp.sum(scales[:, None] * values, 0), 0.0))
    return total, values, gradients


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
    values, gradient = [], None
    for term, coefficient in zip(terms, coefficients, strict=True):
        t = tau if term.tempered else jnp.ones_like(tau)
        logq = log_softmax(student / t)
        logp = log_softmax(teacher / t) if term.teacher else None
        value, slope = jax.jvp(lambda x, f=term.value, p=logp: f(p, x, is_label), (logq,), (jnp.ones_like(logq),))
        values.append(jnp.sum(value, -1))
        if with_gradient:
            c = jnp.sum(slope, -1, keepdims=True) if term.gradient_sum is None else term.gradient_sum
            scale = jnp.where(weight > 0, weight * coefficient * t, 0.0)[:, None]  # tau^2 of the value, 1/tau of the chain
            part = jnp.where(scale > 0, scale * (slope - jnp.exp(logq) * c), 0.0)
            gradient = part if gradient is None else gradient + part
    return jnp.stack(values), gradient
