"""Values and gradients of rows, from the K logits at the entries and the softmax of all other columns, the tail.

However the tiles are cut, this is all there is to know of a row; and nothing in it is a difference of nearly equal
numbers: the student's mass in the tail is a sum, not 1 - sum_k q_k.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kdjax.kernels.sparse_divergence.api import Entries, SparseTerm
from kdjax.kernels.tiles import MASKED

Rows = tuple[Array, Array, Array, Array, Array | None]  # ids, probs, weight, tail, teacher_entropy: without gradient
Slopes = tuple[Float[Array, "C"], Float[Array, "C K"]]


def evaluate(
    term: SparseTerm,
    rows: Rows,
    own: Float[Array, "C K"],
    tail_top: Float[Array, "C"],
    tail_sum: Float[Array, "C"],
    vocab_size: int,
    tau: Float[Array, ""],
    with_gradient: bool,
) -> tuple[Float[Array, "C"], Slopes | None]:
    """(values, (a, b)): d total / d logit is a exp(logit / tau - tail_top) in the tail and b_k at entry k.

    own: the student's logits / tau at the entries, anything where one is empty. tail_top, tail_sum: the largest
    logit / tau of all other columns and the sum of their exp(logit / tau - tail_top); anything if there is no column.
    """
    _, probs, weight, tail, teacher_entropy = rows
    live = probs != 0
    left = jnp.sum(live, -1) < vocab_size  # is there any other column?
    own = jnp.where(live, own, MASKED)
    top = jnp.maximum(tail_top, jnp.max(own, -1, initial=MASKED))
    tail_log = jnp.log(tail_sum) + (tail_top - top)
    log_sum = jnp.log(jnp.exp(tail_log) + jnp.sum(jnp.exp(own - top[:, None]), -1))
    # Not logits - (top + log_sum): at logits of 1e4 the sum would round off the third decimal.
    logq, tail_logq = jnp.where(live, own - top[:, None] - log_sum[:, None], 0.0), tail_log - log_sum

    def value(logq: Array, tail_logq: Array) -> Array:
        return term.value(Entries(probs, logq, live, jnp.where(left, tail, 0.0), tail_logq, teacher_entropy))

    if not with_gradient:
        return value(logq, tail_logq), None
    values, transpose = jax.vjp(value, logq, tail_logq)
    slope, tail_slope = transpose(jnp.ones_like(values))
    c = jnp.sum(slope, -1) + tail_slope
    scale = weight * tau  # tau^2 of the value, 1 / tau of the chain rule
    in_tail = scale * (tail_slope - jnp.exp(tail_logq) * c) / tail_sum
    at_entries = scale[:, None] * (slope - jnp.exp(logq) * c[:, None])
    counts = weight != 0
    return values, (jnp.where(counts & left, in_tail, 0.0), jnp.where(counts[:, None] & live, at_entries, 0.0))
