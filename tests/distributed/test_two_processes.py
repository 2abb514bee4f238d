"""Two processes with four devices each, over loopback, do what one with eight does; they stop and they fail together.

One pair of processes goes through all scenes, because a process costs seconds to start; the tests look at what it left.
To be quick, the model is small and XLA optimises little, in all processes alike. What one process does alone is done
while the pair waits for its end, a wait of LOST_SECONDS.
"""

import base64
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from kdjax import models
from kdjax.config import Prompts
from kdjax.data.prompts import load_prompts
from kdjax.data.styles import STYLES, scripted
from kdjax.models import synthetic
from kdjax.models.hf_io import save_hf
from tests.launch import launched

LOST_SECONDS = 20
STEPS = 4
VALUES = {
    "student.init.layers": 1,
    "data.seq_len": 32,
    "data.max_train_tokens": 0,
    "samples.fraction": 0.5,
    "samples.rescore_every": 2,
    "selection.policy": "threshold",  # its queue holds positions of all rows of a batch, in their order
    "selection.queue": 100,
    "classes.entries": 8,
    "cache.rows_per_shard": 16,
    "mesh.preset": "fsdp",
    "train.batch_size": 16,
    "train.steps": STEPS,
    "train.log_every": 1,
    "optim.warmup": 1,
    "eval.rows": 4,
    "eval.completions": 0,
    "checkpoint.every": 2,
    "checkpoint.keep": STEPS,
    "log.tensorboard": False,
}
# A live teacher, and so many steps that there is time to disturb it.
LONG = {
    "teacher.source": "live",
    "classes.kind": "all",
    "samples.fraction": 1.0,
    "samples.rescore_every": 0,
    "selection.policy": "top_fraction",
    "train.steps": 100000,
    "checkpoint.every": 2,
    "checkpoint.keep": 1000,
}
# Answers of a pool that the student chooses, twice; steps 2, 3 and 5 on its own answers, two steps' worth at a time; so
# fast that it chooses others the second time, and that the second block depends on the first.
POOL = LONG | {
    "selection.policy": "all",
    "prompts.path": "arith:sum1",
    "prompts.size": 30,
    "prompts.answers": "pool",
    "prompts.instruction": "Say how much it is.",  # no row is shorter than half of the longest: one width
    "data.chat_template": False,
    "data.seq_len": 96,
    "answers.rescore_every": 3,
    "generation.new_tokens": 5,
    "generation.batch_size": 8,
    "on_policy.fraction": 0.85,
    "on_policy.block": 2,
    "loss.terms": (("reverse_kl", 1.0),),
    "optim.learning_rate": 1e-2,
    "train.batch_size": 8,
    "train.steps": 5,
    "eval.prompts": 0,
    "checkpoint.every": 100000,
}
# By gradients: of the teachers' answers to a few questions, and of an answer to each.
BEST = {
    "prompts.size": 10,
    "answers.policy": "best_teacher",
    "answers.score": "g_norm",
    "answers.teacher_questions": 2,
    "answers.rescore_every": 0,
}
GRAND = {
    "prompts.size": 10,
    "answers.policy": "best",
    "answers.score": "grand",
    "answers.candidates": 1,
    "answers.rescore_every": 0,
}
# Tensor parallelism across the processes: both hold all rows.
ACROSS = {"mesh.preset": "tp", "mesh.shape": "model:2,data:4", "checkpoint.every": 100000}
SCENES = ("curate", "cache_teacher", "train", "curate", "train", "curate", "curate", "curate", "train")
DONE = [f"{script} {number} is done" for number, script in enumerate(SCENES)]


def typed(workdir, **changes):
    """The arguments of a command for a workdir beside which are the text and the teacher."""
    paths = {"data.path": workdir.parent / "text.jsonl", "teacher.path": workdir.parent / "teacher"}
    overrides = [f"--config.{name}={value}" for name, value in (VALUES | paths | changes).items()]
    return [f"--config={launched.ROOT}/configs/se_kd_3x.py", f"--workdir={workdir}", *overrides]


def pool(workdir, *more, **changes):
    """The arguments for a workdir beside which are the text, the teacher and a pool."""
    return [*typed(workdir, **POOL | {"answers.pool": f"({str(workdir.parent / 'pool')!r},)"} | changes), *more]


