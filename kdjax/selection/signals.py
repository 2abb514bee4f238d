"""Signals: a score per position, higher = more worth supervising. Under stop-gradient, at temperature 1.

To add one: a function of the statistics it declares, and a line in SIGNALS.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kdjax.types import Batch, TokenStats

CERTAIN = 1e-6  # added to the teacher's cross-entropy before dividing by it, in nats
FLAT = 1e-6  # a standard deviation or range below this does not scale a score


@dataclasses.dataclass(frozen=True)
class View:
    """What a signal may look at, [B, T] each: the statistics it declared, the eligible positions, its noise.

    noise: uniform, depends on seed, row, epoch and position only.
    """

    stats: TokenStats
    eligible: Bool[Array, "B T"]
    noise: Float[Array, "B T"]


@dataclasses.dataclass(frozen=True)
class Signal:
    """score(view) -> [B, T]; `needs` names the `TokenStats` fields it reads, nothing else is computed."""

    score: Callable[[View], Float[Array, "B T"]]
    needs: tuple[str, ...] = ()
    noisy: bool = False


def _statistic(name: str) -> Signal:
    return Signal(lambda view: getattr(view.stats, name), (name,))


def _of(formula: Callable[..., Array], *needs: str) -> Signal:
    """formula(statistics ...) -> score, position by position."""
    return Signal(lambda view: formula(*(getattr(view.stats, name) for name in needs)), needs)


def _ratio(student_ce: Array, teacher_ce: Array) -> Array:
    """How much worse the student predicts the text than the teacher; large where the teacher is certain and right."""
    return student_ce / (teacher_ce + CERTAIN)


def _standardised(values: Array, eligible: Array) -> Array:
    """Zero mean and unit variance over a row's eligible positions; only centred where they hardly differ."""
    count = jnp.maximum(jnp.sum(eligible, 1, keepdims=True), 1)
    mean = jnp.sum(jnp.where(eligible, values, 0.0), 1, keepdims=True) / count
    spread = jnp.sqrt(jnp.sum(jnp.where(eligible, jnp.square(values - mean), 0.0), 1, keepdims=True) / count)
    return (values - mean) / jnp.where(spread < FLAT, 1.0, spread)


def _in_unit_range(values: Array, eligible: Array) -> Array:
    """0 at the smallest and 1 at the largest of a row's eligible positions."""
    low = jnp.min(jnp.where(eligible, values, jnp.inf), 1, keepdims=True)
    high = jnp.max(jnp.where(eligible, values, -jnp.inf), 1, keepdims=True)
    width = high - low
    return jnp.where(eligible, (values - low) / jnp.where(width < FLAT, 1.0, width), 0.0)


COMPOSITE = ("student_entropy", "student_ce", "kl")


def _composite(view: View) -> Array:
    parts = [_standardised(getattr(view.stats, name), view.eligible) for name in COMPOSITE]
    return parts[0] + parts[1] + parts[2]


def _entropy_or_kl(view: View) -> Array:
    h, d = (_in_unit_range(getattr(view.stats, name), view.eligible) for name in ("student_entropy", "kl"))
    return h + d - h * d


def _earlier_first(view: View) -> Array:
    return jnp.broadcast_to(-jnp.arange(view.noise.shape[1], dtype=jnp.float32)[None], view.noise.shape)


SIGNALS: dict[str, Signal] = {
    "student_entropy": _statistic("student_entropy"),  # SE-KD: H(q_t) = -sum_v q log q of the student
    "teacher_entropy": _statistic("teacher_entropy"),
    "student_ce": _statistic("student_ce"),  # -log q_t(y_t): where the student misses the text
    "teacher_ce": _statistic("teacher_ce"),
    "kl": _statistic("kl"),  # KL(p || q), teacher p
    "reverse_kl": _statistic("reverse_kl"),  # KL(q || p)
    "hellinger": _statistic("hellinger"),  # AdaKD: sqrt(1 - sum sqrt(p q)), in [0, 1]
    "token_gradient_norm": _statistic("student_gradient_norm"),  # ||q - onehot(y)||, exact
    "unc": _of(lambda ce: -jnp.expm1(-ce), "teacher_ce"),  # AT-KD: 1 - p(y)
    "ce_ratio": _of(_ratio, "student_ce", "teacher_ce"),
    "ce_ratio_plus_entropy": _of(lambda s, t, h: _ratio(s, t) + h, "student_ce", "teacher_ce", "student_entropy"),
    "ce_ratio_times_entropy": _of(lambda s, t, h: _ratio(s, t) * h, "student_ce", "teacher_ce", "student_entropy"),
    "entropy_plus_kl": _of(lambda h, kl: h + kl, "student_entropy", "kl"),
    # Standardised per row, then added: entropy, CE and KL with equal weights.
    "composite": Signal(_composite, COMPOSITE),
    # TIP: h + d - h d, entropy and KL brought to [0, 1] per row (the range is our reading).
    "entropy_or_kl": Signal(_entropy_or_kl, ("student_entropy", "kl")),
    "position": Signal(_earlier_first),  # a control: the first positions of the row
    "random": Signal(lambda view: view.noise, noisy=True),
}


def position_noise(key: Array, batch: Batch, purpose: int) -> Float[Array, "B T"]:
    """Uniform numbers of key, purpose, row, epoch and position alone: the same at any batch size or device count."""
    key = jax.random.fold_in(key, purpose)

    def row(row_id: Int[Array, ""], epoch: Int[Array, ""]) -> Float[Array, "T"]:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, row_id), epoch), batch.tokens.shape[1:])

    return jax.vmap(row)(batch.row_id, batch.epoch).astype(jnp.float32)
