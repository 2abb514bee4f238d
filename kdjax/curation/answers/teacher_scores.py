"""One number per teacher for the whole pool: CAR, RSR of a data set, GRACE and its kin. Arrays in, number out.

They choose the teacher whose answers all questions get; `scores.py` chooses an answer for each question. Give every
teacher the same questions (200 in the papers): most of these figures depend on which ones they are.

To add one: its formula and what it reads, as a line in TEACHER_SCORES.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float

from kdjax import registry

BETA = 3.0  # of CAR; from memory of the paper, unverified
FOLDS = 10
SMOOTHING = 1e-4  # GRACE, nu
SHRINKAGE = 1e-3  # GRACE as released
SMALLEST = 1e-12


# Of one teacher's N answers, by name, arrays [N]:
#   answer_nll, n_answer, rank_sum: figures of answers, see scores.py.
#   question: a number per question, the same for all answers to it.
#   reward: any number, higher is better; its mean is read. With 1 and 0 for right and wrong give it, and the figures,
#     of all answers, not of the verified ones alone; or the share of right ones for each answer, as best_teacher.py.
#   gradients: [N, D], `AnswerGradient.projected` with one seed for all teachers.
TeacherAnswers = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class TeacherScore:
    """of(arrays in the order of `needs`) -> number; lower: whether the lowest is the best teacher."""

    of: Callable[..., float]
    needs: tuple[str, ...]
    lower: bool = True


def car(reward: Float[np.ndarray, "N"], nll: Float[np.ndarray, "N"], beta: float = BETA) -> float:
    """Compatibility-adjusted reward r / (1 + beta L): mean reward r, mean loss L of the student (arXiv 2411.07133).

    best_teacher.py gives how often the teacher is right as its reward: `verify.right_shares`, as for the strongest one.
    """
    return float(np.mean(reward) / (1 + beta * np.mean(nll)))


def rank_surprisal(
    rank_sum: Float[np.ndarray, "N"], nll: Float[np.ndarray, "N"], n_answer: Float[np.ndarray, "N"]
) -> float:
    """(Mean over answers of the mean rank) / (mean over answers of the mean NLL) (RSR, arXiv 2601.14249)."""
    return float(np.mean(rank_sum / n_answer) / max(float(np.mean(nll)), SMALLEST))


def length_scaled(gradients: Float[np.ndarray, "N D"], n_answer: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N D"]:
    """float64: each gradient of a mean loss times log max(n, 2), which undoes part of its decay with length n."""
    return np.asarray(gradients, np.float64) * np.log(np.maximum(n_answer, 2))[:, None]


def g_norm(rows: Float[np.ndarray, "N D"]) -> float:
    """tr(G^T G / N): the mean squared norm."""
    return float(np.mean(np.sum(np.asarray(rows, np.float64) ** 2, 1)))


def g_vendi(rows: Float[np.ndarray, "N D"]) -> float:
    """Entropy, in nats, of the spectrum of G^T G / N with unit rows: how many directions there are, on a log scale."""
    values = np.linalg.svd(_unit(rows), compute_uv=False) ** 2
    shares = values[values > SMALLEST] / max(float(values.sum()), SMALLEST)
    return float(-np.sum(shares * np.log(shares)))


def grace(
    rows: Float[np.ndarray, "N D"],
    question: np.ndarray,
    *,
    folds: int = FOLDS,
    smoothing: float = SMOOTHING,
    seed: int = 42,
) -> float:
    """Mean over the folds i of tr(M^-1 S): S = G_i^T G_i / n_i, M of the other rows made unit, + (nu / D) I; lower.

    rows: `length_scaled` gradients (arXiv 2511.02833). Questions, with all their answers, are dealt to `folds` parts at
    random; there are no more parts than questions. Raises ValueError for fewer than two questions, or figures that are
    not finite.
    """
    number = _numbered(rows, question)
    part = np.random.default_rng(seed).permutation(number.max() + 1)[number] % folds
    width = rows.shape[1]
    found = []
    for fold in np.unique(part):
        moment = _moment(_unit(rows[part != fold])) + smoothing / width * np.eye(width)
        found.append(np.trace(np.linalg.solve(moment, _moment(rows[part == fold]))))
    return float(np.mean(found))


def grace_released(
    gradients: Float[np.ndarray, "N D"],
    question: np.ndarray,
    *,
    splits: int = FOLDS,
    held: float = 0.1,
    shrinkage: float = SHRINKAGE,
) -> float:
    """GRACE as its released code has it: 10 random splits of 90 to 10 % of the questions, no factor of the length.

    The eigenvalues of M are shrunk by `shrinkage` to their mean in place of + (nu / D) I. `gradients` are not scaled.
    Split number i permutes the questions, in ascending order, by numpy's default_rng(i), and holds out the last ones.
    """
    number = _numbered(gradients, question)
    questions = int(number.max()) + 1
    held_out = max(1, int(questions * held))
    found = []
    for split in range(splits):
        order = np.random.default_rng(split).permutation(questions)
        test = np.isin(number, order[questions - held_out :])
        values, vectors = np.linalg.eigh(_moment(_unit(gradients[~test])))
        values = np.maximum(values, SMALLEST)
        values = (1 - shrinkage) * values + shrinkage * values.mean()
        along = vectors.T @ _moment(gradients[test]) @ vectors
        found.append(np.sum(np.diag(along) / values))
    return float(np.mean(found))


_SCALED = ("gradients", "n_answer")

TEACHER_SCORES: dict[str, TeacherScore] = {
    "car": TeacherScore(car, ("reward", "answer_nll"), lower=False),
    "rsr": TeacherScore(rank_surprisal, ("rank_sum", "answer_nll", "n_answer")),
    "grape": TeacherScore(lambda nll: float(np.mean(nll)), ("answer_nll",)),
    "accuracy": TeacherScore(lambda reward: float(np.mean(reward)), ("reward",), lower=False),  # the strongest teacher
    "grace": TeacherScore(lambda g, n, question: grace(length_scaled(g, n), question), (*_SCALED, "question")),
    "grace_released": TeacherScore(grace_released, ("gradients", "question")),
    "g_norm": TeacherScore(lambda g, n: g_norm(length_scaled(g, n)), _SCALED),
    "g_vendi": TeacherScore(lambda g, n: g_vendi(length_scaled(g, n)), _SCALED, lower=False),
}


def rate_teachers(name: str, teachers: Mapping[str, TeacherAnswers]) -> dict[str, float]:
    """Teacher -> its score, the best one first; equal ones by name, and those whose score is not finite last.

    Raises ValueError for an unknown score, or a teacher without what it needs.
    """
    score = registry.lookup(TEACHER_SCORES, name, "name")
    found = {}
    for teacher, answers in teachers.items():
        missing = [need for need in score.needs if need not in answers]
        if missing:
            raise ValueError(
                f"answers of teacher {teacher!r} must come with {missing[0]!r} for the score {name!r}, got "
                f"{', '.join(sorted(answers)) or 'nothing'}. Score them with it."
            )
        value = score.of(*(answers[need] for need in score.needs))
        found[teacher] = value if math.isfinite(value) else math.nan
    costs = {teacher: value if score.lower else -value for teacher, value in found.items()}
    order = sorted(found, key=lambda teacher: (math.isnan(costs[teacher]), np.nan_to_num(costs[teacher]), teacher))
    return {teacher: found[teacher] for teacher in order}


def _moment(rows: np.ndarray) -> np.ndarray:
    exact = np.asarray(rows, np.float64)
    return exact.T @ exact / len(rows)


def _unit(rows: np.ndarray) -> np.ndarray:
    exact = np.asarray(rows, np.float64)
    return exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), SMALLEST)


def _numbered(rows: np.ndarray, question: np.ndarray) -> np.ndarray:
    """0, 1, ... per question, in ascending order of `question`."""
    if len(rows) != len(question):
        raise ValueError(f"question must name the question of each of the {len(rows)} rows, got {len(question)}.")
    if not np.isfinite(rows).all():
        raise ValueError("gradients must be finite, got some that are not. Leave those answers out.")
    number = np.unique(question, return_inverse=True)[1]
    if not len(number) or number.max() < 1:
        raise ValueError("question must name at least two questions, got fewer; one part is compared with the others.")
    return number