def write_pool(folder):
    """Three teachers, one of them once wrong."""
    folder.mkdir()
    for name in ("bare", "equation", "words"):
        asked = load_prompts(Prompts(path="arith:sum1", size=30))
        rows = [{"id": q.id, "instruction": q.prompt, "teacher_output": scripted(q, STYLES[name])} for q in asked]
        if name == "words":
            rows[0]["teacher_output"] = "I would say 99."
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def tear(workdir, target):
    """A choice of answers as a kill would have left it: half verified, or half scored, and half a line."""
    (target / "answers").mkdir(parents=True)
    folder = workdir / "answers"
    for path in (folder / "admitted.jsonl", *folder.glob("scored-*.jsonl")):
        data = path.read_bytes()
        (target / "answers" / path.name).write_bytes(data[: len(data) // 2])
        manifest = f"{path.stem}.manifest.json"
        said = json.loads((folder / manifest).read_text()) | {"counts": None}
        (target / "answers" / manifest).write_text(json.dumps(said))


def stop_at(monkeypatch, step):
    """Runs in this process are asked to stop after so many steps of theirs."""
    from kdjax import loop

    @contextlib.contextmanager
    def signals():
        calls = itertools.count(1)
        yield lambda: next(calls) == step

    monkeypatch.setattr(loop, "_stop_signals", signals)


def lines(workdir, name="metrics.jsonl"):
    path = workdir / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def cut_back(workdir, target, step):
    """A copy of a run as it was when the checkpoint of `step` was the newest."""
    shutil.copytree(workdir, target)
    for folder in (target / "checkpoints").iterdir():
        if folder.name.isdecimal() and int(folder.name) > step:
            shutil.rmtree(folder)


@dataclasses.dataclass
class Pair:
    """The directory of all runs; what two processes said there, and how they ended."""

    root: pathlib.Path
    out: list[str]
    err: list[str]
    codes: list[int]
    stopped: int = 0
    seconds_to_end: float = 0.0


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    said = [{"text": f"{i} bottles of beer on the wall, {i % 7} of milk; take {i % 5} down."} for i in range(24)]
    (root / "text.jsonl").write_text("\n".join(map(json.dumps, said)))
    cfg = dataclasses.replace(synthetic.config(), layers=2, width=32, heads=2, mlp=64, head_dim=16)
    save_hf(root / "teacher", cfg, models.init_params(cfg, jax.random.key(0)), synthetic.make_tokenizer())
    write_pool(root / "pool")
    launched.run("curate", *pool(root / "pool_one", "--yardstick=2"))
    tear(root / "pool_one", root / "pool_torn")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4)
        launched.run("train", *typed(root / "short", **LONG))
    cut_back(root / "short", root / "long", 2)
    scenes = [(script, *typed(root / "two")) for script in ("curate", "cache_teacher", "train")]
    scenes += [(script, *pool(root / "pool_two")) for script in ("curate", "train")]
    scenes.append(("curate", *pool(root / "pool_torn", "--yardstick=2", **ACROSS)))
    scenes += [("curate", *pool(root / name, **how)) for name, how in (("best_two", BEST), ("grand_two", GRAND))]
    scenes.append(("train", *typed(root / "long", **LONG | ACROSS)))
    scenes.append(("evaluate", f"--workdir={root / 'two'}"))
    with start(root, scenes) as starter:
        ids = list(map(int, starter.stdout.readline().split()))
        try:
            killed, stopped = disturb(root, starter, ids)
            alone(root)
            rest = starter.communicate(timeout=3 * LOST_SECONDS)[0] if killed else ""
        finally:
            for one in ids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)
    ends = {int(number): (int(code), float(at)) for number, code, at in map(str.split, rest.splitlines())}
    codes = [ends[number][0] if number in ends else None for number in range(2)]
    out, err = ([(root / f"{number}.{kind}").read_text() for number in range(2)] for kind in ("out", "err"))
    return Pair(root, out, err, codes, stopped, ends[0][1] - killed if 0 in ends else 0.0)


def alone(root):
    """What one process does of the scenes."""
    for script in ("curate", "cache_teacher", "train"):
        launched.run(script, *typed(root / "one"))
    launched.run("train", *pool(root / "pool_one"))
    for name, how in (("best_one", BEST), ("grand_one", GRAND)):
        launched.run("curate", *pool(root / name, **how))


