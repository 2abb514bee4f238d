"""What a divergence from K stored teacher entries is to the kernel, and the kinds there are."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from kdjax.types import Array


class Entries(NamedTuple):
    """What a term sees of one tile of rows. Ids are gone: after merging, each live entry is another column.

    probs: [C, K], the teacher's. logq: [C, K], the student's full-vocabulary log-probabilities of the same columns.
    live: [C, K], False where an entry is empty: probs is 0 there and logq is a filler. tail: [C], the teacher's mass
    outside of the live entries (0 if they are all columns there are). tail_logq: [C], the log of the student's mass
    there; exact however small it is, hugely negative if no column is left. teacher_entropy: [C], if it was given.
    """

    probs: Array
    logq: Array
    live: Array
    tail: Array
    tail_logq: Array
    teacher_entropy: Array | None


@dataclasses.dataclass(frozen=True)
class SparseTerm:
    """One divergence, a function of the student's K log-probabilities and that of its tail.

    value(entries) -> [C], nats. JAX differentiates it in logq and tail_logq; with d_k, d_t its slopes and
    c = sum_k d_k + d_t, the kernel forms the gradient on the logits at temperature tau: (d_k - q_k c) / tau at the
    entries, (d_t r_v - q_v c) / tau in the rest, r = the student's distribution within the tail.
    """

    value: Callable[[Entries], Array]


def _dot(live: Array, probs: Array, log_probs: Array) -> Array:
    return jnp.sum(jnp.where(live, probs * log_probs, 0.0), -1)


def _log(live: Array, probs: Array) -> Array:
    return jnp.log(jnp.where(live, probs, 1.0))


def sampled(entries: Entries) -> Array:
    """Cross-entropy -sum_k w_k log q_k less the teacher's entropy; gradient q sum_k w_k - w."""
    probs, logq, live = entries[:3]
    if entries.teacher_entropy is None:
        return zero_tail(entries)
    value = -_dot(live, probs, logq) - entries.teacher_entropy
    return jnp.where(jnp.any(live, -1), value, 0.0)


def renormalised(entries: Entries) -> Array:
    """KL(p / sum_k p_k || q); gradient q - p / sum_k p_k. The student keeps its whole vocabulary."""
    total = jnp.sum(entries.probs, -1, keepdims=True)
    return zero_tail(entries._replace(probs=entries.probs / jnp.where(total == 0, 1.0, total)))


def zero_tail(entries: Entries) -> Array:
    """sum_k p_k (log p_k - log q_k), a part of KL(p || q) that may be negative; gradient q sum_k p_k - p."""
    probs, logq, live = entries[:3]
    return _dot(live, probs, _log(live, probs) - logq)


def ghost_tail(entries: Entries) -> Array:
    """KL between the K entries and one class for all the rest, on both sides; <= KL(p || q)."""
    tailed = entries.tail != 0
    rest = entries.tail * (_log(tailed, entries.tail) - entries.tail_logq)
    return zero_tail(entries) + jnp.where(tailed, rest, 0.0)
