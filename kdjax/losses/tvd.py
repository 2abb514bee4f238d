"""Total variation distance: 1/2 sum_v |p - q| (f-distill, Wen et al. 2023)."""

import jax.numpy as jnp

from kdjax.config import Loss
from kdjax.kernels.linear_divergence import Term


def tvd(config: Loss) -> Term:
    """In [0, 1]; value and gradient are 0 where p = q to rounding, whose sign would be a gradient of full size."""
    return Term(lambda pair: 0.5 * jnp.where(jnp.abs(pair.logp - pair.logq) < 1e-5, 0.0, jnp.abs(pair.p - pair.q)))
