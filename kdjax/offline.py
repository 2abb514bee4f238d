"""From what is built to the teacher's cache: what is computed of a row, and the file it goes into."""

import dataclasses
import json
from datetime import UTC, datetime

import kdjax
from kdjax import config as schema
from kdjax.build import Built, build_chooser, cache_identity, check_cached
from kdjax.curation import params_fingerprint
from kdjax.curation.teacher_pass import TeacherPass
from kdjax.data import Rows
from kdjax.teacher.cache import CacheWriter, Header, create_or_open, rows_digest


def teacher_pass(built: Built) -> TeacherPass:
    """What `launch.cache_teacher` computes of a row. Raises ValueError if the config describes no cache."""
    e, parts = built.experiment, built.parts
    check_cached(e, parts.chooser)
    if parts.teacher is None or parts.classes is None or built.teacher is None:
        raise ValueError("teacher.path must be set, got ''; there is nothing to cache. Name a model.")
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


def open_writer(built: Built, rows: Rows, path: str, command: str) -> CacheWriter:
    """The cache of these rows at `path`, begun now or before; `command` is kept in it for people."""
    e = built.experiment
    header = Header(
        **cache_identity(built),
        student=params_fingerprint(built.student_params) if e.cache.superset else "",
        entropy=e.cache.entropy,
        label_logp=e.cache.label_logp,
        rows=len(rows),
        rows_digest=rows_digest(rows.row_id, rows.row_hash),
        rows_per_shard=e.cache.rows_per_shard,
        made={
            "kdjax": kdjax.__version__,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "teacher": "" if built.teacher is None else built.teacher.source,
            "command": command,
            "corpus_tokens": int((built.data.train.segment_ids > 0).sum()),
            "config": json.loads(json.dumps(dataclasses.asdict(e))),
        },
    )
    return create_or_open(path, header, rows.row_id, rows.row_hash)
