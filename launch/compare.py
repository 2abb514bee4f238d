"""Arms x seeds -> a table with intervals: python -m launch.compare --config=configs/studies/se_kd_small.py

Each run is a sequence of the other scripts (curate, cache_teacher, train, evaluate), each in a process of its own. What
is done is not done again: the same command goes on after a kill, SIGTERM or Ctrl-C. --arm, --seed: a part of the runs;
the table is made of what is there and says what is missing. --dry_run: says what would be done. Exit code 1 if a run
failed; the others are done all the same.
"""

import contextlib
import dataclasses
import fcntl
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from kdjax.run_log import write_whole
from launch import app

if TYPE_CHECKING:
    from kdjax.analysis.study import Run, Study
    from kdjax.config import Experiment

flags.DEFINE_string("config", None, "The study: a file of configs/studies/.")
flags.DEFINE_string("workdir", None, "Where runs and tables are kept; default: runs/studies/<name of the study>.")
flags.DEFINE_list("arm", [], "Only these arms; an arm under equal time is called <arm>@time.")
flags.DEFINE_list("seed", [], "Only these seeds.")
flags.DEFINE_bool("full", False, "The study's variant for better machines.")
flags.DEFINE_bool("dry_run", False, "Say what would be done.")

ROOT = Path(__file__).resolve().parents[1]
SUMMED = ("seconds", "processor_seconds")  # over the attempts of a phase
TAIL = 12  # lines of a failed command's log that are shown


class Stopped(Exception):
    """The user asked to stop."""


@dataclasses.dataclass
class Stop:
    """Whether the user asked to stop, the command that is told so, and the open files that commands hold on to."""

    asked: bool = False
    child: "subprocess.Popen[bytes] | None" = None
    pass_on: tuple[int, ...] = ()

    def check(self) -> None:
        """Raises Stopped if the user asked to stop."""
        if self.asked:
            raise Stopped

    def note(self, number: int, frame: Any) -> None:
        """The handler of SIGINT and SIGTERM: the command saves what it has and ends."""
        self.asked = True
        if self.child is not None:
            self.child.terminate()


def main() -> int:
    """Study -> runs, one after the other -> tables and the page."""
    from kdjax.analysis import study as definition

    config = Path(app.require("config"))
    study = load_study(config, flags.FLAGS.full)
    chosen = definition.runs(study, flags.FLAGS.arm, [_whole(seed) for seed in flags.FLAGS.seed])
    workdir = Path(flags.FLAGS.workdir or Path("runs/studies") / study.name).resolve()
    if flags.FLAGS.dry_run:
        check_identity(study, workdir)
        for run in chosen:
            print(f"{run.place:32}{_plan_of(study, workdir, run)}")
        return 0
    claim(study, workdir)
    failed = 0
    with _stop_signals() as stop:
        try:
            if not all(prepare(study, workdir, name, stop) for name in study.prepare):
                return 1
            for arm in dict.fromkeys(run.arm for run in chosen):  # first, because a mistake in the last arm shows there
                plan(study, workdir, arm, stop)
            failed = sum(not perform(study, workdir, run, at, len(chosen), stop) for at, run in enumerate(chosen, 1))
        except Stopped:
            print("stopped, all that is done is kept; run the same command to go on")
            return 0
    report(study, workdir, config)
    return 1 if failed else 0


