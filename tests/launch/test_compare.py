"""launch.compare: which commands it runs, what it keeps, how it goes on, what it says when one fails.

The commands are stood in for by functions that leave the files of the real ones; one small study is run for real.
"""

import fcntl
import importlib.util
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from absl import flags

from tests.launch import launched

ROOT = pathlib.Path(__file__).parents[2]
STUDY = """
from kdjax.analysis.study import default_study


def get_config(full=False):
    study = default_study()
    study.name = "full" if full else "small"
    base = study.base
    base.teacher.path = "synthetic"
    base.student.init.kind = "cut"
    base.student.init.layers = 1
    base.data.path = "topics"
    base.data.seq_len = 32
    base.data.max_train_tokens = 16 * 32
    base.selection.policy = "all"
    base.train.batch_size = 4
    base.train.steps = 4
    base.train.log_every = 1
    base.optim.warmup = 1
    base.eval.rows = 4
    base.eval.completions = 0
    base.checkpoint.keep_best = 0
    study.arms = ARMS
    study.seeds = (0, 1)
    study.heldout_rows = 4
    study.equal_time = EQUAL_TIME
    return study
"""
ARMS = {
    "dense": {},
    "se_kd": {"selection.policy": "top_fraction"},
    "few": {"samples.fraction": 0.5, "classes.kind": "sampled", "teacher.source": "cache"},
}
PACE = {"dense": 1.0, "se_kd": 0.5, "few": 0.25}  # seconds per step


@pytest.fixture
def compare():
    """The module, its flags defined anew."""
    with launched.loaded("compare") as module:
        yield module


