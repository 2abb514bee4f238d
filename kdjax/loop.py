"""The run: the only place with per-step side effects. Data, checkpoints, log, evaluation, preemption.

Order on start: config.json, models and data, then the newest checkpoint if there is one; its step is the data position.
A step is dispatched before the previous one's figures are fetched, so the device never waits for the host.
With several processes each feeds the rows of its own devices; all run this code, process 0 alone writes (but for the
checkpoints), and whatever decides what comes next is decided by process 0 or known to all.
"""

import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from kdjax.build import Built
from kdjax.checkpoint import Checkpoints, abstract_like, agreed, config_difference, require_same, require_shared
from kdjax.config import Experiment, fingerprint, trajectory
from kdjax.data import as_batch, on_mesh
from kdjax.data.pipeline import Columns
from kdjax.evals.evaluation import Evaluation
from kdjax.run.heldout import Heldout
from kdjax.run.own_answers import OwnAnswers, own_answers
from kdjax.run.report_data import write_after, write_before
from kdjax.run.rows import RowChoice, restarted
from kdjax.run_log import Progress, RunLog
from kdjax.sharding import Rules
from kdjax.step import StepReport, feed_step, init_state, make_train_step
from kdjax.types import Batch, Params, TrainState


class NonFinite(FloatingPointError):
    """The loss or gradient of a step was not finite."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """steps done, whether a signal asked to stop before the end, and the newest evaluation."""

    step: int
    interrupted: bool
    evaluation: Evaluation | None


def claim_workdir(workdir: Path, experiment: Experiment) -> None:
    """Create the directory, or make sure that what it holds is of this very config. Before anything slow is loaded.

    Raises ValueError if it is of another one, and with several processes if they cannot work on it together.
    """
    path = workdir / "config.json"
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        new = json.loads(json.dumps(dataclasses.asdict(experiment)))
        differing = config_difference(trajectory(old), trajectory(new))
        saved = [path for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()]
        if differing and saved:  # a run that failed before its first checkpoint has nothing to go on from
            raise ValueError(
                f"--workdir must be empty or of the same config, got {str(workdir)!r}: {'; '.join(differing)}. "
                "Set another --workdir, or undo these changes to go on with that run."
            )
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_count() > 1:
        _require_mesh(experiment)
        require_same(repr(experiment), "config")
        require_shared(workdir)


def run(built: Built, workdir: Path) -> Outcome:
    """Train to `train.steps`, from the newest checkpoint in `workdir` if there is one; evaluate and write report data.

    Raises NonFinite (nothing is saved from then on), OSError from the checkpoints, ValueError for another config's.
    SIGTERM and the first SIGINT: the step is finished, all is saved, the outcome says interrupted.
    """
    e, parts = built.experiment, built.parts
    identity = run_identity(built)
    require_same(f"{e} {identity}", "config and data")
    state = fresh_state(built)
    step_function = jax.jit(make_train_step(parts), donate_argnums=0)
    heldout = Heldout(built)
    with Checkpoints(workdir, e.checkpoint) as checkpoints, _stop_signals() as stop_asked:
        start = _agreed_step(checkpoints.latest)
        if start is not None:
            state, start = checkpoints.restore(abstract_like(state), identity, start)
        own = own_answers(built, workdir)
        rows = RowChoice(built, workdir, own)
        if start and rows.due(start):
            state = restarted(state, built)
        data = rows.iterator(start or 0)
        config = dataclasses.asdict(e)
        with RunLog(
            workdir,
            resume_step=start,
            tensorboard=e.log.tensorboard,
            wandb=e.log.wandb,
            wandb_project=e.log.wandb_project,
            config=config,
        ) as log:
            run_state = _Running(built, log, heldout, checkpoints, identity, data, rows, stop_asked, own)
            if start is None:
                run_state.evaluate(0, state.params)
                write_before(workdir, built)
            return run_state.steps(step_function, state, start or 0, workdir)


def run_identity(built: Built) -> str:
    """What a checkpoint must agree on to be resumed: config and data."""
    return fingerprint(built.experiment) + "-" + built.data.fingerprint[:16]


def fresh_state(built: Built) -> TrainState:
    """The state before the first step, with parameters of its own (the step donates them)."""
    return jax.jit(lambda params: init_state(built.parts, params, built.experiment.train.seed))(built.student_params)


def restore(built: Built, workdir: Path, step: str = "") -> tuple[TrainState, int]:
    """(state, step) of a checkpoint: a step number, 'best' or '' for the newest. ValueError if it is not there."""
    none_such = f"--step must name a checkpoint, got {step!r}; {workdir} has none such yet."
    if not (workdir / "checkpoints").is_dir():
        raise ValueError(none_such)
    with Checkpoints(workdir, built.experiment.checkpoint, read_only=True) as checkpoints:
        which = {"": checkpoints.latest, "best": checkpoints.best}.get(step, int(step) if step.isdecimal() else None)
        which = _agreed_step(which)
        if which is None:
            raise ValueError(none_such)
        return checkpoints.restore(abstract_like(fresh_state(built)), run_identity(built), which)


@dataclasses.dataclass
class _Running:
    """The moving parts of one run."""

    built: Built
    log: RunLog
    heldout: Heldout
    checkpoints: Checkpoints
    identity: str
    data: Any
    rows: RowChoice
    stop_asked: Callable[[], bool]
    own: OwnAnswers | None = None
    evaluation: Evaluation | None = None

    def evaluate(self, step: int, params: Params) -> Evaluation:
        self.evaluation = self.heldout(params)
        self.log.write_evaluation(step, "student", self.evaluation.to_dict())
        return self.evaluation

    def columns(self, step: int, params: Params, window: "_Window") -> Columns:
        """The rows of a step: those of the data, or the student's own answers, written now if a block is due."""
        if self.own is None or not self.own.takes(step):
            found: Columns = next(self.data)
            return found
        if self.own.due(step):
            window.settle()
            if figures := self.own.load(step, params):
                self.log.write(step, figures)
            window.restart_clock()
        return self.own.columns(step)

    def steps(self, step_function: Any, state: TrainState, start: int, workdir: Path) -> Outcome:
        e, total = self.built.experiment, self.built.experiment.train.steps
        progress, window = Progress(total, start_step=start), _Window(self.log, e.train.log_every)
        interrupted, feed = False, feed_step(self.built.parts)
        for step in range(start + 1, total + 1):
            columns = self.columns(step, state.params, window)
            batch = feed(place(columns, self.built.rules, e.train.accumulate))
            state, report = step_function(state, self.built.teacher_params, batch)
            window.dispatched(step, report, columns, batch)
            interrupted = self.stop_asked() and step < total
            evaluates = not interrupted and (step == total or (e.eval.every > 0 and step % e.eval.every == 0))
            saves, due = evaluates or interrupted or step % e.checkpoint.every == 0, self.rows.due(step)
            if saves or due:
                window.settle()  # a step that went wrong must never reach a checkpoint
            found = self.evaluate(step, state.params) if evaluates else None
            if due:
                self.data, figures = self.rows.choose(step, state.params)
                self.log.write(step, figures)
            if saves:  # the student that was trained, with its figures; what was chosen by it is on disk by now
                kl = None if found is None or found.kl is None else found.kl.value
                self.checkpoints.save(step, state, self.identity, kl)
            if due:
                state = restarted(state, self.built)
            if saves or due:
                window.restart_clock()
            if window.shown:
                progress.update(step, **window.shown)
            if interrupted:
                break
        progress.close()
        self.checkpoints.wait()
        if not interrupted and (start < total or agreed(not (workdir / "report.html").is_file())):
            write_after(workdir, self.built, state)
        return Outcome(step if start < total else start, interrupted, self.evaluation)


