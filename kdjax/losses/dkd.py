"""DKD, decoupled knowledge distillation (Zhao et al. 2022): the label against the rest, and the rest among itself."""

import jax.numpy as jnp
from jax import lax

from kdjax.config import Loss
from kdjax.kernels.linear_divergence import Pair, Term
from kdjax.kernels.linear_divergence.api import VocabSum
from kdjax.types import Array

# What exp and a sum over the vocabulary hold in float32 with digits to spare.
SMALLEST, LARGEST, STEEPEST = 1e-20, 1e25, 60.0
State = tuple[Array, Array, Array, Array]


def dkd(config: Loss) -> Term:
    """KL((p_y, 1 - p_y) || (q_y, 1 - q_y)) + dkd_beta KL(p' || q'); ' = renormalised over all entries but the label y.

    y is the ground truth, as in the paper; both sides are at temperature tau. KL(p || q) is the case of
    dkd_beta = 1 - p_y. Exact for p_y and q_y up to 1: what is left of the mass besides the label, and how it is spread,
    is computed from the other entries in log space, never as 1 - p_y.
    """
    return Term(
        lambda pair: against_rest(pair) + config.dkd_beta * among_rest(pair), gradient_sum=0.0, row_scalars=log_rests
    )


def log_rests(pair: Pair, vocab_sum: VocabSum) -> Array:
    """log(1 - p_y) and log(1 - q_y), [C, 2]: the first row scalars of whatever uses `against_rest` and `among_rest`."""
    sides = ((pair.logp, pair.p), (pair.logq, pair.q))
    return jnp.concatenate([log_sum(logs, shares, pair.is_label, vocab_sum) for logs, shares in sides], 1)


def among_rest(pair: Pair) -> Array:
    """Elementwise KL(p' || q'), ' = renormalised over all entries but the label; 0 there."""
    logp, logq = _of_rest(pair)
    return jnp.where(pair.is_label, 0.0, _excess(logp, logq))


def against_rest(pair: Pair) -> Array:
    """KL((p_y, 1 - p_y) || (q_y, 1 - q_y)) at the label; elsewhere summands of value 0 that carry a gradient."""
    rest_p, rest_q = pair.row[:, 0:1], pair.row[:, 1:2]
    _, logq = _of_rest(pair)
    still = lax.stop_gradient(logq)
    # log(1 - q_y) is a number of the row here, without gradient. The divergence of the rest does not depend on it to
    # first order; that of the pair does, and d log(1 - q_y) = sum_v q'_v dlogq_v is put back as a summand of value 0.
    moved = (jnp.exp(rest_q) - jnp.exp(rest_p)) * jnp.exp(still) * (logq - still)
    return jnp.where(pair.is_label, _excess(pair.logp, pair.logq) + _excess(rest_p, rest_q), moved)


def _of_rest(pair: Pair) -> tuple[Array, Array]:
    """log p' and log q'; 0 at the label, where exp could overflow and would spoil a gradient even if not selected."""
    sides = ((pair.logp, pair.row[:, 0:1]), (pair.logq, pair.row[:, 1:2]))
    logp, logq = (jnp.where(pair.is_label, 0.0, logs - rest) for logs, rest in sides)
    return logp, logq


def _excess(logp: Array, logq: Array) -> Array:
    """p log(p/q) - p + q from the logs: never negative, and sums to KL(p || q) as p and q sum to the same.

    Its slope in log q is q - p, which sums to 0. Next to 0 the series, where the digits of the three would cancel.
    """
    gap = logp - logq
    near = jnp.abs(gap) < 0.25
    x = jnp.where(near, gap, 0.0)
    series = x * x * (1 / 2 - x * (1 / 6 - x * (1 / 24 - x * (1 / 120 - x * (1 / 720 - x / 5040)))))
    p = jnp.exp(logp)
    return jnp.where(near, p * series, p * (gap - 1.0) + jnp.exp(logq))


def log_sum(logs: Array, shares: Array, left_out: Array, vocab_sum: VocabSum) -> Array:
    """log of the sum of all `shares` = exp(logs) but those left out [C, 1], exact where that sum underflows, too.

    The loop does not run unless it does for some row (logits of 46 or more over all others): then it bisects for a
    shift of that row's logs at which the sum neither vanishes nor overflows.
    """
    total = vocab_sum(jnp.where(left_out, 0.0, shares))
    low, high = jnp.full(total.shape, -1e8, jnp.float32), jnp.zeros(total.shape, jnp.float32)

    def lost(state: State) -> Array:
        low, high, _, total = state
        return (high - low > 1.0) & ((total < SMALLEST) | (total > LARGEST))

    def shift(state: State) -> State:
        low, high, at, total = state
        go = lost(state)
        low, high = jnp.where(go & (total > LARGEST), at, low), jnp.where(go & (total < SMALLEST), at, high)
        middle = 0.5 * (low + high)
        again = vocab_sum(jnp.where(left_out, 0.0, jnp.exp(jnp.minimum(logs - middle, STEEPEST))))
        return low, high, jnp.where(go, middle, at), jnp.where(go, again, total)

    state = (low, high, jnp.zeros(total.shape, jnp.float32), total)
    _, _, at, total = lax.while_loop(lambda state: jnp.any(lost(state)), shift, state)
    return at + jnp.log(jnp.maximum(total, SMALLEST))  # a vocabulary of nothing but the label has no rest