class World:
    """Stands in for the commands: what was called, and what is to fail, stop or be killed."""

    def __init__(self, compare, root):
        self.compare, self.root, self.called = compare, root, []
        self.failing, self.killed, self.stopping = set(), set(), set()
        self.study(ARMS)

    def study(self, arms, equal_time=True, **replace):
        text = STUDY.replace("ARMS", repr(arms)).replace("EQUAL_TIME", str(equal_time))
        for old, new in replace.items():
            text = text.replace(old, new)
        (self.root / "study.py").write_text(text)

    def __call__(self, *arguments):
        """Exit code of the script with these further flags."""
        self.called = []
        flags.FLAGS(["x", f"--config={self.root / 'study.py'}", f"--workdir={self.root / 'out'}", *arguments])
        return self.compare.main()

    def execute(self, command, log, stop):
        phase = command[2].removeprefix("launch.")
        given = dict(argument.removeprefix("--").split("=", 1) for argument in command[3:] if "=" in argument)
        folder = pathlib.Path(given.get("workdir", log.parents[1]))
        name = folder.relative_to(self.root / "out").as_posix()
        self.called.append((name, phase))
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"first line\nerror: {phase} does not work\n" if (name, phase) in self.failing else "fine\n")
        used = {"seconds": 10.0, "processor_seconds": 15.0, "resident_bytes": 1000}
        if (name, phase) in self.killed:
            raise KeyboardInterrupt  # as if this process was killed, too
        if (name, phase) in self.failing:
            return 2, used
        getattr(self, phase)(folder, given, complete=(name, phase) not in self.stopping)
        if (name, phase) in self.stopping:
            stop.note(signal.SIGTERM, None)
        return 0, used

    def plan(self, folder, given, complete):
        path = pathlib.Path(given["out"])
        path.parent.mkdir(parents=True, exist_ok=True)
        figures = {"train_rows": 16, "train_tokens": 512, "train_targets": 496}
        path.write_text(json.dumps(figures | {"step_temporary_bytes": 2**20, "step_argument_bytes": 2**21}))

    def generate(self, folder, given, complete):
        folder.mkdir(parents=True, exist_ok=True)

    def curate(self, folder, given, complete):
        (folder / "samples").mkdir()
        (folder / "samples" / "manifest.json").write_text(json.dumps({"made": {"seconds": 0.75}}))

    def cache_teacher(self, folder, given, complete):
        (folder / "cache").mkdir()
        (folder / "cache" / "shard").write_bytes(b"x" * 5120)
        (folder / "logs" / "cache_teacher.log").write_text("8 rows, 256 tokens in 1.25 s, 205 tokens/s\n")

    def train(self, folder, given, complete):
        arm, seed = folder.parent.name, int(folder.name)
        steps = self.experiment(folder).train.steps if complete else 1
        rate = 4 * 32 / PACE.get(arm.removesuffix("@time"), 1.0)
        metrics = [
            {"step": s, "tokens_per_second": rate if s > 1 else 1.0, "selected_fraction": 0.5} for s in range(1, 5)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
        figure = {"perplexity": {"value": 100.0 + seed, "low": 90.0, "high": 110.0}}
        evals = [{"step": step, "which": "student", "student": figure} for step in (0, steps)]
        (folder / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evals))
        (folder / "checkpoints" / "4").mkdir(parents=True, exist_ok=True)

    def evaluate(self, folder, given, complete):
        arm, seed = folder.parent.name, int(folder.name)
        value = {"se_kd": 90.0, "few": 120.0}.get(arm.removesuffix("@time"), 100.0) + seed * (1 + len(arm) / 10)
        student = {name: {"value": value, "low": value - 1, "high": value + 1} for name in ("perplexity", "nll")}
        student |= {name: {"value": 0.1, "low": 0.0, "high": 0.2} for name in ("accuracy", "ece", "entropy")}
        after = {"student": student | {"calibration": {}}, "teacher": student, "tokens": 124, "rows": 4}
        after |= {name: {"value": 0.5, "low": 0.4, "high": 0.6} for name in ("kl", "agreement")}
        pathlib.Path(given["out"]).write_text(json.dumps({"step": 4, "before": None, "after": after}))

    def experiment(self, folder):
        from kdjax.config import from_config_dict

        spec = importlib.util.spec_from_file_location("written", folder / "config.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return from_config_dict(module.get_config())

    def results(self):
        return json.loads((self.root / "out" / "results.json").read_text())


@pytest.fixture
def world(compare, monkeypatch, tmp_path):
    made = World(compare, tmp_path)
    monkeypatch.setattr(compare, "execute", made.execute)
    return made


# --- a whole study


def test_what_arms_share_is_made_once_before_them(world, capsys):
    prepared = 'study.prepare = {"pool": ("generate", "--out=pool")}\n    study.arms = '
    world.study({"dense": {}}, equal_time=False, **{"study.arms = ": prepared})
    world.failing.add(("prepare/pool", "generate"))
    assert world() == 1
    assert world.called == [("prepare/pool", "generate")]
    assert "prepare pool: generate FAILED" in capsys.readouterr().out
    world.failing.clear()
    assert world() == 0
    assert world.called[:2] == [("prepare/pool", "generate"), ("dense", "plan")]
    assert world() == 0
    assert ("prepare/pool", "generate") not in world.called
    world.study({"dense": {}}, equal_time=False, **{"study.arms = ": prepared.replace("generate", "rm")})
    with pytest.raises(
        ValueError, match=r"^prepare\['pool'\] must be \(script, \*arguments\) with a script of generate, "
    ):
        world()


def test_arms_by_seeds_then_equal_time_then_the_table(world, capsys):
    assert world() == 0
    phases = {"dense": ["train", "evaluate"], "se_kd": ["train", "evaluate"]}
    phases["few"] = ["curate", "cache_teacher", "train", "evaluate"]
    plain = [(arm, seed) for seed in (0, 1) for arm in ARMS]
    timed = [(f"{arm}@time", seed) for seed in (0, 1) for arm in ("se_kd", "few")]
    wanted = [(arm, "plan") for arm in ARMS]
    for arm, seed in plain + timed:
        wanted += [(f"{arm}/{seed}", phase) for phase in phases[arm.removesuffix("@time")]]
    assert world.called == wanted

    found = world.results()
    assert found["missing"] == []
    assert [f"{run['name']}/{run['seed']}" for run in found["runs"]] == [f"{arm}/{seed}" for arm, seed in plain + timed]
    costs = {run["name"]: run["costs"] for run in found["runs"]}
    # The reference's 4 steps of 1 s: se_kd has 8 of 0.5 s; few has 2 s left after 0.75 + 1.25 s, 8 steps of 0.25 s.
    assert {name: cost["steps"] for name, cost in costs.items()} == {
        "dense": 4,
        "se_kd": 4,
        "few": 2,
        "se_kd@time": 8,
        "few@time": 8,
    }
    few, timed = costs["few"], costs["few@time"]
    assert (few["preparation_seconds"], few["steps_seconds"], few["total_seconds"]) == (2.0, 0.5, 2.5)
    assert (few["whole_seconds"], few["processor_seconds"], few["cache_bytes"]) == (30.0, 45.0, 5120)
    assert (few["tokens_covered"], few["tokens_trained"]) == (512, 256)
    assert (timed["tokens_covered"], timed["tokens_trained"]) == (2048, 1024)
    assert few["tokens_of_text"] == timed["tokens_of_text"] == 512
    assert few["targets_supervised"] == 124  # 256 tokens, 496 of 512 are targets, half of them selected
    assert found["runs"][0]["figures"]["perplexity"] == {"value": 100.0, "low": 99.0, "high": 101.0}
    assert "**" not in (world.root / "out" / "table.md").read_text()
    assert "Equal time" in capsys.readouterr().out
    assert "<svg" in (world.root / "out" / "report.html").read_text()
    assert not list((world.root / "out").glob("*/*/checkpoints")), "nobody asked to keep them"


def test_the_experiment_of_a_run_is_in_its_config(world):
    world("--arm=dense,few", "--seed=1")
    few = world.experiment(world.root / "out" / "few" / "1")
    assert (few.train.steps, few.train.seed, few.classes.seed, few.samples.fraction) == (2, 1, 1, 0.5)
    dense = world.experiment(world.root / "out" / "dense" / "1")
    assert dense.data == few.data


def test_a_part_of_the_study_says_what_is_missing(world, capsys):
    assert world("--arm=dense,se_kd@time", "--seed=1") == 0
    plans = [("dense", "plan"), ("se_kd", "plan")]
    assert world.called == [*plans, ("dense/1", "train"), ("dense/1", "evaluate")]
    out = capsys.readouterr().out
    assert "se_kd@time/1: not run, dense/0 is not trained" in out
    assert "- dense/0: not started" in out
    assert "- few@time/1: dense/0 is not trained" in out
    assert len(world.results()["missing"]) == 9


def test_a_preparation_that_takes_all_the_time_is_said(world, capsys, monkeypatch):
    monkeypatch.setitem(PACE, "dense", 0.1)
    assert world() == 0
    assert "few@time/0: not run, scoring and caching take 2 s of the 0.4 s of dense" in capsys.readouterr().out
    assert {run["name"] for run in world.results()["runs"]} == {"dense", "se_kd", "few"}


def test_a_dry_run_does_nothing(world, capsys):
    assert world("--dry_run") == 0
    out = capsys.readouterr().out
    assert re.search(r"^few/0 +curate, cache_teacher, train 2 steps, evaluate$", out, re.MULTILINE)
    assert re.search(
        r"^se_kd@time/1 +train as many steps as the time allows \(dense/0 is not trained\), ", out, re.MULTILINE
    )
    assert not (world.root / "out").exists()
    assert world.called == []


def test_full_is_another_study(world, capsys):
    world("--full", "--arm=dense", "--seed=0")
    assert world.results()["study"] == "full"
    assert "study.py --full`" in capsys.readouterr().out


# --- going on


def test_what_is_done_is_not_done_again(world, capsys):
    world("--arm=few", "--seed=0")
    assert world("--arm=few", "--seed=0") == 0
    assert world.called == []
    assert "few/0: done before" in capsys.readouterr().out


def test_a_killed_phase_is_run_again_and_its_time_is_not_known(world):
    world.killed = {("few/0", "train")}
    with pytest.raises(KeyboardInterrupt):
        world("--arm=few", "--seed=0")
    world.killed = set()
    assert world("--arm=few", "--seed=0") == 0
    assert world.called == [("few/0", "train"), ("few/0", "evaluate")]
    (run,) = world.results()["runs"]
    assert run["phases"]["train"] == {"seconds": None, "processor_seconds": None, "resident_bytes": 1000, "attempts": 2}
    assert run["costs"]["whole_seconds"] is None
    assert run["costs"]["total_seconds"] == 2.5
    world.killed = {("few/1", "cache_teacher")}
    with pytest.raises(KeyboardInterrupt):
        world("--arm=few", "--seed=1")
    world.killed = set()
    assert world("--arm=few", "--seed=1") == 0
    assert world.results()["runs"][1]["costs"]["preparation_seconds"] is None, "part of the cache was written before"
    assert (
        "without a time of the whole command: few/0 train, few/1 cache_teacher"
        in (world.root / "out" / "table.md").read_text()
    )


def test_asked_to_stop_it_stops_and_goes_on_later(world, capsys):
    world.stopping = {("dense/0", "train")}
    assert world("--arm=dense,se_kd", "--seed=0") == 0
    assert world.called[-1] == ("dense/0", "train")
    assert "run the same command to go on" in capsys.readouterr().out
    world.stopping = set()
    assert world("--arm=dense", "--seed=0") == 0
    (run,) = world.results()["runs"]
    assert (run["phases"]["train"]["seconds"], run["phases"]["train"]["attempts"]) == (20.0, 2)


def test_the_signal_handlers_are_put_back(world):
    before = signal.getsignal(signal.SIGTERM)
    world("--arm=dense", "--seed=0")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_training_that_ends_early_is_not_done(world, capsys):
    world.stopping = {("dense/0", "train")}
    world.compare.Stop.note = lambda self, number, frame: None  # the signal reached the training alone
    assert world("--arm=dense", "--seed=0") == 1
    assert "train FAILED, it ended before its last step" in capsys.readouterr().out


def test_a_run_of_another_process_is_left_alone(world, capsys):
    folder = world.root / "out" / "dense" / "0"
    folder.mkdir(parents=True)
    with open(folder / "lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert world("--arm=dense", "--seed=0") == 0
    assert "dense/0: not run, another process runs it" in capsys.readouterr().out
    assert world.called == [("dense", "plan")]


# --- failing


def test_a_failing_phase_is_said_and_the_others_go_on(world, capsys):
    world.failing = {("dense/0", "train"), ("few/1", "evaluate")}
    assert world() == 1
    out = capsys.readouterr().out
    assert re.search(
        r"dense/0: train FAILED, exit code 2; the end of \S+train\.log:\n +first line\n +error: train does", out
    )
    assert re.search(r"again: \S+python\S* -m launch\.train --config=\S+/dense/0/config\.py --workdir=", out)
    assert "- dense/0: train failed: error: train does not work" in out
    assert "- few/1: evaluate failed: error: evaluate does not work" in out
    assert "se_kd@time/0: not run, dense/0 is not trained" in out
    assert {f"{run['name']}/{run['seed']}" for run in world.results()["runs"]} == {
        "dense/1",
        "se_kd/0",
        "se_kd/1",
        "few/0",
    }
    world.failing = set()
    assert world() == 0
    assert world.results()["missing"] == []
    assert world.called[0] == ("dense/0", "train")


def test_a_plan_that_fails_fails_its_arm_alone(world):
    world.failing = {("se_kd", "plan")}
    assert world("--arm=dense,se_kd") == 1
    assert {run["name"] for run in world.results()["runs"]} == {"dense"}
    assert "se_kd/1: plan failed: error: plan does not work" in world.results()["missing"]


# --- refused


def test_a_changed_study_does_not_mix(world):
    world("--arm=dense", "--seed=0")
    world.study(dict(ARMS) | {"se_kd": {"selection.policy": "top_fraction", "selection.fraction": 0.3}, "new": {}})
    message = (
        r"^--workdir must be empty or of the same study, got '.*out': arms\.se_kd\.selection\.fraction was 'not set' "
        r"and is 0\.3\. Set another --workdir, or undo these changes to go on with that study\.$"
    )
    with pytest.raises(ValueError, match=message):
        world("--arm=dense", "--seed=0")
    world.study(dict(ARMS) | {"new": {"loss.beta": 0.4}})
    assert world("--arm=new", "--seed=0") == 0, "an arm more is no other study"
    world.study({"dense": {}, "new": {"loss.beta": 0.3}})
    with pytest.raises(ValueError, match=r"arms\.new\.loss\.beta was 0\.4 and is 0\.3"):
        world("--arm=dense", "--seed=0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arm=sekd"], r"^--arm must name arms of the study, got 'sekd'\. Did you mean 'se_kd'\?"),
        (["--seed=x"], r"^--seed must be whole numbers, got 'x'\.$"),
        (["--seed=7"], r"^--seed must be of the study's 0, 1, got 7\.$"),
    ],
)
def test_bad_flags(world, arguments, message):
    with pytest.raises(ValueError, match=message):
        world(*arguments)


