"""The oracle: whole [N, V] log-probabilities and JAX's own differentiation."""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kdjax.kernels.linear_divergence.api import Pair, Term
from kdjax.kernels.tiles import is_label, log_softmax, tile_logits, vocab_sum
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
    given: Float[Array, "N"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, "M N"]]:
    """See the package."""
    values = _values(hidden, head, teacher_hidden, teacher_head, labels, terms, tau, given)
    # Rows of weight 0 are taken out before the maths: afterwards a NaN of theirs would come back as 0 * NaN.
    live = weight[:, None] != 0
    hidden = jnp.where(live, hidden, 0)
    teacher_hidden = None if teacher_hidden is None else jnp.where(live, teacher_hidden, 0)
    kept = _values(hidden, head, teacher_hidden, teacher_head, labels, terms, tau, given)
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
    given: Float[Array, "N"] | None,
) -> Float[Array, "M N"]:
    axis = head.vocab_axis
    student = tile_logits(hidden, head)
    teacher = None if teacher_hidden is None or teacher_head is None else tile_logits(teacher_hidden, teacher_head)
    labelled = is_label(head, labels)
    total = functools.partial(vocab_sum, axis=axis)
    values = []
    for term in terms:
        t = tau if term.tempered else jnp.ones_like(tau)
        logq, logp, p = log_softmax(student / t, axis), None, None
        if term.teacher and teacher is not None:
            logp = log_softmax(teacher / t, axis)
            p = jnp.exp(logp)
        pair = Pair(logp, logq, p, jnp.exp(logq), labelled)
        if term.row_scalars is None:
            row = jnp.zeros((student.shape[0], 0), jnp.float32)
        else:
            said = given[:, None] if term.given and given is not None else None
            row = lax.stop_gradient(term.row_scalars(lax.stop_gradient(pair._replace(row=said)), total))
        values.append(total(term.value(pair._replace(row=row)))[:, 0])
    return jnp.stack(values)
