"""What the runs of a study left on disk, as plain records: one per finished run, for the tables and for results.json.

A run's directory holds phases/<phase>.json, written when the phase was done: seconds of the whole command (null if an
attempt was killed and its end not seen), processor seconds, peak resident bytes, and the phase's own figures. An arm's
directory holds plan.json (`launch.plan`). Imports no JAX.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdjax.analysis.study import PHASES, Run, Study, phases, seconds_per_step, steps_for_time
from kdjax.config import Experiment
from kdjax.run_log import read_lines

Record = dict[str, Any]
PREPARATION = ("curate", "cache_teacher")
TIMES = ("seconds", "processor_seconds", "resident_bytes", "attempts")  # of every phase


def marker(folder: Path, phase: str) -> Path:
    """The file that says that a phase of the run in `folder` is done."""
    return folder / "phases" / f"{phase}.json"


def failure(folder: Path) -> Path:
    """The file that says which phase failed last, and how."""
    return folder / "phases" / "failed.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError that names the file if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON object, got a damaged file; {error}. Remove it.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(found).__name__}. Remove it.")
    return found


def is_trained(folder: Path, steps: int) -> bool:
    """Whether the run in `folder` was evaluated after its last step; a train that was told to stop ends well too."""
    lines = read_lines(folder / "evals.jsonl")
    return bool(lines) and int(lines[-1]["step"]) == steps


def phase_figures(phase: str, folder: Path, made: Experiment) -> Record:
    """What a phase that is done is known by besides its time."""
    if phase == "train":
        return _train_figures(folder, made)
    if phase == "evaluate":
        return {"evaluation": read_json(folder / "evaluation.json")["after"]}
    if phase == "curate" and made.prompts.path:
        return {}  # answers may be shared by runs: the command's own time stands for it
    if phase == "curate":
        return {"work_seconds": read_json(folder / "samples" / "manifest.json")["made"].get("seconds")}
    if phase == "cache_teacher":
        place = Path(made.cache.path or folder / "cache")
        stored = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        log = (folder / "logs" / f"{phase}.log").read_text(encoding="utf-8", errors="replace")
        passes = re.findall(r"tokens in ([\d.]+) s, ", log)  # one line per attempt that wrote shards
        return {"bytes": stored, "work_seconds": sum(map(float, passes)) if passes else None}
    return {}


def _train_figures(folder: Path, made: Experiment) -> Record:
    """Steps, seconds per step, share of the positions that were supervised, held-out perplexity on the way, machine."""
    lines = read_lines(folder / "metrics.jsonl")
    curve = [
        {"step": line["step"], "perplexity": line["student"]["perplexity"]["value"]}
        for line in read_lines(folder / "evals.jsonl")
        if line["which"] == "student"
    ]
    shares = [float(line["selected_fraction"]) for line in lines if line.get("selected_fraction") is not None]
    data = read_json(folder / "report_data.json") if (folder / "report_data.json").is_file() else {}
    pace = seconds_per_step(lines, made.train.batch_size * made.data.seq_len)
    return {
        "steps": made.train.steps,
        "seconds_per_step": pace if math.isfinite(pace) else None,
        "selected_fraction": sum(shares) / len(shares) if shares else None,
        "answers": _answers(folder, made, made.train.steps),
        "curve": curve,
        "hardware": data.get("summary", {}).get("hardware"),
        "versions": data.get("versions", {}),
    }


def preparation_seconds(folder: Path, made: Experiment) -> float | None:
    """Seconds that scoring and caching took for a run; None if one of them is not known."""
    return _sum([_work(read_json(marker(folder, phase))) for phase in phases(made) if phase in PREPARATION])


def _work(done: Record) -> float | None:
    """Seconds of a preparation: without start-up if its script says so, of the whole commands if it took several."""
    seconds = done.get("work_seconds")
    return float(seconds) if seconds is not None and done["attempts"] == 1 else done["seconds"]


def timed_steps(study: Study, workdir: Path, arm: str, made: Experiment) -> tuple[int, str]:
    """(steps that fit into the reference's time, "") or (0, what is missing to know them).

    The time is the median over the seeds of the reference's steps x seconds per step. The arm's median preparation is
    spent of it first; the rest takes steps at the arm's median pace. All seeds must have finished under equal tokens.
    """
    paces: dict[str, list[float]] = {study.reference: [], arm: []}
    budgets, before = [], []
    for seed in study.seeds:
        for name in paces:
            folder = workdir / Run(name, seed).place
            done = read_json(marker(folder, "train")) if marker(folder, "train").is_file() else {}
            if not done.get("seconds_per_step"):
                why = "has no pace: fewer than two lines of metrics" if done else "is not trained"
                return 0, f"{Run(name, seed).place} {why}"
            paces[name].append(done["seconds_per_step"])
            if name == study.reference:
                budgets.append(done["steps"] * done["seconds_per_step"])
            if name == arm:
                spent = preparation_seconds(folder, made)
                before += [] if spent is None else [spent]
    if not before:
        return 0, f"{arm} has no time for its preparation: every attempt was killed"
    budget, spent, pace = map(statistics.median, (budgets, before, paces[arm]))
    steps = steps_for_time(budget, spent, pace)
    return steps, "" if steps else f"scoring and caching take {spent:.3g} s of the {budget:.3g} s of {study.reference}"


def collect(
    study: Study, workdir: Path, runs: Sequence[Run], waits_for: Callable[[Run], str]
) -> tuple[list[Record], list[str]]:
    """(records of the finished runs, "arm/seed: what is missing" of the others).

    waits_for: what a run that was not started cannot start without, or "".
    """
    records, missing = [], []
    for run in runs:
        folder = workdir / run.place
        if marker(folder, "evaluate").is_file():
            records.append(_record(study, workdir, run))
            continue
        failed = next((f for f in map(failure, (folder, workdir / run.arm)) if f.is_file()), None)
        last = [phase for phase in PHASES if marker(folder, phase).is_file()]
        why = f"done up to {last[-1]}" if last else waits_for(run) or "not started"
        if failed is not None:
            said = read_json(failed)
            why = f"{said['phase']} failed: {said['message']}"
        missing.append(f"{run.place}: {why}")
    return records, missing


def _record(study: Study, workdir: Path, run: Run) -> Record:
    folder, plan = workdir / run.place, _plan(workdir, run)
    found = {phase: read_json(marker(folder, phase)) for phase in PHASES if marker(folder, phase).is_file()}
    train, evaluation = found["train"], found["evaluate"]["evaluation"]
    base = study.base
    batch = int(study.arms[run.arm].get("train.batch_size", base.train.batch_size))
    trained = train["steps"] * batch * base.data.seq_len
    work = [found[phase] for phase in (*PREPARATION, "train") if phase in found]
    prepared = [_work(found[phase]) for phase in PREPARATION if phase in found]
    pace = train["seconds_per_step"]
    steps_only = None if pace is None else pace * train["steps"]
    costs = {
        "steps": train["steps"],
        "tokens_of_text": int(plan.get("train_tokens") or _covered(study, Run(run.arm, run.seed), trained)),
        "tokens_covered": _covered(study, run, trained),
        "tokens_trained": trained,
        "targets_supervised": _supervised(plan, trained, train["selected_fraction"]),
        "seconds_per_step": pace,
        "preparation_seconds": _sum(prepared),
        "steps_seconds": steps_only,
        "total_seconds": _sum([*prepared, steps_only]),
        "whole_seconds": _sum([entry["seconds"] for entry in work]),
        "processor_seconds": _sum([entry["processor_seconds"] for entry in work]),
        "resident_bytes": max(entry["resident_bytes"] for entry in work),
        "temporary_bytes": plan.get("step_temporary_bytes"),
        "argument_bytes": plan.get("step_argument_bytes"),
        "cache_bytes": found.get("cache_teacher", {}).get("bytes"),
        **train.get("answers", {}),
    }
    return {
        "arm": run.arm,
        "name": run.name,
        "seed": run.seed,
        "timed": run.timed,
        "figures": figures(evaluation),
        "teacher": figures(evaluation.get("teacher") and {"student": evaluation["teacher"]}),
        "heldout_tokens": evaluation["tokens"],
        "costs": costs,
        "phases": {phase: {name: entry[name] for name in TIMES} for phase, entry in found.items()},
        "curve": train["curve"],
        "hardware": train.get("hardware"),
        "versions": train.get("versions", {}),
    }


def figures(evaluation: Mapping[str, Any] | None) -> Record:
    """name -> {"value", "low", "high"} of an evaluation's student and of the pair, the reliability diagram apart."""
    if not evaluation:
        return {}
    student = {name: value for name, value in evaluation["student"].items() if name != "calibration"}
    both = {name: evaluation.get(name) for name in ("kl", "agreement", "answers")}
    return {name: value for name, value in (student | both).items() if value is not None}


def _plan(workdir: Path, run: Run) -> Record:
    path = workdir / run.arm / "plan.json"
    return read_json(path) if path.is_file() else {}


def _covered(study: Study, run: Run, trained: int) -> int:
    """Tokens of the rows that were gone through: trained on, or scored and left out; once per epoch."""
    base = study.base
    if not run.timed:
        return base.train.steps * base.train.batch_size * base.data.seq_len
    return round(trained / float(study.arms[run.arm].get("samples.fraction", base.samples.fraction)))


def _answers(folder: Path, made: Experiment, steps: int) -> Record:
    """Tokens of the answers trained on, by their mean length; tokens and seconds of scoring and of gradients, in all.

    A choice is made before the first step and after each of answers.rescore_every; {} without a pool of answers. What
    another run scored with the same student counts: it is what the arm costs.
    """
    if made.prompts.answers != "pool":
        return {}
    every = made.answers.rescore_every or steps
    tokens, places, seconds = 0.0, 0, 0.0
    for step in range(0, steps, every):
        chosen = folder / "answers" / f"selected{f'-{step}' if step else ''}.manifest.json"
        choice = read_json(chosen)
        mean = choice["counts"]["tokens"] / choice["counts"]["rows"]
        tokens += mean * made.train.batch_size * min(every, steps - step)
        for read in filter(None, (choice["depends"].get(name) for name in ("scored", "gradients"))):
            name = Path(read).with_suffix(".manifest.json").name
            passed = read_json(folder / made.answers.scored / "answers" / name)["counts"]
            places, seconds = places + passed["places"], seconds + passed["seconds"]
    return {"answer_tokens": round(tokens), "scored_tokens": places, "scoring_seconds": seconds}


def _supervised(plan: Record, trained: int, share: float | None) -> int | None:
    """Positions in the loss, summed over all steps, from the logged share of the eligible ones."""
    if share is None or not plan.get("train_tokens"):
        return None
    return round(trained * plan["train_targets"] / plan["train_tokens"] * share)


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def results(study: Study, records: Sequence[Record], missing: Sequence[str], arms: Sequence[Any]) -> Record:
    """What results.json holds; `arms` are the lines of the tables. A number that is not known is null."""
    found = {
        "study": study.name,
        "reference": study.reference,
        "seeds": list(study.seeds),
        "base": dataclasses.asdict(study.base),
        "arms": {name: dict(overrides) for name, overrides in study.arms.items()},
        "table": [dataclasses.asdict(arm) for arm in arms],
        "runs": list(records),
        "missing": list(missing),
    }
    return dict(_plain(found))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