def start(root, scenes):
    """The process that starts two and says how they end."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    quick = {"JAX_NUM_CPU_DEVICES": "4", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    worker = [sys.executable, "-u", str(pathlib.Path(__file__).with_name("process_worker.py"))]
    flags = [f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--lost_seconds={LOST_SECONDS}"]
    return subprocess.Popen(
        [*worker, str(root), json.dumps([list(map(str, scene)) for scene in scenes]), *flags],
        cwd=launched.ROOT,
        env=os.environ | {"PYTHONPATH": str(launched.ROOT)} | quick,
        stdout=subprocess.PIPE,
        text=True,
    )


def until(condition, starter, within=600):
    """Whether it came true before a process ended."""
    end = time.monotonic() + within
    while not condition():
        ended, _, _ = select.select([starter.stdout], [], [], 0.02)
        if ended or time.monotonic() > end:
            return False
    return True


def disturb(root, starter, ids):
    """SIGTERM to process 1 when both train, kill -9 when process 0 waits for it: (when, the step they stopped at)."""
    long, outputs = root / "long", [root / "0.out", root / "1.out"]
    if not until(lambda: lines(long)[-1]["step"] > 4, starter):  # those up to 4 are of the copy
        return 0.0, 0
    os.kill(ids[1], signal.SIGTERM)
    if not until(lambda: all(DONE[-1] in out.read_text() for out in outputs), starter):
        return 0.0, 0
    os.kill(ids[1], signal.SIGKILL)
    return time.monotonic(), lines(long)[-1]["step"]


def said(pair):
    return "\n".join(text[-3000:] for text in (*pair.out, *pair.err))


def test_all_scenes_were_gone_through(pair):
    for out in pair.out:
        done = [line for line in out.splitlines() if line.endswith("is done")]
        assert done == DONE, said(pair)
    assert "2 processes, 8 x cpu" in pair.err[0]


def test_the_same_rows_are_kept(pair):
    one, two = pair.root / "one/samples", pair.root / "two/samples"
    (expected,) = one.glob("*.npz")
    assert (two / expected.name).read_bytes() == expected.read_bytes()
    wanted, found = (json.loads((run / "manifest.json").read_text()) for run in (one, two))
    assert {**found, "made": None} == {**wanted, "made": None}
    assert 0 < found["kept"] < found["rows"]


def test_the_same_rows_are_kept_by_the_student_of_step_2(pair):
    """Its weights differ in the last bits, as sums over devices do."""
    one, two = (np.load(next((pair.root / run / "rescored/step-2/samples").glob("*.npz"))) for run in ("one", "two"))
    with one, two:
        np.testing.assert_array_equal(two["kept"], one["kept"])
        np.testing.assert_allclose(two["scores"], one["scores"], rtol=1e-5)


def test_the_cache_is_the_same_byte_for_byte(pair):
    one, two = ({p.name: p.read_bytes() for p in (pair.root / run / "cache").iterdir()} for run in ("one", "two"))
    assert len([name for name in one if name.startswith("shard-")]) > 2
    headers = [{**json.loads(run.pop("header.json")), "made": None} for run in (one, two)]
    assert headers[0] == headers[1]
    assert one == two


def close(found, expected):
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, wanted in zip(found, expected, strict=True):
        assert line.keys() == wanted.keys()
        for name in line.keys() - {"seconds", "tokens_per_second"}:
            assert line[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-6), (line["step"], name)


def held_out(workdir):
    last = lines(workdir, "evals.jsonl")[-1]
    assert last["step"] == STEPS
    return [last[name]["value"] for name in ("kl", "agreement") if last[name]] + [last["student"]["nll"]["value"]]


def test_training_is_the_same(pair):
    one, two = pair.root / "one", pair.root / "two"
    wanted = lines(one)
    assert [line["step"] for line in wanted if "loss" in line] == [1, 2, 3, 4]
    assert all(0 < line["selected_fraction"] < 1 for line in wanted if "loss" in line)
    close(lines(two), wanted)
    assert held_out(two) == pytest.approx(held_out(one), rel=1e-5)


def test_own_answers_and_what_is_learned_from_them_are_the_same(pair):
    blocks = [sorted((pair.root / run / "own_answers").iterdir()) for run in ("pool_one", "pool_two")]
    names = ["block-000000.jsonl", "block-000001.jsonl"]
    assert [[path.name for path in run] for run in blocks] == [names, names]
    for one, two in zip(*blocks, strict=True):
        (_, *wanted), (_, *found) = (list(map(json.loads, path.read_text().splitlines())) for path in (one, two))
        assert len(wanted) == 16
        assert [line["tokens"] for line in found] == [line["tokens"] for line in wanted]
        assert [line["logp"] for line in found] == pytest.approx([line["logp"] for line in wanted], rel=1e-4)
    assert [line["step"] for line in lines(pair.root / "pool_one") if "rollout_teacher_nll" in line] == [2, 5]


def chosen(workdir, name="selected"):
    return {line["id"]: line["row"] for line in lines(workdir, f"answers/{name}.jsonl")}


def scored(workdir, step=0):
    """{row: figures} of the student that chose after this step."""
    name = f"selected-{step}" if step else "selected"
    manifest = json.loads((workdir / f"answers/{name}.manifest.json").read_text())
    return {line["row"]: line["figures"] for line in lines(workdir, f"answers/{manifest['depends']['scored']}")}


def test_the_same_answers_are_admitted_scored_and_selected(pair):
    """By the student that nothing was changed of since, to the last byte."""
    one, two = pair.root / "pool_one/answers", pair.root / "pool_two/answers"
    (figures,) = {path.name for path in one.glob("scored-*.jsonl")} & {path.name for path in two.glob("scored-*.jsonl")}
    for name in ("admitted.jsonl", figures, "selected.jsonl", "admitted.manifest.json", "selected.manifest.json"):
        assert (two / name).read_bytes() == (one / name).read_bytes(), name
    admitted = lines(one, "admitted.jsonl")
    assert [line["reason"] for line in admitted if line["reason"] not in ("", "heldout")] == ["wrong"]
    rows = [line["row"] for line in admitted if not line["reason"]]
    assert sorted(line["row"] for line in lines(two, figures)) == sorted(rows)
    assert "2 rounds of selection by scas" in (two / "report.html").read_text()


def test_what_the_student_chooses_next_and_learns_is_the_same(pair):
    one, two = pair.root / "pool_one", pair.root / "pool_two"
    assert chosen(one) != chosen(one, "selected-3") == chosen(two, "selected-3")
    wanted, found = scored(one, 3), scored(two, 3)
    assert found.keys() == wanted.keys() == scored(one).keys()
    for row, values in wanted.items():
        assert found[row] == pytest.approx(values, rel=1e-4, abs=1e-6)
    logs = lines(one), lines(two)
    for line in (line for log in logs for line in log if "answers_scored" in line):
        assert (line["step"], line["answers_scored"], line.pop("scoring_seconds") > 0) == (3, len(wanted), True)
    assert [line["step"] for line in logs[0] if "loss" in line] == [1, 2, 3, 4, 5]
    close(logs[1], logs[0])


def test_a_choice_that_was_stopped_goes_on_in_two_processes_with_tensor_parallelism_across_them(pair):
    one, torn = pair.root / "pool_one", pair.root / "pool_torn"
    assert (torn / "answers/admitted.jsonl").read_bytes() == (one / "answers/admitted.jsonl").read_bytes()
    wanted, found = scored(one), scored(torn)
    (file,) = (torn / "answers").glob("scored-*.jsonl")
    whole = file.read_bytes().splitlines()
    now = [int(count) for count in re.findall("scored now: ([0-9]+) answers", pair.out[0])]
    assert now[0] == len(wanted) == len(whole), "none twice"
    assert 0 < now[1] < now[0]
    assert whole[: -now[1]] == (one / "answers" / file.name).read_bytes().splitlines()[: -now[1]]
    assert found.keys() == wanted.keys()
    for row, values in wanted.items():
        assert found[row] == pytest.approx(values, rel=1e-4, abs=1e-6)
    assert chosen(torn) == chosen(one)


def known(figures):
    return {name: value for name, value in figures.items() if value is not None}


def test_gradients_gains_and_scores_of_steps_are_the_same_with_tensor_parallelism_across_them(pair):
    """All that --yardstick measures, of which the score "lalp" is a part."""
    wanted, found = (lines(pair.root / run, "answers/yardstick.jsonl") for run in ("pool_one", "pool_torn"))
    assert len({line["id"] for line in wanted}) == 2
    for one, two in zip(wanted, found, strict=True):
        assert one["row"] == two["row"]
        assert two["gradient"] == pytest.approx(one["gradient"], rel=1e-5)
        assert two["gain"] == pytest.approx(one["gain"], abs=1e-5)
        assert known(two["figures"]) == pytest.approx(known(one["figures"]), rel=1e-5, abs=1e-6)
    assert all(line["figures"]["local_logp"] for line in wanted)
    assert "against the gain" in pair.out[0]


def test_teachers_are_rated_by_the_same_gradients(pair):
    one, two = (next((pair.root / run / "answers").glob("gradients-*.jsonl")) for run in ("best_one", "best_two"))
    assert two.name == one.name
    wanted, found = (list(map(json.loads, path.read_text().splitlines())) for path in (one, two))
    assert len(wanted) == 2 * 3
    for line, other in zip(wanted, found, strict=True):
        here, there = (np.frombuffer(base64.b64decode(each.pop("gradient")), "<f4") for each in (line, other))
        np.testing.assert_allclose(there, here, atol=1e-5 * np.linalg.norm(here))
        assert other == line
    said = [
        json.loads((pair.root / run / "answers/selected.manifest.json").read_text()) for run in ("best_one", "best_two")
    ]
    scores = [each["teacher_scores"] for each in said]
    assert list(scores[1]) == list(scores[0])
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)
    assert chosen(pair.root / "best_two") == chosen(pair.root / "best_one")


def test_norms_of_gradients_as_scores_are_the_same(pair):
    wanted, found = scored(pair.root / "grand_one"), scored(pair.root / "grand_two")
    assert len(wanted) == 8
    assert list(found) == list(wanted)
    for row, values in wanted.items():
        assert found[row] == pytest.approx(values, rel=1e-5, abs=1e-6)
        assert values["gradient_norm"] > 0


def test_a_run_of_two_processes_goes_on_in_one(pair, monkeypatch):
    cut_back(pair.root / "two", pair.root / "from_two", 2)
    stop_at(monkeypatch, 1)
    launched.run("train", *typed(pair.root / "from_two"))
    wanted = lines(pair.root / "one")
    close(lines(pair.root / "from_two"), [line for line in wanted if line["step"] <= 3])


def test_a_run_of_one_process_goes_on_in_two_with_tensor_parallelism_across_them(pair):
    """Written by one process under fsdp, at step 2; both have all rows now, and half of every layer."""
    short, long = lines(pair.root / "short"), lines(pair.root / "long")
    assert [line["step"] for line in short] == [1, 2, 3, 4]
    close(long[:4], short)
    assert long[:2] == short[:2]
    assert json.loads((pair.root / "long/config.json").read_text())["mesh"]["shape"] == "model:2,data:4"


def test_process_0_alone_speaks(pair):
    assert pair.out[0].count("held out: ") == 2
    assert pair.out[0].count("scored now: ") == 3
    assert "step 4/4" in pair.err[0]
    assert re.findall(r"\w+ \d is done", pair.out[1]) == DONE
    # Gloo's threads write to the same stream, and break one another's lines.
    heard, silent = ({line for line in out.splitlines() if "peer rank" not in line} for out in pair.out[:2])
    assert len(heard - {*DONE, ""}) >= 4
    assert not heard & silent - {*DONE, ""}
    assert "step 4/4" not in pair.err[1]


def test_a_signal_to_one_process_stops_all_of_them_at_one_step(pair):
    assert pair.stopped, said(pair)
    wanted = f"stopped at step {pair.stopped} of 100000, all saved; run the same command to go on"
    assert wanted in pair.out[0].splitlines()
    assert [line["step"] for line in lines(pair.root / "long")] == list(range(1, pair.stopped + 1))


def test_what_they_saved_then_is_there_for_one_process(pair, capsys):
    launched.run("evaluate", f"--workdir={pair.root / 'long'}", f"--step={pair.stopped}", "--nobefore")
    out = capsys.readouterr().out
    assert out.startswith(f"{pair.root / 'long'}, step {pair.stopped}\n")
    assert "KL to the teacher" in out


def test_a_lost_process_ends_the_other_with_a_message(pair):
    assert pair.codes == [4, -signal.SIGKILL], said(pair)
    assert pair.seconds_to_end < 2.5 * LOST_SECONDS
    last = pair.err[0].splitlines()[-1]
    assert last.startswith("error: another process of this run is lost or failed; ")
    assert "Start all processes again with the same command" in last
