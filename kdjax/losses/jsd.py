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
        # Only ratios: next to logp = -10 the last bits of log m would be all that is left of a small divergence.
        gap = pair.logq - pair.logp
        log_m_over_p = jnp.logaddexp(math.log(beta), math.log1p(-beta) + gap)
        return (1 - beta) * pair.q * (gap - log_m_over_p) - beta * pair.p * log_m_over_p

    return Term(value)
