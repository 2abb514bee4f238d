"""Cross-entropy on the labels: -log q(y). Always at temperature 1; needs no teacher."""

import jax.numpy as jnp

from kdjax.config import Loss
from kdjax.kernels.linear_divergence import Term


def cross_entropy(config: Loss) -> Term:
    """Gradient on the logits q - onehot(y)."""
    return Term(
        lambda pair: jnp.where(pair.is_label, -pair.logq, 0.0), teacher=False, tempered=False, gradient_sum=-1.0
    )
