"""`report.html` of a run: one self-contained page from the plain files in its workdir. Imports no JAX.

Reads (all optional, but one of the first two must be there):
  metrics.jsonl     {"step": 7, "seconds": 12.3, "loss": 2.1, "learning_rate": 4e-4, "tokens_per_second": 812.0, ...}
  evals.jsonl       {"step": 0, "which": "student", **evals.Evaluation.to_dict()}: the line of the lowest step is
                    "before", that of the highest "after"
  config.json       the experiment; its "name" is the title
  report_data.json  what only the loop knows, every field optional:
    {"summary": {"teacher": "SmolLM2-135M-Instruct, dequantised from Q4_1", "teacher_layers": 30,
                 "teacher_parameters": 134515008, "student": "cut from the teacher (layers 0, 1, 2, 10, 20, 29)",
                 "student_layers": 6, "student_parameters": 49554240, "data": "World Factbook, 248 training documents",
                 "selection": "the 20 % of positions with the highest student entropy", "loss": "forward KL",
                 "steps": 200, "tokens": 204800, "seed": 0, "seconds": 312.0, "hardware": "2 CPU cores"},
     "text": [{"token": " the", "entropy": 1.25, "nll": 0.31, "rank": 40, "selected": false, "eligible": true}, ...],
     "text_note": "plain text put under the heading of the text page",
     "completions": [{"prompt": "...", "teacher": "...", "before": "...", "after": "..."}, ...],
     "command": "python -m launch.train ...", "versions": {"kdjax": "0.1.0", ...},
     "fingerprints": {"config": "0123456789abcdef", ...}}
  `text` is one row in reading order; the figures of a token are those of the prediction *of* that token, in nats,
  `rank` is 1 for the highest entropy; null where `eligible` is false (`evals.text_page.entropy_page` makes the list).
  `seconds` is the last one logged if it is not given. In the summary `data` follows on "on", `loss` on "with",
  `selection` on "supervised at".
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdjax.analysis import report_page as page
from kdjax.analysis.report_charts import Series, chart, number
from kdjax.run_log import duration, read_lines, write_whole

Record = Mapping[str, Any]
SMOOTHED_FROM = 40  # points; shorter loss curves are drawn as they are

# name in metrics.jsonl, title, unit
TRAIN_CURVES = (
    ("learning_rate", "Learning rate", ""),
    ("tokens_per_second", "Throughput", "tokens/s"),
    ("student_entropy", "Student entropy", "nats"),
    ("grad_norm", "Gradient norm before clipping", ""),
)
# name in an evaluation, title, unit, on a log axis?
HELDOUT_CURVES = (
    ("kl", "Held-out KL to the teacher", "nats", False),
    ("perplexity", "Held-out perplexity", "", True),
)


def write_report(workdir: str | os.PathLike[str]) -> Path:
    """Write workdir/report.html, return its path. Raises ValueError if there is no run or a damaged file in workdir."""
    out = Path(workdir) / "report.html"
    write_whole(out, render(*read_run(workdir)))
    return out


def read_run(workdir: str | os.PathLike[str]) -> tuple[list[Record], list[Record], Record, Record]:
    """The contents of metrics, evals, config and report data. Raises ValueError as write_report does."""
    root = Path(workdir)
    metrics, evals = read_lines(root / "metrics.jsonl"), read_lines(root / "evals.jsonl")
    if not metrics and not evals:
        raise ValueError(
            f"workdir must be the directory of a run, got {str(root)!r}; it has neither metrics.jsonl nor evals.jsonl "
            "with a whole line. Set it to the workdir of launch.train."
        )
    return [*metrics], [*evals], _read(root / "config.json"), _read(root / "report_data.json")


def render(metrics: Sequence[Record], evals: Sequence[Record], config: Record, data: Record) -> str:
    """The page as text; the arguments are the contents of the files above."""
    return page.document(title(config), list(sections(metrics, evals, config, data).values()))


def sections(metrics: Sequence[Record], evals: Sequence[Record], config: Record, data: Record) -> dict[str, str]:
    """The parts of the page by name, in order; "" for one that there is nothing to put into."""
    students = sorted((line for line in evals if line["which"] == "student"), key=lambda line: line["step"])
    before = students[0] if students else None
    after = students[-1] if len(students) > 1 else None
    last = after or before
    told = summary({"seconds": _last_second([*metrics, *evals]), **(data.get("summary") or {})})
    drawn = [_loss_chart(metrics), *_heldout_charts(students), _calibration(last), *_other_charts(metrics)]
    return {
        "header": page.header(title(config), told),
        "tiles": page.tiles(before, after),
        "table": page.table(before, after),
        "curves": page.charts(drawn),
        "text": page.text_page(data.get("text") or [], data.get("text_note") or ""),
        "completions": page.completions(data.get("completions") or []),
        "reproduce": page.reproduce(data, config),
    }


def title(config: Record) -> str:
    """Of the page: the name of the experiment."""
    return str(config.get("name") or "Distillation run")


def _last_second(lines: Sequence[Record]) -> float:
    return max((float(line.get("seconds") or 0.0) for line in lines), default=0.0)


def summary(fields: Record) -> str:
    """What was distilled from what into what, in sentences; a sentence without its fields is left out."""
    text = []
    if fields.get("student") or fields.get("teacher"):
        text.append(f"Teacher: {_model(fields, 'teacher')}. Student: {_model(fields, 'student')}.")
    clauses = [f"on {fields['data']}"] if fields.get("data") else []
    clauses += [f"with {fields['loss']}"] if fields.get("loss") else []
    clauses += [f"supervised at {fields['selection']}"] if fields.get("selection") else []
    if clauses:
        text.append(f"Distilled {', '.join(clauses)}.")
    amounts = [f"{fields['steps']:,} steps"] if fields.get("steps") else []
    amounts += [f"{fields['tokens']:,} tokens"] if fields.get("tokens") else []
    amounts += [f"seed {fields['seed']}"] if fields.get("seed") is not None else []
    spent = duration(float(fields["seconds"])) if fields.get("seconds") else ""
    spent += f" on {fields['hardware']}" if fields.get("hardware") else ""
    amounts += [spent.strip()] if spent else []
    if amounts:
        text.append(f"{', '.join(amounts)}.")
    return " ".join(text)


def _model(fields: Record, which: str) -> str:
    layers, parameters = fields.get(f"{which}_layers"), fields.get(f"{which}_parameters")
    size = [f"{layers} layers"] if layers else []
    size += [_millions(parameters)] if parameters else []
    return ", ".join([fields.get(which) or "not named", *size])


def _millions(parameters: int) -> str:
    unit, name = (1e9, "B") if parameters >= 1e9 else (1e6, "M")
    return f"{number(parameters / unit)} {name} parameters" if parameters >= 1e6 else f"{parameters:,} parameters"


def _loss_chart(metrics: Sequence[Record]) -> str:
    x, loss = _column(metrics, "loss")
    if len(loss) >= SMOOTHED_FROM:
        lines = [Series("each logged step", x, loss, "raw"), Series("smoothed", x, _smoothed(loss), "after")]
    else:
        lines = [Series("", x, loss, "after")]
    return chart("Training loss", "nats per slot", lines)


def _other_charts(metrics: Sequence[Record]) -> list[str]:
    return [chart(title, unit, [Series("", *_column(metrics, name), "after")]) for name, title, unit in TRAIN_CURVES]


def _heldout_charts(students: Sequence[Record]) -> list[str]:
    """Held-out curves with their intervals, if there are more points than the table shows."""
    if len(students) < 3:
        return []
    steps = [line["step"] for line in students]
    made = []
    for name, title, unit, log in HELDOUT_CURVES:
        found = [line.get(name) or line["student"].get(name) for line in students]
        if not all(found):
            continue
        low, value, high = ([_number(one[end]) for one in found] for end in ("low", "value", "high"))
        lines = [Series("student", steps, value, "after", low, high, dots=len(steps) <= 30)]
        teacher = students[-1].get("teacher")
        if log and teacher:
            lines.append(Series("teacher", [steps[0], steps[-1]], [_number(teacher[name]["value"])] * 2, "teacher"))
        made.append(chart(title, unit, lines, log=log))
    return made


def _calibration(last: Record | None) -> str:
    """Reliability diagram: how often the top token is right, by its probability; bins of at least 10 positions."""
    if last is None:
        return ""
    lines = [Series("perfect", [0, 1], [0, 1], "guide")]
    for kind, label, model in (("after", "student", last["student"]), ("teacher", "teacher", last.get("teacher"))):
        bins = (model or {}).get("calibration") or {"count": [], "confidence": [], "correct": []}
        columns = zip(bins["count"], bins["confidence"], bins["correct"], strict=True)
        points = [(sure / n, right / n) for n, sure, right in columns if n >= 10]
        if points:
            x, y = zip(*points, strict=True)
            lines.append(Series(label, x, y, kind, dots=True))
    if len(lines) == 1:
        return ""
    return chart("Calibration", "share correct", lines, x_unit="probability of the top token", ends=False)


def _column(metrics: Sequence[Record], name: str) -> tuple[list[float], list[float]]:
    lines = [line for line in metrics if line.get(name) is not None]
    return [line["step"] for line in lines], [float(line[name]) for line in lines]


def _smoothed(values: Sequence[float]) -> list[float]:
    """Mean over a window of a tenth of the run around each point, narrower at the start, where the curve is steep."""
    half = max(1, len(values) // 20)
    made = []
    for at in range(len(values)):
        reach = min(half, at)
        window = values[at - reach : at + reach + 1]
        made.append(sum(window) / len(window))
    return made


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be a JSON object; {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(found).__name__}.")
    return found
