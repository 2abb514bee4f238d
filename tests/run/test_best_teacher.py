"""The teacher that suits the student best: every score against figures that are made once more, and what is kept."""

import dataclasses
import json
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.analysis.answers_page import render, round_of
from kdjax.config import Answers
from kdjax.curation import snr
from kdjax.curation.answers import best_teacher
from kdjax.curation.answers.encode import encode
from kdjax.curation.answers.gradients import ROUND_UP, AnswerGradient, rows_of
from kdjax.curation.answers.scorer import Scored
from kdjax.curation.answers.scores import SCORES
from kdjax.curation.answers.select import Pick, ScoredAnswer, choose
from kdjax.curation.answers.selected import read_selected, select
from kdjax.curation.answers.stage import read_manifest
from kdjax.curation.answers.teacher_scores import TEACHER_SCORES
from kdjax.curation.answers.verify import admitted_answers, right_shares
from kdjax.run import teachers
from launch import curate_answers
from tests.curation.answers import plain_llama as plain
from tests.run.answer_choices import choice_among, said_by

WIDTH = 64  # of a projected gradient, in place of 512


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    assert best_teacher.DIMENSIONS == 512
    monkeypatch.setattr(best_teacher, "DIMENSIONS", WIDTH)


WRONG = "I would say 99."
POOL = {
    "ada": dict.fromkeys(range(8)) | {8: WRONG},
    "bob": dict.fromkeys(range(2, 9)),
    "cy": dict.fromkeys(range(1, 10)) | {0: "Is it 3 or 4?"},
    "dee": dict.fromkeys(range(9), WRONG),
}
SHARED = range(2, 8)  # of ada, bob and cy


def choice_of(base, workdir, said=None, **changes):
    return choice_among(base, workdir, POOL if said is None else said, **changes)


def manifest_of(workdir, name="selected"):
    return read_manifest(workdir / "answers" / f"{name}.jsonl")


# --- every score, from figures that are made once more


@pytest.fixture(scope="module")
def known(base, tmp_path_factory):
    """(where figures and gradients are kept, (question, teacher) -> what an oracle finds of the answer)."""
    workdir = tmp_path_factory.mktemp("known") / "run"
    built, _ = base
    choice = choice_of(base, workdir)
    params, cfg = built.student_params, built.student_cfg

    def logits(p, tokens):
        return plain.forward(cfg, p, tokens)[0][:, : built.vocab_size]

    @jax.jit
    def oracle(p, tokens, mask):
        def loss(p):
            nll = plain.token_nll(logits(p, tokens), tokens)
            return jnp.vdot(mask[1:].astype(jnp.float32), nll) / mask[1:].sum()

        value, gradient = jax.value_and_grad(loss)(p)
        before = logits(p, tokens)[:-1]
        above = jnp.sum(before > jnp.take_along_axis(before, tokens[1:, None], 1), -1)
        ranks = jnp.sum(jnp.where(mask[1:], jnp.minimum(above + 1, 100), 0))
        return value, ranks, snr.project(gradient, WIDTH, 0)

    found = {}
    for prompt, candidates in admitted_answers(choice.admitted, Answers()):
        encoded = encode(prompt, candidates, choice._coding)
        for one, (ids, mask, _) in zip(encoded.answers, rows_of(encoded), strict=True):
            padded = [np.pad(a, (0, 64 - len(a))) for a in (ids, mask)]  # nothing looks ahead
            nll, ranks, gradient = jax.device_get(oracle(params, *padded))
            found[prompt.id, one.teacher] = (float(nll), float(mask.sum()), float(ranks), np.float64(gradient))
    return workdir, found


