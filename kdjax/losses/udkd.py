"""UDKD, uncertainty-driven decoupled distillation (SE-KD's release): the rest, and the label by a gate."""

import jax.numpy as jnp

from kdjax import registry
from kdjax.config import Loss
from kdjax.kernels.linear_divergence import Pair, Term
from kdjax.kernels.linear_divergence.api import VocabSum
from kdjax.losses.dkd import among_rest, log_rests
from kdjax.types import Array


def udkd(config: Loss) -> Term:
    """KL(p' || q') + g (-p_y log q_y); ' = renormalised over all entries but the label y, g the gate, detached.

    sekd 3.2. The second part is a cross-entropy: neither value nor gradient vanish where q = p.
    """
    gate = registry.lookup(GATES, config.udkd_gate, "loss.udkd_gate")

    def row_scalars(pair: Pair, vocab_sum: VocabSum) -> Array:
        return jnp.concatenate([log_rests(pair, vocab_sum), gate(pair, vocab_sum)], 1)

    def value(pair: Pair) -> Array:
        return among_rest(pair) - jnp.where(pair.is_label, pair.row[:, 2:3] * pair.p * pair.logq, 0.0)

    return Term(value, row_scalars=row_scalars)


def _relative_entropy(shares: Array, logs: Array, vocab_sum: VocabSum) -> Array:
    """H / ln V [C, 1]. Columns that are padding have a log-probability that no logit gives."""
    size = vocab_sum(jnp.where(logs > -1e20, 1.0, 0.0))
    return -vocab_sum(shares * logs) / jnp.log(jnp.maximum(size, 2.0))


GATES = {  # loss.udkd_gate -> gate(pair, vocab_sum) [C, 1]
    "unc": lambda pair, vocab_sum: vocab_sum(jnp.where(pair.is_label, 0.0, pair.p)),  # 1 - p_y
    "teacher_entropy": lambda pair, vocab_sum: _relative_entropy(pair.p, pair.logp, vocab_sum),
    "student_entropy": lambda pair, vocab_sum: _relative_entropy(pair.q, pair.logq, vocab_sum),
    "kl": lambda pair, vocab_sum: vocab_sum(pair.p * (pair.logp - pair.logq)),
    "reverse_kl": lambda pair, vocab_sum: vocab_sum(pair.q * (pair.logq - pair.logp)),
}
