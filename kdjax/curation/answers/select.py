"""Which of a question's admitted answers is trained on: by what it costs the student, or by a rule without scores.

To add a policy: a function (the valid answers of a question, settings, draws) -> picks, and a line in POLICIES.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence

from kdjax import config, registry
from kdjax.curation.answers.scores import SCORES, AnswerScore, lark_weights
from kdjax.curation.answers.teacher_scores import TEACHER_SCORES, TeacherScore

MIX_LONG = 0.2  # mix: share of the questions with a long answer, long : short = 1 : 4 in the code of 2502.12143


@dataclasses.dataclass(frozen=True)
class ScoredAnswer:
    """What a choice reads of an answer. score: NaN = none. length: in tokens. error: why it cannot be trained on."""

    row: str
    teacher: str
    score: float = math.nan
    length: int = 0
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Pick:
    """A chosen answer. rank: its place among the valid ones, 1 = preferred; group: of cost; 0 where there is none."""

    answer: ScoredAnswer
    rank: int = 0
    group: int = 0


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What is trained on. forced: there was one valid answer only. ranked: all valid ones with their groups."""

    picks: tuple[Pick, ...]
    forced: bool
    ranked: tuple[Pick, ...]


@dataclasses.dataclass(frozen=True)
class Dropped:
    """Nothing is. reason: one of DROPPED. ranked: as in `Chosen`."""

    reason: str
    ranked: tuple[Pick, ...] = ()


DROPPED = (
    "no_answer",  # none is admitted
    "no_valid_answer",  # all have errors or no score
    "small_pool",  # the group is empty
    "other_teachers",  # none is of a teacher that is asked for
)


