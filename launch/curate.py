"""Choose what to train on: python -m launch.curate --config=configs/se_kd.py --workdir=runs/x [--config.samples...]

With samples.fraction below 1 the rows of a text or of prompts.answers: each is scored (samples.score) by the untrained
student, the samples.fraction of them with the highest scores are kept; the choice is written to <workdir>/samples,
where launch.train looks for it. Run again, it leaves a finished choice as it is; another fraction takes the scores that
are there. --agreement: with samples.positions below 1, the number of rows that are scored in full as well, to say how
well the estimate ranks them.

With prompts.path, else, the prompts: the student answers each of them generation.samples times, the answers are
verified, and each prompt gets a weight by its pass rate (pass_rates.weight). <workdir> then holds rollouts/,
verified.jsonl, pass_rates.jsonl and weights.jsonl. Run again after a kill, it goes on with the answer or the verdict
that is missing.
--add: other workdirs whose pass rates, of other seeds, are added. --earlier: those of the student as it was before,
oldest first, for estimators of a rate that moves. --snr=32: also the signal-to-noise ratio of the gradients per pass
rate, on one of prompts.answers for each of up to so many problems; table, <workdir>/snr.jsonl and snr.html.

With prompts.answers="pool" the teachers' answers of answers.pool: they are verified, scored by the untrained student
(answers.score) and one is selected for each question (answers.policy); <workdir>/answers then holds admitted.jsonl,
scored-*.jsonl and selected.jsonl. --yardstick=20: also how well each score orders the answers to so many questions, by
the student's exact gradient and by what one step on an answer gains on others; two tables, answers/yardstick.jsonl.
--explain=ID --out=x.html: a page about one question instead, its answers token by token.
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

from launch import app, curate_answers, processes

if TYPE_CHECKING:
    import numpy as np

    from kdjax.build import Built
    from kdjax.config import Experiment
    from kdjax.curation.chain import Curated
    from kdjax.data.prompts import Prompt

app.define_config()
processes.define()
flags.DEFINE_integer("agreement", 256, "Rows scored in full as well if samples.positions < 1; 0 = none.", lower_bound=0)
flags.DEFINE_integer("batch_size", 0, "Rows a call; 0 = those of a micro-batch of training.", lower_bound=0)
flags.DEFINE_list("add", [], "Prompts: workdirs whose pass rates are added, of the same student and another seed.")
flags.DEFINE_integer("snr", 0, "Prompts: how many of each pass rate have their gradients measured.", lower_bound=0)
flags.DEFINE_string("explain", None, "Pool: the id of a question whose answers are shown on a page, --out.")
flags.DEFINE_integer("yardstick", 0, "Pool: questions whose answers' gradients and gains are measured.", lower_bound=0)
flags.DEFINE_string("out", None, "--explain: the page, an *.html.")
flags.DEFINE_list("earlier", [], "Prompts: workdirs of the pass rates of the student as it was, oldest first.")

QUANTILES = {"least": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "most": 1.0}
OWN_FLAGS = ("--agreement", "--batch_size", "--add", "--earlier", "--snr", "--explain", "--out", "--yardstick")


def main() -> None:
    """Flags -> build -> scores -> rows kept -> files -> summary."""
    from kdjax.config import from_config_dict

    experiment = from_config_dict(app.require("config"))
    if flags.FLAGS.explain is not None:
        curate_answers.explain(experiment, flags.FLAGS.explain, _optional_workdir(), Path(app.require("out")))
        return
    workdir, wanted = Path(app.require("workdir")), experiment.samples
    if experiment.prompts.answers == "pool":
        curate_answers.choose_answers(experiment, workdir, flags.FLAGS.yardstick)
        if wanted.fraction == 1:
            processes.say(f"next: {shlex.join(['python', '-m', 'launch.train', *_shared(sys.argv[1:])])}")
    if wanted.fraction < 1:
        choose_rows(experiment, workdir)
    elif experiment.prompts.answers == "pool" and experiment.pass_rates.weight == "uniform":
        return
    elif experiment.prompts.path:
        weigh_prompts(experiment, workdir)
    else:
        print("samples.fraction is 1: all rows are used and there is nothing to choose.")


def choose_rows(experiment: "Experiment", workdir: Path) -> None:
    """The rows of highest score, of the text or of given answers -> files -> summary."""
    processes.join()

    from kdjax import curation, loop, registry
    from kdjax.build import build, keeps_rows, samples_basis
    from kdjax.checkpoint import agreed

    wanted = experiment.samples
    if flags.FLAGS.snr:
        raise ValueError(
            f"samples.fraction must be 1 with --snr, got {wanted.fraction}; gradients are measured per pass rate, over "
            "all prompts. Set it to 1."
        )
    if not keeps_rows(experiment):
        processes.say("on_policy.fraction is 1: launch.train scores each block of own answers; nothing to choose now.")
        return
    score = registry.lookup(curation.SCORES, wanted.score, "samples.score")
    if score.needs_teacher and not experiment.teacher.path:
        raise ValueError(
            f"teacher.path must be set, got ''; samples.score={wanted.score!r} reads the teacher. Name one."
        )
    loop.claim_workdir(workdir, experiment)
    built = build(experiment, workdir, live_teacher=score.needs_teacher, choosing=True)
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


def weigh_prompts(experiment: "Experiment", workdir: Path) -> None:
    """The student's answers -> verdicts -> pass rates -> weights -> summary."""
    processes.join()

    from kdjax import loop, registry
    from kdjax.curation import chain, paced
    from kdjax.curation.pass_rates import ESTIMATORS, load_pass_rates
    from kdjax.data.prompts import load_prompts, split_prompts
    from kdjax.verifiers import check_prompts

    e = experiment
    if flags.FLAGS.snr and not e.prompts.answers:
        raise ValueError("prompts.answers must be set with --snr, got ''; gradients need answers. Set it to 'gold'.")
    registry.lookup(paced.WEIGHTS, e.pass_rates.weight, "pass_rates.weight")  # answers take their time
    registry.lookup(ESTIMATORS, e.pass_rates.estimator, "pass_rates.estimator")
    _, prompts = split_prompts(load_prompts(e.prompts), e.prompts)
    added = [load_pass_rates(Path(name)) for name in flags.FLAGS.add]
    earlier = [load_pass_rates(Path(name)) for name in flags.FLAGS.earlier]
    loop.claim_workdir(workdir, e)
    check_prompts(prompts, e.prompts.verifier)
    rollouts = chain.rollouts_of(workdir, e.pass_rates)
    answer(e, prompts, rollouts)
    found = chain.curate(workdir, prompts, e.prompts.verifier, e.pass_rates, added=added, earlier=earlier)
    print("\n".join(paced.table(found.weights.summary)))
    for note in found.notes:
        print(f"note: {note}")
    seeds, tried = ", ".join(map(str, found.rates.seeds)), found.rates.tried + found.rates.undecided
    each = " to ".join(map(str, sorted({int(tried.min()), int(tried.max())})))
    print(
        f"{each} answers a prompt, {found.tokens:,} tokens; generation.seed {seeds}; loss.reduction "
        f"{e.loss.reduction!r}; pass rates {found.sha256[:12]}"
    )
    if flags.FLAGS.snr:
        measure(e, workdir, found)
    print(f"files: {workdir / 'weights.jsonl'}, pass_rates.jsonl, verified.jsonl beside it; answers: {rollouts}")
    command = shlex.join(["python", "-m", "launch.train", *_shared(sys.argv[1:])])
    if not e.prompts.answers and e.on_policy.fraction == 0:
        command += ", with prompts.answers or on_policy.fraction set: no answers are trained on yet"
    print(f"next: {command}")


