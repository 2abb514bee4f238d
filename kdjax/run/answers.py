"""Which answers of a pool the student of a moment is trained on: admitted -> scored by this student -> selected.

Several processes score together, on a mesh of the devices of all; process 0 alone verifies, selects and writes files.
"""

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import kdjax
from kdjax.build import Built
from kdjax.checkpoint import by_first, require_same, require_seen
from kdjax.curation import params_fingerprint
from kdjax.curation.answers.best_teacher import Rated, figures_of, gradients_path
from kdjax.curation.answers.encode import Coding, coding, coding_basis, encode_answer, encode_question
from kdjax.curation.answers.measure import context_of, make_measurer, unscored
from kdjax.curation.answers.pool import Candidate, open_pool
from kdjax.curation.answers.released import as_released
from kdjax.curation.answers.scored import ScoredFile, open_scored, read_scored, scored_path
from kdjax.curation.answers.select import policy_of
from kdjax.curation.answers.selected import NAME, basis_of, select
from kdjax.curation.answers.stage import FOLDER, read_manifest
from kdjax.curation.answers.verify import Admitted, admit
from kdjax.data.prompts import Prompt, fingerprint, load_prompts, split_prompts
from kdjax.run.teachers import make_teacher_rater
from kdjax.run_log import Progress
from kdjax.types import Params


@dataclasses.dataclass(frozen=True)
class Choice:
    """counts: of selected.manifest.json. scored: answers that were read now; places: tokens with padding, of those
    calls; seconds: what they took, gradients included. file: of the figures; None = the policy reads none. rated: the
    teachers, with policy "best_teacher"."""

    counts: Mapping[str, Any]
    scored: int = 0
    places: int = 0
    seconds: float = 0.0
    file: Path | None = None
    rated: Rated | None = None


def selection_of(step: int) -> str:
    """The name of the choice that holds after `step`; 0 = that of launch.curate."""
    return f"{NAME}-{step}" if step else NAME