def test_a_study_that_is_not_there(compare, tmp_path):
    with pytest.raises(ValueError, match=r"^--config must be a file of configs/studies/, got '.*nix\.py'; there is no"):
        compare.load_study(tmp_path / "nix.py", False)
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(
        ValueError, match=r"^--config must be a study with get_config\(full=False\), got .*; it has none"
    ):
        compare.load_study(tmp_path / "empty.py", False)
    with pytest.raises(TypeError, match="full"):
        compare.load_study(ROOT / "configs" / "quickstart.py", False)


def test_damaged_results_are_named(world):
    world("--arm=dense", "--seed=0")
    (world.root / "out" / "dense" / "0" / "phases" / "evaluate.json").write_text('{"seconds": ')
    with pytest.raises(ValueError, match=r"evaluate\.json must be a JSON object, got a damaged file; .* Remove it\.$"):
        world("--arm=dense", "--seed=0")


# --- real processes


def test_a_command_is_measured_and_told_to_stop(compare, tmp_path):
    code = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print('up', flush=True); time.sleep(60)"
    )
    stop, log = compare.Stop(), tmp_path / "logs" / "x.log"

    def ask():
        until = time.monotonic() + 30
        while (not log.is_file() or not log.read_text().endswith("\nup\n")) and time.monotonic() < until:
            time.sleep(0.02)
        stop.note(signal.SIGTERM, None)

    asking = threading.Thread(target=ask)
    asking.start()
    code, used = compare.execute([sys.executable, "-c", code], log, stop)
    asking.join()
    assert code == 7
    assert 0 < used["seconds"] < 40
    assert used["processor_seconds"] > 0
    assert 2**20 < used["resident_bytes"] < 2**34
    assert log.read_text().endswith("up\n")


