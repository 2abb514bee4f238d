"""The held-out figures of a run as a plain-text table."""

import json
from pathlib import Path
from typing import Any

ROWS = (
    ("perplexity", "perplexity", "{:,.1f}"),
    ("KL to the teacher, nats", "kl", "{:.3f}"),
    ("top-1 agreement", "agreement", "{:.3f}"),
    ("next-token accuracy", "accuracy", "{:.3f}"),
    ("calibration error", "ece", "{:.3f}"),
    ("right answers to prompts", "answers", "{:.3f}"),
)


def figures(workdir: Path) -> str:
    """The first and the last evaluation in evals.jsonl, side by side with the teacher."""
    lines = (workdir / "evals.jsonl").read_text(encoding="utf-8").splitlines()
    return table(json.loads(lines[0]), json.loads(lines[-1]))


def table(before: dict[str, Any] | None, after: dict[str, Any]) -> str:
    """Evaluations as {"student": figures, "teacher": figures or None, "kl": ..., "agreement": ...}; None: no column."""
    title = f"held out: {after['tokens']:,} tokens"
    columns = {"student before": before, "student after": after}
    shown = {name: evaluation for name, evaluation in columns.items() if evaluation is not None}
    made = [f"{title:28}" + "".join(f"{name:>28}" for name in [*shown, "teacher"])]
    rows = [row for row in ROWS if row[1] != "answers" or after.get("answers")]
    for label, name, form in rows:
        cells = [_cell(e.get(name) or e["student"].get(name), form) for e in shown.values()]
        teacher = after.get("teacher") or {}
        made.append(f"{label:28}" + "".join(f"{cell:>28}" for cell in [*cells, _cell(teacher.get(name), form)]))
    made.append("[low, high]: 95 % bootstrap interval over held-out rows")
    if after.get("answers"):
        counts = after["answers"]
        judged = counts["right"] + counts["wrong"]
        made[-1] += f"; of answers Wilson, {judged} judged and {counts['undecided']} undecided"
    return "\n".join(made)


def _cell(estimate: dict[str, float | None] | None, form: str) -> str:
    if estimate is None or estimate["value"] is None:
        return "-"
    value = estimate["value"]
    if value >= 1e5:
        return f"{value:.1e}"
    low, high = (form.format(estimate[side]) for side in ("low", "high"))
    return f"{form.format(value)} [{low}, {high}]"
