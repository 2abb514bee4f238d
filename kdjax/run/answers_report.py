"""The page about a run's choices of answers so far, <workdir>/answers/report.html, from the files that they left."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from kdjax.analysis.answers_page import Round, round_of, write_answers
from kdjax.build import Built
from kdjax.curation.answers import selected, verify
from kdjax.curation.answers.scored import read_scored
from kdjax.curation.answers.select import score_read
from kdjax.curation.answers.stage import FOLDER, manifest_of, read_manifest
from kdjax.run.answers import selection_of
from kdjax.run.report_data import typed_command

# what a choice reads, as its manifest names it: what the file counts, FLOPs per parameter and token
PASSES = {"scored": ("answers", 2.0), "gradients": ("gradients", 6.0)}


def write_report(built: Built, workdir: Path, step: int | None = None) -> Path:
    """The page, made anew, of the choices up to `step`; None = up to the newest checkpoint, 0 without one.

    Choices of later steps are of an earlier run in this directory, or will be made again: they stay there, and are not
    shown. Raises OSError if the page cannot be written, ValueError for files that are damaged.
    """
    e, folder = built.experiment, workdir / FOLDER
    every, total = e.answers.rescore_every or e.train.steps, e.train.steps
    last = min(_newest_checkpoint(workdir) if step is None else step, total - 1)
    steps = [at for at in range(0, last + 1, every) if manifest_of(folder / f"{selection_of(at)}.jsonl").is_file()]
    size = sum(leaf.size for leaf in jax.tree.leaves(built.student_params))
    rounds = [_round(built, folder, at, min(every, total - at), size) for at in steps]
    pool = read_manifest(folder / verify.ADMITTED)["counts"]["teachers"]
    said = f"answers.policy={e.answers.policy!r}, answers.seed={e.answers.seed}."
    return write_answers(
        folder / "report.html",
        rounds,
        pool,
        name=e.name,
        score=score_read(e.answers),
        chosen=said,
        command=typed_command(),
    )


def _newest_checkpoint(workdir: Path) -> int:
    saved = (workdir / "checkpoints").glob("*")
    return max((int(path.name) for path in saved if path.name.isdecimal()), default=0)


def _round(built: Built, folder: Path, step: int, steps: int, size: int) -> Round:
    name = selection_of(step)
    manifest = json.loads(manifest_of(folder / f"{name}.jsonl").read_text(encoding="utf-8"))
    lines = list(selected.read_selected(folder.parent, name))
    e = built.experiment
    trained = steps * e.train.batch_size * e.data.seq_len
    known: dict[str, Any] = {"tokens_trained": trained, "training_flops": 6.0 * size * trained}
    known["teacher_scores"] = manifest.get("teacher_scores", {})
    depends, kept = manifest["depends"], Path(os.path.normpath(folder.parent / e.answers.scored)) / FOLDER
    known |= _costs(depends, kept, size)
    if depends["scored"]:
        path = kept / depends["scored"]
        with read_scored(path) as figures:
            nlls = [figures[one.row].values.get("answer_nll") for one in lines if one.row in figures]
        known["answer_nll"] = _mean(nlls)
        known["score"] = _mean([one.score_value for one in lines])
    return round_of(manifest["counts"], step=step, **known)


def _costs(depends: Mapping[str, Any], kept: Path, size: int) -> dict[str, float]:
    """What the passes of this student over answers took, for this choice and others; {} if it reads none."""
    costs = []
    for name, (counted, flops) in PASSES.items():
        if depends.get(name):
            of = read_manifest(kept / depends[name]).get("counts") or {}
            places = of.get("places", 0)
            costs.append((of.get(counted, 0), places, of.get("seconds", math.nan), flops * size * places))
    names = ("answers_scored", "tokens_scored", "scoring_seconds", "scoring_flops")
    return {name: sum(column) for name, column in zip(names, zip(*costs, strict=True), strict=True)} if costs else {}


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan
