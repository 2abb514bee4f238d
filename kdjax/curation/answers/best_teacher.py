"""Whose answers suit this student: what a pool's teachers are rated on, for policy "best_teacher"; see run/teachers.py.

admitted answers -> their figures (scored-<student>.jsonl) or the gradients of a few (gradients-<student>.jsonl, a line
per answer, each taken once: {"row", "id", "teacher", "gradient": base64 of float32, little endian, "error"}) -> a score
of `teacher_scores.py` per teacher. A score takes just the passes that it needs: none, forward ones, or backward ones.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdjax import config, registry
from kdjax.curation.answers.encode import Coding, encode
from kdjax.curation.answers.gradients import Row, rows_of
from kdjax.curation.answers.scored import SHOWN, ScoredFile
from kdjax.curation.answers.scores import SCORES
from kdjax.curation.answers.select import policy_of, score_of
from kdjax.curation.answers.stage import Stage, open_stage, records
from kdjax.curation.answers.teacher_scores import TEACHER_SCORES, TeacherScore, rate_teachers
from kdjax.curation.answers.verify import Admitted, admitted_answers, right_shares

DIMENSIONS = 512  # of a projected gradient
SIGNS = 0  # seed of the projection: one for all teachers and students, so that their gradients can be compared
FORWARD = ("answer_nll", "rank_sum")  # of what scores of teachers read: figures of a pass forward
FEWEST = 2  # questions that all teachers have answered, to be rated on these alone; and of one teacher, for GRACE


@dataclasses.dataclass(frozen=True)
class Rated:
    """scores: teacher -> score, the best first, NaN = it has none. questions: ids of those that they were rated on.

    common: how many questions every teacher with a usable answer has one to; with fewer than two, teachers were rated
    on whatever they have answered. gradients: how many were taken now, places: their tokens with padding, seconds.
    file: the name of the file of gradients, "" = the score reads none.
    """

    scores: Mapping[str, float]
    questions: tuple[str, ...]
    common: int
    gradients: int = 0
    places: int = 0
    seconds: float = 0.0
    file: str = ""

    def record(self) -> dict[str, Any]:
        """As the manifest of a selection has it."""
        scores = {teacher: score if math.isfinite(score) else None for teacher, score in self.scores.items()}
        return {"teacher_scores": scores, "common_questions": self.common, "rated_questions": list(self.questions)}


@dataclasses.dataclass(frozen=True, eq=False)
class Usable:
    """Answers that teachers are rated on, arrays [N]: numbers of question and teacher, digest of the row, figures."""

    question: np.ndarray
    teacher: np.ndarray
    row: np.ndarray
    figures: Mapping[str, np.ndarray]

    def where(self, kept: np.ndarray) -> Usable:
        """Those for which `kept` [N] is true."""
        figures = {name: column[kept] for name, column in self.figures.items()}
        return Usable(self.question[kept], self.teacher[kept], self.row[kept], figures)


def needs_of(settings: config.Answers) -> tuple[str, ...]:
    """What the score of teachers that answers.score names reads. Raises ValueError for one of answers."""
    score = score_of(settings)
    if not isinstance(score, TeacherScore):
        raise ValueError(f"answers.policy must be 'best_teacher' to rate teachers, got {settings.policy!r}. Set it.")
    return score.needs


def figures_of(settings: config.Answers) -> config.Answers | None:
    """The settings by which `make_measurer` takes the figures that a choice reads; None = it reads none of a pass.

    Raises ValueError for an unknown policy or score, and for a score that is not for a policy that reads one.
    """
    policy = policy_of(settings)
    if policy.teachers:
        return dataclasses.replace(settings, score="rsr") if set(needs_of(settings)) & set(FORWARD) else None
    if policy.scores:
        score_of(settings)
        return settings
    registry.lookup({**SCORES, **TEACHER_SCORES}, settings.score, "answers.score")  # it is not read, but named
    return None


def usable_answers(
    admitted: Admitted, settings: config.Answers, of: Coding, scored: ScoredFile | None = None
) -> Usable:
    """All admitted answers that can be trained on, with n_answer and the figures that answers.score needs.

    Raises ValueError if it needs figures of a pass and an answer has not been scored.
    """
    names = tuple(name for name in FORWARD if name in needs_of(settings))
    found: dict[str, list[float]] = {name: [] for name in (*names, "n_answer")}
    pairs: list[tuple[int, int]] = []
    digests: list[int] = []
    teachers = {name: number for number, name in enumerate(admitted.pool.teachers)}
    for number, (prompt, candidates) in enumerate(admitted_answers(admitted, settings)):
        lengths = {}
        if candidates and not names:
            encoded = encode(prompt, candidates, of)
            lengths = {each.row: int(each.tokens.counted.sum()) for each in encoded.answers if not each.error}
        for one in candidates:
            if names:
                figures = _figures(scored, one.row, one.teacher, prompt.id, tuple(found))
            else:
                figures = {"n_answer": lengths[one.row]} if one.row in lengths else {}
            if figures:
                pairs.append((number, teachers[one.teacher]))
                digests.append(int(one.row, 16))
                for name, column in found.items():
                    column.append(figures[name])
    numbers = np.array(pairs, np.int32).reshape(-1, 2)
    columns = {name: np.array(column, np.float64) for name, column in found.items()}
    return Usable(numbers[:, 0], numbers[:, 1], np.array(digests, np.uint64), columns)


def _figures(
    scored: ScoredFile | None, row: str, teacher: str, question: str, names: Sequence[str]
) -> Mapping[str, float]:
    """{} if the student gives none."""
    if scored is None or scored.lacks(row, names):
        raise ValueError(
            f"{'the scores' if scored is None else scored.path} must have {', '.join(names)} of all admitted answers, "
            f"got none of {row}, by {teacher!r} to {question!r}; scoring was stopped. Run the same command again."
        )
    line = scored[row]
    usable = not line.error and all(math.isfinite(line.values[name]) for name in names)
    return line.values if usable else {}


def asked_questions(usable: Usable, settings: config.Answers) -> tuple[list[int], int]:
    """(numbers of the questions that teachers are rated on, how many questions all teachers have answered).

    All teachers are rated on the same questions: those that each teacher with a usable answer has answered, or, if they
    are fewer than two, all. For gradients answers.teacher_questions of them at most, drawn by answers.seed.
    """
    pairs = np.unique(np.stack([usable.question, usable.teacher]), axis=1)
    questions, counts = np.unique(pairs[0], return_counts=True)
    common = questions[counts == len(np.unique(pairs[1]))]
    asked = (common if len(common) >= FEWEST else questions).tolist()
    if "gradients" in needs_of(settings):
        draw = random.Random(f"{settings.seed} teachers")
        asked = sorted(draw.sample(asked, min(settings.teacher_questions, len(asked))))
    return asked, len(common)


def gradients_path(scored: Path, student: str) -> Path:
    """Beside the figures of a student, by `params_fingerprint` of its weights."""
    return scored.with_name(f"gradients-{student[:SHOWN]}.jsonl")


def open_gradients(path: Path, depends: Mapping[str, Any]) -> Stage:
    """Begin or go on with a student's gradients. Raises ValueError as `scored.open_scored` does."""
    return open_stage(path, {**depends, "dimensions": DIMENSIONS, "signs": SIGNS}, renew=False)