def load_study(path: Path, full: bool) -> "Study":
    """The checked study of a file with get_config(full=False)."""
    from kdjax.analysis.study import from_study_config

    if not path.is_file():
        raise ValueError(f"--config must be a file of configs/studies/, got {str(path)!r}; there is no such file.")
    spec = importlib.util.spec_from_file_location("study_config", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config must be a Python file, got {str(path)!r}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config must be a study with get_config(full=False), got {str(path)!r}; it has none.")
    return from_study_config(module.get_config(full=full))


def check_identity(study: "Study", workdir: Path) -> None:
    """Refuses a directory whose runs were started with another study; the message names what changed."""
    from kdjax.analysis.study import difference, identity
    from kdjax.analysis.study_results import read_json

    path = workdir / "study.json"
    changed = difference(read_json(path), identity(study)) if path.is_file() else []
    if changed:
        raise ValueError(
            f"--workdir must be empty or of the same study, got {str(workdir)!r}: {'; '.join(changed)}. Set another "
            "--workdir, or undo these changes to go on with that study."
        )


def claim(study: "Study", workdir: Path) -> None:
    """Make the directory one of this study; arms may join those that are there."""
    from kdjax.analysis.study import identity
    from kdjax.analysis.study_results import read_json

    check_identity(study, workdir)
    path = workdir / "study.json"
    said = identity(study)
    if path.is_file():
        said["arms"] = read_json(path)["arms"] | said["arms"]
    write_json(path, said)


def prepare(study: "Study", workdir: Path, name: str, stop: Stop) -> bool:
    """One of the commands that come before all arms, if it is not done yet; False if it failed. Raises Stopped."""
    from kdjax.analysis.study_results import marker

    script, *typed = study.prepare[name]
    folder = workdir / "prepare" / name
    return marker(folder, script).is_file() or _phase(f"prepare {name}", script, folder, study.base, stop, typed)


def plan(study: "Study", workdir: Path, arm: str, stop: Stop) -> None:
    """launch.plan for an arm: it compiles the step, from shapes alone, so that what cannot work is said at once."""
    from kdjax.analysis.study import Run, experiment, steps_for_tokens

    folder, made = workdir / arm, experiment(study, Run(arm, study.seeds[0]), steps_for_tokens(study, arm))
    if not (folder / "plan.json").is_file():
        typed = [f"--config={write_config(folder, made)}", f"--out={folder / 'plan.json'}"]
        _phase(arm, "plan", folder, made, stop, typed)


def perform(study: "Study", workdir: Path, run: "Run", at: int, count: int, stop: "Stop") -> bool:
    """All phases of a run that are not done yet; False if one failed. Raises Stopped."""
    from kdjax.analysis.study import experiment, phases
    from kdjax.analysis.study_results import marker

    folder, head = workdir / run.place, f"[{at}/{count}] {run.place}"
    steps, why = steps_of(study, workdir, run)
    if not steps:
        print(f"{head}: not run, {why}")
        return True
    made = experiment(study, run, steps, log__tensorboard=False)
    wanted = phases(made)
    if all(marker(folder, phase).is_file() for phase in wanted):
        print(f"{head}: done before")
        return True
    if not (workdir / run.arm / "plan.json").is_file():
        print(f"{head}: not run, its plan failed")
        return False
    with _lock(folder, stop) as held:
        if not held:
            print(f"{head}: not run, another process runs it")
            return True
        config = write_config(folder, made)
        for phase in wanted:
            if not marker(folder, phase).is_file():
                if not _phase(head, phase, folder, made, stop, arguments(study, phase, folder, config)):
                    return False
        if not study.keep_checkpoints:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return True


def steps_of(study: "Study", workdir: Path, run: "Run") -> tuple[int, str]:
    """(steps of a run, "") or (0, why they are not known). Those under equal time are fixed once and for all seeds."""
    from kdjax.analysis.study import Run, experiment, steps_for_tokens
    from kdjax.analysis.study_results import read_json, timed_steps

    tokens = steps_for_tokens(study, run.arm)
    if not run.timed:
        return tokens, ""
    fixed = workdir / run.name / "steps.json"
    if fixed.is_file():
        return int(read_json(fixed)["steps"]), ""
    like = experiment(study, Run(run.arm, run.seed), tokens)
    steps, why = timed_steps(study, workdir, run.arm, like)
    if steps and not flags.FLAGS.dry_run:
        write_json(fixed, {"steps": steps})
    return steps, why


def arguments(study: "Study", phase: str, folder: Path, config: Path) -> list[str]:
    """What a script of launch/ is called with."""
    if phase != "evaluate":
        return [f"--config={config}", f"--workdir={folder}"]
    rows = f"--rows={study.heldout_rows}"
    return [f"--workdir={folder}", rows, "--nobefore", f"--out={folder / 'evaluation.json'}"]


def write_config(folder: Path, made: "Experiment") -> Path:
    """The run's own config file, which gives the run outside of the study as well."""
    from kdjax.analysis.study import config_file

    path = folder / "config.py"
    command = f"python -m launch.train --config={path.name} --workdir=."
    write_whole(path, config_file(made, command))
    return path


def _phase(head: str, phase: str, folder: Path, made: "Experiment", stop: "Stop", typed: Sequence[str]) -> bool:
    """One command from start to end, and its marker; False, with the end of its log, if it failed."""
    from kdjax.analysis.study_results import failure, is_trained, marker, phase_figures
    from kdjax.run_log import duration

    stop.check()
    command = [sys.executable, "-m", f"launch.{phase}", *typed]
    book, log = folder / "phases" / f"{phase}.attempts.json", folder / "logs" / f"{phase}.log"
    attempts = json.loads(book.read_text(encoding="utf-8")) if book.is_file() else []
    write_json(book, [*attempts, None])  # an attempt whose end is not seen stays null
    code, used = execute(command, log, stop)
    attempts = [*attempts, used]
    write_json(book, attempts)
    failure(folder).unlink(missing_ok=True)
    complete = code == 0 and (phase != "train" or is_trained(folder, made.train.steps))
    if not complete:
        stop.check()
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        ended = f"exit code {code}" if code else "it ended before its last step"
        message = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        write_json(failure(folder), {"phase": phase, "message": message, "code": code, "command": shlex.join(command)})
        tail = "".join(f"    {line}\n" for line in lines[-TAIL:])
        print(f"{head}: {phase} FAILED, {ended}; the end of {log}:\n{tail}    again: {shlex.join(command)}")
        return False
    seen = [attempt for attempt in attempts if attempt is not None]
    whole = {name: sum(a[name] for a in seen) if len(seen) == len(attempts) else None for name in SUMMED}
    record = {
        **whole,
        "resident_bytes": max(attempt["resident_bytes"] for attempt in seen),
        "attempts": len(attempts),
        "command": shlex.join(command),
        **phase_figures(phase, folder, made),
    }
    write_json(marker(folder, phase), record)
    print(f"{head}: {phase}, {duration(used['seconds'])}", flush=True)
    stop.check()
    return True


def execute(command: Sequence[str], log: Path, stop: "Stop") -> tuple[int, dict[str, float]]:
    """(exit code, {seconds, processor_seconds, resident_bytes}) of a command; what it says is added to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        start = time.perf_counter()
        # A session of its own: a Ctrl-C here reaches it once, as the signal that it saves on.
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=stop.pass_on,
        )
        stop.child = child
        if stop.asked:
            child.terminate()
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        stop.child = None
    child.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    used = {"seconds": seconds, "processor_seconds": usage.ru_utime + usage.ru_stime}
    return child.returncode, used | {"resident_bytes": usage.ru_maxrss * unit}


@contextlib.contextmanager
def _lock(folder: Path, stop: Stop) -> Iterator[bool]:
    """Whether this process may run in `folder`. Its commands hold the lock too, so one that outlives it is safe."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        stop.pass_on = (file.fileno(),)
        try:
            yield True
        finally:
            stop.pass_on = ()


@contextlib.contextmanager
def _stop_signals() -> Iterator[Stop]:
    """Within the block SIGINT and SIGTERM are noted, and handed on, instead of ending the process."""
    stop = Stop()
    before = {number: signal.signal(number, stop.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def report(study: "Study", workdir: Path, config: Path) -> None:
    """Tables and page of all that is there, whichever part was run now."""
    from kdjax.analysis import study_page, study_table
    from kdjax.analysis.study import runs
    from kdjax.analysis.study_results import collect, results

    records, missing = collect(study, workdir, runs(study), lambda run: steps_of(study, workdir, run)[1])
    command = f"python -m launch.compare --config={config.as_posix()}" + (" --full" if flags.FLAGS.full else "")
    arms = study_table.summarise(records, study.reference)
    notes = study_table.notes_on(records)
    teacher = records[0]["teacher"] if records else None
    text = study_table.text(f"Study {study.name}", arms, study.reference, teacher, missing, [*notes, f"`{command}`"])
    write_whole(workdir / "table.md", text)
    write_json(workdir / "results.json", results(study, records, missing, arms))
    if records:
        page = study_page.render(study, records, arms, missing, notes, command)
        write_whole(workdir / "report.html", page)
    print(f"\n{text}\nfiles: {workdir}/table.md, results.json, report.html")


def write_json(path: Path, value: Any) -> None:
    """Strict JSON, all or nothing."""
    write_whole(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def _plan_of(study: "Study", workdir: Path, run: "Run") -> str:
    """'curate (done), train 20 steps, evaluate'."""
    from kdjax.analysis.study import experiment, phases, steps_for_tokens
    from kdjax.analysis.study_results import marker

    steps, why = steps_of(study, workdir, run)
    made = experiment(study, run, steps or steps_for_tokens(study, run.arm))
    count = f"{steps} steps" if steps else f"as many steps as the time allows ({why})"
    said = []
    for phase in phases(made):
        done = " (done)" if marker(workdir / run.place, phase).is_file() else ""
        said.append(f"train {count}{done}" if phase == "train" else phase + done)
    return ", ".join(said)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"--seed must be whole numbers, got {text!r}.")
    return int(text)


if __name__ == "__main__":
    app.run(main)