def scored_by_hand(name, mine, questions, share):
    """One teacher's score from [(nll, n, ranks, gradient)], written out."""
    nll, n, ranks = (np.array([one[at] for one in mine]) for at in range(3))
    rows = np.stack([one[3] for one in mine])
    scaled = np.stack([row * math.log(max(length, 2)) for row, length in zip(rows, n, strict=True)])

    def moment(some):
        return sum(np.outer(row, row) for row in some) / len(some)

    def unit(some):
        return some / np.sqrt((some**2).sum(1))[:, None]

    if name == "car":
        return share / (1 + 3 * nll.mean())
    if name == "rsr":
        return (ranks / n).mean() / nll.mean()
    if name == "grape":
        return nll.mean()
    if name == "accuracy":
        return share
    if name == "g_norm":
        return np.trace(moment(scaled))
    if name == "g_vendi":
        values = np.linalg.eigvalsh(moment(unit(scaled)))
        values = values[values > 1e-12] / values.sum()
        return -(values * np.log(values)).sum()
    order, found = sorted(set(questions)), []
    number = np.array([order.index(each) for each in questions])
    if name == "grace":
        part = np.random.default_rng(42).permutation(len(order))[number] % 10
        for fold in set(part.tolist()):
            background = moment(unit(scaled[part != fold])) + 1e-4 / WIDTH * np.eye(WIDTH)
            found.append(np.trace(np.linalg.inv(background) @ moment(scaled[part == fold])))
    if name == "grace_released":
        for split in range(10):
            last = np.random.default_rng(split).permutation(len(order))[-1:]
            background = moment(unit(rows[~np.isin(number, last)]))
            background = 0.999 * background + 0.001 * np.trace(background) / WIDTH * np.eye(WIDTH)
            found.append(np.trace(np.linalg.inv(background) @ moment(rows[np.isin(number, last)])))
    return np.mean(found)


SHARES = {"ada": 8 / 10, "bob": 7 / 10, "cy": 9 / 10}  # of the ten questions that somebody answers


@pytest.mark.parametrize("name", TEACHER_SCORES)
def test_each_score_chooses_by_its_definition(base, known, name):
    workdir, answers = known
    asked = 4 if "gradients" in TEACHER_SCORES[name].needs else 200
    choice = choice_of(base, workdir, score=name, teacher_questions=asked)
    made = choice(base[0].student_params)
    manifest = manifest_of(workdir)
    shared = sorted(base[1][number].id for number in SHARED)
    assert manifest["common_questions"] == len(shared)
    used = manifest["rated_questions"]
    assert sorted(used) == shared if asked == 200 else set(used) < set(shared)
    assert len(used) == min(asked, len(shared))
    assert made.rated.gradients == 0 or asked == 4, "a score that needs none takes no pass back"
    assert (made.file is None) == (not {"answer_nll", "rank_sum"} & set(TEACHER_SCORES[name].needs))
    wanted = {}
    for teacher, share in SHARES.items():
        order = sorted(used, key=lambda question: json.dumps(question))
        mine = [answers[question, teacher] for question in order]
        wanted[teacher] = scored_by_hand(name, mine, order, share)
    scores = manifest["teacher_scores"]
    assert scores.pop("dee") is None
    assert scores == pytest.approx(wanted, rel=2e-4)
    assert list(scores) == sorted(wanted, key=wanted.get, reverse=not TEACHER_SCORES[name].lower)
    best = next(iter(scores))
    assert {one.teacher_name for one in read_selected(workdir)} == {best}
    assert made.counts["teachers"] == {best: len([key for key in answers if key[1] == best])}
    assert manifest["counts"]["taken_teachers"] == [best]
    assert min(abs(a / b - 1) for a in wanted.values() for b in wanted.values() if a != b) > 1e-3, "no tie"


# --- gradients on disk


class Stopped(Exception):
    pass


@pytest.fixture
def faked(monkeypatch):
    """No student is run: gradients are drawn by the ids of a row. What is asked for, and after how many it stops."""
    state = {"asked": [], "stop": None, "broken": lambda ids: False}

    def make(model, rules, **options):
        assert options["dimensions"] == WIDTH

        def run(params, rows):
            for ids, _, _ in rows:
                if state["stop"] is not None and len(state["asked"]) >= state["stop"]:
                    raise Stopped
                state["asked"].append(ids.tobytes())
                drawn = np.random.default_rng(list(ids)).normal(size=WIDTH).astype(np.float32)
                if state["broken"](ids):
                    drawn[0] = np.nan
                yield AnswerGradient(0.0, float(drawn @ drawn), {}, projected=drawn)

        return run

    monkeypatch.setattr(teachers, "make_gradient_pass", make)
    return state