def group_of(rank: int, answers: int, groups: int) -> int:
    """g(r) = min(G, max(1, ceil(r G / M))), in whole numbers; r = 1 .. M."""
    return min(groups, max(1, -(-rank * groups // answers)))


def _group(ranked: Sequence[Pick], settings: config.Answers, draws: random.Random) -> list[Pick]:
    """One of a group, each alike. Every group that is not empty is drawn from, as released: groups do not interact."""
    members: dict[int, list[Pick]] = {}
    for pick in ranked:
        members.setdefault(pick.group, []).append(pick)
    drawn = {group: draws.choice(members[group]) for group in sorted(members)}
    if settings.group in drawn:
        return [drawn[settings.group]]
    if settings.small_pool == "official":
        return []
    return [drawn[min(drawn, key=lambda group: (abs(group - settings.group), group))]]


def _best(ranked: Sequence[Pick], _: config.Answers, __: random.Random) -> list[Pick]:
    return [dataclasses.replace(ranked[0], group=0)]


def _weighted(ranked: Sequence[Pick], settings: config.Answers, draws: random.Random) -> list[Pick]:
    """One of the three best, as often as LARK weighs it: on average that is the loss of the three by their weights."""
    sign = -1 if score_of(settings).lower else 1
    weights = lark_weights([sign * pick.answer.score for pick in ranked])
    return [dataclasses.replace(draws.choices(ranked, weights)[0], group=0)]


def _random(valid: Sequence[Pick], _: config.Answers, draws: random.Random) -> list[Pick]:
    return [draws.choice(valid)]


def _all(valid: Sequence[Pick], _: config.Answers, __: random.Random) -> list[Pick]:
    return list(valid)


def _shortest(valid: Sequence[Pick], _: config.Answers, __: random.Random) -> list[Pick]:
    return [min(valid, key=lambda pick: pick.answer.length)]


def _longest(valid: Sequence[Pick], _: config.Answers, __: random.Random) -> list[Pick]:
    return [max(valid, key=lambda pick: pick.answer.length)]


def _mix(valid: Sequence[Pick], settings: config.Answers, draws: random.Random) -> list[Pick]:
    """The longest answer to one question in five, by draw, the shortest to the others."""
    return (_longest if draws.random() < MIX_LONG else _shortest)(valid, settings, draws)


@dataclasses.dataclass(frozen=True)
class Policy:
    """pick: of the valid answers. scores, lengths: does it read these? teachers: are they scored in place of answers?

    few: is it given the answers of some teachers alone? none: why a question is left with nothing.
    """

    pick: Callable[[Sequence[Pick], config.Answers, random.Random], list[Pick]]
    scores: bool = False
    lengths: bool = False
    teachers: bool = False
    few: bool = False
    none: str = "no_valid_answer"


_FEW = Policy(_random, few=True, none="other_teachers")

POLICIES: dict[str, Policy] = {
    "group": Policy(_group, scores=True, none="small_pool"),  # of answers.groups of equal size, answers.group; SCAS
    "best": Policy(_best, scores=True),  # the preferred one
    "weighted": Policy(_weighted, scores=True),  # one of the three best, the better the likelier, 2605.30651
    "random": Policy(_random),
    "all": Policy(_all),
    "shortest": Policy(_shortest, lengths=True),
    "longest": Policy(_longest, lengths=True),
    "strongest": _FEW,  # of the teacher that is right most often; of equals one of their answers is drawn
    "teacher": _FEW,  # of answers.teacher
    "best_teacher": dataclasses.replace(_FEW, teachers=True),  # of whom answers.score rates best; of equals as above
    "mix": Policy(_mix, lengths=True),  # long and short answers, 2502.12143
}


def policy_of(settings: config.Answers) -> Policy:
    """The entry that answers.policy names. Raises ValueError for an unknown one."""
    return registry.lookup(POLICIES, settings.policy, "answers.policy")


def score_read(settings: config.Answers) -> str:
    """The name in answers.score; "" where answers.policy reads no score."""
    policy = policy_of(settings)
    return settings.score if policy.scores or policy.teachers else ""


def score_of(settings: config.Answers) -> AnswerScore | TeacherScore:
    """What answers.score names: a score of teachers with policy "best_teacher", of answers with the others.

    Raises ValueError for an unknown one, which says so if it is of the other kind.
    """
    of_teachers = policy_of(settings).teachers
    table: Mapping[str, AnswerScore | TeacherScore] = TEACHER_SCORES if of_teachers else SCORES
    if settings.score not in table and settings.score in (SCORES if of_teachers else TEACHER_SCORES):
        kind, needed = ("teachers", "'group', 'best' or 'weighted'") if of_teachers else ("answers", "'best_teacher'")
        raise ValueError(
            f"answers.score must rate {kind} with answers.policy={settings.policy!r}, got {settings.score!r}, which is "
            f"for answers.policy={needed}.{registry.did_you_mean(settings.score, table)}"
        )
    return registry.lookup(table, settings.score, "answers.score")


def choose(
    question: str,
    scored: Sequence[ScoredAnswer],
    settings: config.Answers,
    draws: random.Random,
    teachers: Collection[str] = (),
) -> Chosen | Dropped:
    """The answer (all: answers) to a question that is trained on; no one with an error or, where it counts, no score.

    Answers are ranked by (score, teacher, row), the preferred first whether its score is low or high, and without
    scores taken in the order of (teacher, row): the order of `scored` does not matter. draws: one generator for all
    questions, which come in the order of their ids as JSON. teachers: whose answers a policy of a few teachers draws
    from, each alike. Raises ValueError for an unknown policy or score, and for a row that comes twice.
    """
    policy = policy_of(settings)
    if len({answer.row for answer in scored}) < len(scored):
        raise ValueError(f"the answers to {question!r} must be different rows, got one twice.")
    valid = [answer for answer in scored if not answer.error]
    if policy.scores:
        sign = 1 if score_of(settings).lower else -1
        valid = [answer for answer in valid if math.isfinite(answer.score)]
        valid.sort(key=lambda answer: (sign * answer.score, answer.teacher, answer.row))
        count = len(valid)
        ranked = tuple(
            Pick(answer, rank, group_of(rank, count, settings.groups)) for rank, answer in enumerate(valid, 1)
        )
    else:
        ranked = tuple(map(Pick, sorted(valid, key=lambda answer: (answer.teacher, answer.row))))
    if not ranked:
        return Dropped("no_valid_answer" if scored else "no_answer")
    offered = [pick for pick in ranked if pick.answer.teacher in teachers] if policy.few else ranked
    picks = policy.pick(offered, settings, draws) if offered else []
    if not picks:
        return Dropped(policy.none, ranked)
    return Chosen(tuple(picks), len(ranked) == 1, ranked)
