"""Skew KL divergences (DistiLLM, Ko et al. 2024): the second argument is mixed with a share of the first."""

import math

import jax.numpy as jnp

from kdjax.config import Loss
from kdjax.kernels.linear_divergence import Term
from kdjax.types import Array


def _mix(skew: float, own: Array, other: Array) -> Array:
    return other if skew == 0 else jnp.logaddexp(math.log(skew) + own, math.log1p(-skew) + other)


def skew_kl(config: Loss) -> Term:
    """KL(p || skew p + (1 - skew) q); skew = 0 is forward KL."""
    return Term(lambda logp, logq, is_label: jnp.exp(logp) * (logp - _mix(config.skew, logp, logq)))


def skew_reverse_kl(config: Loss) -> Term:
    """KL(q || (1 - skew) p + skew q); skew = 0 is reverse KL."""
    return Term(lambda logp, logq, is_label: jnp.exp(logq) * (logq - _mix(config.skew, logq, logp)))
