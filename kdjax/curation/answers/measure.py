"""The figures that scores read, of answers that have none of this student yet: one pass, or a few.

Most come from one forward pass (scorer.py). Scores that look at steps read the NLL of each token, LALP scores steps by
themselves in a second pass, and "grand" takes a backward pass per answer.
"""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kdjax import config, registry
from kdjax.curation.answers.encode import Coding, Encoded, EncodedAnswer, Tokens, encode
from kdjax.curation.answers.gradients import make_gradient_pass, rows_of
from kdjax.curation.answers.scored import ScoredFile
from kdjax.curation.answers.scorer import FIGURES, Scored, make_answer_scorer, usual_figures
from kdjax.curation.answers.scores import SCORES, Context
from kdjax.curation.answers.steps import fit_casl, lalp, local_rows, step_figures, steps_of_tokens
from kdjax.curation.answers.verify import Admitted, admitted_answers
from kdjax.sharding import Rules
from kdjax.step import LanguageModel
from kdjax.types import Params

STEPS = ("rest_logp", "first_logp", "first_share")
LOCAL, GRADIENT = "local_logp", "gradient_norm"
BUFFER = 64  # answers whose steps are scored together

Texts = dict[str, tuple[Encoded, EncodedAnswer, str]]  # by row, of the answers that are under way
OnCall = Callable[[int, int], None]
Measurer = Callable[[Params, Iterable[tuple[Encoded, dict[str, str]]]], Iterator[Scored]]


def make_measurer(
    model: LanguageModel,
    settings: config.Answers,
    of: Coding,
    rules: Rules = Rules(),
    *,
    needs: Collection[str] | None = None,
    tokens: bool = False,
    on_call: OnCall | None = None,
) -> Measurer:
    """measure(student_params, (question, {row: text}) ...) -> a `Scored` per answer, in any order.

    The figures are those of every forward pass and `needs` besides, of several scores at once if that is wanted; None =
    what answers.score needs. tokens: whether each answer comes with its `TokenFigures`. on_call: as in `scorer.py`, of
    all passes forward. Raises ValueError for an unknown score or figure, and as `make_answer_scorer` does.
    """
    needs = registry.lookup(SCORES, settings.score, "answers.score").needs if needs is None else needs
    for name in needs:
        registry.lookup(dict.fromkeys((*FIGURES, *STEPS, LOCAL, GRADIENT)), name, "needs")
    steps, local, gradient = any(name in STEPS for name in needs), LOCAL in needs, GRADIENT in needs
    usual = usual_figures(model)
    wanted = (*usual, *(name for name in needs if name in FIGURES and name not in usual))
    scorer = make_answer_scorer(model, settings, of.seq_len, rules, figures=wanted, tokens=tokens or steps or local)
    alone = make_answer_scorer(model, settings, of.seq_len, rules, figures=("answer_nll",), tokens=True)

    backward = make_gradient_pass(model, rules)

    def measure(params: Params, questions: Iterable[tuple[Encoded, dict[str, str]]]) -> Iterator[Scored]:
        texts: Texts = {}
        found = scorer(params, _remembered(questions, texts), on_call)
        if steps or local:
            found = _with_steps(found, texts, of)
        if local:
            found = _with_local(found, texts, of, lambda asked: alone(params, asked, on_call))
        for each in found:
            encoded, answer, _ = texts.pop(each.row)
            if gradient and not each.error:
                (row,) = rows_of(dataclasses.replace(encoded, answers=(answer,)))
                (exact,) = backward(params, [row])
                each = _more(each, {GRADIENT: math.sqrt(float(exact.norm))})
            yield each

    return measure


def measurable(model: LanguageModel) -> tuple[str, ...]:
    """All figures that a measurer can give of this student's answers."""
    return (*usual_figures(model), "top_brier", *STEPS, LOCAL, GRADIENT)


def unscored(
    admitted: Admitted, settings: config.Answers, scored: ScoredFile, of: Coding
) -> Iterator[tuple[Encoded, dict[str, str]]]:
    """(question, {row: text}) of the answers that lack figures of this student, question after question."""
    needs = registry.lookup(SCORES, settings.score, "answers.score").needs
    for prompt, candidates in admitted_answers(admitted, settings):
        missing = [one for one in candidates if scored.lacks(one.row, needs)]
        if missing:
            yield encode(prompt, missing, of), {one.row: one.text for one in missing}


