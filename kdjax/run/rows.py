"""Which rows a run trains on, chosen anew every so many steps by the student as it is then.

Of a text those of highest score (samples.*), of a pool of answers those that suit this student (answers.*). What was
chosen is on disk before it is used, so that a run that goes on after a kill has the same rows.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import optax

from kdjax.build import Built, reselected, samples_basis
from kdjax.curation import Scorer, keep, load_samples, make_scorer, overlap, positions_of, write_samples
from kdjax.curation.answers import selected
from kdjax.curation.batches import weigh_batch
from kdjax.data import fed_places, take, train_iterator
from kdjax.run.answers import AnswerChoice, selection_of
from kdjax.run.answers_report import write_report
from kdjax.run.own_answers import OwnAnswers
from kdjax.step import init_state
from kdjax.types import Params, TrainState


class RowChoice:
    """The rows of each phase of a run: `samples.rescore_every` or `answers.rescore_every` steps; 0 = there is one."""

    def __init__(self, built: Built, workdir: Path, own: OwnAnswers | None = None) -> None:
        e = built.experiment
        self._built, self._workdir, self._own = built, workdir, own
        self._of_answers = e.answers.rescore_every > 0
        self._every = e.answers.rescore_every or e.samples.rescore_every
        self._scorer: Scorer | None = None
        self._answers: AnswerChoice | None = None
        self._now, self._text = built.train, built.text

    def due(self, step: int) -> bool:
        """Whether the student of this step is to choose for the next ones."""
        return self._every > 0 and step % self._every == 0 and step < self._built.experiment.train.steps

    def iterator(self, step: int) -> Any:
        """Batches as they follow after `step`, of the rows that hold then."""
        phase = self._phase(step)
        if self._of_answers and phase:
            self._hold(phase * self._every)
        elif phase:
            every = self._built.data.train
            self._now = take(every, positions_of(load_samples(self._folder(phase)), every))
        return self._batches(step)

    def choose(self, step: int, params: Params) -> tuple[Any, dict[str, float]]:
        """(batches of what this student chooses, figures for the log: kept_overlap, the share that was chosen before).

        Of answers also how many were read for it, in how many tokens and seconds.
        """
        figures = self._choose_answers(step, params) if self._of_answers else self._choose_rows(step, params)
        return self._batches(step), figures

    def _choose_rows(self, step: int, params: Params) -> dict[str, float]:
        built, e = self._built, self._built.experiment
        if self._scorer is None:
            size = e.train.batch_size // e.train.accumulate
            self._scorer = make_scorer(built.parts.student, built.parts.teacher, e.samples, built.rules, size)
        every = built.data.train
        text = {} if built.text is None else built.text.teacher
        scores = self._scorer(params, built.teacher_params, every, text=text)
        kept = keep(scores, e.samples.fraction)
        shared = overlap(self._now.row_id, every.row_id[kept])
        basis = samples_basis(built)
        if jax.process_index() == 0:
            write_samples(self._folder(self._phase(step)), basis, every, scores, kept, {"step": step})
        self._now = take(every, kept)
        return {"kept_overlap": shared}

    def _choose_answers(self, step: int, params: Params) -> dict[str, float]:
        if self._answers is None:
            self._answers = AnswerChoice(self._built, self._workdir)
        made = self._answers(params, step)
        before, now = (selected.read_selected(self._workdir, selection_of(at)) for at in (step - self._every, step))
        kept = selected.overlap(before, now)
        self._hold(step)
        if jax.process_index() == 0:
            write_report(self._built, self._workdir, step)
        figures = {"answers_scored": made.scored, "scoring_tokens": made.places, "scoring_seconds": made.seconds}
        return {"kept_overlap": kept} | {name: float(of) for name, of in figures.items()}

    def _hold(self, step: int) -> None:
        """From now on the answers that were chosen after `step`."""
        built = self._built
        if built.text is None:
            raise ValueError("prompts.answers must be 'pool' with answers.rescore_every. Set it.")
        name = selection_of(step)
        self._text = reselected(built.text, built.experiment, built.tokenizer, self._workdir, name)
        self._now = self._text.data.train

    def _phase(self, step: int) -> int:
        """How often rows were chosen anew before the step that follows; after the last step none is."""
        return min(step, self._built.experiment.train.steps - 1) // self._every if self._every else 0

    def _batches(self, step: int) -> Any:
        e, phase = self._built.experiment, self._phase(step)
        return train_iterator(
            self._now,
            e.train.batch_size,
            e.train.seed,
            phase=phase,
            start=step - phase * self._every if self._own is None else self._own.others_before(step),
            fed=fed_places(self._built.rules, e.train.batch_size, e.train.accumulate),
            teacher=self._teacher(),
            choose=None if self._text is None else self._text.choose,
            weigh=weigh_batch(e.pass_rates),
        )

    def _teacher(self) -> Any:
        """What reads the teacher's columns of a batch."""
        if self._built.cache is not None:
            return self._built.cache.columns
        text = {} if self._text is None else self._text.teacher
        return (lambda ids, *_: {name: column[ids] for name, column in text.items()}) if text else None

    def _folder(self, phase: int) -> Path:
        return self._workdir / "rescored" / f"step-{phase * self._every}"


def restarted(state: TrainState, built: Built) -> TrainState:
    """The state after a new choice: with answers.restart the moments, or weights and moments, are those of the start.

    The number of steps stays, and with it the place in the schedule of the learning rate.
    """
    what = built.experiment.answers.restart
    if not what:
        return state
    params = built.student_params if what == "weights" else state.params
    seed = built.experiment.train.seed
    fresh = jax.jit(lambda start: init_state(built.parts, start, seed))(params)

    def counts(part: Any) -> bool:
        return isinstance(part, optax.ScaleByScheduleState)

    moments = jax.tree.map(
        lambda new, old: old if counts(old) else new, fresh.opt_state, state.opt_state, is_leaf=counts
    )
    return dataclasses.replace(state, params=fresh.params, opt_state=moments)
