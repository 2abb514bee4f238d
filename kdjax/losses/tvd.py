"""Total variation distance: 1/2 sum_v |p - q| (f-distill, Wen et al. 2023)."""

import jax.numpy as jnp

from kdjax.config import Loss
from kdjax.kernels.linear_divergence import Term


def tvd(config: Loss) -> Term:
    """In [0, 1]; the gradient at p = q is taken as 0."""
    return Term(lambda pair: 0.5 * jnp.abs(pair.p - pair.q))
