"""`report.html` of a study: one self-contained page. Plain records in, text out; imports no JAX."""

from __future__ import annotations

import dataclasses
import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kdjax.analysis import report_page as page
from kdjax.analysis import study_table as tables
from kdjax.analysis.report_charts import COLOURS, MINUS, WIDTH, Series, arm_css, chart, linear_axis, number
from kdjax.analysis.study import TIMED, Study
from kdjax.analysis.study_stats import BETTER, NONE_SEEN, UNKNOWN, WORSE
from kdjax.analysis.study_table import Arm

Record = Mapping[str, Any]
NAMES, ROW, HEAD, FOOT = 128, 24, 8, 34  # of the difference plots: left margin, height of an arm, above, below
KINDS = {BETTER: "after", WORSE: "teacher", NONE_SEEN: "before", UNKNOWN: "before"}
BASE_CSS = """
main { max-width: 1080px; }
.arm { fill: var(--ink); font-size: 12px; }
.span { stroke: currentColor; stroke-width: 2.2; }
.keys { flex-wrap: wrap; gap: 0 12px; margin-left: 0; width: 100%; }
"""


def render(
    study: Study,
    records: Sequence[Record],
    arms: Sequence[Arm],
    missing: Sequence[str],
    notes: Sequence[str],
    command: str,
) -> str:
    """The page as text."""
    teacher = records[0]["teacher"]
    sections = [page.header(f"Study {study.name}", _lead(study, records))]
    for heading, kept in tables.split(arms, study.reference):
        sections.append(f"<h2>{heading}</h2>")
        sections.append(_plots(kept, study.reference))
        sections.append(_table(tables.value_rows(kept, teacher)))
        sections.append(_table(tables.difference_rows(kept, study.reference)))
        sections.append(_table(tables.cost_rows(kept, study.reference)))
    said = [tables.SAYS, tables.COSTS_SAY.format(reference=study.reference), *notes]
    sections += [f'<p class="note">{html.escape(text)}</p>' for text in said]
    sections.append(page.charts(_curves(records)))
    if missing:
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in missing)
        sections.append(f"<h2>Not there</h2>\n<ul>{lines}</ul>")
    config = {
        "base": dataclasses.asdict(study.base),
        "arms": {name: dict(fields) for name, fields in study.arms.items()},
    }
    sections.append(page.reproduce({"command": command, "versions": records[0]["versions"]}, config))
    return page.document(f"Study {study.name}", sections, css=BASE_CSS + arm_css())


