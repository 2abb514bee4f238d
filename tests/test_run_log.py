"""run_log.py: strict JSON lines, what a resumed run keeps, optional sinks, the progress line."""

import io
import json
import sys
import types

import jax
import numpy as np
import pytest

from kdjax import run_log
from kdjax.run_log import Progress, RunLog, duration, read_lines


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_strict_json(tmp_path):
    with RunLog(tmp_path, config={"name": "x", "train": {"steps": 3, "keep": (1, 2)}}) as log:
        log.write(1, {"loss": np.float32(2.5), "grad_norm": float("nan"), "rows": np.arange(2)})
        log.write_evaluation(0, "student", {"tokens": 4, "student": {"nll": {"value": float("inf")}}})
    (line,) = records(tmp_path / "metrics.jsonl")
    assert line.pop("seconds") >= 0
    assert line == {"step": 1, "loss": 2.5, "grad_norm": None, "rows": [0, 1]}
    (line,) = records(tmp_path / "evals.jsonl")
    assert (line["step"], line["which"], line["student"]) == (0, "student", {"nll": {"value": None}})
    assert json.loads((tmp_path / "config.json").read_text()) == {"name": "x", "train": {"steps": 3, "keep": [1, 2]}}


def test_resume_drops_the_steps_to_be_done_again(tmp_path):
    with RunLog(tmp_path) as log:
        log.write_evaluation(0, "student", {})
        for step in range(1, 7):
            log.write(step, {"loss": step})
        log.write_evaluation(6, "student", {})
    lines = records(tmp_path / "metrics.jsonl")
    lines[3]["seconds"] = 5000.0
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 7, "lo')  # killed while writing
    with RunLog(tmp_path, resume_step=4) as log:
        log.write(5, {"loss": -5})
    kept = records(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in kept] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, -5)]
    assert kept[-1]["seconds"] >= 5000, "the clock goes on where the run left it"
    assert [line["step"] for line in records(tmp_path / "evals.jsonl")] == [0]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_new_run_starts_empty(tmp_path):
    for _ in range(2):
        with RunLog(tmp_path) as log:
            log.write(1, {"loss": 1.0})
    assert len(records(tmp_path / "metrics.jsonl")) == 1


def test_failed_replace_leaves_the_old_file(tmp_path, monkeypatch):
    with RunLog(tmp_path) as log:
        log.write(1, {"loss": 1.0})
        log.write(2, {"loss": 2.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def full(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(run_log.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        RunLog(tmp_path, resume_step=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("line", ["{broken", "[1, 2]"])
def test_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 must be a JSON object, got"):
        read_lines(path)
    assert read_lines(tmp_path / "none.jsonl") == []


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with RunLog(tmp_path / "run", tensorboard=True, wandb=True, config={}) as log:
        log.write(1, {"loss": 1.0})
        log.write_evaluation(1, "student", {})
    assert not (tmp_path / "run").exists()
    stream = io.StringIO()
    Progress(10, stream=stream).update(1, loss=1.0, tokens_per_second=1.0)
    assert stream.getvalue() == ""


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboardX", reason="TensorBoard writing is optional")
    from tensorboardX.proto.event_pb2 import Event

    with RunLog(tmp_path, tensorboard=True) as log:
        log.write(3, {"loss": 1.5})
        log.write_evaluation(
            3, "student", {"tokens": 7, "student": {"nll": {"value": 2.0}, "calibration": {"count": [1]}}}
        )
    (file,) = (tmp_path / "tensorboard").glob("events.*")
    data, at, found = file.read_bytes(), 0, {}
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        at += 16 + size
    assert found == {
        "train/loss": (3, 1.5),
        "heldout/student/tokens": (3, 7.0),
        "heldout/student/student/nll/value": (3, 2.0),
    }


def test_wandb_when_asked_for(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish")
    )
    fake = types.SimpleNamespace(init=lambda **settings: calls.append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with RunLog(tmp_path, wandb=True, wandb_project="mine", config={"name": "x"}) as log:
        log.write(1, {"loss": 2.0})
    assert calls[0]["project"] == "mine"
    assert calls[0]["config"] == {"name": "x"}
    assert calls[1:] == [(1, {"train/loss": 2.0}), "finish"]
    RunLog(tmp_path, wandb=True, resume_step=1).close()
    assert calls[3]["id"] == calls[0]["id"], "a resumed run goes on with the same W&B run"
    RunLog(tmp_path, wandb=True).close()
    assert calls[5]["id"] != calls[0]["id"]


@pytest.mark.parametrize(("sink", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_missing_sink_says_what_to_install(tmp_path, monkeypatch, sink, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ValueError, match=rf"log\.{sink} must be False unless .* `pip install {package}` or set log\.{sink}"
    ):
        RunLog(tmp_path, **{sink: True})
    RunLog(tmp_path).close()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bar_rewrites_one_line(monkeypatch):
    clock = iter([100.0, 100.0, 110.0, 115.0])
    monkeypatch.setattr(run_log.time, "monotonic", lambda: next(clock))
    stream = Terminal()
    progress = Progress(20, start_step=4, stream=stream)
    progress.update(4, loss=12.3456, tokens_per_second=1234.4)
    progress.update(8, loss=2.5, tokens_per_second=700.0)
    progress.update(20, loss=2.0, tokens_per_second=700.0)
    progress.close()
    first, second, third = stream.getvalue().split("\r")[1:]
    assert first.endswith("]  4/20  loss 12.35  1,234 tokens/s  ETA ?")
    assert second.rstrip().endswith("]  8/20  loss 2.5  700 tokens/s  ETA 30s")
    assert len(second) >= len(first), "the rest of a longer line is overwritten"
    assert third.startswith("[" + "=" * run_log.BAR_WIDTH + "] 20/20")
    assert stream.getvalue().endswith("\n")


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run_log.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(100, every=30, stream=stream)
    for step in range(1, 101):
        now[0] = float(step)
        progress.update(step, loss=1.0, tokens_per_second=5.0)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [int(line.split("/")[0].split()[1]) for line in lines] == [1, 31, 61, 91, 100]
    assert "\r" not in stream.getvalue()
    assert lines[1] == "step  31/100  loss 1  5 tokens/s  ETA 1m09s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (200, "3m20s"), (7500, "2h05m"), (float("nan"), "?"), (float("inf"), "?")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
