"""A run on its own answers that was killed ends with the weights of one that was not, and asks nothing twice."""

import json

import jax
import numpy as np
import pytest

from kdjax import loop
from kdjax.build import build
from kdjax.run import own_answers

FIELDS = {
    "train__steps": "8",
    "data__seq_len": "64",
    "data__chat_template": "False",
    "prompts__path": "arith:sum1",
    "prompts__size": "30",
    "prompts__answers": "gold",
    "generation__new_tokens": "6",
    "on_policy__fraction": "0.7",
    "on_policy__block": "2",
    "loss__terms": "(('reverse_kl', 1.0),)",
}


STORE = own_answers.OwnAnswers._store


class Killed(BaseException):
    """As sudden as a kill: nobody catches it."""


def train(run, monkeypatch, kill_at=None):
    """(what each block asked, final weights) of a run; (..., None) if it is killed while it writes block `kill_at`."""
    experiment = run.experiment(**FIELDS)
    loop.claim_workdir(run.workdir, experiment)
    asked = []

    def watched(self, number, *rest):
        if number == kill_at:
            raise Killed
        asked.append((number, tuple(answer.text for answer in rest[2])))
        STORE(self, number, *rest)

    monkeypatch.setattr(own_answers.OwnAnswers, "_store", watched)
    built = build(experiment, run.workdir)
    try:
        loop.run(built, run.workdir)
    except Killed:
        return asked, None
    state, step = loop.restore(built, run.workdir)
    assert step == 8
    return asked, [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)]


def test_killed_while_writing_a_block(make_run, monkeypatch):
    calm, hurt = make_run("calm"), make_run("hurt")
    asked, weights = train(calm, monkeypatch)
    assert [number for number, _ in asked] == list(range(len(asked)))
    assert len(asked) >= 2
    first, none = train(hurt, monkeypatch, kill_at=1)
    assert none is None
    rest, found = train(hurt, monkeypatch)
    assert first + rest == asked
    for left, right in zip(weights, found, strict=True):
        np.testing.assert_array_equal(left, right)
    lines = [json.loads(line) for line in (hurt.workdir / "metrics.jsonl").read_text().splitlines()]
    assert sum("rollout_tokens" in line for line in lines) == len(asked)


def test_eight_devices_write_the_answers_of_one(make_run):
    fields = {"train__steps": "3", "train__batch_size": "8", "optim__warmup": "0", "on_policy__fraction": "1.0"}
    fields |= {"teacher__privileged": "'{question} ({answer})'", "data__seq_len": "96"}
    seen = {}
    for preset in ("single", "fsdp"):
        run = make_run(preset)
        experiment = run.experiment(**FIELDS | fields | {"mesh__preset": preset})
        loop.claim_workdir(run.workdir, experiment)
        loop.run(build(experiment, run.workdir), run.workdir)
        lines = [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
        blocks = sorted((run.workdir / "own_answers").glob("*.jsonl"))
        texts = [[json.loads(line)["tokens"] for line in path.read_text().splitlines()[1:]] for path in blocks]
        seen[preset] = [line["loss"] for line in lines if "loss" in line], texts
    assert len(seen["single"][1]) == 2
    assert seen["fsdp"][1] == seen["single"][1]
    np.testing.assert_allclose(seen["fsdp"][0], seen["single"][0], rtol=1e-5)


def test_what_cannot_be_asked_is_said(make_run):
    run = make_run("long")
    with pytest.raises(ValueError, match=r"^data\.seq_len must hold the longest prompt and its answer, got 16 "):
        build(run.experiment(**FIELDS | {"data__seq_len": "16"}), run.workdir)
    with pytest.raises(ValueError, match=r"weights"):
        build(run.experiment(**FIELDS | {"pass_rates__weight": "paced"}), run.workdir)
    empty = run.workdir.parent / "nothing"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"^prompts\.answers must hold answers to the train prompts"):
        build(run.experiment(**FIELDS | {"prompts__answers": str(empty)}), run.workdir)