def _lead(study: Study, records: Sequence[Record]) -> str:
    base = study.base
    rows = base.train.steps * base.train.batch_size
    covers = f"{rows * base.data.seq_len:,} tokens of {base.data.path}"
    judged = f"the same {records[0]['heldout_tokens']:,} held-out tokens"
    if base.prompts.answers or base.on_policy.fraction != 0:
        covers = f"{rows:,} answers to prompts of {base.prompts.path}"
        if not base.prompts.answers and base.on_policy.fraction != 1:
            covers = f"{rows:,} rows, text of {base.data.path} and answers to prompts of {base.prompts.path}"
        judged += f" of {base.data.path}"
        if base.eval.prompts:
            judged += f", and on answers to {base.eval.prompts} held-out prompts"
    return (
        f"{len(study.arms)} arms, seeds {', '.join(map(str, study.seeds))}; {len(records)} finished runs. Each arm "
        f"covers {covers}"
        + (f", and trains again for as long as {study.reference} took" if study.equal_time else "")
        + f". Judged on {judged}."
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join(f"<tr><th>{html.escape(row[0])}</th>{''.join(map(_cell, row[1:]))}</tr>" for row in rows[1:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    """A value; its interval and what may be said of it each on a line of their own."""
    value, interval, said = re.fullmatch(r"(.*?)(?: (\[.*\]))?(?: (\D+))?", text, re.DOTALL).groups("")  # type: ignore[union-attr]
    below = "".join(f"<small>{html.escape(part)}</small>" for part in (interval, said) if part)
    return f"<td>{html.escape(value)}{below}</td>"


def _plots(arms: Sequence[Arm], reference: str) -> str:
    """One plot of paired differences per figure."""
    made = [difference_plot(title, key, lower, arms, reference) for key, title, lower, _ in tables.figures_of(arms)]
    made = [one for one in made if one]
    return f'<div class="charts">{"".join(made)}</div>' if made else ""


def difference_plot(title: str, key: str, lower: bool, arms: Sequence[Arm], reference: str) -> str:
    """Arms one below the other, each difference with its interval, a line at 0; '' if no arm has an interval."""
    shown = [arm for arm in arms if key in arm.differences and math.isfinite(arm.differences[key].low)]
    if not shown:
        return ""
    ends = [end for arm in shown for end in (arm.differences[key].low, arm.differences[key].high)]
    axis = linear_axis(min(0.0, *ends), max(0.0, *ends))
    bottom, right = HEAD + ROW * len(shown), WIDTH - 14

    def x(value: float) -> float:
        return round(NAMES + axis.at(value) * (right - NAMES), 1)

    parts = [f'<path class="zero" d="M{x(0)} {HEAD}V{bottom}"/>']
    for tick in axis.ticks:
        label = number(tick, 2).replace("-", MINUS)
        parts.append(f'<path class="grid" d="M{x(tick)} {HEAD}V{bottom}"/>')
        parts.append(f'<text class="tick" x="{x(tick)}" y="{bottom + 15}" text-anchor="middle">{label}</text>')
    for at, arm in enumerate(shown):
        found, y = arm.differences[key], HEAD + ROW * at + ROW / 2
        kind = KINDS[arm.verdicts[key]]
        said = html.escape(f"{arm.name}: {tables.with_interval(found, 4, sign=True)}, {arm.verdicts[key]}")
        parts.append(
            f'<g class="{kind}"><title>{said}</title><text class="arm" x="{NAMES - 10}" y="{y + 4}" '
            f'text-anchor="end">{html.escape(arm.name)}</text>'
            f'<path class="span" d="M{x(found.low)} {y}H{x(found.high)}"/>'
            f'<circle class="dot" cx="{x(found.value)}" cy="{y}" r="3.6"/></g>'
        )
    better = "left" if lower else "right"
    name = html.escape(f"{title}, minus {reference}")
    return (
        f'<figure class="chart"><figcaption><b>{name}</b> <span class="unit">better is {better}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {bottom + FOOT}" role="img" aria-label="{name}">{"".join(parts)}</svg></figure>'
    )


def _curves(records: Sequence[Record]) -> list[str]:
    """Held-out perplexity on the way, mean and range over seeds: over tokens covered, over seconds of work."""
    plain = [record for record in records if not record["timed"]]
    timed = [record for record in records if record["timed"]]
    kinds = {arm: f"arm{at % len(COLOURS)}" for at, arm in enumerate(dict.fromkeys(r["arm"] for r in records))}
    unit = "band: lowest to highest seed"
    title = "Held-out perplexity on the way"
    made = [chart(f"{title}, equal tokens", unit, _lines(plain, kinds, False), x_unit="tokens covered", log=True)]
    made.append(chart(f"{title}, equal tokens", unit, _lines(plain, kinds, True), x_unit="seconds of work", log=True))
    if timed:
        made.append(chart(f"{title}, equal time", unit, _lines(timed, kinds, True), x_unit="seconds of work", log=True))
    return made


def _lines(records: Sequence[Record], kinds: Mapping[str, str], over_time: bool) -> list[Series]:
    by_arm: dict[str, list[Record]] = {}
    for record in records:
        by_arm.setdefault(record["name"], []).append(record)
    lines = []
    for name, found in by_arm.items():
        costs = [record["costs"] for record in found]
        if over_time and any(cost["total_seconds"] is None for cost in costs):
            continue
        steps = [point["step"] for point in found[0]["curve"]]
        by_step = [{p["step"]: p["perplexity"] or math.nan for p in record["curve"]} for record in found]
        values = [[curve.get(step, math.nan) for curve in by_step] for step in steps]
        x = [sum(_at(cost, step, over_time) for cost in costs) / len(costs) for step in steps]
        middle, low, high = ([pick(v) for v in values] for pick in (_mean, min, max))
        label = name.removesuffix(TIMED)
        lines.append(Series(label, x, middle, kinds[found[0]["arm"]], low, high, dots=True))
    return lines


def _at(cost: Record, step: int, over_time: bool) -> float:
    """Where a step lies on the axis."""
    if over_time:
        return float(cost["preparation_seconds"] + step * cost["seconds_per_step"])
    return float(cost["tokens_covered"] * step / cost["steps"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
