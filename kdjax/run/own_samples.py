"""The sample axis on the student's own answers: a block asks more prompts than it trains on and keeps the best answers.

Each block is scored by the student that wrote it, by `samples.score` as rows of a text are (curation/scores.py).
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from kdjax.build import Built
from kdjax.curation import make_scorer
from kdjax.data import Rows
from kdjax.types import Params

# (student, rows of a block, what the teacher reads in their place, number of the block) -> scores, float64 [R]
ScoreBlock = Callable[[Params, Rows, Mapping[str, np.ndarray], int], np.ndarray]


def make_score_block(built: Built) -> ScoreBlock | None:
    """Scores of the answers of a block; -inf for a row without a target. None if all answers are trained on."""
    e = built.experiment
    if e.samples.fraction == 1:
        return None
    size = e.train.batch_size // e.train.accumulate
    scorer = make_scorer(built.parts.student, built.parts.teacher, e.samples, built.rules, size)

    def score_block(params: Params, rows: Rows, text: Mapping[str, np.ndarray], number: int) -> np.ndarray:
        # random scores and positions are drawn by row_id: no two answers of a run have the same
        ids = (number * len(rows) + np.arange(len(rows), dtype=np.int64)) % 2**31
        apart = dataclasses.replace(rows, row_id=ids.astype(np.int32))
        found: np.ndarray = scorer(params, built.teacher_params, apart, text=text)
        return found

    return score_block


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """int64 [count], ascending: the places of highest score; ties: the first; those at -inf if there are no others."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def kept_figures(scores: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    """rollout_kept: share of the answers that is trained on. rollout_score, rollout_score_kept: means of all, of these.

    Answers without a target are in no mean and not kept.
    """
    usable = scores > -np.inf
    figures = {"rollout_kept": float(usable[kept].sum() / len(scores))}
    if usable.any():
        figures["rollout_score"] = float(scores[usable].mean())
        figures["rollout_score_kept"] = float(scores[kept][usable[kept]].mean())
    return figures
