"""How much of a selection other choices would have taken as well, of the same answers."""

import dataclasses
import random
from collections.abc import Mapping, Sequence

from kdjax import config
from kdjax.curation.answers.scored import ScoredLine
from kdjax.curation.answers.scores import SCORES, Context, rate
from kdjax.curation.answers.select import Chosen, ScoredAnswer, choose, policy_of

# answers.policy and answers.score, "" = it reads none; besides these "random": what to expect of an answer drawn alike
RIVALS: dict[str, tuple[str, str]] = {
    **{name: ("best", name) for name in ("scas", "head_norm", "grape", "rsr")},
    "shortest": ("shortest", ""),
}


def shares(
    question: str,
    chosen: Chosen,
    answers: Sequence[ScoredAnswer],
    lines: Mapping[str, ScoredLine],
    settings: config.Answers,
) -> dict[str, float]:
    """Rival -> |same answers| / |answers of either|, as it would choose of the same answers; {} where it has no choice.

    A rival that reads figures is asked where all answers have them, "shortest" where lengths are known.
    """
    rows, valid = {pick.answer.row for pick in chosen.picks}, [one for one in answers if not one.error]
    if len(valid) < 2:
        return {}
    own = settings.score if policy_of(settings).scores else settings.policy
    found = {} if own == "random" else {"random": 1 / len(valid)}
    figures = [lines[one.row].values for one in valid if one.row in lines]
    for name, (policy, score) in RIVALS.items():
        offered = valid
        if name == own or (not score and not all(one.length for one in valid)):
            continue
        if score:
            if len(figures) < len(valid) or not all(need in of for of in figures for need in SCORES[score].needs):
                continue
            values = rate(score, figures, Context(settings.question_share))
            offered = [dataclasses.replace(one, score=value) for one, value in zip(valid, values, strict=True)]
        how = dataclasses.replace(settings, policy=policy, score=score or settings.score)
        best = choose(question, offered, how, random.Random(0))
        if isinstance(best, Chosen):
            taken = {pick.answer.row for pick in best.picks}
            found[name] = len(taken & rows) / len(taken | rows)
    return found