class AnswerChoice:
    """choice(params, step) -> Choice: what this student is to be trained on after `step`, as files of `workdir`.

    The pool is indexed and verified once, and programs are compiled once. Of several processes all have to call. Raises
    ValueError for a pool that holds no right answers or is another one in some process, and as `select` does.
    """

    def __init__(self, built: Built, workdir: Path) -> None:
        e = built.experiment
        self._built, self._workdir, self._settings = built, workdir, as_released(e.answers)
        self._coding = coding(built.tokenizer, e.data, self._settings)
        heldout, train, every = _sides(built)
        self.prompts = fingerprint(train)
        self._basis = basis_of(e, built.tokenizer, every)
        self.admitted = _admit(e, workdir, train, heldout, self._coding)
        self._places = 0
        self._figures, self._measure, self._rate = figures_of(self._settings), None, None
        if self._figures is not None:
            self._measure = make_measurer(
                built.parts.student, self._figures, self._coding, built.rules, on_call=self._on_call
            )
        if policy_of(self._settings).teachers:
            self._rate = make_teacher_rater(built, self.admitted, self._settings, self._coding)

    def __call__(self, params: Params, step: int = 0) -> Choice:
        name = selection_of(step)
        if self._measure is None and self._rate is None:
            return Choice(self._select(name, ""))
        student, scored, rated = params_fingerprint(params), None, None
        path = scored_path(self._workdir, student, self._settings.scored)
        self._places, added, seconds = 0, 0, 0.0
        with contextlib.ExitStack() as opened:
            if self._measure is not None:
                scored = self._open(path, student, opened)
                added, seconds = self._score(params, scored)
            if self._rate is not None:
                rated = self._rate(params, scored, gradients_path(path, student), self._depends(student))
                seconds += rated.seconds
            counts = self._select(name, student, scored, rated)
        return Choice(counts, added, self._places, seconds, None if scored is None else scored.path, rated)

    def _open(self, path: Path, student: str, opened: contextlib.ExitStack) -> ScoredFile:
        """The figures of this student: process 0 goes on with the file, the others read what was there before."""
        mine = list[ScoredFile]()

        def first() -> int:
            mine.append(opened.enter_context(open_scored(path, self._depends(student))))
            return path.stat().st_size

        size = by_first(first)
        require_seen(lambda: path.is_file() and path.stat().st_size == size, self._workdir)
        scored = mine[0] if mine else opened.enter_context(read_scored(path))
        require_same(str(len(scored)), str(path))  # and none appends before all have read
        return scored

    def _select(
        self, name: str, student: str, scored: ScoredFile | None = None, rated: Rated | None = None
    ) -> dict[str, Any]:
        """The counts of what process 0 selects; its file is seen by all."""
        path = self._workdir / FOLDER / f"{name}.jsonl"

        def first() -> tuple[dict[str, Any], str]:
            settings = self._settings
            how: dict[str, Any] = {"measure": self._length, "rated": rated, "basis": self._basis | {"student": student}}
            if scored is not None:
                how |= {"scored": scored, "context": context_of(settings, scored, self.admitted)}
            counts = select(self._workdir, self.admitted, settings, name=name, **how)
            return counts, read_manifest(path)["sha256"]

        counts, digest = by_first(first)
        require_seen(lambda: bool(read_manifest(path).get("sha256") == digest), self._workdir)
        return dict(counts)

    def _score(self, params: Params, scored: ScoredFile) -> tuple[int, float]:
        """Figures of the answers that lack them of this student; how many there were, and the seconds."""
        if self._measure is None or self._figures is None:
            return 0, 0.0
        added, seconds = 0, 0.0
        progress = Progress(self.admitted.counts["reasons"][""], start_step=len(scored), unit="answer")
        start, missing = time.perf_counter(), unscored(self.admitted, self._figures, scored, self._coding)
        scored.spent(answers=0, places=0, seconds=0.0)  # so that there are sums if nothing is missing
        for each in self._measure(params, missing):
            if jax.process_index() == 0:
                scored.append(each.row, each.id, each.teacher, None if each.error else each.figures, each.error)
            added, seconds = added + 1, time.perf_counter() - start
            scored.spent(answers=added, places=self._places, seconds=seconds)
            progress.update(len(scored), tokens_per_second=self._places / seconds)
        progress.close()
        return added, seconds

    def _on_call(self, answers: int, places: int) -> None:
        self._places += places

    def _length(self, one: Candidate) -> tuple[int, str]:
        found = encode_answer(one, encode_question(one.question, self._coding), self._coding)
        return int(found.tokens.counted.sum()), found.error

    def _depends(self, student: str) -> dict[str, Any]:
        e, settings = self._built.experiment, self._settings
        return {
            "version": kdjax.__version__,
            "student": student,
            "questions": self.prompts,
            **coding_basis(self._coding),
            "compute_dtype": e.student.compute_dtype,
            "tap": settings.tap,
            "alignment": settings.alignment,
        }


def _sides(built: Built) -> tuple[list[Prompt], list[Prompt], str]:
    """Held-out and train prompts, and the fingerprint of all."""
    asked, prompts = built.asked, built.experiment.prompts
    if asked is not None:
        return list(asked.heldout), list(asked.train), asked.fingerprint
    every = load_prompts(prompts)
    return *split_prompts(every, prompts), fingerprint(every)


def _admit(e: Any, workdir: Path, train: list[Prompt], heldout: list[Prompt], of: Coding) -> Admitted:
    """The pool, and what process 0 finds of its answers."""
    pool = open_pool(e.answers.pool, train, heldout, e.prompts.instruction)
    require_same(f"{pool.content} {fingerprint(train)} {fingerprint(heldout)}", "answers.pool")

    def first() -> tuple[list[int], dict[str, Any]]:
        progress = Progress(len(pool), unit="row")
        try:
            done = admit(workdir, pool, e.answers, e.prompts.verifier, lambda done, total: progress.update(done), of=of)
        finally:
            progress.close()
        return done.reason.tolist(), dict(done.counts)

    reason, counts = by_first(first)
    return Admitted(pool, np.array(reason, pool.reason.dtype), counts)
