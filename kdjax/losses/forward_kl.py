"""Forward KL: KL(p || q) = sum_v p (log p - log q), teacher p, student q. The usual distillation loss (Hinton et al. 2015)."""

import jax.numpy as jnp

from kdjax.config import Loss
from kdjax.kernels.linear_divergence import Term


def forward_kl(config: Loss) -> Term:
    """Gradient on the logits q - p. 0 only at p = q."""
    return Term(lambda logp, logq, is_label: jnp.exp(logp) * (logp - logq), gradient_sum=-1.0)
