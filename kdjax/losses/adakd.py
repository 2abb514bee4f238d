"""AdaKD (Xie et al., arXiv 2510.11615): divergences at a temperature of each position's own."""

import jax
import jax.numpy as jnp
from jax import lax

from kdjax.config import Loss
from kdjax.kernels.linear_divergence import Pair, Term
from kdjax.kernels.linear_divergence.api import VocabSum
from kdjax.losses.forward_kl import forward_kl
from kdjax.losses.reverse_kl import reverse_kl
from kdjax.types import Array


def adakd_forward_kl(config: Loss) -> Term:
    """t^2 KL(p_t || q_t), both sides at temperature tau t of the position; the policy `adaptive` says t."""
    return at_own_temperature(forward_kl(config))


def adakd_reverse_kl(config: Loss) -> Term:
    """t^2 KL(q_t || p_t), both sides at temperature tau t of the position; the policy `adaptive` says t."""
    return at_own_temperature(reverse_kl(config))


def at_own_temperature(term: Term) -> Term:
    """t^2 term(p_t, q_t) with p_t = softmax(log p / t), and q_t alike; t [C, 1] is given per row and detached.

    The term must not have row scalars. Gradient on the logits: t (d_v - q_t,v sum_u d_u), d the term's slope at q_t.
    """

    def softened(pair: Pair, t: Array, log_sum_p: Array, log_sum_q: Array) -> Pair:
        logp, logq = pair.logp / t - log_sum_p, pair.logq / t - log_sum_q
        return pair._replace(logp=logp, logq=logq, p=jnp.exp(logp), q=jnp.exp(logq), row=None)

    def row_scalars(pair: Pair, vocab_sum: VocabSum) -> Array:
        t = _positive(pair.row)
        # No shift: the largest log-probability is above -ln V, so the sum cannot underflow unless t is below 0.2.
        log_sums = [jnp.log(vocab_sum(jnp.exp(logs / t))) for logs in (pair.logp, pair.logq)]
        soft = softened(pair, t, *log_sums)
        _, slope = jax.jvp(
            lambda logq, q: term.value(soft._replace(logq=logq, q=q)),
            (soft.logq, soft.q),
            (jnp.ones_like(soft.logq), soft.q),
        )
        return jnp.concatenate([t, *log_sums, vocab_sum(slope)], 1)

    def value(pair: Pair) -> Array:
        t, slope = _positive(pair.row[:, 0:1]), pair.row[:, 3:4]
        soft = softened(pair, t, pair.row[:, 1:2], pair.row[:, 2:3])
        # The log-sum of q is a number of the row, without gradient; its own, q_t / t, comes back as a summand of 0.
        still = lax.stop_gradient(pair.logq)
        moved = lax.stop_gradient(soft.q) * (pair.logq - still)
        return t * t * term.value(soft) - t * slope * moved

    return Term(value, gradient_sum=0.0, row_scalars=row_scalars, given="temperature")


def _positive(temperature: Array) -> Array:
    """Rows that only fill up a tile come with zeros, and must stay finite."""
    return jnp.where(temperature > 0, temperature, 1.0)
