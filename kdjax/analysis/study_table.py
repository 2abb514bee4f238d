"""The tables of a study: what each arm reached, how it differs from the reference, what it cost. Plain text and data.

Imports no JAX.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdjax.analysis.study import TIMED
from kdjax.analysis.study_stats import BETTER, NONE_SEEN, UNKNOWN, WORSE, Mean, mean, paired, ratio, verdict

Record = Mapping[str, Any]
MIB = 2**20

# key, title, is lower better?, digits after the point
FIGURES = (
    ("perplexity", "perplexity", True, 1),
    ("kl", "KL to the teacher, nats", True, 3),
    ("agreement", "top-1 agreement", False, 3),
    ("accuracy", "next-token accuracy", False, 3),
    ("ece", "calibration error", True, 3),
    ("answers", "right answers to prompts", False, 3),  # where prompts were asked
)
SAYS = (
    f"[low, high]: 95 % interval over seeds (Student's t), of the mean or of the paired difference. '{BETTER}' or "
    f"'{WORSE}': this interval of the difference does not hold 0; '{NONE_SEEN}': it does; '{UNKNOWN}': fewer than two "
    "seeds, or seeds that change nothing. No correction for the number of comparisons; all runs are judged on the same "
    "text, and how the figures would vary over other texts is not in these intervals."
)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One line of the tables. values, differences: by figure; costs, ratios (to the reference): by cost."""

    name: str
    seeds: tuple[int, ...]
    values: Mapping[str, Mean]
    differences: Mapping[str, Mean]
    verdicts: Mapping[str, str]
    costs: Mapping[str, Mean]
    ratios: Mapping[str, Mean]


def summarise(records: Sequence[Record], reference: str) -> list[Arm]:
    """The arms in the order of their first record, those under equal time compared with the same reference."""
    by_arm: dict[str, dict[int, Record]] = {}
    for record in records:
        by_arm.setdefault(record["name"], {})[record["seed"]] = record
    base = by_arm.get(reference, {})
    return [_arm(name, found, base, name == reference) for name, found in by_arm.items()]


def _arm(name: str, found: Mapping[int, Record], base: Mapping[int, Record], is_reference: bool) -> Arm:
    values, differences, verdicts = {}, {}, {}
    for key, _, lower, _ in FIGURES:
        mine, theirs = (_column(records, "figures", key) for records in (found, base))
        values[key] = mean(list(mine.values()))
        if not is_reference:
            differences[key] = paired(mine, theirs)
            verdicts[key] = verdict(differences[key], lower)
    costs, ratios = {}, {}
    for key in next(iter(found.values()))["costs"]:
        mine, theirs = (_column(records, "costs", key) for records in (found, base))
        costs[key] = mean(list(mine.values()))
        ratios[key] = ratio(mine, theirs)
    return Arm(name, tuple(sorted(found)), values, differences, verdicts, costs, ratios)


def _column(records: Mapping[int, Record], group: str, key: str) -> dict[int, float]:
    """seed -> the figure or cost, where it is known."""
    cells = {seed: record[group].get(key) for seed, record in records.items()}
    plain = {seed: cell["value"] if isinstance(cell, Mapping) else cell for seed, cell in cells.items()}
    return {seed: float(value) for seed, value in plain.items() if value is not None}


def text(
    title: str,
    arms: Sequence[Arm],
    reference: str,
    teacher: Record | None,
    missing: Sequence[str],
    notes: Sequence[str],
) -> str:
    """All tables as Markdown that also reads well as it is."""
    parts = [f"# {title}"]
    for heading, kept in split(arms, reference):
        parts += [f"## {heading}", markdown(value_rows(kept, teacher)), markdown(difference_rows(kept, reference))]
        parts += [markdown(cost_rows(kept, reference))]
    parts += [SAYS, COSTS_SAY.format(reference=reference), *notes]
    if missing:
        parts.append("Not there:\n" + "\n".join(f"- {line}" for line in missing))
    return "\n\n".join(part for part in parts if part) + "\n"


