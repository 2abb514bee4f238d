"""Which rows a batch has by the weights of their prompts, and what they weigh in it."""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from kdjax import config

Counts = Float[np.ndarray, "N"]
Weigh = Callable[[np.ndarray, np.ndarray], np.ndarray]


def batch_mean(weights: Float[np.ndarray, "B"], real: np.ndarray) -> Float[np.ndarray, "B"]:
    """weights / their mean over the rows of a batch that are `real` (bool [B]), of all devices and micro-batches.

    0 for rows that only fill the batch, and for all if no weight is positive.
    """
    kept = np.where(real, weights, 0.0)
    total = kept.sum()
    return kept * (real.sum() / total) if total > 0 else kept


def weigh_batch(settings: config.PassRates) -> Weigh | None:
    """(weights [B] of the rows of a whole batch, whether each has a target) -> those that they have in it.

    None = the same. A row without a target, such as an answer that was dropped, is not in the loss's count of rows
    either.
    """
    return batch_mean if settings.normalise == "batch_mean" else None


def easiest_first(a: Counts, n: Counts) -> Int[np.ndarray, "N"]:
    """int64 [N]: indices by descending a / n, in order of the problems among equals; unmeasured ones (n = 0) last."""
    return np.argsort(-np.where(n > 0, a / np.maximum(n, 1), -1.0), kind="stable")


def paced_fraction(step: int, total: int, first: float = 0.3) -> float:
    """min(1, first + (1 - first) step / (total / 2)): the share of the easiest problems that a step draws from."""
    return min(1.0, first + (1 - first) * step / (0.5 * total))


def choose_rows(
    weight: Counts, rank: Int[np.ndarray, "N"] | None, settings: config.PassRates, size: int, seed: int, steps: int
) -> Callable[[int], np.ndarray] | None:
    """(number of a batch) -> int64 [size], its rows; None = all rows in turn.

    normalise "sample": drawn with replacement in proportion to `weight`, to weigh 1 each: the expected gradient is that
    of weights of mean 1, and no forward pass is spent on a small one. weight "curriculum": drawn among those of the
    lowest `rank`, whose share of all grows with the `steps` (`paced_fraction`).
    """
    if settings.normalise == "sample":
        share = weight / weight.sum()
        return lambda step: np.random.default_rng([seed, 4, step]).choice(len(share), size, p=share)
    if rank is None:
        return None
    order = np.argsort(rank, kind="stable")

    def easy(step: int) -> np.ndarray:
        pool = order[: max(1, math.ceil(round(paced_fraction(step, steps) * len(order), 9)))]
        return np.random.default_rng([seed, 4, step]).choice(pool, size, replace=len(pool) < size)

    return easy
