"""The contract of a policy, exact integer budgets, and how positions become slots."""

import dataclasses
import fractions
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kdjax.types import LossOutput, Selection


@dataclasses.dataclass(frozen=True)
class Context:
    """What a policy may know besides scores and its state.

    step: int32 [], optimiser updates so far. noise: uniform [B, T] of seed, row, epoch and position; other numbers than
    a signal's. all_rows(array [B, ...]): the rows of all devices, in the order of the mesh; own_rows takes them back.
    """

    step: Int[Array, ""]
    noise: Float[Array, "B T"]
    all_rows: Callable[[Array], Array] = lambda array: array
    own_rows: Callable[[Array], Array] = lambda array: array


@dataclasses.dataclass(frozen=True)
class Policy:
    """select(score [B, T], eligible [B, T], state, context) -> (Selection with S = slots(T), state).

    uses_signal: False if the scores are not read; then no signal is computed. noisy: reads context.noise.
    signal: overrides the config's signal. init() -> state, a pytree that lives in the checkpoint.
    gives: what selection.given is, in a word, for the losses that ask for that; "" = nothing.
    observe(state, output, step) -> state, with the loss of the micro-batch over all devices.
    """

    slots: Callable[[int], int]
    select: Callable[[Float[Array, "B T"], Bool[Array, "B T"], Any, Context], tuple[Selection, Any]]
    uses_signal: bool = True
    noisy: bool = False
    signal: str | None = None
    init: Callable[[], Any] = lambda: ()
    gives: str = ""
    observe: Callable[[Any, LossOutput, Int[Array, ""]], Any] = lambda state, output, step: state


def sortable(score: Float[Array, "B T"], eligible: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Scores for `lax.top_k`, which orders bit patterns: -nan < -inf < ... < -0 < 0 < ... < inf < nan.

    -0 ties with 0, only what is not eligible is at -inf, and NaN goes first: the loss is to show it.
    """
    score = jnp.where(score == 0, 0.0, score)
    score = jnp.nan_to_num(score, nan=jnp.inf)  # and -inf, inf to the ends of what is finite
    return jnp.where(eligible, score, -jnp.inf)


def take(order: Float[Array, "B T"], count: Int[Array, "B"], size: int) -> Selection:
    """Of each row the `count` largest of `order` (a result of `sortable`) in `size` slots; ties: the lower index.

    count <= size, and no more than there are entries above -inf.
    """
    positions = order.shape[1]
    _, index = lax.top_k(order, size)  # equal scores: lower index first
    filled = jnp.arange(size)[None, :] < count[:, None]
    # Ascending positions with the empty slots last: gathers run forward, and slots are comparable between steps.
    index = jnp.sort(jnp.where(filled, index, positions), 1)
    filled = index < positions
    return Selection(jnp.where(filled, index, 0).astype(jnp.int32), filled.astype(jnp.float32))


def top_of_batch(order: Float[Array, "B T"], count: Int[Array, ""], context: Context) -> Bool[Array, "B T"]:
    """True at the `count` largest of `order` (a result of `sortable`) over the rows of all devices; ties: the first."""
    everything = context.all_rows(order)
    places = jnp.argsort(-everything.reshape(-1), stable=True)
    chosen = jnp.zeros(places.shape, bool).at[places].set(jnp.arange(places.size) < count)
    return context.own_rows(chosen.reshape(everything.shape))


def ranks(order: Float[Array, "B T"]) -> Int[Array, "B T"]:
    """The place of each position in its row, the largest at 0; ties: the lower index first."""
    _, places = lax.top_k(order, order.shape[1])
    return jnp.argsort(places, axis=1)


def eligible_count(eligible: Bool[Array, "B T"]) -> Int[Array, "B"]:
    """How many of a row's positions may be selected."""
    return jnp.sum(eligible, 1, dtype=jnp.int32)


def exact(fraction: float) -> fractions.Fraction:
    """A fraction as the decimal it was written as: 0.07 is 7/100, not the float next to it."""
    return fractions.Fraction(repr(float(fraction)))


def budget(fraction: float, eligible: int) -> int:
    """max(1, ceil(fraction * eligible)), 0 of 0, in exact arithmetic.

    Float products round up too far for some budgets: 0.07 of 100 is 7, not 8.
    """
    wanted = exact(fraction) * eligible
    return min(eligible, max(1, -(-wanted.numerator // wanted.denominator)))


def enough_for(count: int, fraction: float) -> int:
    """The least n of which floor(fraction * n) is `count`: ceil(count / fraction), in exact arithmetic."""
    wanted = count / exact(fraction)
    return -(-wanted.numerator // wanted.denominator)


def budgets(fraction: float, count: Int[Array, "B"], positions: int) -> Int[Array, "B"]:
    """`budget` of each row's number of eligible positions, by a table of exact values for 0..positions."""
    table = np.array([budget(fraction, n) for n in range(positions + 1)], np.int32)
    return jnp.asarray(table).at[count].get(mode="promise_in_bounds")
