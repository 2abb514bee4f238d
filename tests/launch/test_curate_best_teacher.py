"""answers.policy=best_teacher as a user types it: curate, train in rounds, and going on after a stop."""

import json
import pathlib
import shutil

from kdjax.config import Prompts
from kdjax.curation.answers.selected import read_selected
from kdjax.curation.answers.stage import read_manifest
from kdjax.data.prompts import load_prompts, split_prompts
from kdjax.data.styles import STYLES, scripted

ROOT = pathlib.Path(__file__).parents[2]
TEACHERS = ("bare", "sentence", "steps")
VALUES = {
    "teacher.path": "synthetic",
    "student.init.layers": 1,
    "data.seq_len": 96,
    "data.chat_template": False,
    "data.max_train_tokens": 0,
    "prompts.path": "arith:sum1",
    "prompts.size": 12,
    "prompts.instruction": "",
    "train.batch_size": 4,
    "train.steps": 4,
    "train.log_every": 1,
    "answers.policy": "best_teacher",
    "answers.score": "grace",
    "answers.teacher_questions": 4,
    "answers.rescore_every": 2,
    "optim.warmup": 1,
    "eval.rows": 2,
    "eval.prompts": 0,
    "eval.completions": 0,
    "checkpoint.every": 2,
    "checkpoint.keep": 5,
    "log.tensorboard": False,
}


def test_rounds_by_the_best_teacher(call, tmp_path):
    text, pool, run = tmp_path / "text.jsonl", tmp_path / "pool", tmp_path / "run"
    text.write_text("\n".join(json.dumps({"text": f"{i} bottles of beer on the wall; take {i}."}) for i in range(40)))
    pool.mkdir()
    asked = Prompts(path="arith:sum1", size=12)
    _, questions = split_prompts(load_prompts(asked), asked)
    for name in TEACHERS:
        rows = [{"id": q.id, "instruction": q.prompt, "teacher_output": scripted(q, STYLES[name])} for q in questions]
        (pool / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    values = VALUES | {"data.path": text, "answers.pool": f"({str(pool)!r},)"}
    typed = [f"--config={ROOT}/configs/scas.py", f"--workdir={run}"]
    typed += [f"--config.{name}={value}" for name, value in values.items()]

    said = call("curate", *typed)
    assert f"teachers were rated on 4 questions, of the {len(questions)} that all teachers have answered" in said
    assert "gradients now: 12 answers" in said
    assert "gradients now" not in call("curate", *typed), "they are there"
    call("train", *typed)
    manifests = [read_manifest(run / "answers" / f"{name}.jsonl") for name in ("selected", "selected-2")]
    for name, manifest in zip(("selected", "selected-2"), manifests, strict=True):
        best = next(iter(manifest["teacher_scores"]))
        assert {one.teacher_name for one in read_selected(run, name)} == {best}
    first, second = ([manifest["teacher_scores"][name] for name in TEACHERS] for manifest in manifests)
    assert all(abs(a - b) > 1e-6 * abs(a) for a, b in zip(first, second, strict=True)), "another student"
    assert manifests[0]["rated_questions"] == manifests[1]["rated_questions"]
    page = (run / "answers/report.html").read_text()
    assert "Score in round 2" in page

    losses = [line["loss"] for line in log(run) if "loss" in line]
    files = {path.name: path.read_bytes() for path in (run / "answers").glob("*-*.jsonl")}
    assert len([name for name in files if name.startswith("gradients-")]) == 2
    shutil.rmtree(run / "checkpoints/4")
    (run / "answers/selected-2.jsonl").unlink()
    shutil.rmtree(run / "checkpoints/2")
    call("train", *typed)
    assert [line["loss"] for line in log(run) if "loss" in line] == losses
    assert {path.name: path.read_bytes() for path in (run / "answers").glob("*-*.jsonl")} == files


def log(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
