"""Choose the rows to train on: python -m launch.curate --config=configs/se_kd.py --workdir=runs/x [--config.samples...]

Scores each row of the training text (samples.score) with the untrained student and keeps the samples.fraction of them
with the highest scores; the choice is written to <workdir>/samples, where launch.train looks for it. Run again, it
leaves a finished choice as it is; another fraction takes the scores that are there. --agreement: with samples.positions
below 1, the number of rows that are scored in full as well, to say how well the estimate ranks them.
"""

import dataclasses
import math
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import app, processes

if TYPE_CHECKING:
    import numpy as np

    from kdjax.build import Built

app.define_config()
processes.define()
flags.DEFINE_integer("agreement", 256, "Rows scored in full as well if samples.positions < 1; 0 = none.", lower_bound=0)
flags.DEFINE_integer("batch_size", 0, "Rows a call; 0 = those of a micro-batch of training.", lower_bound=0)

QUANTILES = {"least": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "most": 1.0}
OWN_FLAGS = ("--agreement", "--batch_size")


def main() -> None:
    """Flags -> build -> scores -> rows kept -> files -> summary."""
    from kdjax.config import from_config_dict

    experiment = from_config_dict(app.require("config"))
    workdir, wanted = Path(app.require("workdir")), experiment.samples
    if wanted.fraction == 1:
        print("samples.fraction is 1: all rows are used and there is nothing to choose.")
        return

    processes.join()

    from kdjax import curation, loop, registry
    from kdjax.build import build, samples_basis
    from kdjax.checkpoint import agreed

    score = registry.lookup(curation.SCORES, wanted.score, "samples.score")
    if score.needs_teacher and not experiment.teacher.path:
        raise ValueError(
            f"teacher.path must be set, got ''; samples.score={wanted.score!r} reads the teacher. Name one."
        )
    loop.claim_workdir(workdir, experiment)
    built = build(experiment, live_teacher=score.needs_teacher)
    rows, basis = built.data.train, samples_basis(built)
    found, why = curation.reusable(workdir, basis)
    anew = agreed(found is None)
    if not anew and not processes.first():
        return  # what is left concerns files
    if anew or found is None:
        if why:
            processes.say(f"scored anew, because the choice that was there does not hold: {why}")
        scores, made = scored(built)
    elif found.manifest["fraction"] == wanted.fraction:
        print(f"the rows are chosen already, nothing was scored: {workdir / 'samples'}")
        show(built, found.scores, curation.positions_of(found, rows), found.manifest["made"], workdir)
        return
    else:
        print(f"the scores of {found.manifest['file']} hold for another fraction too; nothing was scored")
        scores, made = found.scores, found.manifest["made"]
    kept = curation.keep(scores, wanted.fraction)
    if processes.first():
        curation.write_samples(workdir, basis, rows, scores, kept, made)
    show(built, scores, kept, made, workdir)


def scored(built: "Built") -> tuple["np.ndarray", dict[str, Any]]:
    """(scores of all rows, how they were made)."""
    import jax

    from kdjax import curation
    from kdjax.run_log import Progress

    e, rows, parts = built.experiment, built.data.train, built.parts
    size = flags.FLAGS.batch_size or e.train.batch_size // e.train.accumulate
    start, progress = time.perf_counter(), Progress(len(rows), unit="row")

    def on_batch(done: int, tokens: int) -> None:
        progress.update(done, tokens_per_second=tokens / (time.perf_counter() - start))

    sides = built.student_params, built.teacher_params
    scorer = curation.make_scorer(parts.student, parts.teacher, e.samples, built.rules, size)
    scores = scorer(*sides, rows, on_batch)
    progress.close()
    seconds = time.perf_counter() - start
    made: dict[str, Any] = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "tokens": int((rows.segment_ids > 0).sum()),
        "batch_size": size,
        "devices": f"{built.rules.batch_shards} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }
    count = min(flags.FLAGS.agreement, len(rows))
    if e.samples.positions < 1 and e.samples.score != "random" and count:
        made["agreement"] = compared(built, scores, size, count)
    return scores, made


def compared(built: "Built", scores: "np.ndarray", size: int, count: int) -> dict[str, Any]:
    """How well the estimated scores rank `count` random rows, which are scored at all positions here."""
    import numpy as np

    from kdjax import curation
    from kdjax.data import take

    e, rows, parts = built.experiment, built.data.train, built.parts
    drawn = dataclasses.replace(e.samples, score="random")
    order = curation.make_scorer(parts.student, None, drawn)((), (), rows)
    some = np.sort(np.argsort(-order, kind="stable")[:count])
    whole = dataclasses.replace(e.samples, positions=1.0)
    scorer = curation.make_scorer(parts.student, parts.teacher, whole, built.rules, size)
    full = scorer(built.student_params, built.teacher_params, take(rows, some))
    found = curation.agreement(full, scores[some], e.samples.fraction)
    figures = {name: None if math.isnan(value) else round(value, 4) for name, value in found.items()}
    return {"rows": count, "fraction": e.samples.fraction, **figures}


def show(built: "Built", scores: "np.ndarray", kept: "np.ndarray", made: dict[str, Any], workdir: Path) -> None:
    """The summary: what was kept, how the scores are spread, what it took, where it is and what comes next."""
    import numpy as np

    if not processes.first():
        return
    tokens, score = (built.data.train.segment_ids > 0).sum(1), built.experiment.samples.score
    share = tokens[kept].sum() / tokens.sum()
    print(f"kept {len(kept)} of {len(tokens)} rows, those of highest {score}: {share:.1%} of {tokens.sum():,} tokens")
    rest = np.setdiff1d(np.flatnonzero(np.isfinite(scores)), kept)
    print("score  " + "".join(f"{name:>9}" for name in QUANTILES))
    for name, part in (("kept", kept), ("rest", rest)):
        cells = np.quantile(scores[part], list(QUANTILES.values())) if len(part) else []
        print(f"{name:<7}" + ("".join(f"{cell:9.3f}" for cell in cells) or "  none"))
    without = int(np.sum(~np.isfinite(scores)))
    if without:
        print(f"{without} rows have no target and are never kept")
    speed = made["tokens"] / max(made["seconds"], 1e-9)
    print(f"scoring took {made['seconds']:.1f} s" + (f", {speed:,.0f} tokens/s" if score != "random" else ""))
    if made.get("agreement"):
        found = made["agreement"]
        correlation = "undefined" if found["spearman"] is None else f"{found['spearman']:.3f}"
        print(
            f"against scores at all positions, on {found['rows']} random rows: rank correlation {correlation}, "
            f"{found['overlap']:.0%} of the rows kept are the same"
        )
    print(f"files: {workdir / 'samples'}")
    script = "launch.cache_teacher" if built.experiment.teacher.source == "cache" else "launch.train"
    print(f"next: {shlex.join(['python', '-m', script, *_shared(sys.argv[1:])])}")


def _shared(arguments: list[str]) -> list[str]:
    """The flags that other scripts take too."""
    kept, own = [], False
    for argument in arguments:
        name, assigned, _ = argument.partition("=")
        if argument.startswith("-"):
            own = "--" + name.lstrip("-") in OWN_FLAGS
        if not own:
            kept.append(argument)
        own = own and argument.startswith("-") and not assigned  # its value is the next word
    return kept


if __name__ == "__main__":
    app.run(main)
