"""The oracle: whole [N, V] log-probabilities and JAX's own differentiation."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kdjax.kernels.linear_divergence.api import Term
from kdjax.kernels.tiles import log_softmax, tile_logits
from kdjax.types import Head


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
    student = tile_logits(hidden, head)
    teacher = None if teacher_hidden is None else lax.stop_gradient(tile_logits(teacher_hidden, teacher_head))
    is_label = labels[:, None] == jnp.arange(student.shape[1])[None, :]
    values, total = [], jnp.zeros((), jnp.float32)
    for term, coefficient in zip(terms, coefficients, strict=True):
        t = tau if term.tempered else jnp.ones_like(tau)
        logp = None if teacher is None or not term.teacher else log_softmax(teacher / t)
        value = jnp.sum(term.value(logp, log_softmax(student / t), is_label), -1)
        values.append(lax.stop_gradient(value))
        total += coefficient * t * t * jnp.sum(jnp.where(weight > 0, weight * value, 0.0))
    return total, jnp.stack(values)
