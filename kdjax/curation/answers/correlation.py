"""Does a score order the answers to a question as a yardstick does? Rank correlations within questions.

The yardstick is a number per answer: the squared norm of the whole gradient (`gradients.py`), or the gain measured
after a step on that answer. Answers to different questions are never compared.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from kdjax.curation.scores import spearman

FEWEST = 3  # answers of a question that have a correlation worth its name
RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Agreement:
    """A score against a yardstick, over the questions where the correlation is defined.

    mean: of Spearman's rho within a question; low, high: its 95 % interval, by drawing questions anew; worst: the
    lowest rho. best: share of the questions where both prefer the same answer. NaN without a question; without a
    second one there is no interval.
    """

    questions: int
    mean: float
    low: float
    high: float
    worst: float
    best: float


def agreements(
    question: Sequence[str] | np.ndarray,
    scores: Mapping[str, np.ndarray],
    yardstick: np.ndarray,
    *,
    higher: frozenset[str] = frozenset(),
    yardstick_higher: bool = False,
    where: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Agreement]:
    """Score name -> its `Agreement` with the yardstick; question, scores, yardstick: [N], one entry per answer.

    higher: the scores of which the highest is preferred, yardstick_higher: whether that of the yardstick is; rho is 1
    where both prefer in the same order. where: bool [N], the answers to look at. An answer that either side has no
    finite number for is left out; a question with fewer than three left, or with all equal, has no rho. Equal numbers
    share their mean rank; the first of several preferred answers counts. All scores are resampled with the same
    questions.
    """
    names = np.asarray(question)
    for name, values in {**scores, "the yardstick": yardstick}.items():
        if len(values) != len(names):
            raise ValueError(f"scores must have {len(names)} entries, one per answer, got {len(values)} of {name}.")
    usable = np.isfinite(yardstick) if where is None else np.isfinite(yardstick) & np.asarray(where, bool)
    measured = -yardstick if yardstick_higher else yardstick
    groups = [np.flatnonzero((names == each) & usable) for each in dict.fromkeys(names.tolist())]
    draws = np.random.default_rng(seed).integers(max(len(groups), 1), size=(resamples, len(groups)))
    found = {}
    for name, values in scores.items():
        costs = -values if name in higher else values
        pairs = [(costs[at][kept], measured[at][kept]) for at in groups for kept in [np.isfinite(costs[at])]]
        rho = np.array([spearman(a, b) if len(a) >= FEWEST else math.nan for a, b in pairs])
        same = [bool(np.argmin(a) == np.argmin(b)) for (a, b), r in zip(pairs, rho, strict=True) if np.isfinite(r)]
        found[name] = _agreement(rho, same, draws)
    return found


def _agreement(rho: np.ndarray, same: Sequence[bool], draws: np.ndarray) -> Agreement:
    known = rho[np.isfinite(rho)]
    if not len(known):
        return Agreement(0, *[math.nan] * 5)
    low = high = math.nan
    if len(known) > 1:
        drawn = rho[draws]
        counted = np.isfinite(drawn).sum(1)
        means = np.nansum(drawn, 1)[counted > 0] / counted[counted > 0]
        low, high = np.percentile(means, [2.5, 97.5]).tolist()
    return Agreement(len(known), float(known.mean()), low, high, float(known.min()), float(np.mean(same)))


def table(found: Mapping[str, Agreement]) -> list[str]:
    """The agreements as lines of text, the highest mean first."""
    lines = [f"{'score':<20}{'questions':>10}{'mean rho':>10}   {'95 % interval':<18}{'worst':>7}{'same best':>11}"]
    for name in sorted(found, key=lambda each: -np.nan_to_num(found[each].mean, nan=-2.0)):
        a = found[name]
        interval = f"[{a.low:.2f}, {a.high:.2f}]"
        lines.append(f"{name:<20}{a.questions:>10}{a.mean:>10.2f}   {interval:<18}{a.worst:>7.2f}{a.best:>10.0%}")
    return lines
