"""Which answers were selected, round by round: a page from plain records. Imports no JAX."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdjax.analysis import report_page as page
from kdjax.analysis.report_charts import COLOURS, DASH, Series, arm_css, chart, number
from kdjax.run_log import duration, write_whole

# name, field of a round
COUNTS = (
    ("Answers selected", "selected"),
    ("Questions with one answer alone", "forced"),
    ("Answers scored", "answers_scored"),
    ("Tokens scored, with padding", "tokens_scored"),
    ("Tokens trained, with padding", "tokens_trained"),
)
# name, end of two fields of a round, how it is shown
COSTS = (("time", "seconds", duration), ("FLOPs", "flops", number))
CSS = """
.charts { align-items: end; }
.keys { flex-wrap: wrap; gap: 0 12px; margin-left: 0; width: 100%; }
.tile .now { overflow-wrap: anywhere; }
"""


@dataclasses.dataclass(frozen=True)
class CostGroup:
    """The ranked answers of one cost group over all questions: means of score, d_A and length in tokens.

    group: 1 = the preferred one.
    """

    group: int
    answers: int
    score: float = math.nan
    answer_nll: float = math.nan
    n_answer: float = math.nan


@dataclasses.dataclass(frozen=True)
class Round:
    """One choice of answers. Counts are integers, what is not known is NaN.

    step: of training, at which the student chose. questions: of the pool, with an answer or dropped. teachers: name ->
    answers selected. dropped: reason -> questions. forced: questions with one answer alone. overlap: name of another
    selection -> mean over questions of |same answers| / |answers of either|, in [0, 1]; of "random" what to expect.
    score, answer_nll: means over the selected answers. tokens_*: with padding. same_family: share of the selected from
    teachers of the student's family; usable_of_family: admitted answers of these. Seconds and FLOPs: of scoring for
    this choice, and of the training on it. teacher_scores: where one teacher is chosen; None = it has none.
    taken_teachers: whose answers alone were drawn from; [] = all's.
    """

    step: int
    questions: int
    teachers: Mapping[str, int]
    dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    forced: int = 0
    groups: Sequence[CostGroup] = ()
    overlap: Mapping[str, float] = dataclasses.field(default_factory=dict)
    score: float = math.nan
    answer_nll: float = math.nan
    same_family: float = math.nan
    usable_of_family: int | None = None
    answers_scored: int = 0
    tokens_scored: int = 0
    tokens_trained: int = 0
    scoring_seconds: float = math.nan
    training_seconds: float = math.nan
    scoring_flops: float = math.nan
    training_flops: float = math.nan
    teacher_scores: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    taken_teachers: Sequence[str] = ()

    @property
    def selected(self) -> int:
        """Answers selected."""
        return sum(self.teachers.values())


def round_of(counts: Mapping[str, Any], *, step: int, **rest: Any) -> Round:
    """A round by the counts in the manifest of selected.jsonl. rest: the fields that are not among them."""
    groups = [CostGroup(int(group), **means) for group, means in counts["means_of_groups"].items()]
    named = {name: counts[name] for name in ("questions", "teachers", "dropped", "forced")}
    named |= {"taken_teachers": counts.get("taken_teachers", ()), "overlap": counts.get("overlap", {})}
    if family := counts.get("same_family"):
        named |= {"same_family": family["selected"] / counts["rows"], "usable_of_family": family["admitted"]}
    return Round(step=step, groups=groups, **named, **rest)


def write_answers(out: Path, rounds: Sequence[Round], pool: Mapping[str, Mapping[str, int]], **said: str) -> Path:
    """Write the page; its path is returned. said: as of `render`. Raises OSError if it cannot be written."""
    write_whole(out, render(rounds, pool, **said))
    return out


def render(
    rounds: Sequence[Round],
    pool: Mapping[str, Mapping[str, int]],
    *,
    name: str,
    score: str = "scas",
    chosen: str = "",
    command: str = "",
) -> str:
    """The page as text.

    pool: teacher -> {reason: rows}, "" = admitted, as in the manifest of admitted.jsonl. name: of the experiment.
    score: by which answers are ranked, "" = by none. chosen: how, a sentence.
    """
    title = f"Selected answers: {name}"
    sections = [page.header(title, _lead(rounds, pool, score, chosen)), _tiles(rounds)]
    over_rounds = [_teacher_chart(rounds), _overlap_chart(rounds), *_mean_charts(rounds, score)]
    sections.append(_section("Rounds", over_rounds if len(rounds) > 1 else [], _figures(rounds, score)))
    sections.append(_section("Teachers", [], _teachers(rounds, pool)))
    sections.append(_section("Cost groups", _group_charts(rounds, score), _groups(rounds, score)))
    sections.append(_section("Other selections", [], _overlap(rounds)))
    sections.append(_section("Questions without an answer", [], _dropped(rounds)))
    sections.append(_section("The pool", [], _pool(pool)))
    sections.append(page.reproduce({"command": command}, {}))
    return page.document(title, sections, css=CSS + arm_css())


def _lead(rounds: Sequence[Round], pool: Mapping[str, Mapping[str, int]], score: str, chosen: str) -> str:
    rows = sum(sum(reasons.values()) for reasons in pool.values())
    text = f"{rows:,} answers of {len(pool)} teachers in the pool. " if pool else ""
    if not rounds:
        return text + "Nothing is selected yet."
    last, by = rounds[-1], f" by {score}" if score else ""
    text += f"{len(rounds)} rounds of selection{by}; in the last, " if len(rounds) > 1 else f"Selected{by}: "
    answered = last.questions - sum(last.dropped.values())
    text += f"{last.selected:,} answers to {answered:,} of {last.questions:,} questions. {chosen}"
    return text.strip()


def _tiles(rounds: Sequence[Round]) -> str:
    """The three figures to take away."""
    if not rounds or not rounds[-1].selected:
        return ""
    last, made = rounds[-1], []
    who = max(last.teachers, key=lambda teacher: (last.teachers[teacher], teacher))
    made.append(("Most selected teacher", f"{_percent(_share(last, who))} %", who))
    closest = {other: value for other, value in last.overlap.items() if math.isfinite(value)}
    if closest:
        other = max(closest, key=lambda name: closest[name])
        made.append(("Nearest other selection", f"{_percent(closest[other])} %", f"the same as {other}"))
    spent, trained = (
        [seconds for each in rounds if math.isfinite(seconds := getattr(each, f"{what}_seconds"))]
        for what in ("scoring", "training")
    )
    if spent:
        beside = f"beside {duration(sum(trained))} of training" if trained else "for all rounds"
        made.append(("Scoring", duration(sum(spent)), beside))
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><div class="name">{what}</div><div class="now">{value}</div>'
        f'<div class="was">{page.esc(told)}</div></div>'
        for what, value, told in made
    ) + "</div>"  # fmt: skip


def _section(heading: str, drawn: Sequence[str], table: str) -> str:
    drawn = [one for one in drawn if one]
    charts = f'<div class="charts">{"".join(drawn)}</div>\n' if drawn else ""
    return f"<h2>{heading}</h2>\n{charts}{table}" if drawn or table else ""


# --- charts


def _teacher_chart(rounds: Sequence[Round]) -> str:
    """Shares of the teachers over the rounds: the most selected ones, the others together."""
    totals: dict[str, int] = {}
    for each in rounds:
        for teacher, count in each.teachers.items():
            totals[teacher] = totals.get(teacher, 0) + count
    ranked = sorted(totals, key=lambda teacher: (-totals[teacher], teacher))
    shown = ranked if len(ranked) <= len(COLOURS) else ranked[: len(COLOURS) - 1]
    named = {teacher: [_share(each, teacher) for each in rounds] for teacher in shown}
    if len(shown) < len(ranked):
        rest = ranked[len(shown) :]
        named[f"{len(rest)} others"] = [math.fsum(_share(each, teacher) for teacher in rest) for each in rounds]
    return _percentages("Share of the selected answers", "%", named)


def _overlap_chart(rounds: Sequence[Round]) -> str:
    names = list(dict.fromkeys(name for each in rounds for name in each.overlap))[: len(COLOURS)]
    named = {name: [each.overlap.get(name, math.nan) for each in rounds] for name in names}
    return _percentages("Same answer as", "%, mean over questions", named)


def _percentages(title: str, unit: str, named: Mapping[str, Sequence[float]]) -> str:
    """A line over the rounds for each name."""
    lines = [
        Series(name, _numbers(values), [100 * value for value in values], f"arm{at}", dots=True)
        for at, (name, values) in enumerate(named.items())
    ]
    return chart(title, unit, lines, x_unit="round")


def _mean_charts(rounds: Sequence[Round], score: str) -> list[str]:
    made = []
    names = ((f"Mean {score} of the selected", "", "score"), ("Their mean NLL", "nats", "answer_nll"))
    for title, unit, key in names if score else ():
        line = Series("", _numbers(rounds), [getattr(each, key) for each in rounds], "after", dots=True)
        made.append(chart(title, unit, [line], x_unit="round"))
    return made


def _group_charts(rounds: Sequence[Round], score: str) -> list[str]:
    """Means per cost group, in the first and in the last round."""
    ends = [("first round", "before", each) for each in rounds[:1] if len(rounds) > 1]
    ends += [("last round" if ends else "", "after", each) for each in rounds[-1:]]
    made = []
    for title, unit, key in (
        (score, "", "score"),
        ("Mean NLL", "nats", "answer_nll"),
        ("Length", "tokens", "n_answer"),
    ):
        marks = []
        for label, kind, each in ends:
            x, y = [float(group.group) for group in each.groups], [getattr(group, key) for group in each.groups]
            marks.append(Series(label, x, y, kind, dots=True))
        made.append(chart(title, unit, marks, x_unit="cost group"))
    return made


# --- tables


def _teachers(rounds: Sequence[Round], pool: Mapping[str, Mapping[str, int]]) -> str:
    names = dict.fromkeys([*pool, *(teacher for each in rounds for teacher in each.teachers)])
    last = rounds[-1] if rounds else None
    order = sorted(names, key=lambda t: (-(last.teachers.get(t, 0) if last else 0), t))
    scored = [(at, each.teacher_scores) for at, each in enumerate(rounds, 1) if each.teacher_scores]
    heads = ["Teacher", *(["Right and usable"] if pool else []), *_heads(rounds, "%")]
    heads += [f"Score in round {at}" for at, _ in scored]
    rows = []
    for teacher in order:
        usable = [f"{pool.get(teacher, {}).get('', 0):,}"] if pool else []
        scores = (of.get(teacher) for _, of in scored)
        rated = (DASH if score is None else number(score) for score in scores)
        rows.append([teacher, *usable, *(_percent(_share(each, teacher)) for each in rounds), *rated])
    if any(math.isfinite(each.same_family) for each in rounds):
        known = next((each.usable_of_family for each in reversed(rounds) if each.usable_of_family is not None), None)
        usable = ["" if known is None else f"{known:,}"] if pool else []
        shares = (_percent(each.same_family) for each in rounds)
        rows.append(["of the student's family", *usable, *shares, *([""] * len(scored))])
    return _table(heads, rows) if rows and rounds else ""


def _groups(rounds: Sequence[Round], score: str) -> str:
    if not rounds or not rounds[-1].groups:
        return ""
    rows = [
        [str(each.group), f"{each.answers:,}", number(each.score), number(each.answer_nll), number(each.n_answer)]
        for each in rounds[-1].groups
    ]
    said = "Of all ranked answers, in the last round; group 1 is preferred. Means."
    table = _table(["Group", "Answers", score, "Mean NLL, nats", "Length, tokens"], rows)
    return f'{table}\n<p class="note">{said}</p>'


def _overlap(rounds: Sequence[Round]) -> str:
    names = list(dict.fromkeys(name for each in rounds for name in each.overlap))
    rows = [[name, *(_percent(each.overlap.get(name, math.nan)) for each in rounds)] for name in names]
    note = (
        '<p class="note">Same answers among those of either selection, mean over the questions with two answers or '
        "more; of random what to expect.</p>"
    )
    return _table(["Selection", *_heads(rounds, "%")], rows) + note if rows else ""


def _figures(rounds: Sequence[Round], score: str) -> str:
    """What was selected in each round, and tokens, seconds and FLOPs of scoring against training."""
    if not rounds:
        return ""
    rows = [["At step", *(f"{each.step:,}" for each in rounds)]]
    for name, key in COUNTS:
        rows.append([name, *(f"{getattr(each, key):,}" for each in rounds)])
    if any(len(each.taken_teachers) > 1 for each in rounds):
        rows.append(["Drawn from equal teachers", *(", ".join(each.taken_teachers) or DASH for each in rounds)])
    names = ((f"Mean {score} of the selected", "score"), ("Their mean NLL, nats", "answer_nll"))
    for name, key in names if score else ():
        rows.append([name, *(number(getattr(each, key)) for each in rounds)])
    for name, key, show in COSTS:
        of_both = [[getattr(each, f"{side}_{key}") for each in rounds] for side in ("scoring", "training")]
        for side, values in zip(("Scoring", "Training"), of_both, strict=True):
            rows.append([f"{side}, {name}", *(show(value) if math.isfinite(value) else DASH for value in values)])
        ratios = (spent / trained if trained > 0 else math.nan for spent, trained in zip(*of_both, strict=True))
        rows.append([f"Scoring to training, {name}", *(number(ratio, 2) for ratio in ratios)])
    return _table(["", *_heads(rounds, "")], rows)


def _dropped(rounds: Sequence[Round]) -> str:
    reasons = list(dict.fromkeys(reason for each in rounds for reason in each.dropped))
    rows = [[reason, *(f"{each.dropped.get(reason, 0):,}" for each in rounds)] for reason in reasons]
    return _table(["Reason", *_heads(rounds, "")], rows) if rows else ""


def _pool(pool: Mapping[str, Mapping[str, int]]) -> str:
    found = dict.fromkeys(reason for counts in pool.values() for reason, count in counts.items() if reason and count)
    reasons = list(found)
    rows = [
        [teacher, f"{sum(counts.values()):,}", *(f"{counts.get(reason, 0):,}" for reason in ("", *reasons))]
        for teacher, counts in sorted(pool.items())
    ]
    return (
        _table(["Teacher", "Rows", "Admitted", *(reason.replace("_", " ") for reason in reasons)], rows) if rows else ""
    )


def _heads(rounds: Sequence[Round], unit: str) -> list[str]:
    """A column per round."""
    return [f"Round {at}{f', {unit}' if unit else ''}" for at in range(1, len(rounds) + 1)]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column names the row; everything is escaped."""
    head = "".join(f"<th>{page.esc(cell)}</th>" for cell in heads)
    body = "".join(
        f"<tr><th>{page.esc(row[0])}</th>{''.join(f'<td>{page.esc(cell)}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _numbers(of_rounds: Sequence[object]) -> list[float]:
    return [float(at) for at in range(1, len(of_rounds) + 1)]


def _share(each: Round, teacher: str) -> float:
    return each.teachers.get(teacher, 0) / each.selected if each.selected else math.nan


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}" if math.isfinite(fraction) else DASH
