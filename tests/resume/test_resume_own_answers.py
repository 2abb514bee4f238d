"""A run on its own answers that was killed ends with the weights of one that was not, and asks nothing twice."""

import json
import signal
import time

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
# Writes down every answer that it sees and never comes back from number HANGS_AT: there its block is not on disk.
VERIFIER = """
import os, pathlib, time
from kdjax.verifiers import Finding, Verdict
def judge(response, prompt):
    with open(os.environ["JUDGED"], "a") as file:
        file.write(prompt.id + chr(10))
    while len(pathlib.Path(os.environ["JUDGED"]).read_text().splitlines()) == int(os.environ["HANGS_AT"]):
        time.sleep(1)
    return Finding(Verdict.WRONG)
"""


def judged(folder):
    path = folder / "judged"
    return path.read_text().count("\n") if path.is_file() else 0


def train(run, monkeypatch, **fields):
    """(what each block asked, final weights) of a run."""
    experiment = run.experiment(**FIELDS | fields)
    loop.claim_workdir(run.workdir, experiment)
    asked = []

    def watched(self, number, *rest):
        asked.append((number, tuple(answer.text for answer in rest[2])))
        STORE(self, number, *rest)

    monkeypatch.setattr(own_answers.OwnAnswers, "_store", watched)
    built = build(experiment, run.workdir)
    loop.run(built, run.workdir)
    state, step = loop.restore(built, run.workdir)
    assert step == 8
    return asked, [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)]


def test_killed_in_the_midst_of_a_block(make_run, monkeypatch, tmp_path):
    (tmp_path / "hanging_verifier.py").write_text(VERIFIER)
    questions = [{"id": str(i), "prompt": f"{i} + {i} = ?", "answer": str(2 * i)} for i in range(30)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("JUDGED", str(tmp_path / "judged"))
    monkeypatch.setenv("HANGS_AT", "0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", str(jax.device_count()))  # as here: threads decide how sums are cut
    fields = {"prompts__path": str(tmp_path / "prompts.jsonl"), "prompts__verifier": "hanging_verifier:judge"}
    calm, hurt, size = make_run("calm"), make_run("hurt"), 2 * 4
    asked, weights = train(calm, monkeypatch, **fields)
    assert [number for number, _ in asked] == list(range(len(asked)))
    assert len(asked) >= 2
    assert judged(tmp_path) == size * len(asked)
    stopped = size * len(asked) + size + 3  # with three answers of the second block judged
    monkeypatch.setenv("HANGS_AT", str(stopped))
    process, end = hurt.start(**FIELDS | fields), time.monotonic() + 300
    while process.poll() is None and judged(tmp_path) < stopped and time.monotonic() < end:
        time.sleep(0.05)
    process.kill()  # SIGKILL
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    assert judged(tmp_path) == stopped, err
    monkeypatch.setenv("HANGS_AT", "0")
    (whole,) = (hurt.workdir / "own_answers").iterdir()
    first = whole.read_bytes()
    rest, found = train(hurt, monkeypatch, **fields)
    assert rest == asked[1:]
    assert judged(tmp_path) - stopped == size * len(rest)
    assert whole.read_bytes() == first
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
