"""Scores of teachers against their definitions, written out in float64, and what they do not depend on."""

import math

import numpy as np
import pytest

from kdjax.curation.answers import teacher_scores
from kdjax.curation.answers.teacher_scores import TEACHER_SCORES, rate_teachers

N, D = 23, 6


@pytest.fixture
def made():
    rng = np.random.default_rng(5)
    return {
        "gradients": rng.normal(size=(N, D)) * rng.uniform(0.2, 3, (N, 1)) + np.array([1.0, 0, 0, 0, 0, 0]),
        "question": rng.integers(0, 12, N) * 7,
        "n_answer": rng.integers(1, 90, N).astype(float),
        "answer_nll": rng.uniform(0.2, 3, N),
        "rank_sum": rng.uniform(1, 400, N),
        "reward": (rng.random(N) < 0.7).astype(float),
    }


def test_car_and_rsr(made):
    nll, reward = made["answer_nll"], made["reward"]
    assert teacher_scores.car(reward, nll) == pytest.approx(reward.sum() / N / (1 + 3 * nll.sum() / N))
    assert teacher_scores.car(reward, nll, beta=0.0) == pytest.approx(reward.mean())
    ranks, lengths = made["rank_sum"], made["n_answer"]
    want = sum(r / n for r, n in zip(ranks, lengths, strict=True)) / nll.sum()
    assert teacher_scores.rank_surprisal(ranks, nll, lengths) == pytest.approx(want)
    ones = teacher_scores.rank_surprisal(lengths, nll, lengths)  # every token ranks first
    assert ones == pytest.approx(1 / nll.mean())


def loops(rows, question, folds, smoothing, seed):
    """GRACE, entry by entry."""
    names = sorted(set(question.tolist()))
    order = np.random.default_rng(seed).permutation(len(names))
    part = [int(order[names.index(each)]) % folds for each in question]
    found = []
    for fold in sorted(set(part)):
        own = [r for r, p in zip(rows, part, strict=True) if p == fold]
        others = [r / math.sqrt(sum(x * x for x in r)) for r, p in zip(rows, part, strict=True) if p != fold]
        width = rows.shape[1]
        background = [
            [
                sum(r[i] * r[j] for r in others) / len(others) + (smoothing / width if i == j else 0)
                for j in range(width)
            ]
            for i in range(width)
        ]
        inverse = np.linalg.inv(np.array(background))
        found.append(sum(r @ inverse @ r for r in own) / len(own))
    return sum(found) / len(found)


def test_grace_is_its_definition(made):
    rows = teacher_scores.length_scaled(made["gradients"], made["n_answer"])
    np.testing.assert_allclose(rows[3], made["gradients"][3] * math.log(max(made["n_answer"][3], 2)))
    for folds, smoothing in ((10, 1e-4), (3, 0.5)):
        found = teacher_scores.grace(rows, made["question"], folds=folds, smoothing=smoothing)
        assert found == pytest.approx(loops(rows, made["question"], folds, smoothing, 42), rel=1e-9)
    assert (teacher_scores.length_scaled(np.ones((1, 2)), np.ones(1)) > 0.6).all(), "a single token still counts"


def test_grace_as_released(made):
    gradients, question = made["gradients"], made["question"]
    names = np.unique(question)
    found = []
    for split in range(10):
        last = names[np.random.default_rng(split).permutation(len(names))[-1]]  # a tenth of 12 or fewer is one
        train, test = gradients[question != last], gradients[question == last]
        train = train / np.linalg.norm(train, axis=1)[:, None]
        matrix = train.T @ train / len(train)
        # shrinking the eigenvalues to their mean is shrinking the matrix to its mean diagonal
        matrix = 0.999 * matrix + 0.001 * np.trace(matrix) / D * np.eye(D)
        found.append(np.mean([row @ np.linalg.inv(matrix) @ row for row in test]))
    assert teacher_scores.grace_released(gradients, question) == pytest.approx(np.mean(found), rel=1e-9)
    short = teacher_scores.grace_released(gradients[:3], np.array([0, 1, 1]))  # fewer rows than dimensions
    assert math.isfinite(short)


@pytest.mark.parametrize("name", TEACHER_SCORES)
def test_the_order_of_answers_does_not_matter(name, made):
    order = np.random.default_rng(0).permutation(N)
    mixed = {key: value[order] for key, value in made.items()}
    found = rate_teachers(name, {"one": made, "mixed": mixed})
    assert found["one"] == pytest.approx(found["mixed"], rel=1e-10)
    other = {
        key: np.append(value[:-1], 2 * value[-1] + 1) if value.ndim == 1 else 2 * value for key, value in made.items()
    }
    if name != "g_vendi":
        assert abs(rate_teachers(name, {"one": other})["one"] / found["one"] - 1) > 1e-4


def test_norm_and_entropy_of_the_spectrum(made):
    rows = made["gradients"]
    assert teacher_scores.g_norm(rows) == pytest.approx(np.trace(rows.T @ rows) / N)
    assert teacher_scores.g_vendi(np.eye(4)[[0, 1, 2, 3, 0, 1, 2, 3]]) == pytest.approx(math.log(4))
    assert teacher_scores.g_vendi(np.outer([1.0, -2, 3], [1.0, 2])) == pytest.approx(0, abs=1e-12)
    unit = rows / np.linalg.norm(rows, axis=1)[:, None]
    values = np.linalg.eigvalsh(unit.T @ unit / N)
    assert teacher_scores.g_vendi(rows) == pytest.approx(-np.sum(values * np.log(values)))
    assert teacher_scores.g_vendi(1e3 * rows) == pytest.approx(teacher_scores.g_vendi(rows))
    assert teacher_scores.g_vendi(np.zeros((3, 2))) == 0


def test_the_best_teacher_comes_first():
    def teacher(reward, nll):
        return {"reward": np.array([reward]), "answer_nll": np.array([nll])}

    teachers = {"b": teacher(0.5, 1.0), "c": teacher(math.nan, 2.0), "a": teacher(0.5, 1.0), "d": teacher(0.9, 0.1)}
    assert list(rate_teachers("car", teachers)) == ["d", "a", "b", "c"]
    assert math.isnan(rate_teachers("car", teachers)["c"])
    assert list(rate_teachers("grape", teachers)) == ["d", "a", "b", "c"]
    assert list(rate_teachers("accuracy", {"x": teacher(0.1, 1.0), "y": teacher(0.2, 1.0)})) == ["y", "x"]


def test_what_is_refused(made):
    with pytest.raises(ValueError, match=r"name must be a known name .* Did you mean 'grace'\?"):
        rate_teachers("gracee", {})
    with pytest.raises(
        ValueError, match=r"answers of teacher 'x' must come with 'reward' for the score 'car', got nll"
    ):
        rate_teachers("car", {"x": {"nll": np.ones(2)}})
    rows, broken = made["gradients"], made["gradients"].copy()
    broken[2, 1] = np.nan
    for bad, question, message in (
        (rows, np.zeros(N), r"question must name at least two questions, got fewer"),
        (rows, made["question"][1:], r"question must name the question of each of the 23 rows, got 22"),
        (broken, made["question"], r"gradients must be finite"),
    ):
        for grace in (teacher_scores.grace, teacher_scores.grace_released):
            with pytest.raises(ValueError, match=message):
                grace(bad, question)