class _Window:
    """Figures of the last few steps: fetched one step late, added up, written every `every` steps."""

    def __init__(self, log: RunLog, every: int) -> None:
        self._log, self._every = log, every
        self._pending: tuple[int, StepReport, jax.Array] | None = None
        self._sums: dict[str, np.ndarray] = {}
        self._tokens = 0
        self._clock = time.perf_counter()
        self.shown: dict[str, float] = {}

    def dispatched(self, step: int, report: StepReport, columns: dict[str, np.ndarray], batch: Batch) -> None:
        """A step was sent to the device; the one before it is looked at meanwhile. columns: what this process fed."""
        self.settle()
        share = columns["row_id"].size / batch.row_id.size
        self._tokens += round(np.sum(columns["segment_ids"] > 0) / share)
        self._pending = (step, report, batch.row_id)

    def settle(self) -> None:
        """Wait for the pending step, stop the run if it is not finite, write a line if one is due."""
        if self._pending is None:
            return
        (step, report, row_ids), self._pending = self._pending, None
        sums = {name: np.array(pair, np.float64) for name, pair in jax.device_get(report.metrics).items()}
        _require_finite(step, sums, report, row_ids)
        self._sums = {name: self._sums.get(name, 0) + pair for name, pair in sums.items()}
        if step % self._every == 0:
            self._write(step)

    def restart_clock(self) -> None:
        """Evaluation and saving do not count as training time."""
        self._clock, self._tokens = time.perf_counter(), 0

    def _write(self, step: int) -> None:
        seconds = time.perf_counter() - self._clock
        figures = {name: total / count if count else math.nan for name, (total, count) in self._sums.items()}
        if self._tokens:
            figures["tokens_per_second"] = self._tokens / seconds
        self._log.write(step, figures)
        self.shown = {"loss": figures["loss"], "tokens_per_second": figures.get("tokens_per_second", math.nan)}
        self._sums, self._tokens, self._clock = {}, 0, time.perf_counter()


