"""Which own answers are trained on: how many are asked, which are kept, what a resumed run finds."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.build import Asked, Built
from kdjax.config import Experiment, Samples
from kdjax.data.prompts import Prompt
from kdjax.data.responses import Answered, answer_rows
from kdjax.run.own_answers import Answer, OwnAnswers
from kdjax.run.own_samples import make_score_block
from kdjax.selection.policies.base import enough_for
from kdjax.sharding import Rules
from kdjax.step import LanguageModel
from kdjax.types import Head, TeacherText

COUNT, END = 7, 2
BLOCK = "own_answers/block-000000.jsonl"


def asked(seen=False):
    ids = tuple((10 + i, 20) for i in range(COUNT))
    prompts = tuple(Prompt(f"p{i}", f"What is {i}?", str(i), "numeric") for i in range(COUNT))
    shown = tuple((3, 10 + i, 40 + i) if seen else None for i in range(COUNT))
    return Asked((), prompts, ids, shown, np.ones(COUNT), None, END, 16 if seen else 0, "f")


def experiment(fraction=0.3, score="student_entropy", positions=1.0, steps=6, batch=3, **on_policy):
    e = Experiment()
    return dataclasses.replace(
        e,
        samples=Samples(fraction=fraction, score=score, positions=positions),
        train=dataclasses.replace(e.train, steps=steps, batch_size=batch),
        data=dataclasses.replace(e.data, seq_len=10),
        on_policy=dataclasses.replace(e.on_policy, **({"fraction": 1.0, "block": 2} | on_policy)),
    )


class Student:
    """Says other tokens each time; the answers whose places `bad` names are empty, those of `cut` never end."""

    def __init__(self, bad=(), cut=()):
        self.calls, self.said, self.bad, self.cut = [], [], bad, cut

    def __call__(self, params, prompts, seed):
        rng = np.random.default_rng([seed, 9])
        self.calls.append((params, tuple(prompts), seed))
        self.said.append(
            [
                Answer("x", () if at in self.bad else tuple(rng.integers(30, 80, 4).tolist()), -4.0, at not in self.cut)
                for at in range(len(prompts))
            ]
        )
        return self.said[-1]


def drive(answers, steps, params="student"):
    found = {}
    for step in steps:
        if answers.due(step):
            answers.load(step, params)
        found[step] = answers.columns(step)
    return found


def answers_in(columns):
    """The answers in the rows of some batches."""
    return [
        tuple(row[mask][:4].tolist())
        for step in columns
        for row, mask in zip(columns[step]["tokens"], columns[step]["loss_mask"], strict=True)
    ]


def by_rank(params, rows, text, number):
    """Known scores: of the answer's first token, other than the order of the rows."""
    first = rows.tokens[np.arange(len(rows)), np.argmax(rows.loss_mask, 1)]
    return np.where(rows.loss_mask.any(1), first % 17.0, -np.inf)


