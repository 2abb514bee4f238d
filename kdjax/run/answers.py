"""Which answers of a pool the student of a moment is trained on: admitted -> scored by this student -> selected."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from kdjax.build import Built
from kdjax.curation import params_fingerprint
from kdjax.curation.answers.encode import coding, encode_answer, encode_question
from kdjax.curation.answers.measure import context_of, make_measurer, unscored
from kdjax.curation.answers.pool import Candidate, open_pool
from kdjax.curation.answers.released import as_released
from kdjax.curation.answers.scored import ScoredFile, open_scored, scored_path
from kdjax.curation.answers.select import policy_of
from kdjax.curation.answers.selected import NAME, select
from kdjax.curation.answers.verify import Admitted, admit
from kdjax.data.prompts import Prompt, fingerprint, load_prompts, split_prompts
from kdjax.models import tokenizer as tokenizers
from kdjax.run_log import Progress
from kdjax.types import Params


@dataclasses.dataclass(frozen=True)
class Choice:
    """counts: of selected.manifest.json. scored: answers that were read now; places: tokens with padding, of those
    calls; seconds: what they took. file: of the figures; None = the policy reads none."""

    counts: Mapping[str, Any]
    scored: int = 0
    places: int = 0
    seconds: float = 0.0
    file: Path | None = None


def selection_of(step: int) -> str:
    """The name of the choice that holds after `step`; 0 = that of launch.curate."""
    return f"{NAME}-{step}" if step else NAME


class AnswerChoice:
    """choice(params, step) -> Choice: what this student is to be trained on after `step`, as files of `workdir`.

    The pool is indexed and verified once, and programs are compiled once. Raises ValueError for a pool that holds no
    right answers, in a run of several processes, and as `select` does.
    """

    def __init__(self, built: Built, workdir: Path) -> None:
        if jax.process_count() > 1:
            raise ValueError(
                f"answers must be chosen by one process, got {jax.process_count()}. Start one, with --processes=1, and "
                "leave answers.rescore_every at 0 in runs of several."
            )
        e = built.experiment
        self._built, self._workdir, self._settings = built, workdir, as_released(e.answers)
        self._coding = coding(built.tokenizer, e.data, self._settings)
        heldout, train = split_prompts(load_prompts(e.prompts), e.prompts) if built.asked is None else _sides(built)
        self.prompts = fingerprint(train)
        self.admitted = _admit(e, workdir, train, heldout)
        self._places = 0
        self._measure = None
        if policy_of(self._settings).scores:
            self._measure = make_measurer(
                built.parts.student, self._settings, self._coding, built.rules, on_call=self._on_call
            )

    def __call__(self, params: Params, step: int = 0) -> Choice:
        name = selection_of(step)
        if self._measure is None:
            counts = select(self._workdir, self.admitted, self._settings, measure=self._length, name=name)
            return Choice(counts)
        student = params_fingerprint(params)
        start, self._places = time.perf_counter(), 0
        with open_scored(scored_path(self._workdir, student, self._settings.scored), self._depends(student)) as scored:
            added = self._score(params, scored)
            seconds = time.perf_counter() - start
            if added:
                scored.finish({"answers": added, "places": self._places, "seconds": round(seconds, 3)})
            counts = select(
                self._workdir,
                self.admitted,
                self._settings,
                scored=scored,
                context=context_of(self._settings, scored),
                name=name,
            )
            return Choice(counts, added, self._places, seconds, scored.path)

    def _score(self, params: Params, scored: ScoredFile) -> int:
        """Figures of the answers that lack them of this student; how many there were."""
        if self._measure is None:
            return 0
        added = 0
        progress = Progress(self.admitted.counts["reasons"][""], start_step=len(scored), unit="answer")
        start, missing = time.perf_counter(), unscored(self.admitted, self._settings, scored, self._coding)
        for each in self._measure(params, missing):
            scored.append(each.row, each.id, each.teacher, None if each.error else each.figures, each.error)
            added += 1
            progress.update(len(scored), tokens_per_second=self._places / (time.perf_counter() - start))
        progress.close()
        return added

    def _on_call(self, answers: int, places: int) -> None:
        self._places += places

    def _length(self, one: Candidate) -> tuple[int, str]:
        found = encode_answer(one, encode_question(one.question, self._coding), self._coding)
        return int(found.tokens.counted.sum()), found.error

    def _depends(self, student: str) -> dict[str, Any]:
        e, settings = self._built.experiment, self._settings
        names = ("tap", "alignment", "trailing", "truncated")
        return {
            "student": student,
            "tokenizer": tokenizers.fingerprint(self._built.tokenizer),
            "questions": self.prompts,
            "seq_len": e.data.seq_len,
            "chat_template": e.data.chat_template,
            "system_prompt": e.data.system_prompt,
            "compute_dtype": e.student.compute_dtype,
            **{name: getattr(settings, name) for name in names},
        }


def _sides(built: Built) -> tuple[list[Prompt], list[Prompt]]:
    asked = built.asked
    return ([], []) if asked is None else (list(asked.heldout), list(asked.train))


def _admit(e: Any, workdir: Path, train: list[Prompt], heldout: list[Prompt]) -> Admitted:
    pool = open_pool(e.answers.pool, train, heldout)
    progress = Progress(len(pool), unit="row")
    try:
        return admit(workdir, pool, e.answers, e.prompts.verifier, lambda done, total: progress.update(done))
    finally:
        progress.close()
