"""Forward KL: KL(p || q) = sum_v p (log p - log q), teacher p, student q: the usual one (Hinton et al. 2015)."""

from kdjax.config import Loss
from kdjax.kernels.linear_divergence import Term


def forward_kl(config: Loss) -> Term:
    """Gradient on the logits q - p. 0 only at p = q."""
    return Term(lambda pair: pair.p * (pair.logp - pair.logq), linear=True, gradient_sum=-1.0)
