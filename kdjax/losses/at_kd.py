"""AT-KD (Zhong et al., arXiv 2402.11890): the label and the rest decoupled; easy positions teach the rest alone."""

import jax.numpy as jnp

from kdjax.config import Loss
from kdjax.kernels.linear_divergence import Pair, Term
from kdjax.kernels.linear_divergence.api import VocabSum
from kdjax.losses.dkd import against_rest, among_rest, log_rests
from kdjax.types import Array


def at_kd(config: Loss) -> Term:
    """KL(p' || q') + hard KL((p_y, 1 - p_y) || (q_y, 1 - q_y)); ' = renormalised over all entries but the label y.

    sekd 6.2. hard is 1 at hard positions and 0 at easy ones, as the policies easy_hard and easy_hard_means say, which
    weigh the two kinds as well.
    """

    def row_scalars(pair: Pair, vocab_sum: VocabSum) -> Array:
        return jnp.concatenate([log_rests(pair, vocab_sum), pair.row], 1)

    def value(pair: Pair) -> Array:
        return among_rest(pair) + pair.row[:, 2:3] * against_rest(pair)

    return Term(value, gradient_sum=0.0, row_scalars=row_scalars, given="hardness")
