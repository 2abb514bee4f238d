"""One question and all its answers in a pool, token by token, as the student of the config sees them."""

import dataclasses
import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdjax import config, registry
from kdjax.analysis.explain_page import Explained, ExplainedAnswer
from kdjax.build import Built
from kdjax.curation import params_fingerprint
from kdjax.curation.answers.encode import coding, encode
from kdjax.curation.answers.measure import STEPS, fitted_context, make_measurer, measurable
from kdjax.curation.answers.pool import REASONS, Candidate, candidates, open_pool, reader
from kdjax.curation.answers.released import as_released
from kdjax.curation.answers.scored import read_scored, scored_path
from kdjax.curation.answers.scorer import Scored
from kdjax.curation.answers.scores import SCORES, Context, rate
from kdjax.curation.answers.select import Pick, ScoredAnswer, choose, policy_of
from kdjax.curation.answers.selected import NAME, read_selected
from kdjax.curation.answers.verify import Admitted, admit, admitted_answers
from kdjax.data.prompts import Prompt, load_prompts, question_of
from kdjax.types import Params

SHOWN = ("scas", "head_norm", "grape", "rsr", "head_diagonal")  # scores beside answers.score


def explain(built: Built, question: str, params: Params, workdir: Path | None, command: str) -> Explained:
    """What `launch.curate --explain` shows of the question with this id.

    workdir: where a choice was made, which is marked; None = none was. Answers that are not admitted or not drawn are
    shown with the reason, those that are wrong too, be there no others. Raises ValueError for a question that is not
    among the prompts or has no answer in the pool, and as `make_measurer` does.
    """
    e, settings = built.experiment, as_released(built.experiment.answers)
    if policy_of(settings).teachers:  # then answers.score rates them, and no answers
        settings = dataclasses.replace(settings, score=SHOWN[0])
    prompt = _prompt(load_prompts(e.prompts), question)
    pool = open_pool(settings.pool, [prompt], [], e.prompts.instruction)
    if not pool.of(0):
        raise ValueError(
            f"--explain must be the id of a question that answers.pool answers, got {question!r}, which it does not; "
            "questions that are kept for evaluation are mostly not asked of teachers. Take one of selected.jsonl."
        )
    of = coding(built.tokenizer, e.data, settings)
    with tempfile.TemporaryDirectory() as folder:
        admitted = admit(Path(folder), pool, settings, e.prompts.verifier, of=of, needed=False)
    with reader(pool) as read:
        found = candidates(pool, read, 0)
    reasons = _reasons(admitted, found, settings)
    score, known = registry.lookup(SCORES, settings.score, "answers.score"), set(measurable(built.parts.student))
    needs = score.needs if known.issuperset(score.needs) else ()
    measure = make_measurer(built.parts.student, settings, of, built.rules, needs=needs, tokens=True)
    once = {one.row: one for one in found}  # a row may be there twice
    asked = encode(prompt, once.values(), of), {row: one.text for row, one in once.items()}
    scored = {each.row: each for each in measure(params, [asked])}
    valid = [one for one, why in zip(found, reasons, strict=True) if not why and not scored[one.row].error]
    context = _context(settings, workdir, params, [scored[one.row].figures for one in valid])
    names = [name for name in dict.fromkeys([settings.score, *SHOWN]) if known.issuperset(SCORES[name].needs)]
    names = [name for name in names if name != "aslec_casl" or math.isfinite(context.first_share_slope)]
    rated = {name: _rates(name, valid, scored, context) for name in names}
    ranked = _ranked(valid, rated.get(settings.score, {}), settings)
    chosen = {one.row for one in read_selected(workdir, NAME) if one.id == question} if workdir is not None else set()
    answers = []
    for one, why in zip(found, reasons, strict=True):
        rates = {name: rated[name].get(one.row, np.nan) for name in names}
        answers.append(_answer(one, why, scored[one.row], rates, ranked, chosen, built))
    return Explained(
        question=question_of(prompt),
        answers=answers,
        id=prompt.id,
        gold=prompt.answer or "",
        score=settings.score,
        lower=score.lower,
        groups=settings.groups if policy_of(settings).scores else 0,
        chosen=f"Chosen by answers.policy={settings.policy!r}." if chosen else "",
        student=f"The student: {built.student_source}.",
        command=command,
    )


