"""Scalar schedules of the update number: learning rate, temperature, loss weights.

A schedule is written in a config as plain data: a number (constant) or a tuple `(name, *arguments)`. Where an argument
counts updates it may be a share of the run: ("step", 0.0, 1.0, "50%") switches at half of train.steps, rounded down.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from kdjax import registry
from kdjax.types import Array

Schedule = Callable[[Any], Array]  # update number -> float32 scalar


def _positive(steps: float, name: str) -> float:
    if steps <= 0:
        raise TypeError(f"{name} must be positive")
    return steps


def _linear(start: float, end: float, steps: float) -> Schedule:
    return optax.linear_schedule(start, end, _positive(steps, "steps"))


def _cosine(start: float, end: float, steps: float) -> Schedule:
    _positive(steps, "steps")
    return lambda step: end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(step / steps, 0.0, 1.0)))


def _hold_linear(start: float, end: float, hold: float, steps: float) -> Schedule:
    """`start` for `hold` updates, then linear, `end` from update `steps` on (SE-KD's temperature annealing)."""
    return optax.linear_schedule(start, end, _positive(steps - hold, "steps - hold"), transition_begin=hold)


def _step(before: float, after: float, at: float) -> Schedule:
    """`before` for the first `at` updates, `after` from then on."""
    return lambda step: jnp.where(jnp.asarray(step) < at, before, after).astype(jnp.float32)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": optax.constant_schedule,
    "linear": _linear,  # (start, end, steps)
    "cosine": _cosine,  # (start, end, steps)
    "step": _step,  # (before, after, at)
    "hold_linear": _hold_linear,  # (start, end, hold, steps)
}


def make_schedule(spec: float | tuple, where: str, steps: int | None = None) -> Schedule:
    """A schedule from a number or `(name, *arguments)`; `where` is its config path, for the error.

    steps: of the run, of which "50%" is a share; the first two arguments are values and have none.
    """
    if isinstance(spec, (int, float)):
        return optax.constant_schedule(float(spec))
    name, *arguments = spec or (None,)
    try:
        if not isinstance(name, str):
            raise TypeError("the name is missing")
        numbers = [_number(argument, steps if at > 1 else None) for at, argument in enumerate(arguments)]
        return registry.lookup(SCHEDULES, name, where)(*numbers)
    except TypeError as error:
        raise ValueError(f"{where} must be a number or (name, *arguments), got {spec!r}; {error}.") from error


def _number(argument: Any, steps: int | None) -> float:
    if isinstance(argument, str) and steps is not None:
        share = re.fullmatch(r"(\d+(?:\.\d+)?)%", argument)
        if share is not None:
            return Fraction(share[1]) * steps // 100
    if not isinstance(argument, (int, float)):
        raise TypeError("the arguments are numbers, or where updates are counted shares of the run such as '50%'")
    return argument


def learning_rate(kind: str, peak: float, warmup: int, steps: int, final_fraction: float) -> Schedule:
    """Linear warm-up from 0 over `warmup` updates, then `kind` down to `final_fraction * peak` at update `steps`."""
    after = max(1, steps - warmup)
    bodies: dict[str, Schedule] = {
        "constant": optax.constant_schedule(peak),
        "linear": _linear(peak, final_fraction * peak, after),
        "cosine": _cosine(peak, final_fraction * peak, after),
    }
    body = registry.lookup(bodies, kind, "optim.schedule")
    if warmup == 0:
        return body
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), body], [warmup])


def own_steps(fraction: Any, steps: int, seed: int) -> np.ndarray:
    """bool [steps]: which steps train on the student's own answers, each with probability `fraction` of its update.

    One draw a step, as in GKD (Agarwal et al., arXiv 2306.13649, algorithm 1); the draws of a longer run begin alike.
    """
    schedule = make_schedule(fraction, "on_policy.fraction", steps)
    share = np.array([float(schedule(update)) for update in range(steps)])
    return np.random.default_rng([seed, 1]).random(steps) < share