def test_going_on_asks_for_no_gradient_twice(base, faked, tmp_path):
    params = base[0].student_params
    whole = choice_of(base, tmp_path / "whole", score="grace")(params)
    every = len(faked["asked"])
    assert every == whole.rated.gradients == 3 * len(SHARED)

    faked["asked"].clear()
    faked["stop"] = 7
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        choice_of(base, run, score="grace")(params)
    (file,) = (run / "answers").glob("gradients-*.jsonl")
    assert len(file.read_bytes().splitlines()) == 7
    before, torn = read_manifest(file)["counts"], len(faked["asked"][6]) // 4
    assert before["gradients"] == 7
    assert not (run / "answers/selected.jsonl").exists()
    file.write_bytes(file.read_bytes()[:-30])  # a line that a kill tore: this row alone is asked for again
    faked["stop"] = None
    made = choice_of(base, run, score="grace")(params)
    assert made.rated.gradients == every - 6
    spent = read_manifest(file)["counts"]
    assert (spent["gradients"], spent["places"]) == (every + 1, whole.rated.places + torn + -torn % ROUND_UP)
    assert spent["seconds"] == pytest.approx(before["seconds"] + made.rated.seconds, abs=1e-3)
    assert 0 < before["seconds"] < spent["seconds"]
    assert len(set(faked["asked"])) == every == len(faked["asked"]) - 1
    assert made.rated.scores == pytest.approx(dict(whole.rated.scores), nan_ok=True)
    rows = [json.loads(line)["row"] for line in file.read_text().splitlines()]
    assert len(rows) == len(set(rows)) == every
    assert choice_of(base, run, score="g_norm")(params).rated.gradients == 0, "another score reads the same ones"
    assert read_manifest(file)["counts"] == spent
    shared = choice_of(base, tmp_path / "other", score="grace", scored="../run")(params)
    assert shared.rated.gradients == 0


def test_other_gradients_in_the_file_change_nothing(base, faked, tmp_path):
    params, run = base[0].student_params, tmp_path / "run"
    few = choice_of(base, run, score="g_norm", teacher_questions=3)(params).rated
    more = choice_of(base, run, score="g_norm", teacher_questions=200)(params).rated
    assert (few.gradients, more.gradients) == (9, 9)
    again = choice_of(base, run, score="g_norm", teacher_questions=3)(params).rated
    assert again == dataclasses.replace(few, gradients=0, places=0, seconds=0.0, scores=again.scores)
    assert again.scores == pytest.approx(dict(few.scores), nan_ok=True)
    other = choice_of(base, run, score="g_norm", teacher_questions=3, seed=5)(params).rated
    assert set(other.questions) != set(few.questions)


def test_each_student_has_its_own_gradients_of_the_same_questions(base, faked, tmp_path):
    params = base[0].student_params
    choice = choice_of(base, tmp_path / "run", score="g_vendi", teacher_questions=3)
    first = choice(params)
    then = choice(jax.tree.map(lambda leaf: leaf * 1.5, params), 20)
    assert then.rated.questions == first.rated.questions
    assert then.rated.gradients == first.rated.gradients == 9
    assert len(list((tmp_path / "run/answers").glob("gradients-*.jsonl"))) == 2
    assert not list((tmp_path / "run/answers").glob("scored-*.jsonl")), "no figure was needed"
    assert manifest_of(tmp_path / "run", "selected-20")["rated_questions"] == list(first.rated.questions)


def test_a_gradient_that_is_not_finite_is_left_out(base, faked, tmp_path):
    params = base[0].student_params
    whole = choice_of(base, tmp_path / "a", score="g_norm")(params).rated
    broken = set(faked["asked"][:2])
    faked["broken"] = lambda ids: ids.tobytes() in broken
    made = choice_of(base, tmp_path / "b", score="g_norm")(params).rated
    assert made.questions == whole.questions
    assert made.scores != pytest.approx(dict(whole.scores), nan_ok=True)
    assert sum(math.isfinite(score) for score in made.scores.values()) == 3
    faked["broken"] = lambda ids: True
    with pytest.raises(ValueError, match=r"^answers.score='g_norm' must rate a teacher, got no score of ada, bob"):
        choice_of(base, tmp_path / "c", score="g_norm")(params)


