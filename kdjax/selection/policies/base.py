"""The contract of a policy, and exact integer budgets."""

import dataclasses
import fractions
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kdjax.types import Selection


@dataclasses.dataclass(frozen=True)
class Policy:
    """select(score [B, T], eligible [B, T], state) -> (Selection with S = slots(T), state).

    uses_signal: False if the scores are not read; then no signal is computed.
    signal: overrides the config's signal. init() -> state, a pytree that lives in the checkpoint.
    """

    slots: Callable[[int], int]
    select: Callable[[Float[Array, "B T"], Bool[Array, "B T"], Any], tuple[Selection, Any]]
    uses_signal: bool = True
    signal: str | None = None
    init: Callable[[], Any] = lambda: ()


def sortable(score: Float[Array, "B T"], eligible: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Scores for `lax.top_k`, which orders bit patterns: -nan < -inf < ... < -0 < 0 < ... < inf < nan.

    -0 ties with 0, only what is not eligible is at -inf, and NaN goes first: the loss is to show it.
    """
    score = jnp.where(score == 0, 0.0, score)
    score = jnp.nan_to_num(score, nan=jnp.inf)  # and -inf, inf to the ends of what is finite
    return jnp.where(eligible, score, -jnp.inf)


def budget(fraction: float, eligible: int) -> int:
    """max(1, ceil(fraction * eligible)), 0 of 0; the fraction is taken as the decimal it was written as.

    Float products round up too far for some budgets: 0.07 of 100 is 7, not 8.
    """
    exact = fractions.Fraction(repr(float(fraction))) * eligible
    return min(eligible, max(1, -(-exact.numerator // exact.denominator)))


def budgets(fraction: float, count: Int[Array, "B"], positions: int) -> Int[Array, "B"]:
    """`budget` of each row's number of eligible positions, by a table of exact values for 0..positions."""
    table = np.array([budget(fraction, n) for n in range(positions + 1)], np.int32)
    return jnp.asarray(table).at[count].get(mode="promise_in_bounds")
