"""TAID (Shing et al., arXiv 2501.16937): the target walks from the student to the teacher."""

import jax.numpy as jnp
from jax import lax

from kdjax.config import Loss
from kdjax.kernels.linear_divergence import Pair, Term
from kdjax.kernels.linear_divergence.api import VocabSum
from kdjax.losses.dkd import log_sum
from kdjax.types import Array


def taid(config: Loss) -> Term:
    """-sum_v r log q, r = softmax((1 - t) z_q + t z_p) detached: q^(1-t) p^t, normalised; all at temperature tau.

    paced L11. t in [0, 1] is given: from loss.taid_start at the first update to 1 at the end, faster as the loss
    falls (`selection/policies/interpolated.py`). Gradient on the logits q - r; the value is larger than KL(r || q) by
    the entropy of r. At t = 1 the gradient is that of forward KL, at t = 0 it is 0.
    """

    def mixed(pair: Pair, t: Array) -> Array:
        return t * pair.logp + (1.0 - t) * lax.stop_gradient(pair.logq)

    def row_scalars(pair: Pair, vocab_sum: VocabSum) -> Array:
        t = jnp.clip(pair.row, 0.0, 1.0)
        logs = mixed(pair, t)
        return jnp.concatenate([t, log_sum(logs, jnp.exp(logs), jnp.zeros_like(pair.is_label), vocab_sum)], 1)

    def value(pair: Pair) -> Array:
        return -jnp.exp(mixed(pair, pair.row[:, 0:1]) - pair.row[:, 1:2]) * pair.logq

    return Term(value, gradient_sum=-1.0, row_scalars=row_scalars, given="teacher_share")
