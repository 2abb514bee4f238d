"""Skew KL divergences (DistiLLM, Ko et al. 2024): the second argument is mixed with a share of the first."""

import math

import jax.numpy as jnp

from kdjax.config import Loss
from kdjax.kernels.linear_divergence import Term
from kdjax.types import Array


def _log_mixture_ratio(skew: float, gap: Array) -> Array:
    """log((skew a + (1 - skew) b) / a) from gap = log(b / a): exact to the last bits of the ratio, not of log a."""
    return gap if skew == 0 else jnp.logaddexp(math.log(skew), math.log1p(-skew) + gap)


def skew_kl(config: Loss) -> Term:
    """KL(p || skew p + (1 - skew) q); skew = 0 is forward KL."""
    return Term(lambda pair: -pair.p * _log_mixture_ratio(config.skew, pair.logq - pair.logp))


def skew_reverse_kl(config: Loss) -> Term:
    """KL(q || (1 - skew) p + skew q); skew = 0 is reverse KL."""
    return Term(lambda pair: -pair.q * _log_mixture_ratio(config.skew, pair.logp - pair.logq))