def append_gradient(stage: Stage, said: Mapping[str, str], gradient: np.ndarray) -> None:
    """said: "row", "id" and "teacher" of the answer. A gradient that is not finite is an error of the answer."""
    finite = bool(np.isfinite(gradient).all())
    text = base64.b64encode(np.asarray(gradient, "<f4").tobytes()).decode() if finite else None
    stage.append({**said, "gradient": text, "error": "" if finite else "not_finite"})


def known_gradients(path: Path) -> set[str]:
    """The rows that are in the file."""
    return {record["row"] for _, record in records(path)}


def with_gradients(usable: Usable, path: Path) -> Usable:
    """The answers that have a finite gradient, with it."""
    rows = set(usable.row.tolist())
    found = {}
    for _, record in records(path):
        digest = int(record["row"], 16)
        if digest in rows and not record["error"]:
            found[digest] = np.frombuffer(base64.b64decode(record["gradient"]), "<f4")
    kept = usable.where(np.array([row in found for row in usable.row.tolist()], bool))
    gradients = np.array([found[row] for row in kept.row.tolist()], np.float32).reshape(-1, DIMENSIONS)
    return dataclasses.replace(kept, figures={**kept.figures, "gradients": gradients})


def rows_to_run(
    admitted: Admitted, settings: config.Answers, of: Coding, rows: Collection[str]
) -> Iterator[tuple[dict[str, str], Row]]:
    """(what `append_gradient` says, what is run) of the answers that are among `rows`."""
    for prompt, candidates in admitted_answers(admitted, settings):
        wanted = [one for one in candidates if one.row in rows]
        if wanted:
            encoded = encode(prompt, wanted, of)
            for answer, row in zip(encoded.answers, rows_of(encoded), strict=True):
                yield {"row": answer.row, "id": prompt.id, "teacher": answer.teacher}, row


def rate_usable(admitted: Admitted, settings: config.Answers, usable: Usable) -> dict[str, float]:
    """Teacher -> its score by answers.score, the best first; teachers without one last, with NaN.

    reward is the teacher's share of `right_shares` for each of its answers. A score that reads questions needs two.
    """
    rewards, arrays = right_shares(admitted), {}
    fewest = FEWEST if "question" in needs_of(settings) else 1
    for number, teacher in enumerate(admitted.pool.teachers):
        own = usable.where(usable.teacher == number)
        if len(np.unique(own.question)) >= fewest:
            reward = np.full(len(own.row), rewards[teacher])
            arrays[teacher] = {**own.figures, "question": own.question, "reward": reward}
    without = [teacher for teacher in admitted.pool.teachers if teacher not in arrays]
    return rate_teachers(settings.score, arrays) | dict.fromkeys(without, math.nan)
