"""Signals: a score per position, higher = more worth supervising. Under stop-gradient, at temperature 1.

To add one: a function of the statistics it declares, and a line in SIGNALS.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.types import Batch, TokenStats


@dataclasses.dataclass(frozen=True)
class Signal:
    """score(stats, noise) -> [B, T]; `needs` names the `TokenStats` fields it reads, nothing else is computed.

    `noise`: uniform [B, T] that depends on seed, row, epoch and position only.
    """

    score: Callable[[TokenStats, Float[Array, "B T"]], Float[Array, "B T"]]
    needs: tuple[str, ...] = ()
    noisy: bool = False


def _statistic(name: str) -> Signal:
    return Signal(lambda stats, noise: getattr(stats, name), (name,))


SIGNALS: dict[str, Signal] = {
    "student_entropy": _statistic("student_entropy"),  # SE-KD: H(q_t) = -sum_v q log q of the student
    "teacher_entropy": _statistic("teacher_entropy"),
    "student_ce": _statistic("student_ce"),  # -log q_t(y_t): where the student misses the text
    "random": Signal(lambda stats, noise: noise, noisy=True),
}


def position_noise(key: Array, batch: Batch, purpose: int) -> Float[Array, "B T"]:
    """Uniform numbers of key, purpose, row, epoch and position alone: the same at any batch size or device count."""
    key = jax.random.fold_in(key, purpose)

    def row(row_id: Int[Array, ""], epoch: Int[Array, ""]) -> Float[Array, "T"]:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, row_id), epoch), batch.tokens.shape[1:])

    return jax.vmap(row)(batch.row_id, batch.epoch).astype(jnp.float32)