def split(arms: Sequence[Arm], reference: str) -> list[tuple[str, list[Arm]]]:
    """(heading, arms) of the two protocols, the reference in both; a protocol without other arms is left out."""
    plain = [arm for arm in arms if not arm.name.endswith(TIMED)]
    timed = [arm for arm in arms if arm.name.endswith(TIMED)]
    both = [("Equal tokens", plain)] if plain else []
    if timed:
        both.append(("Equal time", [arm for arm in plain if arm.name == reference] + timed))
    return both


def figures_of(arms: Sequence[Arm]) -> list[tuple[str, str, bool, int]]:
    """The lines of FIGURES that some arm has."""
    return [line for line in FIGURES if line[0] != "answers" or any(arm.values["answers"].n for arm in arms)]


def value_rows(arms: Sequence[Arm], teacher: Record | None) -> list[list[str]]:
    """Arms x figures: mean and interval over seeds."""
    figures = figures_of(arms)
    rows = [["held out", "seeds", *(title for _, title, _, _ in figures)]]
    for arm in arms:
        cells = [with_interval(arm.values[key], digits) for key, _, _, digits in figures]
        rows.append([arm.name, str(len(arm.seeds)), *cells])
    if teacher:
        known = [(teacher.get(key) or {}).get("value") for key, *_ in figures]
        cells = [decimal(math.nan if v is None else v, f[3]) for v, f in zip(known, figures, strict=True)]
        rows.append(["(teacher)", "", *cells])
    return rows


def difference_rows(arms: Sequence[Arm], reference: str) -> list[list[str]]:
    """Arms x figures: paired difference to the reference, its interval, and what may be said; [] without a pair."""
    figures = figures_of(arms)
    rows = [[f"minus {reference}", "pairs", *(title for _, title, _, _ in figures)]]
    for arm in arms:
        if not arm.differences or not max(d.n for d in arm.differences.values()):
            continue
        cells = [
            f"{with_interval(arm.differences[key], digits, sign=True)} {arm.verdicts[key]}"
            for key, _, _, digits in figures
        ]
        rows.append([arm.name, str(arm.differences[FIGURES[0][0]].n), *cells])
    return rows if len(rows) > 1 else []


COSTS_SAY = (
    "Costs are means over seeds. Tokens covered: of the rows gone through, with those that were scored and left out; "
    "trained on: of the rows in the steps; supervised: positions in the loss. Steps: median seconds per step, without "
    "start-up and compilation, times steps. Scoring of answers: of all choices, whichever run paid for it. "
    "Scoring and caching: of the passes over the text alone, where the scripts "
    "say it. Work: both together; its ratio is to {reference}, seed by seed, [95 % interval]. Commands: curate, "
    "cache_teacher and train from start to end, with start-up, compilation, checkpoints and the evaluations on the "
    "way. Temporary: of the compiled step; arguments: weights of the models that it takes, optimiser, batch. "
    "Resident: of the largest of these commands."
)


