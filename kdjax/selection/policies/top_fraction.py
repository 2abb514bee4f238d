"""SE-KD's policy: per row the top fraction of the eligible positions by score; and its controls."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kdjax.config import Selection as SelectionConfig
from kdjax.selection.policies.base import Context, Policy, budget, budgets, eligible_count, exact, sortable, take
from kdjax.types import Selection


def top_fraction(config: SelectionConfig) -> Policy:
    """Exactly max(1, ceil(f n)) of a row's n eligible positions, the largest scores; ties go to the lower index.

    sekd 2.1; fraction 1 is dense distillation. A row without eligible positions has only empty slots. quota "batch":
    every row has the budget of the micro-batch's mean length, as far as it has positions (sekd 3.3, shared quota).
    """

    def slots(positions: int) -> int:
        return budget(config.fraction, positions)

    def select(
        score: Float[Array, "B T"], eligible: Bool[Array, "B T"], state: tuple, context: Context
    ) -> tuple[Selection, tuple]:
        positions, count = score.shape[1], eligible_count(eligible)
        if config.quota == "batch":
            wanted = jnp.minimum(count, _shared_quota(config.fraction, context.all_rows(count), positions))
        else:
            wanted = budgets(config.fraction, count, positions)
        return take(sortable(score, eligible), wanted, slots(positions)), state

    return Policy(slots=slots, select=select)


def _shared_quota(fraction: float, count: Int[Array, "R"], positions: int) -> Int[Array, ""]:
    """max(1, ceil(fraction * mean(count))) over the R rows of all devices, by a table over the sum."""
    rows = count.shape[0]
    share = exact(fraction) / rows
    table = [
        max(1, -(-(share * total).numerator // (share * total).denominator)) for total in range(rows * positions + 1)
    ]
    return jnp.asarray(np.array(table, np.int32)).at[jnp.sum(count)].get(mode="promise_in_bounds")


def random_fraction(config: SelectionConfig) -> Policy:
    """The control arm: the same budget, drawn uniformly without replacement; new draws in every epoch."""
    return dataclasses.replace(top_fraction(config), signal="random")


def reserve_mix(config: SelectionConfig) -> Policy:
    """The same budget k, of which floor(reserve k) are drawn uniformly from the rest and the others are the top."""

    def slots(positions: int) -> int:
        return budget(config.fraction, positions)

    def select(
        score: Float[Array, "B T"], eligible: Bool[Array, "B T"], state: tuple, context: Context
    ) -> tuple[Selection, tuple]:
        positions = score.shape[1]
        wanted = budgets(config.fraction, eligible_count(eligible), positions)
        share = exact(config.reserve)
        table = np.array([k - (share * k).numerator // (share * k).denominator for k in range(positions + 1)], np.int32)
        top = jnp.asarray(table).at[wanted].get(mode="promise_in_bounds")
        first = ranks_below(sortable(score, eligible), top)
        return take(sortable(jnp.where(first, 2.0, context.noise), eligible), wanted, slots(positions)), state

    return Policy(slots=slots, select=select, noisy=True)


def ranks_below(order: Float[Array, "B T"], count: Int[Array, "B"]) -> Bool[Array, "B T"]:
    """True at the `count` largest of each row."""
    chosen = take(order, count, order.shape[1])
    rows = jnp.arange(order.shape[0])[:, None]
    return jnp.zeros(order.shape, bool).at[rows, chosen.index].max(chosen.weight > 0)
