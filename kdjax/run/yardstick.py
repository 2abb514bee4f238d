"""What scores of answers are worth: beside the exact gradient of the student, and what a step on an answer gains."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.build import Built
from kdjax.curation.answers.correlation import Agreement, agreements
from kdjax.curation.answers.encode import Encoded, coding, encode
from kdjax.curation.answers.gradients import make_gain, make_gradient_pass, rows_of
from kdjax.curation.answers.measure import GRADIENT, STEPS, fitted_context, make_measurer, measurable
from kdjax.curation.answers.released import as_released
from kdjax.curation.answers.scores import SCORES, Context, rate
from kdjax.curation.answers.verify import Admitted, admitted_answers
from kdjax.optim import make_optimiser
from kdjax.run_log import Progress
from kdjax.types import Params

PROBE = 16  # questions that are set aside
PROBE_ROWS = 32  # of their answers: the gain is measured on these
FEWEST = 3  # answers of a question that is measured


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """lines: of each answer {"id", "row", "teacher", "figures", "gradient", "gain"}; gradient = ||grad L_A||^2, gain in
    nats. gradient, gain: score -> how well it orders answers within a question."""

    lines: list[dict[str, Any]]
    gradient: dict[str, Agreement]
    gain: dict[str, Agreement]


def measure(built: Built, params: Params, admitted: Admitted, questions: int) -> Yardstick:
    """Every score that the student has figures for, of the answers to `questions` questions with at least three each.

    The gain: by how much the first update of the run's optimiser, at the peak of its learning rate, on the answer alone
    lowers the mean loss of PROBE_ROWS answers to PROBE other questions. Raises ValueError for too few questions.
    """
    e, settings = built.experiment, as_released(built.experiment.answers)
    of = coding(built.tokenizer, e.data, settings)
    every = [
        (encode(prompt, found, of), {one.row: one.text for one in found})
        for prompt, found in admitted_answers(admitted, settings)
        if len(found) >= FEWEST
    ]
    usable = [(one, texts) for one, texts in every if sum(not each.error for each in one.answers) >= FEWEST]
    if questions + PROBE > len(usable):
        raise ValueError(
            f"--yardstick must be at most {max(0, len(usable) - PROBE)}, got {questions}; of the {len(usable)} "
            f"questions with {FEWEST} answers or more, {PROBE} are set aside to measure the gain on. Lower it."
        )
    rng = np.random.default_rng(settings.seed)
    order = rng.permutation(len(usable))
    probe, asked = ([usable[at] for at in np.sort(part)] for part in (order[:PROBE], order[PROBE : PROBE + questions]))
    needs = [name for name in measurable(built.parts.student) if name != GRADIENT]  # it comes from `exact`
    scorer = make_measurer(built.parts.student, settings, of, built.rules, needs=needs)
    scored = {each.row: each for each in scorer(params, asked)}
    exact = make_gradient_pass(built.parts.student, built.rules)
    optimiser, _ = make_optimiser(dataclasses.replace(e.optim, schedule="constant", warmup=0), e.train.steps)
    told = [row for one, _ in probe for row in rows_of(one)]
    told = [told[at] for at in np.sort(rng.permutation(len(told))[:PROBE_ROWS])]
    gain = make_gain(built.parts.student, optimiser, told, built.rules)
    answers = list(_answers([one for one, _ in asked]))
    rows, lines, progress = [row for *_, row in answers], [], Progress(len(answers), unit="answer")
    for (encoded, answer, _), gradient, gained in zip(answers, exact(params, rows), gain(params, rows), strict=True):
        figures = scored[answer.row].figures | {GRADIENT: math.sqrt(float(gradient.norm))}
        known = {name: None if np.isnan(value) else value for name, value in figures.items()}
        line = {"id": encoded.id, "row": answer.row, "teacher": answer.teacher, "figures": known}
        lines.append(line | {"gradient": float(gradient.norm), "gain": float(gained)})
        progress.update(len(lines))
    progress.close()
    return compared(lines, settings.question_share)


def compared(lines: list[dict[str, Any]], question_share: float) -> Yardstick:
    """The agreements of the scores that the figures of these lines are enough for, and of length.

    Not of those without diagonal: they prefer every answer of one token. The slope of ASLEC-CASL is fitted over these
    answers; where they do not determine it, a warning says so and the score is left out.
    """
    there = set(lines[0]["figures"])
    names = [name for name, one in SCORES.items() if set(one.needs) <= there and not name.endswith("_no_diag")]
    context = Context(question_share)
    if {*STEPS, "answer_nll"} <= there:
        context = fitted_context(question_share, [line["figures"] for line in lines])
    names = [name for name in names if name != "aslec_casl" or math.isfinite(context.first_share_slope)]
    questions = [line["id"] for line in lines]
    scores = {name: np.full(len(lines), np.nan) for name in names}
    for question in dict.fromkeys(questions):
        at = [number for number, name in enumerate(questions) if name == question]
        for name in names:
            scores[name][at] = rate(name, [lines[number]["figures"] for number in at], context)
    scores["shortest"] = np.array([line["figures"]["n_answer"] for line in lines], np.float64)
    scores = {name: values for name, values in scores.items() if np.isfinite(values).any()}
    higher = frozenset(name for name, score in SCORES.items() if not score.lower)
    gradient, gain = (np.array([line[name] for line in lines], np.float64) for name in ("gradient", "gain"))
    by_gain = agreements(questions, scores | {"gradient": gradient}, gain, higher=higher, yardstick_higher=True)
    return Yardstick(lines, agreements(questions, scores, gradient, higher=higher), by_gain)


def write(path: Path, found: Yardstick) -> None:
    """One JSON object a line, an answer each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in found.lines), encoding="utf-8")


def _answers(asked: list[Encoded]) -> Iterator[tuple[Encoded, Any, Any]]:
    for encoded in asked:
        good = [each for each in encoded.answers if not each.error]
        yield from ((encoded, answer, row) for answer, row in zip(good, rows_of(encoded), strict=True))