def context_of(settings: config.Answers, scored: ScoredFile, admitted: Admitted) -> Context:
    """What answers.score reads besides figures; the slope of ASLEC-CASL is fitted over the answers that compete.

    The file may hold others, and some that another score asked for and that have no figures of steps.
    """
    if settings.score != "aslec_casl":
        return Context(settings.question_share)
    rows = (one.row for _, candidates in admitted_answers(admitted, settings) for one in candidates)
    figures = [line.values for row in rows if row in scored and not (line := scored[row]).error]
    return Context(settings.question_share, fit_casl(figures)["share"])


def fitted_context(question_share: float, figures: Sequence[Mapping[str, Any]]) -> Context:
    """What any score reads besides figures, with the slope of ASLEC-CASL fitted over these answers.

    Where they do not determine it, it is NaN, and a warning says why.
    """
    slope = math.nan
    try:
        slope = fit_casl(figures)["share"]
    except ValueError as error:
        warnings.warn(f"aslec_casl is left out, for want of its slope: {error}", stacklevel=2)
    return Context(question_share, slope)


def _remembered(questions: Iterable[tuple[Encoded, dict[str, str]]], texts: Texts) -> Iterator[Encoded]:
    for encoded, of_row in questions:
        texts |= {answer.row: (encoded, answer, of_row[answer.row]) for answer in encoded.answers}
        yield encoded


def _with_steps(found: Iterable[Scored], texts: Texts, of: Coding) -> Iterator[Scored]:
    for each in found:
        if each.error or each.tokens is None:
            yield _more(each, dict.fromkeys(STEPS, math.nan))
        else:
            _, answer, text = texts[each.row]
            yield _more(each, step_figures(each.tokens.nll, _steps(answer, text, of)))


def _with_local(
    found: Iterable[Scored], texts: Texts, of: Coding, scorer: Callable[[list[Encoded]], Iterator[Scored]]
) -> Iterator[Scored]:
    """The steps of a few answers at a time are scored, each as an answer to what comes before it."""
    while some := list(itertools.islice(found, BUFFER)):
        asked: list[Encoded] = []
        of_answer: dict[str, list[str]] = {}
        for each in some:
            encoded, answer, text = texts[each.row]
            if each.error or each.tokens is None:
                continue
            ids = answer.tokens.ids[answer.tokens.counted].tolist()
            rows = local_rows(encoded.question.ids.tolist(), ids, _steps(answer, text, of))
            of_answer[each.row] = [f"{each.row} {number}" for number in range(len(rows))]
            for name, (before, step) in zip(of_answer[each.row], rows, strict=True):
                one = EncodedAnswer(name, each.teacher, _all_of(step))
                asked.append(Encoded(each.id, _all_of(before), (one,)))
        nlls = {one.row: one.tokens.nll for one in scorer(asked) if one.tokens is not None}
        for each in some:
            value = math.nan
            names = of_answer.get(each.row, [])
            if each.row in of_answer and each.tokens is not None and all(name in nlls for name in names):
                _, answer, text = texts[each.row]
                value = lalp(each.tokens.nll, _steps(answer, text, of), [nlls[name] for name in names])
            yield _more(each, {LOCAL: value})


def _all_of(ids: tuple[int, ...]) -> Tokens:
    return Tokens(np.array(ids, np.int32), np.ones(len(ids), bool))


def _steps(answer: EncodedAnswer, text: str, of: Coding) -> list[int]:
    """The step of each token that counts; what follows the text goes with its last step."""
    text = text.lstrip()
    offsets: list[Any] = of.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    counted = answer.tokens.counted
    offsets = [*offsets, *[(len(text), len(text))] * max(0, len(counted) - len(offsets))][: len(counted)]
    return steps_of_tokens(text, [tuple(span) for span, counts in zip(offsets, counted, strict=True) if counts])


def _more(each: Scored, figures: dict[str, float]) -> Scored:
    if each.error:
        figures = dict.fromkeys(figures, math.nan)
    return dataclasses.replace(each, figures=each.figures | figures)
