"""SE-KD's policy: per row the top fraction of the eligible positions by score; and its control, a random fraction."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from kdjax.config import Selection as SelectionConfig
from kdjax.selection.policies.base import Policy, budget, budgets, sortable
from kdjax.types import Selection


def top_fraction(config: SelectionConfig) -> Policy:
    """Exactly max(1, ceil(f n)) of a row's n eligible positions, the largest scores; ties go to the lower index.

    sekd 2.1; fraction 1 is dense distillation. A row without eligible positions has only empty slots.
    """

    def slots(positions: int) -> int:
        return budget(config.fraction, positions)

    def select(score: Float[Array, "B T"], eligible: Bool[Array, "B T"], state: tuple) -> tuple[Selection, tuple]:
        positions = score.shape[1]
        size = slots(positions)
        _, index = lax.top_k(sortable(score, eligible), size)  # equal scores: lower index first
        count = jnp.sum(eligible, 1, dtype=jnp.int32)
        filled = jnp.arange(size)[None, :] < budgets(config.fraction, count, positions)[:, None]
        # Ascending positions with the empty slots last: gathers run forward, and slots are comparable between steps.
        index = jnp.sort(jnp.where(filled, index, positions), 1)
        filled = index < positions
        return Selection(jnp.where(filled, index, 0).astype(jnp.int32), filled.astype(jnp.float32)), state

    return Policy(slots=slots, select=select)


def random_fraction(config: SelectionConfig) -> Policy:
    """The control arm: the same budget, drawn uniformly without replacement; new draws in every epoch."""
    return dataclasses.replace(top_fraction(config), signal="random")
