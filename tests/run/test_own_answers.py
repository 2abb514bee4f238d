"""The student's own answers: which steps, which prompts, what is kept, and what a resumed run finds."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import paced
from kdjax.build import Asked, Built, build_objective
from kdjax.config import Experiment, Generation, from_config_dict
from kdjax.curation.pass_rates import PassRates, after
from kdjax.data.prompts import Prompt
from kdjax.generation.batching import Completion
from kdjax.generation.sampling import Sampling
from kdjax.run import own_answers
from kdjax.run.own_answers import Answer, Collapse, OwnAnswers, own_steps
from kdjax.sharding import Rules
from kdjax.step import LanguageModel
from kdjax.types import Head

PROMPTS = tuple(Prompt(f"p{i}", f"What is {i}?", str(i), "numeric") for i in range(5))


def asked(seen=False, rank=None, rates=None):
    ids = tuple((10 + i, 20) for i in range(5))
    return Asked(
        heldout=(),
        train=PROMPTS,
        ids=ids,
        seen_by_teacher=tuple((1, *one) if seen else None for one in ids),
        weight=np.array([1.0, 2.0, 0.5, 1.0, 0.5]),
        rank=rank,
        end=2,
        room=16 if seen else 0,
        fingerprint="f",
        rates=rates,
    )


def experiment(steps=12, batch=2, pass_rates=None, **on_policy):
    e = Experiment()
    return dataclasses.replace(
        e,
        pass_rates=dataclasses.replace(e.pass_rates, **(pass_rates or {})),
        train=dataclasses.replace(e.train, steps=steps, batch_size=batch),
        data=dataclasses.replace(e.data, seq_len=8),
        on_policy=dataclasses.replace(e.on_policy, **({"fraction": 1.0} | on_policy)),
    )


class Student:
    """Answers with the number of the prompt, as often as `length` says; remembers what it was asked."""

    def __init__(self, length=3, logp=-1.0, finished=True):
        self.length, self.logp, self.finished, self.calls = length, logp, finished, []

    def __call__(self, params, prompts, seed):
        self.calls.append((params, tuple(prompts), seed))
        return [
            Answer(
                "x",
                tuple(30 + (prompt + k) % 40 for k in range(self.length)),
                self.logp * self.length,
                self.finished,
            )
            for prompt in prompts
        ]


def own(tmp_path, student, seen=False, judge=None, rank=None, rates=None, **fields):
    return OwnAnswers(experiment(**fields), asked(seen, rank, rates), tmp_path, student, judge)


def drive(answers, steps, params="student"):
    """The columns of the own steps, in order."""
    found = {}
    for step in steps:
        if answers.takes(step):
            if answers.due(step):
                answers.load(step, f"{params} {step}")
            found[step] = answers.columns(step)
    return found


def test_the_share_of_own_steps_is_lambda_and_a_longer_run_begins_alike():
    drawn = own_steps(0.3, 4000, 0)
    assert abs(drawn.mean() - 0.3) < 3 * (0.3 * 0.7 / 4000) ** 0.5
    np.testing.assert_array_equal(drawn[:100], own_steps(0.3, 100, 0))
    assert not np.array_equal(drawn, own_steps(0.3, 4000, 1))
    assert own_steps(1.0, 50, 0).all()
    assert not own_steps(0.0, 50, 0).any()
    np.testing.assert_array_equal(own_steps(("step", 0.0, 1.0, 6.0), 12, 0), np.arange(12) >= 6)


@pytest.mark.parametrize("steps", [40, 101])
def test_the_stages_of_paced_are_halves_whatever_the_steps(steps):
    config = paced.get_config()
    config.train.steps = steps
    e = from_config_dict(config)
    second = np.arange(steps) >= steps // 2
    np.testing.assert_array_equal(own_steps(e.on_policy.fraction, steps, 0), second)
    weights = build_objective(e.loss, e.train.steps).weights
    for at in (0, steps // 2 - 1, steps // 2, steps - 1):
        assert [float(weights[name](at)) for name in ("forward_kl", "reverse_kl")] == [1 - second[at], second[at]]


def test_every_epoch_asks_every_prompt_once(tmp_path):
    student = Student()
    drive(own(tmp_path, student, steps=10), range(1, 11))
    order = [prompt for _, prompts, _ in student.calls for prompt in prompts]
    assert len(order) == 20
    for epoch in range(4):
        assert sorted(order[5 * epoch : 5 * epoch + 5]) == list(range(5))
    assert len({seed for *_, seed in student.calls}) == 10  # other draws every time


def test_a_row_is_prompt_answer_and_end(tmp_path):
    student = Student()
    columns = drive(own(tmp_path, student, seen=True), [1])[1]
    for row, prompt in enumerate(student.calls[0][1]):
        answer = [30 + prompt, 31 + prompt, 32 + prompt]
        assert columns["tokens"][row].tolist() == [10 + prompt, 20, *answer, 2, 0, 0]
        assert columns["loss_mask"][row].tolist() == [False] * 2 + [True] * 4 + [False] * 2
        assert columns["row_id"][row] == prompt
        assert columns["weight"][row] == asked().weight[prompt]
        assert columns["teacher"]["tokens"][row][:7].tolist() == [1, 10 + prompt, 20, *answer, 2]


def test_truncated_answers_have_no_end_and_may_be_dropped(tmp_path):
    kept = drive(own(tmp_path / "a", Student(finished=False)), [1])[1]
    assert 2 not in kept["tokens"]
    assert kept["loss_mask"].sum() == 6
    dropped = drive(own(tmp_path / "b", Student(finished=False), truncated="drop"), [1])[1]
    assert not dropped["weight"].any()
    assert not dropped["loss_mask"].any()
    empty = drive(own(tmp_path / "c", Student(length=0)), [1])[1]
    assert not empty["weight"].any()


def test_a_block_is_written_once_and_used_as_often_as_asked(tmp_path):
    student = Student()
    columns = drive(own(tmp_path, student, block=2, reuse=3), range(1, 13))
    assert [params for params, *_ in student.calls] == ["student 1", "student 7"]
    for first in (1, 7):
        prompts = sorted(student.calls[first // 6][1])
        for turn in range(3):
            steps = (first + 2 * turn, first + 2 * turn + 1)
            assert sorted(id for step in steps for id in columns[step]["row_id"]) == prompts
    epochs = [tuple(columns[step]["epoch"]) for step in range(1, 13)]
    assert len(set(epochs)) == 12  # other random positions every time


@pytest.mark.parametrize("stop", [1, 3, 5, 8])
def test_a_resumed_run_has_the_same_batches_and_asks_nothing_twice(tmp_path, stop):
    fields = {"steps": 10, "fraction": 0.7, "block": 2, "reuse": 2}
    calm = Student()
    whole = drive(own(tmp_path / "calm", calm, **fields), range(1, 11))
    hurt = Student()
    first = drive(own(tmp_path / "hurt", hurt, **fields), range(1, stop + 1))
    # the kill came two steps after the last checkpoint
    rest = drive(own(tmp_path / "hurt", hurt, **fields), range(max(1, stop - 1), 11))
    assert hurt.calls == calm.calls
    for step, columns in (first | rest).items():
        jax.tree.map(np.testing.assert_array_equal, columns, whole[step])
    assert (first | rest).keys() == whole.keys()


def test_blocks_of_another_run_are_written_anew(tmp_path):
    drive(own(tmp_path, Student()), [1])
    student = Student()
    drive(own(tmp_path, student), [1])
    assert not student.calls
    drive(own(tmp_path, student, truncated="drop"), [1])  # any setting that shapes the run
    assert len(student.calls) == 1


def test_steps_on_other_text_are_counted(tmp_path):
    answers = own(tmp_path, Student(), steps=50, fraction=0.5)
    taken = [answers.takes(step) for step in range(1, 51)]
    assert answers.others_before(0) == 0
    for step in range(51):
        assert answers.others_before(step) == sum(not own for own in taken[:step])


def test_figures_of_a_block(tmp_path):
    answers = own(tmp_path, Student(length=4, logp=-0.5), judge=lambda params, rows, text: {"rollout_teacher_nll": 3.0})
    figures = answers.load(1, None)
    assert figures == {
        "rollout_tokens": 4.0,
        "rollout_truncated": 0.0,
        "rollout_right": 0.0,
        "rollout_distinct": 1.0,
        "rollout_entropy": 0.5,
        "rollout_teacher_nll": 3.0,
    }
    again = own(tmp_path, Student(), judge=None)
    assert again.load(1, None) == figures  # from disk


def repeating(length):
    return lambda params, prompts, seed: [Answer("x", (7,) * length, -1.0 * length, True) for _ in prompts]


@pytest.mark.parametrize(
    ("later", "judged", "says"),
    [
        (Student(length=1), 1.0, "four times shorter"),
        (Student(length=4, finished=False), 1.0, "do not end by themselves"),
        (repeating(5), 1.0, "repeat the same pairs"),
        (Student(length=4, logp=-0.001), 1.0, "stopped to vary"),
        (Student(length=4), 4.0, "gives these answers little mass"),
    ],
)
def test_a_collapse_is_said_and_can_stop_the_run(tmp_path, caplog, later, judged, says):
    own(tmp_path, Student(length=5), judge=lambda *_: {"rollout_teacher_nll": 1.0}).load(1, None)
    judge = lambda *_: {"rollout_teacher_nll": judged}  # noqa: E731
    with caplog.at_level("WARNING", logger="kdjax"):
        own(tmp_path, later, judge=judge).load(2, None)
    assert [says in record.getMessage() for record in caplog.records] == [True]
    with pytest.raises(Collapse, match=says):
        own(tmp_path, later, judge=judge, alarms="stop").load(2, None)
    caplog.clear()
    own(tmp_path, later, judge=judge, alarms="off").load(2, None)
    own(tmp_path / "healthy", Student(), judge=judge).load(1, None)
    own(tmp_path / "healthy", Student(), judge=judge, alarms="stop").load(2, None)
    assert not caplog.records


@pytest.mark.parametrize(
    ("student", "says"),
    [
        (Student(finished=False), r"do not end by themselves .*: rollout_truncated is 1 in block 0 \("),
        (Student(length=0), r"answers are empty or .*: rollout_tokens is 0 in block 0 \("),
    ],
)
def test_answers_that_are_bad_from_the_start_are_said_in_the_first_block(tmp_path, caplog, student, says):
    with caplog.at_level("WARNING", logger="kdjax"):
        own(tmp_path, student).load(1, None)
    assert [re.search(says, record.getMessage()) is not None for record in caplog.records] == [True]
    with pytest.raises(Collapse, match=says):
        own(tmp_path, student, alarms="stop").load(1, None)
    own(tmp_path, student, alarms="off").load(1, None)
    with pytest.raises(Collapse, match=r"in block 1 \(.*\), in the first block it was"):
        own(tmp_path, student, alarms="stop").load(2, None)


def test_prompts_drawn_by_their_weights_weigh_the_same(tmp_path):
    student = Student()
    answers = own(tmp_path, student, steps=80, block=80, batch=5, pass_rates={"normalise": "sample"})
    answers.load(1, None)
    counts = np.bincount(student.calls[0][1], minlength=5)
    expected = 400 * asked().weight / asked().weight.sum()
    assert np.sum((counts - expected) ** 2 / expected) < 18.5  # chi-square, 4 degrees of freedom, 0.1 %


def test_a_curriculum_begins_with_the_easiest(tmp_path):
    student, rank = Student(), np.array([4, 3, 2, 1, 0])  # the last prompt is the easiest
    drive(own(tmp_path, student, steps=40, rank=rank), range(1, 41))
    asked_at = [set(prompts) for _, prompts, _ in student.calls]
    assert set.union(*asked_at[:2]) <= {4, 3}  # 30 % of five
    assert set.union(*asked_at[20:]) == {0, 1, 2, 3, 4}


def test_weights_of_a_batch_may_have_mean_one(tmp_path):
    plain = drive(own(tmp_path / "a", Student()), [1])[1]["weight"]
    mean_one = drive(own(tmp_path / "b", Student(), pass_rates={"normalise": "batch_mean"}), [1])[1]["weight"]
    np.testing.assert_allclose(mean_one, plain / plain.mean(), rtol=1e-6)


@pytest.mark.parametrize("bad", [{"finished": False}, {"tokens": ()}])
def test_dropped_and_empty_answers_are_not_in_the_mean_weight_of_a_batch(tmp_path, bad):
    def student(params, prompts, seed):
        calls.append(prompts)
        made = Student()(params, prompts, seed)
        return [dataclasses.replace(a, **bad) if p in (1, 3) else a for p, a in zip(prompts, made, strict=True)]

    calls = []
    fields = {"batch": 5, "truncated": "drop", "pass_rates": {"normalise": "batch_mean"}}
    columns = drive(own(tmp_path, student, **fields), [1])[1]
    real = ~np.isin(calls[0], (1, 3))
    assert real.sum() == 3
    want = np.where(real, asked().weight[calls[0]], 0)
    np.testing.assert_allclose(columns["weight"], want / want[real].mean(), rtol=1e-6)
    np.testing.assert_array_equal(columns["loss_mask"].any(1), real)  # the rows that the loss is divided by


class Solver(Student):
    """Right about the first two prompts, wrong about the others."""

    def __call__(self, params, prompts, seed):
        made = super().__call__(params, prompts, seed)
        return [dataclasses.replace(a, text=str(p) if p < 2 else "99") for p, a in zip(prompts, made, strict=True)]


def test_rates_are_estimated_anew_from_own_answers(tmp_path):
    """Rounds of two blocks of five prompts: after the first, two more of two are right, and none of two."""
    rates = PassRates(
        ids=tuple(prompt.id for prompt in PROMPTS),
        right=np.array([4, 2, 4, 2, 0]),
        tried=np.full(5, 8),
        undecided=np.zeros(5, np.int64),
        truncated=np.zeros(5, np.int64),
        basis={},
        seeds=(0,),
    )
    settings = {"every": 2, "weight": "paced", "estimator": "discounted", "discount": 0.5, "prior": 1.0}
    fields = {"rates": rates, "batch": 5, "steps": 8, "pass_rates": settings}
    columns = drive(own(tmp_path, Solver(), **fields), range(1, 9))

    def weights(step):
        order = np.argsort(columns[step]["row_id"])
        return columns[step]["weight"][order]

    np.testing.assert_allclose(weights(1), asked().weight)  # what curate left
    np.testing.assert_allclose(weights(2), asked().weight)
    a = 0.5 * (0.5 * 1 + rates.right) + np.array([2, 2, 0, 0, 0])
    n = 0.5 * (0.5 * 2 + rates.tried) + 2
    expected = a / n * (1 - a / n)
    np.testing.assert_allclose(weights(3), expected / expected.mean(), rtol=1e-6)
    assert weights(5)[0] != weights(3)[0]
    figures = own(tmp_path / "again", Solver(), **fields).load(1, None)
    assert figures["rollout_effective_prompts"] == pytest.approx(
        1 / np.mean((asked().weight / np.mean(asked().weight)) ** 2)
    )
    # Rounds before that of launch.curate still count.
    known = drive(own(tmp_path / "before", Solver(), **fields | {"rates": after([rates], rates)}), range(1, 4))
    a, n = a + 0.25 * (rates.right - 0.5), n + 0.25 * (rates.tried - 1)
    expected = (a / n * (1 - a / n))[known[3]["row_id"]]
    np.testing.assert_allclose(known[3]["weight"], expected / expected.mean(), rtol=1e-6)
    again = drive(own(tmp_path, Solver(), **fields), range(4, 9))  # resumed: from the blocks on disk
    for step in range(4, 9):
        jax.tree.map(np.testing.assert_array_equal, again[step], columns[step])


def test_the_share_of_right_answers_is_among_the_figures(tmp_path):
    figures = own(tmp_path, Solver(), batch=5, steps=2).load(1, None)
    assert figures["rollout_right"] == 0.4


# --- between the loop and the models


def built_of(**fields):
    """A `Built` of which only these fields are read."""
    built = object.__new__(Built)
    for name, value in fields.items():
        object.__setattr__(built, name, value)
    return built


def test_the_student_is_asked_with_the_settings_of_generation(monkeypatch):
    asks = []

    def rollouts(model, prompts, samples, settings, **rest):
        asks.append((model, prompts, settings, rest))
        for index in reversed(range(len(prompts))):
            for sample in samples[index]:
                name = f"{rest['names'][index]} {sample}"
                yield index, sample, Completion(name, (index, sample), -1.5, "stop" if sample else "length")

    monkeypatch.setattr(own_answers, "rollouts", rollouts)
    monkeypatch.setattr(own_answers, "student_speaker", lambda built, params: (built.experiment.name, params))
    settings = Generation(
        temperature=0.7, top_p=0.9, top_k=20, min_p=0.1, new_tokens=7, stop=("##",), batch_size=3, seed=5
    )
    e = dataclasses.replace(Experiment(), generation=settings, name="whose")
    write = own_answers._writer(built_of(experiment=e), asked())
    found = write("weights", [3, 1, 3], 0)
    assert [answer.text for answer in found] == ["p3 0", "p1 0", "p3 1"]
    assert [(answer.logp, answer.finished) for answer in found] == [(-1.5, False), (-1.5, False), (-1.5, True)]
    model, prompts, sampling, rest = asks[0]
    assert model == ("whose", "weights")
    assert prompts == [asked().ids[3], asked().ids[1]]
    assert sampling == Sampling(temperature=0.7, top_p=0.9, top_k=20, min_p=0.1)
    assert {name: rest[name] for name in ("new_tokens", "stop", "batch_size")} == {
        "new_tokens": 7,
        "stop": ("##",),
        "batch_size": 3,
    }


def test_no_block_has_the_draws_of_another_or_of_rollouts(monkeypatch):
    """launch.curate draws with generation.seed itself: its answers must not count a second time as new ones."""
    seeds = []
    monkeypatch.setattr(own_answers, "rollouts", lambda *_, seed, **__: seeds.append(seed) or [])
    monkeypatch.setattr(own_answers, "student_speaker", lambda *_: None)
    for seed in range(3):
        e = dataclasses.replace(Experiment(), generation=Generation(seed=seed))
        for block in range(4):
            own_answers._writer(built_of(experiment=e), asked())("weights", [], block)
    assert len({*seeds, *range(1000)}) == 12 + 1000
    assert len({jax.random.key(seed).__repr__() for seed in seeds}) == 12


def test_what_the_teacher_says_of_a_block(tmp_path):
    """Nats a token over the answers of the first batch, against whole distributions in float64."""
    rng = np.random.default_rng(0)
    student, teacher = (
        {"table": jnp.asarray(rng.normal(size=(80, 6)), jnp.float32), "head": jnp.asarray(rng.normal(size=(6, 80)))}
        for _ in range(2)
    )
    model = LanguageModel(lambda p, batch: p["table"][batch.tokens], lambda p: Head(p["head"], vocab_size=80))
    e = experiment(batch=2, block=2)
    parts = types.SimpleNamespace(student=model, teacher=model)
    built = built_of(parts=parts, experiment=e, rules=Rules(), teacher_head=teacher)
    lengths = iter((3, 1, 2, 4))  # the block has a second batch, which is not read

    def write(params, prompts, seed):
        return [Answer("x", tuple(30 + p + k for k in range(next(lengths))), -1.0, True) for p in prompts]

    answers = own(tmp_path, write, judge=own_answers._judge(built), batch=2, block=2)
    figures = answers.load(1, student)
    columns = answers.columns(1)

    def log_probs(params, at):
        logits = np.asarray(params["table"], np.float64)[at] @ np.asarray(params["head"], np.float64)
        return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)

    row, place = np.nonzero(columns["loss_mask"])
    assert len(row) == (3 + 1) + (1 + 1)  # with the ends
    before, label = columns["tokens"][row, place - 1], columns["tokens"][row, place]
    p, q = log_probs(teacher, before), log_probs(student, before)
    assert figures["rollout_teacher_nll"] == pytest.approx(-p[np.arange(len(row)), label].mean(), rel=1e-5)
    assert figures["rollout_kl"] == pytest.approx(np.sum(np.exp(p) * (p - q), 1).mean(), rel=1e-5)
    nobody = types.SimpleNamespace(student=model, teacher=None)
    assert own_answers._judge(built_of(parts=nobody, experiment=e)) is None
