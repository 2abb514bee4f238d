"""A run that was stopped, however, ends with the very same weights as one that was not."""

import json
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from kdjax import loop
from kdjax.build import build
from kdjax.checkpoint import Checkpoints

STEPS = "12"


def final_leaves(run):
    built = build(run.experiment(train__steps=STEPS))
    state, step = loop.restore(built, run.workdir)
    assert step == int(STEPS)
    plain = [leaf for leaf in jax.tree.leaves(state) if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return [np.asarray(leaf) for leaf in plain]


def train_here(run, **overrides):
    experiment = run.experiment(train__steps=STEPS, **overrides)
    loop.claim_workdir(run.workdir, experiment)
    return loop.run(build(experiment), run.workdir)


def steps_in(run):
    path = run.workdir / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def wait_for_checkpoint(run, process, above, timeout=150):
    """Until a complete checkpoint of a step > `above` is there."""
    folder, end = run.workdir / "checkpoints", time.monotonic() + timeout
    while time.monotonic() < end:
        steps = [int(p.name) for p in folder.glob("*") if p.name.isdigit()] if folder.is_dir() else []
        if any(step > above for step in steps):
            return max(steps)
        if process.poll() is not None:
            raise AssertionError(process.communicate())
        time.sleep(0.01)
    raise AssertionError("no checkpoint in time")


def test_killed_and_terminated_runs_end_like_an_undisturbed_one(make_run):
    calm, hurt = make_run("calm"), make_run("hurt")
    train_here(calm)
    process = hurt.start(train__steps=STEPS)
    reached = wait_for_checkpoint(hurt, process, 0)
    process.kill()  # SIGKILL: nothing can be saved
    process.communicate()
    process = hurt.start(train__steps=STEPS)
    if reached + 4 < int(STEPS):
        wait_for_checkpoint(hurt, process, reached)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    if (hurt.workdir / "checkpoints" / STEPS).is_dir():
        assert "report:" in out  # it was done before the signal came
    else:
        assert "all saved; run the same command to go on" in out
        train_here(hurt)
    for left, right in zip(final_leaves(calm), final_leaves(hurt), strict=True):
        np.testing.assert_array_equal(left, right)
    assert steps_in(hurt) == steps_in(calm) == list(range(1, int(STEPS) + 1))


def test_a_finished_run_is_not_trained_again(make_run):
    run = make_run("run")
    first = train_here(run)
    before = (run.workdir / "metrics.jsonl").read_text()
    second = train_here(run)
    assert first.step == second.step == int(STEPS)
    assert (run.workdir / "metrics.jsonl").read_text() == before
    (run.workdir / "report.html").unlink()  # killed after the last checkpoint, before the report
    train_here(run)
    assert (run.workdir / "report.html").is_file()


@pytest.mark.parametrize("rate", ["0.0004", "0.3"])  # improves to the end; diverges after a while
def test_checkpoints_keep_the_newest_and_the_best(make_run, rate):
    run = make_run("run")
    train_here(run, eval__every="4", checkpoint__keep="1", optim__learning_rate=rate)
    evals = [json.loads(line) for line in (run.workdir / "evals.jsonl").read_text().splitlines()]
    rated = {line["step"]: line["kl"]["value"] for line in evals if line["step"] > 0}
    best = min(rated, key=rated.get)
    kept = {int(p.name) for p in (run.workdir / "checkpoints").glob("*") if p.name.isdigit()}
    assert kept == {best, int(STEPS)}
    with Checkpoints(run.workdir, run.experiment().checkpoint) as checkpoints:
        assert checkpoints.best == best


def test_another_config_is_refused_and_says_what_differs(make_run):
    run = make_run("run")
    train_here(run)
    with pytest.raises(
        ValueError,
        match=r"--workdir must be empty or of the same config.*optim.learning_rate is 0.001 there and 0.1 here",
    ):
        loop.claim_workdir(run.workdir, run.experiment(train__steps=STEPS, optim__learning_rate="0.1"))
    loop.claim_workdir(
        run.workdir, run.experiment(train__steps=STEPS, checkpoint__every="3")
    )  # not part of the trajectory


def test_other_data_under_the_same_path_is_refused(make_run):
    run = make_run("run")
    train_here(run)
    run.text.write_text(run.text.read_text().replace("beer", "milk"))
    with pytest.raises(ValueError, match="must hold checkpoints of this config and data"):
        train_here(run)


def test_a_non_finite_loss_stops_names_the_step_and_keeps_the_last_good_checkpoint(make_run, monkeypatch):
    run = make_run("run")
    place, calls = loop.place, []

    def poisoned(columns, rules, accumulate):
        calls.append(None)
        batch = place(columns, rules, accumulate)
        return batch if len(calls) != 7 else batch.replace(weight=batch.weight.at[0, 2].set(np.inf))

    monkeypatch.setattr(loop, "place", poisoned)
    with pytest.raises(
        loop.NonFinite, match=r"step 7 must have a finite loss.*rows .* of the training data.*last good checkpoint"
    ):
        train_here(run)
    monkeypatch.undo()
    with Checkpoints(run.workdir, run.experiment().checkpoint) as checkpoints:
        assert checkpoints.latest == 6
    assert train_here(run).step == int(STEPS)  # and the run can go on


def test_a_disk_that_fills_up_while_writing_is_said_and_the_last_good_checkpoint_stands(make_run, monkeypatch):
    run = make_run("run")

    class Full:
        """The response of a write that failed; and closing repeats it."""

        def result(self):
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    save = Checkpoints.save

    def failing(self, step, *arguments):
        save(self, step, *arguments)
        if step == 6:
            self.wait()
            self._pending = step, Full()
            monkeypatch.setattr(self._orbax.__class__, "close", lambda self: Full().result())

    monkeypatch.setattr(Checkpoints, "save", failing)
    with pytest.raises(
        OSError, match=r"the checkpoint of step 6 could not be written to .*No space left.*Free disk"
    ) as info:
        train_here(run)
    assert "No space left" in "".join(info.value.__notes__)


def test_a_full_disk_is_said_before_anything_is_written(make_run, monkeypatch):
    run = make_run("run")
    usage, calls = shutil.disk_usage, []

    def full(path):
        calls.append(path)
        return usage(path)._replace(free=1000) if len(calls) > 2 else usage(path)

    monkeypatch.setattr(shutil, "disk_usage", full)
    with pytest.raises(
        OSError,
        match=r"the checkpoint of step 6 could not be written to .* MiB are free; the last good one is of step 4",
    ):
        train_here(run)
    monkeypatch.undo()
    assert train_here(run).step == int(STEPS)
