"""Policies that take a window of the ranked positions: a curriculum from easy to hard, and a band of quantiles."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kdjax.config import Selection as SelectionConfig
from kdjax.selection.policies.base import Context, Policy, budget, budgets, eligible_count, ranks, sortable, take
from kdjax.types import Selection


def curriculum(config: SelectionConfig) -> Policy:
    """The budget of top_fraction in a window that moves from the lowest scores to the highest over the first updates.

    sekd 3.3: with n eligible positions ascending by score and a budget k, the k from floor(phi (n - k)) on, where
    phi = min(1, step / curriculum_steps). From then on it is top_fraction.
    """

    def slots(positions: int) -> int:
        return budget(config.fraction, positions)

    def select(
        score: Float[Array, "B T"], eligible: Bool[Array, "B T"], state: tuple, context: Context
    ) -> tuple[Selection, tuple]:
        positions, count = score.shape[1], eligible_count(eligible)
        wanted = budgets(config.fraction, count, positions)
        step = jnp.minimum(context.step, config.curriculum_steps).astype(jnp.float32)
        # The small addend of the reference: a product that should be whole must not fall below it.
        progress = step / config.curriculum_steps * (count - wanted).astype(jnp.float32) + 1e-4
        start = jnp.minimum(jnp.floor(progress).astype(jnp.int32), count - wanted)
        order = sortable(score, eligible)
        ascending = count[:, None] - 1 - ranks(order)
        inside = eligible & (ascending >= start[:, None]) & (ascending < (start + wanted)[:, None])
        return take(jnp.where(inside, order, -jnp.inf), wanted, slots(positions)), state

    return Policy(slots=slots, select=select)


def bucket(config: SelectionConfig) -> Policy:
    """The positions whose score lies between two quantiles of their row: [upper - fraction, upper], ends included.

    sekd 3.3; quantiles with linear interpolation. With ties there may be more than slots; the largest are kept.
    """
    low = config.upper - config.fraction
    if low < -1e-9:
        raise ValueError(
            f"selection.fraction must be at most selection.upper = {config.upper} for the policy 'bucket', got "
            f"{config.fraction}; the band of that width would begin below 0. Lower it, or raise selection.upper."
        )

    def slots(positions: int) -> int:
        return min(positions, budget(config.fraction, positions) + 2)  # both ends may be positions

    def select(
        score: Float[Array, "B T"], eligible: Bool[Array, "B T"], state: tuple, context: Context
    ) -> tuple[Selection, tuple]:
        count, order = eligible_count(eligible), sortable(score, eligible)
        ascending = jnp.sort(jnp.where(eligible, order, jnp.inf), 1)
        last = jnp.maximum(count - 1, 0)

        def at(level: float) -> Float[Array, "B 1"]:
            place = jnp.clip(level, 0.0, 1.0) * last.astype(jnp.float32)
            below = jnp.floor(place).astype(jnp.int32)
            both = jnp.take_along_axis(ascending, jnp.stack([below, jnp.minimum(below + 1, last)], 1), 1)
            share = (place - below.astype(jnp.float32))[:, None]
            return jnp.where(share > 0, both[:, :1] + share * (both[:, 1:] - both[:, :1]), both[:, :1])

        inside = eligible & (order >= at(low)) & (order <= at(config.upper))
        size = slots(score.shape[1])
        wanted = jnp.minimum(jnp.sum(inside, 1, dtype=jnp.int32), size)
        return take(jnp.where(inside, order, -jnp.inf), wanted, size), state

    return Policy(slots=slots, select=select)
