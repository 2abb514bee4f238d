"""A run that keeps a part of its own answers: killed and resumed, and on eight devices."""

import json

import numpy as np
import pytest

from kdjax import loop
from kdjax.build import build
from kdjax.checkpoint import Checkpoints
from kdjax.run import own_samples

FIELDS = {
    "train__steps": "4",
    "train__batch_size": "8",
    "data__seq_len": "96",
    "data__chat_template": "False",
    "prompts__path": "arith:sum1",
    "prompts__size": "40",
    "generation__new_tokens": "6",
    "on_policy__fraction": "1.0",
    "on_policy__block": "2",
    "samples__fraction": "0.5",
    "samples__score": "kl",
    "teacher__privileged": "'{question} ({answer})'",
    "loss__terms": "(('reverse_kl', 1.0),)",
    "optim__warmup": "0",
    "eval__rows": "2",
    "on_policy__alarms": "off",
}


def start(run, **fields):
    experiment = run.experiment(**FIELDS | fields)
    loop.claim_workdir(run.workdir, experiment)
    loop.run(build(experiment, run.workdir), run.workdir)


def seen(run):
    """(losses, heads of the blocks, answers in them)."""
    lines = [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
    blocks = [
        list(map(json.loads, path.read_text().splitlines()))
        for path in sorted((run.workdir / "own_answers").glob("*.jsonl"))
    ]
    losses = [line["loss"] for line in lines if "loss" in line]
    return losses, [head for head, *_ in blocks], [[line["tokens"] for line in said] for _, *said in blocks]


def test_a_killed_run_on_one_device_keeps_the_answers_of_a_calm_one_on_eight(make_run, monkeypatch):
    calm, hurt = make_run("calm"), make_run("hurt")
    start(calm, mesh__preset="fsdp")
    losses, heads, said = seen(calm)
    assert [len(answers) for answers in said] == [32, 32]
    for head in heads:
        assert len(head["kept"]) == 16
        figures = head["figures"]
        assert figures["rollout_kept"] == 0.5
        assert figures["rollout_score_kept"] > figures["rollout_score"] > 0
    lines = [json.loads(line) for line in (calm.workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "rollout_score_kept" in line] == [1, 3]
    report = json.loads((calm.workdir / "report_data.json").read_text())["summary"]["data"]
    assert "the student's own answers (of each block the 50% with the highest kl) to 33 prompts" in report

    def dies(self, step, *rest):
        if step == 4:
            raise RuntimeError("killed")  # the second block is on disk, the checkpoint is that of step 2
        return save(self, step, *rest)

    save = Checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", dies)
        with pytest.raises(RuntimeError, match="killed"):
            start(hurt)
    files = {path: path.read_bytes() for path in (hurt.workdir / "own_answers").iterdir()}
    assert len(files) == 2

    def scored_again(*_, **__):
        raise AssertionError("what was kept is on disk")

    monkeypatch.setattr(own_samples, "make_scorer", lambda *_: scored_again)
    start(hurt)
    assert {path: path.read_bytes() for path in (hurt.workdir / "own_answers").iterdir()} == files
    found = seen(hurt)
    assert found[2] == said
    assert [head["kept"] for head in found[1]] == [head["kept"] for head in heads]
    assert len(found[0]) == 4
    np.testing.assert_allclose(found[0], losses, rtol=1e-5)