def significant(value: float) -> str:
    """Three significant digits, whole from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


# title, cost, how it is written
COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("steps", "steps", "{:,.0f}".format),
    ("tokens covered", "tokens_covered", "{:,.0f}".format),
    ("trained on", "tokens_trained", "{:,.0f}".format),
    ("supervised", "targets_supervised", "{:,.0f}".format),
    ("answer tokens trained on", "answer_tokens", "{:,.0f}".format),
    ("tokens scored, with padding", "scored_tokens", "{:,.0f}".format),
    ("scoring of answers, s", "scoring_seconds", significant),
    ("seconds per step", "seconds_per_step", significant),
    ("steps, s", "steps_seconds", significant),
    ("scoring + caching, s", "preparation_seconds", significant),
    ("work, s", "total_seconds", significant),
    ("commands, s", "whole_seconds", significant),
    ("processor, s", "processor_seconds", significant),
    ("temporary, MiB", "temporary_bytes", lambda v: significant(v / MIB)),
    ("arguments, MiB", "argument_bytes", lambda v: significant(v / MIB)),
    ("resident at most, MiB", "resident_bytes", lambda v: significant(v / MIB)),
    ("cache, MiB", "cache_bytes", lambda v: significant(v / MIB)),
)


def cost_rows(arms: Sequence[Arm], reference: str) -> list[list[str]]:
    """Costs x arms, then work and steps alone as parts of the reference's, and the cache's bytes per token of text."""
    rows = [["costs", *(arm.name for arm in arms)]]
    rows += [[title, *(_known(arm.costs.get(key), form) for arm in arms)] for title, key, form in COSTS]
    for title, key in (("work", "total_seconds"), ("steps", "steps_seconds")):
        parts = ["1" if arm.name == reference else with_interval(arm.ratios[key], 2) for arm in arms]
        rows.append([f"{title} / {reference}", *parts])
    per_token = []
    for arm in arms:
        stored, tokens = arm.costs["cache_bytes"], arm.costs["tokens_of_text"]
        per_token.append(f"{stored.value / tokens.value:.2f}" if stored.n and tokens.value else "-")
    rows.append(["cache, bytes per token of the text", *per_token])
    return [row for at, row in enumerate(rows) if not at or any(cell != "-" for cell in row[1:])]


def _known(cost: Mean | None, form: Callable[[float], str]) -> str:
    return "-" if cost is None or not cost.n else form(cost.value)


def with_interval(found: Mean, digits: int, sign: bool = False) -> str:
    """'172.3 [168.1, 176.5]'; without an interval the value alone, '-' without a value."""
    if not found.n:
        return "-"
    value, low, high = (decimal(v, digits, sign) for v in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]" if math.isfinite(found.low) else value


def decimal(value: float, digits: int, sign: bool = False) -> str:
    """A number with `digits` after the point, in powers of ten from 1e5 on."""
    if not math.isfinite(value):
        return "-"
    plus = "+" if sign else ""
    return f"{value:{plus}.2g}" if abs(value) >= 1e5 else f"{value:{plus},.{digits}f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are also aligned; the first to the left, the others to the right; '' for none."""
    if not rows:
        return ""
    widths = [max(3, *(len(row[at]) for row in rows)) for at in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        filled = [c.rjust(w) if at else c.ljust(w) for at, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(filled) + " |"

    rule = ["-" * width if not at else "-" * (width - 1) + ":" for at, width in enumerate(widths)]
    return "\n".join([line(rows[0]), line(rule), *(line(row) for row in rows[1:])])


def notes_on(records: Sequence[Record]) -> list[str]:
    """The machine, and what makes a figure of the tables say less than it seems to."""
    machines = list(dict.fromkeys(record["hardware"] for record in records if record["hardware"]))
    notes = [f"Hardware: {machines[0]}."] if len(machines) == 1 else []
    if len(machines) > 1:
        notes.append(f"Run on different machines, so that times do not compare: {'; '.join(machines)}.")
    by_arm = dict[str, list[Record]]()
    for record in records:
        by_arm.setdefault(record["name"], []).append(record)
    same = [
        name
        for name, found in by_arm.items()
        if len(found) > 1 and len({record["figures"]["nll"]["value"] for record in found}) == 1
    ]
    if same:
        notes.append(
            f"All seeds of {', '.join(same)} gave the same figures: nothing that a seed sets has an effect there, "
            "and the interval says nothing."
        )
    lost = [
        f"{r['name']}/{r['seed']} {phase}" for r in records for phase, e in r["phases"].items() if e["seconds"] is None
    ]
    if lost:
        notes.append(f"Killed and gone on with, so without a time of the whole command: {', '.join(lost)}.")
    again = [f"{r['name']}/{r['seed']} {p}" for r in records for p, e in r["phases"].items() if e["attempts"] > 1]
    if again:
        notes.append(f"Took more than one attempt, of which the time is the sum: {', '.join(again)}.")
    return notes
