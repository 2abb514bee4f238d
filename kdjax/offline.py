"""From what is built to files that training reads later: the teacher's cache, and answers to prompts."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

import kdjax
from kdjax import config as schema
from kdjax import registry
from kdjax.build import DTYPES, Built, build_chooser, cache_identity, check_cached, scores_text, student_speaker
from kdjax.curation import params_fingerprint
from kdjax.curation.served_cache import served_recorder
from kdjax.curation.served_text import make_text_recorder
from kdjax.curation.teacher_pass import TeacherPass, make_recorder
from kdjax.data import Rows
from kdjax.data.prompts import Prompt
from kdjax.generation import speaker
from kdjax.generation.generate import Source, Summary, generate, identity, of_model
from kdjax.models import tokenizer as tokenizers
from kdjax.run_log import Progress
from kdjax.teacher.apart import share_devices
from kdjax.teacher.cache import CacheWriter, Header, RowRecord, create_or_open, rows_digest
from kdjax.types import Params


def teacher_pass(built: Built) -> TeacherPass:
    """What `launch.cache_teacher` computes of a row. Raises ValueError if the config describes no cache."""
    e, parts = built.experiment, built.parts
    if parts.teacher is None or parts.classes is None or built.teacher is None:
        raise ValueError(
            "teacher.path must be set, got ''; there is nothing to cache. Name a model, or set served.prompt_logprobs."
        )
    tau = e.loss.tau
    positions = schema.Selection(policy="all")
    if e.cache.superset:
        positions = schema.Selection(policy="top_fraction", signal="student_entropy", fraction=e.cache.superset)
    return TeacherPass(
        teacher=parts.teacher,
        sampler=parts.classes,
        tau=tau if isinstance(tau, float) else 1.0,
        chooser=build_chooser(positions),
        student=parts.student if e.cache.superset else None,
        entropy=e.cache.entropy,
        label_logp=e.cache.label_logp,
        rules=built.rules,
    )


def cache_recorder(built: Built) -> Callable[[Rows], Iterator[RowRecord]]:
    """recorder(rows) -> a `RowRecord` per row: by the teacher, or from what a server said or is asked now.

    Raises ValueError if the config describes no cache.
    """
    e, entries = built.experiment, built.experiment.classes.entries
    check_cached(e, built.parts.chooser)
    if scores_text(e):
        label_logp = e.cache.label_logp
        return make_text_recorder(e.served, built.tokenizer, entries, built.vocab_size, label_logp=label_logp)
    if built.text is not None and built.text.speaker is not None:
        return served_recorder(built.text.said, entries, built.vocab_size)
    return make_recorder(teacher_pass(built), built.teacher_params, built.student_params)


def open_writer(built: Built, rows: Rows, path: str, command: str) -> CacheWriter:
    """The cache of these rows at `path`, begun now or before; `command` is kept in it for people."""
    e, header_of = built.experiment, cache_identity(built)
    header = Header(
        **header_of,
        student=params_fingerprint(built.student_params) if e.cache.superset else "",
        entropy=e.cache.entropy,
        label_logp=e.cache.label_logp,
        rows=len(rows),
        rows_digest=rows_digest(rows.row_id, rows.row_hash),
        rows_per_shard=e.cache.rows_per_shard,
        made={
            "kdjax": kdjax.__version__,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "teacher": header_of["teacher"] if built.teacher is None else built.teacher.source,
            "command": command,
            "corpus_tokens": int((built.data.train.segment_ids > 0).sum()),
            "config": json.loads(json.dumps(dataclasses.asdict(e))),
        },
    )
    return create_or_open(path, header, rows.row_id, rows.row_hash)


def to_answer(experiment: schema.Experiment, *, teacher: bool = False) -> schema.Experiment:
    """The experiment with what its untrained student, or its teacher, needs to answer prompts, and no more.

    Answers that are trained on may not be there yet; a teacher from which no student is cut need not be loaded.
    """
    e = dataclasses.replace(experiment, on_policy=schema.OnPolicy())
    e = dataclasses.replace(e, prompts=dataclasses.replace(e.prompts, answers=""), served=schema.Served())
    if teacher or e.student.init.kind == "cut":
        return e
    data = dataclasses.replace(e.data, tokenizer=e.data.tokenizer or e.teacher.path)
    return dataclasses.replace(e, teacher=schema.Teacher(), data=data)


def student_answers(
    built: Built, prompts: Sequence[Prompt], settings: schema.Experiment, params: Params | None = None
) -> tuple[Source, dict[str, Any], str]:
    """The student as (a source of answers, what they depend on, what it is in words); see `write_answers`.

    settings: the experiment whose generation.* and data.* apply. params: of a trained student; None = the initial one.
    """
    source = built.student_source if params is None else "the student of a run"
    params = built.student_params if params is None else params
    model = student_speaker(built, params)
    depends = identity(
        params_fingerprint(params),
        tokenizers.fingerprint(built.tokenizer),
        prompts,
        settings.generation,
        settings.data,
    )
    return of_model(model, prompts, settings.generation, settings.data), depends, source


def teacher_answers(built: Built, prompts: Sequence[Prompt]) -> tuple[Source, dict[str, Any], str]:
    """As `student_answers`, of the teacher. Raises ValueError if there is none."""
    e, teacher = built.experiment, built.teacher
    if teacher is None:
        raise ValueError("teacher.path must be set, got ''; there is nobody to ask. Name a model.")
    dtype = registry.lookup(DTYPES, e.teacher.dtype, "teacher.dtype")
    rules = share_devices(e)[1]
    model = speaker(teacher.cfg, teacher.params, built.tokenizer, rules=rules, compute_dtype=dtype)
    token_ids = tokenizers.fingerprint(built.tokenizer)
    depends = identity(teacher.fingerprint, token_ids, prompts, e.generation, e.data)
    return of_model(model, prompts, e.generation, e.data), depends, teacher.source


def write_answers(
    directory: str | Path,
    prompts: Sequence[Prompt],
    samples: int,
    who: tuple[Source, dict[str, Any], str],
    experiment: schema.Experiment,
    command: str,
) -> Summary:
    """The answers of `who` in `directory`, with a progress line; see `generation.generate`.

    experiment, command: kept in the manifest for people. Raises ValueError in a run of several processes.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"answers must be written by one process, got {jax.process_count()}. Start one, with --processes=1."
        )
    source, depends, name = who
    made = {
        "kdjax": kdjax.__version__,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": name,
        "command": command,
        "config": json.loads(json.dumps(dataclasses.asdict(experiment))),
    }
    shown: list[Progress] = []

    def on_progress(done: int, total: int, rate: float) -> None:
        if not shown:  # by now it is known how many were there before
            shown.append(Progress(total, start_step=done - 1, unit="answer"))
        shown[0].update(done, tokens_per_second=rate)

    found = generate(directory, prompts, samples, source, depends, made, on_progress, experiment.prompts.instruction)
    for progress in shown:
        progress.close()
    return found