def test_gradients_of_something_else_are_refused(base, faked, tmp_path, monkeypatch):
    params = base[0].student_params
    choice_of(base, tmp_path / "run", score="grace")(params)
    monkeypatch.setattr(best_teacher, "SIGNS", 1)
    with pytest.raises(ValueError, match=r"gradients-\w+.jsonl must be of the same model.*signs is 1, there it is 0"):
        choice_of(base, tmp_path / "run", score="grace")(params)


# --- who takes part, and on what


def test_without_common_questions_teachers_are_rated_on_their_own(base, faked, tmp_path):
    """dee has one question alone, so no score by GRACE; by the norm it has one."""
    said = {"ada": dict.fromkeys(range(4)), "bob": dict.fromkeys(range(3, 9)), "cy": {11: None}}
    params = base[0].student_params
    made = choice_of(base, tmp_path / "a", said, score="grace")(params).rated
    assert (made.common, len(made.questions)) == (0, 10)
    assert [name for name, score in made.scores.items() if math.isnan(score)] == ["cy"]
    assert manifest_of(tmp_path / "a")["common_questions"] == 0
    norm = choice_of(base, tmp_path / "a", said, score="g_norm")(params).rated
    assert all(math.isfinite(score) for score in norm.scores.values())
    two = {name: dict.fromkeys(numbers) for name, numbers in (("ada", (0, 1, 2)), ("bob", (1, 2, 3)))}
    assert choice_of(base, tmp_path / "b", two, score="g_norm")(params).rated.common == 2
    with pytest.raises(ValueError, match=r"'grace' must rate a teacher, got no score of ada, bob; .* to 2 ques"):
        choice_of(base, tmp_path / "c", {"ada": {0: None}, "bob": {1: None}}, score="grace")(params)


def test_one_teacher_is_the_best(base, faked, tmp_path):
    made = choice_of(base, tmp_path / "run", {"bob": dict.fromkeys(range(5))}, score="grace")(base[0].student_params)
    assert (made.rated.common, list(made.rated.scores)) == (5, ["bob"])
    assert made.counts["teachers"] == {"bob": 5}


def test_who_is_never_right_is_never_chosen(base, faked, tmp_path):
    """By accuracy no student is run at all; repeated and equal answers were right."""
    built, questions = base
    said = {"ada": dict.fromkeys(range(3)) | {3: WRONG}, "cy": dict.fromkeys(range(3), WRONG)}
    said["bob"] = {number: said_by("ada", questions[number]) for number in range(2)}
    choice = choice_of(base, tmp_path / "run", said, score="accuracy")
    assert choice.admitted.counts["teachers"]["bob"][""] == 0, "ada has said it all"
    made = choice(built.student_params)
    assert right_shares(choice.admitted) == {"ada": 0.75, "bob": 0.5, "cy": 0.0}
    assert made.rated.scores == pytest.approx({"ada": 0.75, "bob": math.nan, "cy": math.nan}, nan_ok=True)
    assert not faked["asked"]
    assert not list((tmp_path / "run/answers").glob("scored-*"))