def _reasons(admitted: Admitted, found: Sequence[Candidate], settings: config.Answers) -> list[str]:
    """Why each answer cannot be chosen, "" = it can: it is not admitted, or answers.candidates have no place for it."""
    pool = admitted.pool
    drawn = {one.row for _, some in admitted_answers(admitted, settings) for one in some}
    reasons = [REASONS[admitted.reason[row]] for row in pool.of(0)]
    return [why or ("" if one.row in drawn else "not_drawn") for one, why in zip(found, reasons, strict=True)]


def _prompt(prompts: Sequence[Prompt], question: str) -> Prompt:
    known = {prompt.id: prompt for prompt in prompts}
    if question not in known:
        raise ValueError(
            f"--explain must be the id of a question of prompts.path, got {question!r}."
            + registry.did_you_mean(question, known)
        )
    return known[question]


def _context(settings: config.Answers, workdir: Path | None, params: Params, here: list[dict[str, float]]) -> Context:
    """The slope of ASLEC-CASL: over all answers that this student scored, as for the choice; else over those `here`."""
    if settings.score != "aslec_casl":
        return Context(settings.question_share)
    there: list[Mapping[str, float]] = []
    if workdir is not None and (path := scored_path(workdir, params_fingerprint(params), settings.scored)).is_file():
        with read_scored(path) as scored:
            there = [line.values for line in scored if set(STEPS) <= set(line.values)]
    return fitted_context(settings.question_share, there or here)


def _rates(name: str, valid: Sequence[Candidate], scored: dict[str, Scored], context: Context) -> dict[str, float]:
    """Row -> the score of this name."""
    rows = [one.row for one in valid]
    return dict(zip(rows, rate(name, [scored[row].figures for row in rows], context), strict=True))


def _ranked(valid: Sequence[Candidate], values: dict[str, float], settings: config.Answers) -> dict[str, Pick]:
    """Row -> its rank and group by answers.score, whatever the policy."""
    scored = [ScoredAnswer(one.row, one.teacher, values.get(one.row, math.nan)) for one in valid]
    by_score = dataclasses.replace(settings, policy="best")
    return {pick.answer.row: pick for pick in choose("", scored, by_score, random.Random(0)).ranked}


def _answer(
    one: Candidate,
    why: str,
    scored: Scored,
    rated: dict[str, float],
    ranked: dict[str, Pick],
    chosen: set[str],
    built: Built,
) -> ExplainedAnswer:
    verdict = why if why in ("wrong", "undecided") else "right"
    if scored.tokens is None:
        return ExplainedAnswer(one.teacher, verdict=verdict, reason=why or scored.error, text=one.text)
    pick = ranked.get(one.row)
    pieces = _pieces(one.text.lstrip(), built.tokenizer)
    count = len(scored.tokens.nll)
    return ExplainedAnswer(
        one.teacher,
        [*pieces, *[""] * count][:count],  # what the template writes after the text has no piece
        scored.tokens.nll.tolist(),
        scored.tokens.brier.tolist(),
        scored.tokens.rank.tolist(),
        scored.tokens.share.tolist(),
        scored.figures | rated,
        0 if pick is None else pick.group,
        0 if pick is None else pick.rank,
        one.row in chosen,
        verdict,
        why,
    )


def _pieces(text: str, tokenizer: Any) -> list[str]:
    """What each token adds to the text; "" where it only begins or goes on with a character."""
    found, end = [], 0
    for start, stop in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]:
        found.append(text[max(start, end) : stop])
        end = max(end, stop)
    return found
