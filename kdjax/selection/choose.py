"""From statistics to slots: score, policy, weighting; the same code in the train step and in the report."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kdjax.selection.policies import Context, Policy
from kdjax.selection.signals import Signal, View, position_noise
from kdjax.types import Batch, Selection, TokenStats, gather_slots

SIGNAL, POLICY = 1, 2  # purposes of noise: a random score, a policy's draws


@dataclasses.dataclass(frozen=True)
class Chooser:
    """How positions are chosen. signal: None if the policy reads no score. by_score: selected positions count by it."""

    signal: Signal | None
    policy: Policy
    by_score: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        """The fields of TokenStats that the score is made of."""
        return () if self.signal is None else self.signal.needs

    def __call__(
        self,
        stats: TokenStats,
        batch: Batch,
        eligible: Bool[Array, "B T"],
        state: Any,
        key: Any,
        step: Int[Array, ""],
        all_rows: Callable[[Array], Array] = lambda array: array,
        own_rows: Callable[[Array], Array] = lambda array: array,
    ) -> tuple[Selection, Any]:
        """The slots of these rows and the policy's next state; no gradient. key: the run's, never advanced."""
        zeros = jnp.zeros(eligible.shape, jnp.float32)
        score = zeros
        if self.signal is not None:
            noise = position_noise(key, batch, SIGNAL) if self.signal.noisy else zeros
            score = lax.stop_gradient(self.signal.score(View(stats, eligible, noise)))
        draws = position_noise(key, batch, POLICY) if self.policy.noisy else zeros
        selection, state = self.policy.select(score, eligible, state, Context(step, draws, all_rows, own_rows))
        return (_weighted(selection, score) if self.by_score else selection), state


def _weighted(selection: Selection, score: Float[Array, "B T"]) -> Selection:
    """Slot weights times max(score, 0), scaled so that their row sums stay; rows without a positive score stay even."""
    weight = selection.weight * jnp.maximum(gather_slots(score, selection.index), 0.0)
    before, after = (jnp.sum(w, 1, keepdims=True) for w in (selection.weight, weight))
    weight = jnp.where(after > 0, weight * (before / jnp.where(after > 0, after, 1.0)), selection.weight)
    return dataclasses.replace(selection, weight=weight)