def answer(e: "Experiment", prompts: "list[Prompt]", folder: Path) -> None:
    """The untrained student's answers to the prompts in `folder`: those that are missing."""
    from kdjax import offline
    from kdjax.build import build

    built = build(offline.to_answer(e))
    command = shlex.join(["python", "-m", "launch.curate", *sys.argv[1:]])
    student = offline.student_answers(built, prompts, e)
    offline.write_answers(folder, prompts, e.generation.samples, student, e, command)


def measure(e: "Experiment", workdir: Path, curated: "Curated") -> None:
    """Signal-to-noise of the gradients per pass rate, at the untrained student and the loss of the first step."""
    import numpy as np

    from kdjax.analysis import snr_page
    from kdjax.build import build
    from kdjax.config import OnPolicy, PassRates
    from kdjax.curation import paced, snr
    from kdjax.curation.pass_rates import write_lines
    from kdjax.data import take
    from kdjax.run_log import Progress

    built = build(dataclasses.replace(e, pass_rates=PassRates(), on_policy=OnPolicy()), workdir)
    asked = built.asked
    if asked is None:
        raise ValueError(f"prompts.answers must be answers to prompts, got {e.prompts.answers!r}.")
    row_of = snr.row_of_prompts(built.train, asked.ids)
    row_by_id = {asked.train[number].id: row for number, row in row_of.items()}
    rates, bars = curated.rates, curated.weights.summary["histogram"]
    names, bins = paced.rate_bins(rates)
    rng, chosen = np.random.default_rng(e.pass_rates.seed), dict[str, list[int]]()
    for name in names:
        rows = [row_by_id[i] for i, its in zip(rates.ids, bins, strict=True) if its == name and i in row_by_id]
        chosen[name] = rng.permutation(rows)[: flags.FLAGS.snr].tolist()
    every = [row for rows in chosen.values() for row in rows]
    start, progress, tokens = time.perf_counter(), Progress(len(every), unit="row"), 0

    def on_row(done: int) -> None:
        nonlocal tokens
        tokens += int((built.train.segment_ids[every[done - 1]] > 0).sum())
        progress.update(done, tokens_per_second=tokens / (time.perf_counter() - start))

    gradients = snr.row_gradients(
        built.parts,
        built.student_params,
        built.teacher_params,
        take(built.train, np.array(every)),
        text={} if built.text is None else built.text.teacher,
        on_row=on_row,
    )
    progress.close()
    found = snr.snr_by_bin(gradients, [name for name, rows in chosen.items() for _ in rows])
    basis = {"pass_rates": curated.sha256, "answers": e.prompts.answers, "dimensions": snr.DIMENSIONS}
    lines = list(snr.lines_of(found))
    write_lines(workdir, "snr", lines, {"basis": basis})
    print("\n".join(snr.table(found)))
    weights, problems = ({line["rate"]: line[of] for line in bars} for of in ("weight", "problems"))
    share = snr.reached(found, weights, problems)
    print(f"one small step with these weights gains {share:.0%} of what it would with the best, by the SNR measured")
    print(f"the SNR as a picture: {snr_page.write_snr(workdir, lines, bars, share, name=e.name)}, snr.svg beside it")


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
    scores = scorer(*sides, rows, on_batch, {} if built.text is None else built.text.teacher)
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
    text = {name: column[some] for name, column in ({} if built.text is None else built.text.teacher).items()}
    full = scorer(built.student_params, built.teacher_params, take(rows, some), text=text)
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


def _optional_workdir() -> Path | None:
    return None if flags.FLAGS.workdir is None else Path(flags.FLAGS.workdir)


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