def place(columns: dict[str, np.ndarray], rules: Rules, accumulate: int) -> Batch:
    """The rows that this process feeds as micro-batches on the devices: [A, B, ...], B split over the mesh."""

    def column(array: np.ndarray) -> jax.Array:
        return on_mesh(array.reshape(accumulate, -1, *array.shape[1:]), rules, axis=1)

    return as_batch(columns, column)


def _agreed_step(step: int | None) -> int | None:
    found = agreed(-1 if step is None else step)
    return None if found < 0 else found


def _require_mesh(experiment: Experiment) -> None:
    if experiment.mesh.preset == "single":
        raise ValueError(
            f"mesh.preset must spread a run over its {jax.process_count()} processes, got 'single', with which each of "
            "them would train by itself. Set it to 'fsdp' or 'dp', or start one process."
        )


def _require_finite(step: int, sums: dict[str, np.ndarray], report: StepReport, row_ids: jax.Array) -> None:
    if np.isfinite(sums["loss"][0]) and np.isfinite(sums["grad_norm"][0]):
        return
    finite, ids = (_whole(array).reshape(-1) for array in (report.finite_rows, row_ids))
    rows = ids if finite.all() else ids[~finite]
    raise NonFinite(
        f"step {step} must have a finite loss and gradient, got loss {sums['loss'][0]:g} and gradient norm "
        f"{sums['grad_norm'][0]:g} from the rows {', '.join(map(str, rows.tolist()))} of the training data; nothing of "
        "this step was kept and the last good checkpoint stands. Look at these rows, or lower optim.learning_rate."
    )


def _whole(array: jax.Array) -> np.ndarray:
    gathered = array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(gathered)


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM and the first SIGINT are noted instead of ending the process.

    Yields stop(), to be called after every step is dispatched: whether to stop there. With several processes it is true
    in all of them at the same step, if one of them was asked before the step ahead of it.
    """
    asked: list[int] = []
    before = {}

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends it at once

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, note)
    try:
        yield (lambda: bool(asked)) if jax.process_count() == 1 else _asked_anywhere(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _asked_anywhere(asked: list[int]) -> Callable[[], bool]:
    """stop() for several processes: a sum over all devices that is looked at one call later, when it has been made."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("every",))
    spread, whole = (jax.sharding.NamedSharding(mesh, spec) for spec in (P("every"), P()))
    total = jax.jit(jnp.sum, out_shardings=whole)
    sums: list[jax.Array] = []

    def stop() -> bool:
        own = np.array([bool(asked)], np.int32)
        sums.append(total(jax.make_array_from_callback((jax.device_count(),), spread, lambda index: own)))
        return len(sums) > 1 and int(sums.pop(0)) > 0

    return stop
