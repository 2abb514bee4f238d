"""Reverse KL: KL(q || p) = sum_v q (log q - log p), student q, teacher p: mode-seeking (MiniLLM, Gu et al. 2024)."""

from kdjax.config import Loss
from kdjax.kernels.linear_divergence import Term


def reverse_kl(config: Loss) -> Term:
    """Gradient on the logits q (log(q/p) - KL)."""
    return Term(lambda pair: pair.q * (pair.logq - pair.logp))