def test_a_block_asks_for_more_and_trains_on_the_best(tmp_path):
    student = Student()
    e = experiment()
    columns = drive(OwnAnswers(e, asked(), tmp_path, student, None, score=by_rank), range(1, 7))
    assert [len(prompts) for _, prompts, _ in student.calls] == [20, 20, 20]  # 2 x 3 of 0.3
    order = [prompt for _, prompts, _ in student.calls for prompt in prompts]
    for epoch in range(60 // COUNT):
        assert sorted(order[COUNT * epoch : COUNT * (epoch + 1)]) == list(range(COUNT))
    for block in range(3):
        said = student.said[block]
        value = {at: (-(one.tokens[0] % 17), at) for at, one in enumerate(said)}
        want = sorted(sorted(value, key=value.get)[:6])
        assert answers_in({s: columns[s] for s in (2 * block + 1, 2 * block + 2)}) == [said[at].tokens for at in want]
        head, *lines = map(json.loads, (tmp_path / f"own_answers/block-{block:06d}.jsonl").read_text().splitlines())
        assert head["kept"] == want
        assert [tuple(line["tokens"]) for line in lines] == [one.tokens for one in said]
        scores = np.array([one.tokens[0] % 17 for one in said], float)
        assert head["figures"]["rollout_kept"] == 0.3
        assert head["figures"]["rollout_score"] == pytest.approx(scores.mean())
        assert head["figures"]["rollout_score_kept"] == pytest.approx(scores[want].mean())
        ids = np.concatenate([columns[step]["row_id"] for step in (2 * block + 1, 2 * block + 2)])
        assert ids.tolist() == [student.calls[block][1][at] for at in want]


def test_the_fewest_prompts_of_which_the_share_is_a_block():
    wanted = {(6, 0.3): 20, (8, 0.2): 40, (7, 0.07): 100, (8, 1.0): 8, (1, 0.9): 2, (16, 1 / 3): 49}
    assert {pair: enough_for(*pair) for pair in wanted} == wanted


@pytest.mark.parametrize("truncated", ["keep", "drop"])
def test_answers_without_targets_come_last(tmp_path, truncated):
    """16 of 20 are empty or may be dropped: the others are all kept, whatever their score."""
    student = Student(bad=range(8), cut=range(8, 16))
    e = experiment(truncated=truncated)
    columns = drive(OwnAnswers(e, asked(), tmp_path, student, None, score=by_rank), [1, 2])
    head = json.loads((tmp_path / BLOCK).read_text().splitlines()[0])
    usable = set(range(16, 20)) | (set(range(8, 16)) if truncated == "keep" else set())
    assert len(head["kept"]) == 6
    weights = np.concatenate([columns[step]["weight"] for step in (1, 2)])
    masks = np.concatenate([columns[step]["loss_mask"].any(1) for step in (1, 2)])
    np.testing.assert_array_equal(masks, weights > 0)
    if truncated == "keep":
        assert set(head["kept"]) < usable
        assert masks.all()
    else:
        assert usable < set(head["kept"])
        assert masks.sum() == 4
        assert head["figures"]["rollout_kept"] == 4 / 20
    silent = OwnAnswers(e, asked(), tmp_path / "silent", Student(bad=range(20)), None, score=by_rank)
    figures = silent.load(1, None)
    assert figures["rollout_kept"] == 0
    assert "rollout_score" not in figures
    assert not silent.columns(1)["loss_mask"].any()


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_resumed_run_keeps_the_same_and_scores_nothing_twice(tmp_path, stop):
    """The student has changed by then: scored anew, others would be kept."""
    e = experiment(reuse=2, steps=12)
    whole = drive(OwnAnswers(e, asked(), tmp_path / "calm", Student(), None, score=by_rank), range(1, 13))
    drive(OwnAnswers(e, asked(), tmp_path / "hurt", Student(), None, score=by_rank), range(1, stop + 1))
    scored = []

    def other(params, rows, text, number):
        scored.append(number)
        return by_rank(params, rows, text, number) * (-1 if number == 0 else 1)

    rest = drive(OwnAnswers(e, asked(), tmp_path / "hurt", Student(), None, score=other), range(stop, 13))
    assert scored == [1, 2]
    for step, columns in rest.items():
        jax.tree.map(np.testing.assert_array_equal, columns, whole[step])


# --- with models: bigrams, whose whole logits can be written out


def tables(seed):
    rng = np.random.default_rng(seed)
    shapes = {"table": (90, 6), "head": (6, 90)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def teacher_hidden(params, batch):
    text = batch.teacher
    if not isinstance(text, TeacherText):
        return params["table"][batch.tokens]
    # what it has read so far matters, so that another prompt gives another distribution
    read = jnp.cumsum(params["table"][text.tokens], 1)
    return jnp.take_along_axis(read, text.index[..., None], 1)


def built_of(e):
    model = LanguageModel(lambda p, batch: p["table"][batch.tokens], lambda p: Head(p["head"], vocab_size=90))
    built = object.__new__(Built)
    parts = types.SimpleNamespace(student=model, teacher=dataclasses.replace(model, hidden=teacher_hidden))
    for name, value in {"experiment": e, "parts": parts, "rules": Rules(), "teacher_head": tables(2)}.items():
        object.__setattr__(built, name, value)
    return built


def log_probs(params, hidden):
    logits = hidden @ np.asarray(params["head"], np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def expected(student, prompt, answer, score):
    """The score of an answer in float64, of the tokens alone."""
    targets = [*answer.tokens, END]
    table = np.asarray(student["table"], np.float64)
    q = log_probs(student, table[[asked().ids[prompt][-1], *targets[:-1]]])
    if score == "student_entropy":
        return -np.sum(np.exp(q) * q, -1).mean()
    teacher, shown = tables(2), asked(True).seen_by_teacher[prompt]
    read = np.cumsum(np.asarray(teacher["table"], np.float64)[[*shown, *targets[:-1]]], 0)
    p = log_probs(teacher, read[len(shown) - 1 :])
    return np.sum(np.exp(p) * (p - q), -1).mean()


@pytest.mark.parametrize("score", ["student_entropy", "kl"])
def test_kept_answers_are_those_of_highest_score(tmp_path, score):
    """By the student of the step; with the teacher's prompt, where the score reads the teacher."""
    student = Student()
    e = experiment(fraction=0.4, score=score, block=1)
    answers = OwnAnswers(e, asked(True), tmp_path, student, None, score=make_score_block(built_of(e)))
    for step in (1, 2):
        columns = drive(answers, [step], params=tables(10 + step))
        said, prompts = student.said[-1], student.calls[-1][1]
        assert len(said) == 8
        want = [expected(tables(10 + step), *pair, score) for pair in zip(prompts, said, strict=True)]
        kept = np.sort(np.argsort(-np.array(want))[:3])
        assert answers_in(columns) == [said[at].tokens for at in kept]
        for row, at in enumerate(kept):
            shown = asked(True).seen_by_teacher[prompts[at]]
            assert columns[step]["teacher"]["tokens"][row][:7].tolist() == [*shown, *said[at].tokens]
        head = json.loads((tmp_path / f"own_answers/block-{step - 1:06d}.jsonl").read_text().splitlines()[0])
        assert head["figures"]["rollout_score"] == pytest.approx(np.mean(want), rel=1e-5)
        assert head["figures"]["rollout_score_kept"] == pytest.approx(np.array(want)[kept].mean(), rel=1e-5)


def test_random_answers_are_as_many_and_others_each_time(tmp_path):
    """No model is run, and no prompt is favoured: each of seven is kept as often as chance has it."""
    e = experiment(fraction=0.5, score="random", steps=80, batch=7, block=1)
    student = Student()
    answers = OwnAnswers(e, asked(), tmp_path, student, None, score=make_score_block(built_of(e)))
    columns = drive(answers, range(1, 81), params=None)
    assert {len(prompts) for _, prompts, _ in student.calls} == {14}
    assert {len(part["row_id"]) for part in columns.values()} == {7}
    counts = np.bincount(np.concatenate([part["row_id"] for part in columns.values()]), minlength=COUNT)
    # 80 of 160 answers to a prompt are kept: a variance of about 40
    assert np.sum((counts - 80) ** 2 / 40) < 22.5  # chi-square, 6 degrees of freedom, 0.1 %


def test_a_part_of_the_positions_is_drawn_of_each_answer(tmp_path):
    """Two equal answers to one prompt are two draws."""
    e = experiment(score="student_entropy", positions=0.3)
    score = make_score_block(built_of(e))
    rows, text = answer_rows([Answered((4, 9), (30, 70, 55, 61, 42, 38, 77, 50))] * 12, 10)
    rows = dataclasses.replace(rows, row_id=np.zeros(12, np.int32))
    first, second = (score(tables(1), rows, text, number) for number in (0, 1))
    assert len(set(first)) > 6
    assert not np.array_equal(first, second)


def test_all_answers_need_no_score():
    assert make_score_block(built_of(experiment(fraction=1.0))) is None
