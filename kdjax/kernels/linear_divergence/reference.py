"""The oracle: whole [N, V] log-probabilities and JAX's own differentiation."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kdjax.kernels.linear_divergence.api import Pair, Term
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
    values = _values(hidden, head, teacher_hidden, teacher_head, labels, terms, tau)
    # Rows of weight 0 are taken out before the maths: afterwards a NaN of theirs would come back as 0 * NaN.
    live = weight[:, None] != 0
    hidden = jnp.where(live, hidden, 0)
    teacher_hidden = None if teacher_hidden is None else jnp.where(live, teacher_hidden, 0)
    kept = _values(hidden, head, teacher_hidden, teacher_head, labels, terms, tau)
    scales = coefficients * jnp.stack([tau * tau if term.tempered else jnp.ones_like(tau) for term in terms])
    return jnp.sum(scales[:, None] * weight[None, :] * kept), lax.stop_gradient(values)


def _values(
    hidden: Float[Array, "N D"],
    head: Head,
    teacher_hidden: Float[Array, "N E"] | None,
    teacher_head: Head | None,
    labels: Int[Array, "N"],
    terms: tuple[Term, ...],
    tau: Float[Array, ""],
) -> Float[Array, "M N"]:
    student = tile_logits(hidden, head)
    teacher = None if teacher_hidden is None or teacher_head is None else tile_logits(teacher_hidden, teacher_head)
    is_label = labels[:, None] == jnp.arange(student.shape[1])[None, :]
    values = []
    for term in terms:
        t = tau if term.tempered else jnp.ones_like(tau)
        logq, logp, p = log_softmax(student / t), None, None
        if term.teacher and teacher is not None:
            logp = log_softmax(teacher / t)
            p = jnp.exp(logp)
        values.append(jnp.sum(term.value(Pair(logp, logq, p, jnp.exp(logq), is_label)), -1))
    return jnp.stack(values)
