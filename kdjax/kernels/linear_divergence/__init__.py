"""linear_divergence: sums of pointwise divergence terms between two language-model heads, with gradient, in tiles.

A divergence is one elementwise function, `Term.value(pair)` of log p, log q, p, q; its value per row is the sum over
the vocabulary and, with d = dterm/dlogq and c = sum_u d_u, its gradient on the student logits at temperature tau is
(d_v - q_v c) / tau. Nothing else has to be written for a new one.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kdjax.kernels import _dispatch
from kdjax.kernels.linear_divergence import pallas_gpu, pallas_tpu, reference, xla
from kdjax.kernels.linear_divergence.api import Pair, Term
from kdjax.kernels.tiles import check_pair
from kdjax.types import Head

__all__ = ["IMPLEMENTATIONS", "Pair", "Term", "linear_divergence"]

IMPLEMENTATIONS = {
    "reference": reference.linear_divergence,
    "xla": xla.linear_divergence,
    "pallas_tpu": pallas_tpu.linear_divergence,
    "pallas_gpu": pallas_gpu.linear_divergence,
}
DECLINES: dict[str, _dispatch.Declines] = {"pallas_tpu": pallas_tpu.declines, "pallas_gpu": pallas_gpu.declines}


def linear_divergence(
    hidden: Float[Array, "N D"],
    head: Head,
    teacher_hidden: Float[Array, "N E"] | None,
    teacher_head: Head | None,
    labels: Int[Array, "N"],
    weight: Float[Array, "N"],
    terms: Sequence[Term],
    coefficients: Sequence[Float[Array, ""] | float],
    tau: Float[Array, ""] | float = 1.0,
    *,
    given: Float[Array, "N"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, "M N"]]:
    """Weighted total of M terms over N rows, and each term's value per row, from one pass over the vocabulary.

    total = sum_n weight_n sum_m coefficient_m tau_m^2 value_mn, with tau_m = tau for tempered terms, else 1. Rows of
    weight 0 add nothing, whatever they hold. `values` are in nats, without tau^2 and coefficients, under stop-gradient.
    `total` is differentiable with respect to `hidden` and `head.weight` alone; the teacher never gets a gradient.
    A label must be an id of the vocabulary wherever the weight is not 0, if a term reads is_label.
    given: a number per row, for terms that ask for one; None if none does.
    Teacher arguments may be None if no term reads the teacher. Raises ValueError if a term needs what is None or the
    two heads disagree on `vocab_size`.
    """
    if any(term.teacher for term in terms) and (teacher_hidden is None or teacher_head is None):
        raise ValueError("teacher_hidden and teacher_head must be given, got None; a term compares with the teacher.")
    asked = [term.given for term in terms if term.given]
    if asked and given is None:
        raise ValueError(f"given must be a number per row, got None; a term reads the {asked[0]} of each row.")
    if not any(term.teacher for term in terms):
        teacher_hidden = teacher_head = None
    if teacher_head is not None:
        check_pair(head, teacher_head)
    sides = (hidden, head, teacher_hidden, teacher_head)
    chosen = _dispatch.choose("linear_divergence", IMPLEMENTATIONS, DECLINES, implementation, *sides)
    scales = jnp.stack([jnp.asarray(c, jnp.float32) for c in coefficients])
    tau = jnp.asarray(tau, jnp.float32)
    given = given if asked else None
    teacher_hidden, teacher_head, labels, weight, scales, tau, given = lax.stop_gradient(
        (teacher_hidden, teacher_head, labels, weight, scales, tau, given)
    )
    return chosen(hidden, head, teacher_hidden, teacher_head, labels, weight, tuple(terms), scales, tau, given)