def test_a_study_from_the_command_line(tmp_path):
    """One arm, one seed, for real; beside it an arm whose loss does not exist."""
    arms = {"dense": {}, "broken": {"loss.terms": (("nix", 1.0),)}}
    text = STUDY.replace("ARMS", repr(arms)).replace("EQUAL_TIME", "False").replace("(0, 1)", "(0,)")
    (tmp_path / "study.py").write_text(text)
    typed = [
        sys.executable,
        "-m",
        "launch.compare",
        f"--config={tmp_path / 'study.py'}",
        f"--workdir={tmp_path / 'out'}",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(typed, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.index("broken: plan FAILED, exit code 2") < done.stdout.index("dense/0: train")
    assert "- broken/0: plan failed: error: loss.terms must be a known name" in done.stdout
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    (run,) = found["runs"]
    evaluation = json.loads((tmp_path / "out" / "dense" / "0" / "evaluation.json").read_text())
    assert (evaluation["step"], evaluation["before"]) == (4, None)
    assert run["figures"]["kl"] == evaluation["after"]["kl"]
    assert run["costs"]["steps"] == 4
    assert run["costs"]["tokens_covered"] == run["costs"]["tokens_trained"] == 512
    assert 0 < run["costs"]["targets_supervised"] < 512
    assert run["costs"]["temporary_bytes"] > 2**16
    assert 0 < run["costs"]["steps_seconds"] < run["costs"]["whole_seconds"] < 120
    assert math.isclose(run["costs"]["whole_seconds"], run["phases"]["train"]["seconds"])
    assert not (tmp_path / "out" / "dense" / "0" / "checkpoints").exists()
    assert f"| dense | 1 | {run['figures']['perplexity']['value']:,.1f} |" in re.sub(" +", " ", done.stdout)
