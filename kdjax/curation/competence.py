"""A pass rate that moves while the student learns: a hidden level per problem, tracked over rounds of answers.

Each problem has a latent level z_t in 1..L with pass rates theta_1 < ... < theta_L; a round shows k of n right,
Binomial(n, theta_z). Between rounds a level goes up by one with probability `up`, down by one with `down`: a dynamic
Bayesian network after the student model of Morales-Gamboa and Sucar (arXiv 2008.12114), solved exactly by forward and
backward passes, O(rounds L^2) per problem. tests/curation/test_competence.py holds the contest that it had to win
against the discounted Beta counter.
"""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int

LEVELS = (0.01, 0.05, 0.15, 0.3, 0.5, 0.7, 0.85, 0.95, 0.99)
UP, DOWN = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6), (0.0, 0.005, 0.02, 0.05, 0.1, 0.2, 0.3)  # what `fit` looks at


@dataclasses.dataclass(frozen=True, eq=False)
class Tracked:
    """Beliefs over the levels of N problems after each of R rounds.

    filtered, smoothed: float64 [R, N, L], given the rounds so far, and given all rounds. log_score: float64 [R, N], of
    each round's k given the rounds before it, nats.
    """

    levels: np.ndarray
    filtered: np.ndarray
    smoothed: np.ndarray
    log_score: np.ndarray


def transition(levels: int, up: float, down: float) -> Float[np.ndarray, "L L"]:
    """[from, to]: up and down by one level; at the ends the rest stays. Rows sum to 1."""
    if not (0 <= up <= 1 and 0 <= down <= 1 and up + down <= 1):
        raise ValueError(f"up and down must be probabilities that sum to at most 1, got {up} and {down}.")
    found = up * np.eye(levels, k=1) + down * np.eye(levels, k=-1)
    return found + np.diag(1 - found.sum(1))


def track(
    right: Int[np.ndarray, "R N"],
    tried: Int[np.ndarray, "R N"],
    up: float,
    down: float,
    levels: Any = LEVELS,
    initial: Any = None,
) -> Tracked:
    """Forward-backward over the rounds, the oldest first; initial: the law of the first level, None = uniform."""
    theta = np.asarray(levels, np.float64)
    move = transition(len(theta), up, down)
    likely = np.exp(
        _log_choose(tried, right)[..., None]
        + right[..., None] * np.log(theta)
        + (tried - right)[..., None] * np.log1p(-theta)
    )
    belief = np.tile(np.full(len(theta), 1 / len(theta)) if initial is None else initial, (right.shape[1], 1))
    filtered, scores = [], []
    for number, seen in enumerate(likely):
        belief = (belief @ move if number else belief) * seen
        total = belief.sum(1, keepdims=True)
        belief = belief / total
        filtered.append(belief)
        scores.append(np.log(total[:, 0]))
    later, smoothed = np.ones_like(belief), [belief]
    for before, seen in zip(filtered[-2::-1], likely[:0:-1], strict=True):
        later = (later * seen) @ move.T
        later /= later.sum(1, keepdims=True)
        both = before * later
        smoothed.append(both / both.sum(1, keepdims=True))
    return Tracked(theta, np.stack(filtered), np.stack(smoothed[::-1]), np.stack(scores))


def fit(right: Int[np.ndarray, "R N"], tried: Int[np.ndarray, "R N"]) -> tuple[float, float]:
    """(up, down) of UP x DOWN under which the rounds of all problems together are most likely; (0, 0) for one round."""
    if len(right) < 2:
        return 0.0, 0.0
    pairs = [pair for pair in itertools.product(UP, DOWN) if sum(pair) <= 1]
    return max(pairs, key=lambda pair: float(track(right, tried, *pair).log_score.sum()))


def tracker(rounds: tuple[np.ndarray, np.ndarray], settings: Any) -> tuple[np.ndarray, np.ndarray]:
    """(p n, n): p = the mean of theta under the belief after the newest round, n = all answers of a problem.

    up and down are fitted to the rounds; nothing is to be set. n = 0 where nothing was ever tried.
    """
    right, tried = rounds
    found = track(right, tried, *fit(right, tried))
    answers = tried.sum(0).astype(np.float64)
    return found.filtered[-1] @ found.levels * answers, answers


def _log_choose(n: np.ndarray, k: np.ndarray) -> np.ndarray:
    lgamma = np.vectorize(math.lgamma, otypes=[np.float64])
    found: np.ndarray = lgamma(n + 1.0) - lgamma(k + 1.0) - lgamma(n - k + 1.0)
    return found