def test_an_answer_that_cannot_be_scored_counts_for_nobody(base, faked, tmp_path):
    """bob is cheapest; one of his answers has no figures, so its question is none that all have answered."""
    choice = choice_of(base, tmp_path / "run", score="grape")
    without = base[1][3].id
    costs = {"ada": 2.0, "bob": 1.0, "cy": 3.0}

    def measure(params, missing):
        for encoded, texts in missing:
            for answer in encoded.answers:
                assert texts[answer.row]
                error = "not_finite" if (encoded.id, answer.teacher) == (without, "bob") else ""
                nll = math.nan if error else costs[answer.teacher]
                figures = {"answer_nll": nll, "n_answer": 3.0, "rank_sum": 4.0}
                yield Scored(encoded.id, answer.row, answer.teacher, figures, error)

    choice._measure = measure
    made = choice(base[0].student_params)
    assert dict(made.rated.scores) == pytest.approx({"bob": 1.0, "ada": 2.0, "cy": 3.0, "dee": math.nan}, nan_ok=True)
    assert made.rated.common == len(SHARED) - 1
    assert without not in made.rated.questions
    assert made.counts["teachers"] == {"bob": 6}
    assert made.counts["dropped"]["other_teachers"] == 4
    assert without not in {one.id for one in read_selected(tmp_path / "run")}

    choice._score = lambda params, scored: (
        0,
        0.0,
    )  # as if scoring had been stopped before another student's first answer
    with pytest.raises(
        ValueError, match=r"scored-\w+.jsonl must have answer_nll, n_answer of all admitted answers, got no"
    ):
        choice(jax.tree.map(lambda leaf: leaf * 2, base[0].student_params), 2)
    with pytest.raises(ValueError, match="^answers.policy='best_teacher' must have rated teachers, got none"):
        select(tmp_path, choice.admitted, choice._settings)


# --- names, tables, pages


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"policy": "best_teacher", "score": "scas"},
            r"answers.score must rate teachers with answers.policy='best_teacher', got 'scas', which is for "
            r"answers.policy='group', 'best' or 'weighted'. Did you mean 'car'\? Known: accuracy, car, g_norm,",
        ),
        (
            {"policy": "group", "score": "grace"},
            r"answers.score must rate answers with answers.policy='group', got 'grace', which is for "
            r"answers.policy='best_teacher'. Did you mean 'grape'\? Known: aslec_casl,",
        ),
        (
            {"policy": "best_teacher", "score": "gracee"},
            r"answers.score must be a known name .* Did you mean 'grace'\?",
        ),
        ({"policy": "best", "score": "scaz"}, r"answers.score must be a known name .* Did you mean 'scas'\?"),
        ({"policy": "best_teachr"}, r"answers.policy must be a known name .* Did you mean 'best_teacher'\?"),
    ],
)
def test_names_of_the_other_table_are_explained(base, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        choice_of(base, tmp_path / "run", **changes)


def test_what_is_read_of_a_policy_without_scores_is_nothing():
    assert best_teacher.figures_of(Answers(policy="random", score="grace")) is None
    assert set(SCORES["rsr"].needs) == {"n_answer", *best_teacher.FORWARD}, "figures_of asks for them by its name"
    with pytest.raises(ValueError, match="answers.policy must be 'best_teacher' to rate teachers, got 'best'"):
        best_teacher.needs_of(Answers(policy="best"))
    answers = [ScoredAnswer("a", "x"), ScoredAnswer("b", "y")]
    chosen = choose("q", answers, Answers(policy="best_teacher", score="car"), random.Random(0), ["y"])
    assert chosen.picks == (Pick(answers[1]),)


def test_the_table_and_the_page_show_scores(base, faked, tmp_path, capsys):
    choice = choice_of(base, tmp_path / "run", score="g_norm", teacher_questions=5)
    made = choice(base[0].student_params)
    curate_answers.show(base[0].experiment, choice.admitted.counts, made)
    said = capsys.readouterr().out.splitlines()
    head = next(number for number, line in enumerate(said) if line.startswith("teacher "))
    table = [line.split() for line in said[head + 1 : head + 5]]
    assert [row[0] for row in table] == list(made.rated.scores)
    assert [float(row[-1]) for row in table[:3]] == pytest.approx(list(made.rated.scores.values())[:3], rel=1e-4)
    assert table[3] == ["dee", "9", "0", "0", "nan"]
    assert "teachers were rated on 5 questions, of the 6 that all teachers have answered" in said[head + 5]
    assert said[head + 6].startswith("gradients now: 15 answers, ")
    scores = manifest_of(tmp_path / "run")["teacher_scores"]
    one = round_of(made.counts, step=0, teacher_scores=scores)
    page = render([one], choice.admitted.counts["teachers"], name="x", score="g_norm")
    assert "Score in round 1" in page
    assert "Score in round" not in render([dataclasses.replace(one, teacher_scores={})], {}, name="x")
