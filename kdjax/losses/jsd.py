"""Generalised Jensen-Shannon divergence (GKD, Agarwal et al. 2024): beta on the teacher's side."""

import math

import jax.numpy as jnp

from kdjax.config import Loss
from kdjax.kernels.linear_divergence import Pair, Term
from kdjax.types import Array


def jsd(config: Loss) -> Term:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    JSD / beta -> forward KL as beta -> 0, JSD / (1 - beta) -> reverse KL as beta -> 1; bounded by ln 2.
    """
    beta = config.beta

    def value(pair: Pair) -> Array:
        # log(m / p) and log(m / q), never log m: next to log p = -10 a small divergence would be lost in the last bits.
        gap = pair.logq - pair.logp
        to_p = jnp.logaddexp(math.log(beta), math.log1p(-beta) + gap)
        to_q = jnp.logaddexp(math.log(beta) - gap, math.log1p(-beta))
        return -beta * pair.p * to_p - (1 - beta) * pair.q * to_q

    return Term(value)
