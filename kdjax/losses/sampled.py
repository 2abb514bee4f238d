"""Reverse KL from drawn tokens alone (on-policy distillation; the estimators k1, k2, k3 of Schulman's note on KL).

d = log p(y) - log q(y), y the label, which the student itself must have drawn just now, from q at temperature 1. Means
over y ~ q: of -d (k1) and of e^d - 1 - d (k3) KL(q || p), of d^2 / 2 (k2) nearly so where p is near q. k1 is no loss:
the gradient of -d has mean 0. `sampled_reverse_kl` has its value, with the gradient of the score function.
"""

import jax.numpy as jnp
from jax import lax

from kdjax.config import Loss
from kdjax.kernels.linear_divergence import Pair, Term
from kdjax.types import Array

LARGEST = 30.0  # of d where exp(d) is taken: a token that the student drew has a larger one in e^-30 of the cases


def sampled_reverse_kl(config: Loss) -> Term:
    """-d; its gradient is -d d log q(y), detached but for log q(y), whose mean over y ~ q is that of the reverse KL.

    The policy gradient with the advantage d and no discount: of each token's own KL, not of later ones (paced L12).
    """

    def value(pair: Pair) -> Array:
        still = lax.stop_gradient(pair.logq)
        # 1 + 0: the value stays, and the slope is the advantage.
        return jnp.where(pair.is_label, (still - pair.logp) * (1.0 + (pair.logq - still)), 0.0)

    return Term(value, tempered=False, sampled=True)


def sampled_k2(config: Loss) -> Term:
    """d^2 / 2; never negative, and its gradient is that of sampled_reverse_kl, token by token (paced L13)."""
    return Term(
        lambda pair: jnp.where(pair.is_label, 0.5 * (pair.logp - pair.logq) ** 2, 0.0), tempered=False, sampled=True
    )


def sampled_k3(config: Loss) -> Term:
    """e^d - 1 - d; never negative, and the mean of its gradient, (1 - e^d) d log q(y), is the forward KL's.

    paced L13. In e^d larger d than 30 count as 30, so that tokens which the student could not draw stay finite.
    """

    def value(pair: Pair) -> Array:
        still = lax.stop_gradient(pair.logq)
        d = jnp.where(pair.is_label, pair.logp - still, 0.0)
        small = d * d * (1 / 2 + d * (1 / 6 + d / 24))  # e^d - 1 loses the digits of a small d
        excess = jnp.where(jnp.abs(d) < 1e-2, small, jnp.exp(jnp.minimum(d, LARGEST)) - 1.0 - d)
        return excess - jnp.where(pair.is_label, (excess + d) * (pair.logq - still), 0.0)

    return Term(value, tempered=False, sampled=True)
