"""Teachers rated for the student of a moment: figures or gradients of their answers to the same questions -> scores.

Of several processes all run the student; process 0 alone reads figures and writes gradients.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdjax import config
from kdjax.build import Built
from kdjax.checkpoint import by_first
from kdjax.curation.answers import best_teacher
from kdjax.curation.answers.best_teacher import Rated, Usable
from kdjax.curation.answers.encode import Coding
from kdjax.curation.answers.gradients import ROUND_UP, make_gradient_pass
from kdjax.curation.answers.scored import ScoredFile
from kdjax.curation.answers.stage import Stage
from kdjax.curation.answers.verify import Admitted
from kdjax.run_log import Progress
from kdjax.types import Params

TeacherRater = Callable[[Params, ScoredFile | None, Path, Mapping[str, Any]], Rated]


def make_teacher_rater(built: Built, admitted: Admitted, settings: config.Answers, of: Coding) -> TeacherRater:
    """rate(params, scored, path, depends) -> `Rated` by answers.score, for the student of `params`.

    scored: the figures of all admitted answers, for a score that reads figures. path: where gradients are kept, for one
    that reads these; depends: what they depend on, for its manifest. What is there is not computed again. Raises
    ValueError for figures that are not there, and gradients of something else.
    """
    by_gradients = "gradients" in best_teacher.needs_of(settings)
    names = [prompt.id for prompt in admitted.pool.questions]
    backward = make_gradient_pass(
        built.parts.student, built.rules, finite=False, dimensions=best_teacher.DIMENSIONS, seed=best_teacher.SIGNS
    )

    def take(params: Params, path: Path, depends: Mapping[str, Any], held: list[Usable]) -> tuple[int, int, float]:
        """Append the gradients that are missing; (how many, their tokens with padding, seconds)."""
        stages: list[Stage] = []  # process 0 has it
        taken, places, seconds, start = 0, 0, 0.0, time.perf_counter()
        with contextlib.ExitStack() as opened:

            def missing() -> list[str]:
                stages.append(opened.enter_context(best_teacher.open_gradients(path, depends)))
                known = best_teacher.known_gradients(path)
                return [name for row in held[0].row.tolist() if (name := f"{row:016x}") not in known]

            rows = set(by_first(missing))
            for stage in stages:
                stage.spent(gradients=0, places=0, seconds=0.0)  # so that there are sums if nothing is missing
            progress = opened.enter_context(contextlib.closing(Progress(len(rows), unit="gradient")))
            for said, row in best_teacher.rows_to_run(admitted, settings, of, rows):
                (found,) = backward(params, [row])
                taken, places = taken + 1, places + len(row[0]) + -len(row[0]) % ROUND_UP
                seconds = time.perf_counter() - start
                for stage in stages:
                    best_teacher.append_gradient(stage, said, found.projected)
                    stage.spent(gradients=taken, places=places, seconds=seconds)
                progress.update(taken)
        return taken, places, seconds

    def rate(params: Params, scored: ScoredFile | None, path: Path, depends: Mapping[str, Any]) -> Rated:
        took: tuple[int, int, float] = 0, 0, 0.0
        held: list[Usable] = []  # process 0 has them

        def asked() -> tuple[list[int], int]:
            usable = best_teacher.usable_answers(admitted, settings, of, scored)
            numbers, common = best_teacher.asked_questions(usable, settings)
            held.append(usable.where(np.isin(usable.question, numbers)))
            return numbers, common

        def scores() -> dict[str, float]:
            return best_teacher.rate_usable(
                admitted, settings, best_teacher.with_gradients(held[0], path) if by_gradients else held[0]
            )

        numbers, common = by_first(asked)
        if by_gradients:
            took = take(params, path, depends, held)
        found, questions = by_first(scores), tuple(names[number] for number in numbers)
        return Rated(found, questions, common, *took, path.name if by_gradients else "")

    return rate
