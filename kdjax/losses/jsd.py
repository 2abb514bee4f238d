"""Generalised Jensen-Shannon divergence (GKD, Agarwal et al. 2024): beta on the teacher's side."""

import math

import jax.numpy as jnp

from kdjax.config import Loss
from kdjax.kernels.linear_divergence import Term


def jsd(config: Loss) -> Term:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    JSD / beta -> forward KL as beta -> 0, JSD / (1 - beta) -> reverse KL as beta -> 1; bounded by ln 2.
    """
    beta = config.beta

    def value(logp, logq, is_label):
        logm = jnp.logaddexp(math.log(beta) + logp, math.log1p(-beta) + logq)
        return beta * jnp.exp(logp) * (logp - logm) + (1 - beta) * jnp.exp(logq) * (logq - logm)

    return Term(value)
