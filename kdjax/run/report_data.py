"""What the report shows besides the logged figures: summary, a page of text with its selection, completions.

Written in two parts, before the first step and after the last, so that a resumed run still knows the untrained student.
The schema is that of analysis/report.py.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import kdjax
from kdjax.analysis.report import write_report
from kdjax.build import Built
from kdjax.build.checks import is_served
from kdjax.config import fingerprint
from kdjax.curation.answers.select import score_read
from kdjax.data import heldout_batches, to_batch
from kdjax.evals.text_page import entropy_page, make_page_step
from kdjax.generation import complete
from kdjax.models.tokenizer import fingerprint as tokenizer_fingerprint
from kdjax.run_log import write_whole
from kdjax.selection.stats import NEEDS_TEACHER
from kdjax.step import feed_of
from kdjax.types import Params, TrainState

FILE = "report_data.json"
PROMPT_TOKENS = 24
CORPORA = {"factbook": "the World Factbook (embedded)", "topics": "Python's help topics"}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def write_before(workdir: Path, built: Built) -> None:
    """Completions of the teacher and of the student before training."""
    prompts = _prompts(built)
    completions = [{"prompt": prompt} for prompt in prompts]
    if prompts:
        sides = {"before": (built.student_cfg, built.student_params)}
        if built.teacher is not None:
            sides["teacher"] = (built.teacher.cfg, built.teacher.params)
        for name, (cfg, params) in sides.items():
            for entry, text in zip(completions, _complete(built, cfg, params, prompts), strict=True):
                entry[name] = text
    _write(workdir, {"completions": completions})


def write_after(workdir: Path, built: Built, state: TrainState) -> None:
    """The rest, and report.html."""
    path = workdir / FILE
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"completions": []}
    prompts = _prompts(built)  # not those of the file, which may be late on other hosts
    if prompts:
        said = {entry["prompt"]: entry for entry in data["completions"]}
        texts = _complete(built, built.student_cfg, state.params, prompts)
        answers = zip(prompts, texts, strict=True)
        data["completions"] = [said.get(prompt, {"prompt": prompt}) | {"after": text} for prompt, text in answers]
    _write(workdir, data | _summary(workdir, built) | _text_page(built, state))
    if jax.process_index() == 0:
        write_report(workdir)


def _complete(built: Built, cfg: Any, params: Params, prompts: list[str]) -> list[str]:
    return complete(cfg, params, built.tokenizer, prompts, built.experiment.eval.new_tokens)


def _prompts(built: Built) -> list[str]:
    """Beginnings of held-out documents."""
    rows, wanted = built.data.heldout, built.experiment.eval.completions
    found: list[str] = []
    for tokens, segments, begins in zip(rows.tokens, rows.segment_ids, rows.begins, strict=True):
        last = int(segments.max())
        for segment in range(last - int(begins) + 1, last + 1):  # the others go on from the row before
            part = tokens[segments == segment][:PROMPT_TOKENS]
            if len(found) < wanted and part.size == PROMPT_TOKENS:
                found.append(str(built.tokenizer.decode(part.tolist())))
    return found


def _text_page(built: Built, state: TrainState) -> dict[str, Any]:
    """One held-out row with the student's entropies and what the run's policy would select of it.

    {} if its signal reads a teacher that only speaks through a cache: held-out text is not in it.
    """
    if built.parts.cached and NEEDS_TEACHER.intersection(built.parts.chooser.needs):
        return {}
    columns = next(iter(heldout_batches(built.data.heldout, built.rules.batch_shards, built.rules.batch_shards)))
    page = make_page_step(built.parts)
    feed = feed_of(built.parts.teacher if NEEDS_TEACHER.intersection(built.parts.chooser.needs) else None)
    arrays = jax.device_get(
        page(
            state.params,
            built.teacher_params,
            feed(to_batch(columns, built.rules)),
            state.policy_state,
            state.key,
            state.step,
        )
    )
    length = int(np.sum(columns["segment_ids"][0] > 0))
    row = {name: array[0] for name, array in arrays.items()}
    text = entropy_page(columns["tokens"][0], tokenizer=built.tokenizer, length=length, **row)
    return {"text": text, "text_note": "The first held-out row, as the trained student sees it."}


def typed_command() -> str:
    """What was typed; "" in a notebook, where the command line is that of its kernel."""
    return "" if "ipykernel" in sys.modules else shlex.join(["python", "-m", _module(), *sys.argv[1:]])


def _answers(built: Built) -> str:
    """What is trained on where there are prompts; "on" is before it."""
    e, count = built.experiment, len(built.asked.train) if built.asked is not None else 0
    chosen = ", ".join(filter(None, (e.answers.policy, score_read(e.answers))))
    whose = {"gold": "gold answers", "pool": f"selected answers ({chosen})", "": ""}
    given = whose.get(e.prompts.answers, "a model's answers")
    own = "the student's own answers" if e.on_policy.fraction != 0 else ""
    if own and e.samples.fraction < 1:
        own += f" (of each block the {e.samples.fraction:.0%} {_chosen(e.samples.score)})"
    plain = "" if e.prompts.answers else CORPORA.get(e.data.path, e.data.path)  # the text of the other steps
    if e.on_policy.fraction == 1:
        plain = ""
    kept = _kept(built)
    given, plain = (f"{text} ({kept})" if text and kept else text for text in (given, plain))
    asked = f"{' and '.join(filter(None, (given, own)))} to {count:,} prompts of {e.prompts.path}"
    return f"{asked}{f' and {plain}' if plain else ''}, judged on {CORPORA.get(e.data.path, e.data.path)}"


def _kept(built: Built) -> str:
    """Which rows of the given text are trained on; "" = all."""
    kept, every = len(built.train), len(built.data.train)
    chosen = _chosen(built.experiment.samples.score)
    return f"the {kept:,} of {every:,} rows {chosen}" if kept < every else ""


def _chosen(score: str) -> str:
    return "drawn at random" if score == "random" else f"with the highest {score.replace('_', ' ')}"


def _summary(workdir: Path, built: Built) -> dict[str, Any]:
    e, data = built.experiment, built.data
    teacher: dict[str, Any] = {"teacher": "none, the text alone"}
    if built.parts.cached:
        who = (e.served.model if is_served(e) else e.teacher.path) or "unnamed"
        teacher = {"teacher": f"{who}, not loaded: {e.classes.kind} entries from a cache"}
    if built.teacher is not None:
        teacher = {
            "teacher": built.teacher.source,
            "teacher_layers": built.teacher.cfg.layers,
            "teacher_parameters": _size(built.teacher.params),
        }
    signal = e.selection.signal.replace("_", " ")
    policies = {
        "all": "all positions",
        "random_fraction": f"a random {e.selection.fraction:.0%} of the positions",
        "top_fraction": f"the {e.selection.fraction:.0%} of positions with the highest {signal}",
    }
    text = f"{CORPORA.get(e.data.path, e.data.path)}, {data.summary['train']['documents']} training documents"
    text = ", ".join(filter(None, (text, _kept(built)))) if built.asked is None else _answers(built)
    summary = {
        **teacher,
        "student": built.student_source,
        "student_layers": built.student_cfg.layers,
        "student_parameters": _size(built.student_params),
        "data": text,
        "selection": policies.get(e.selection.policy, e.selection.policy),
        "loss": " + ".join(name.replace("_", " ").replace(" kl", " KL") for name in built.parts.objective.terms),
        "steps": e.train.steps,
        "tokens": e.train.steps * e.train.batch_size * e.data.seq_len,
        "seed": e.train.seed,
        "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
    }
    prints = {
        "config": fingerprint(e),
        "data": data.fingerprint[:16],
        "tokenizer": tokenizer_fingerprint(built.tokenizer)[:16],
    } | ({} if built.teacher is None else {"teacher": built.teacher.fingerprint[:16]})
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    versions |= {"kdjax": kdjax.__version__, "python": platform.python_version()}
    return {"summary": summary, "versions": versions, "fingerprints": prints, "command": typed_command()}


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).name


def _size(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _write(workdir: Path, data: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        write_whole(workdir / FILE, json.dumps(data))
