"""ToDi (Jung et al. 2025): every vocabulary entry has its own mixture of forward and reverse KL."""

import jax
from jax import lax

from kdjax.config import Loss
from kdjax.kernels.linear_divergence import Pair, Term
from kdjax.types import Array


def todi(config: Loss) -> Term:
    """sum_v [ s p log(p/q) + (1 - s) q log(q/p) ], s_v = sigmoid(todi_scale log(p/q)) under stop-gradient.

    Where the student gives too little (p > q), forward KL pulls it up; where too much, reverse KL pushes it down. At
    todi_scale = 1 the value, but not the gradient, is that of forward plus reverse KL; at 0 it is half of that.
    """

    def value(pair: Pair) -> Array:
        gap = pair.logp - pair.logq
        share = jax.nn.sigmoid(config.todi_scale * lax.stop_gradient(gap))
        return (share * pair.p - (1.0 - share) * pair.q) * gap

    return Term(value)
