"""The sections of the report as HTML. Plain data in, text out; everything that comes from outside is escaped."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from kdjax.analysis.report_charts import DASH, number

LEVELS = 10  # steps of the colour scale
HEAT = 0.74  # opacity of its last step
WHO = (("before", "Student before"), ("after", "Student after"), ("teacher", "Teacher"))

# key in an evaluation, name, unit, of one model alone?, as a percentage?
FIGURES = (
    ("perplexity", "Perplexity", "", True, False),
    ("kl", "KL to the teacher", "nats", False, False),
    ("agreement", "Top-1 agreement with the teacher", "%", False, True),
    ("accuracy", "Next-token accuracy", "%", True, True),
    ("ece", "Calibration error", "%", True, True),
)

esc = html.escape
Record = Mapping[str, Any]


def document(title: str, sections: Sequence[str], css: str = "") -> str:
    """A whole page with styles and script inside; empty sections are left out. css: further styles."""
    here = resources.files("kdjax.analysis")
    styles, script = ((here / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    levels = "".join(f".h{k}{{background:rgb(var(--heat)/{k / (LEVELS - 1) * HEAT:.3f})}}" for k in range(LEVELS))
    body = "\n".join(filter(None, sections))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{esc(title)}</title>\n<style>\n{styles}{levels}{css}\n</style></head>\n<body><main>\n{body}\n</main>\n"
        f"<script>\n{script}</script></body></html>\n"
    )


def header(title: str, paragraph: str) -> str:
    """Title and summary. `paragraph` is plain text."""
    return f'<p class="over">kdjax report</p>\n<h1>{esc(title)}</h1>\n<p class="lead">{esc(paragraph)}</p>'


def tiles(before: Record | None, after: Record | None) -> str:
    """The three figures to take away: now, and what they were."""
    last = after or before
    if last is None:
        return ""
    made = []
    for key, name, unit, alone, percent in FIGURES[:3]:
        now, was = _estimate(last, key, "student"), _estimate(before, key, "student") if after else None
        if now is None:
            continue
        small = f" <small>{esc(unit)}</small>" if unit else ""
        lines = [f"before {_value(was, percent)}"] if was else []
        teacher = _estimate(last, key, "teacher") if alone else None
        lines += [f"teacher {_value(teacher, percent)}"] if teacher else []
        name = name.removesuffix(" with the teacher")
        made.append(
            f'<div class="tile"><div class="name">{name}</div><div class="now">{_value(now, percent)}{small}</div>'
            f'<div class="was">{"".join(f"<span>{line}</span> " for line in lines)}</div></div>'
        )
    return f'<div class="tiles">{"".join(made)}</div>'


def table(before: Record | None, after: Record | None) -> str:
    """Student before, student after, teacher x figures, each with its interval."""
    last = after or before
    if last is None:
        return ""
    columns = [("before", "Student before", before, "student")] if after else []
    columns.append(("after" if after else "before", "Student after" if after else "Student before", last, "student"))
    if last.get("teacher"):
        columns.append(("teacher", "Teacher", last, "teacher"))
    rows = []
    for key, name, unit, alone, percent in FIGURES:
        cells = []
        for kind, _, record, model in columns:
            found = _estimate(record, key, model) if alone or model == "student" else None
            cells.append(f'<td class="{kind}">{_cell(found, percent)}</td>')
        if any("<b>" in cell for cell in cells):
            small = f" <small>{esc(unit)}</small>" if unit else ""
            rows.append(f"<tr><th>{name}{small}</th>{''.join(cells)}</tr>")
    heads = "".join(f"<th>{name}</th>" for _, name, _, _ in columns)
    return (
        f"<h2>Held-out figures</h2>\n<table><thead><tr><th></th>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>\n"
        f'<p class="note">{last["tokens"]:,} tokens in {last["rows"]:,} rows of documents kept out of this run. '
        "In brackets: 95 % bootstrap interval over rows. KL(teacher ‖ student) and perplexity use natural logarithms; "
        "the calibration error compares the top token's probability with how often it is right, in 15 bins.</p>"
    )


def charts(made: Sequence[str]) -> str:
    """The grid of charts that are not empty."""
    made = [one for one in made if one]
    return f'<h2>Curves</h2>\n<div class="charts">{"".join(made)}</div>' if made else ""


def text_page(tokens: Sequence[Record], note: str = "") -> str:
    """Held-out text; colour: student entropy, underline: selected, title: the details."""
    targets = [token for token in tokens if token["eligible"]]
    if not targets:
        return ""
    entropies = sorted(token["entropy"] for token in targets)
    top = max(1.0, math.ceil(entropies[min(len(entropies) - 1, int(0.98 * len(entropies)))]))
    chosen = [token for token in targets if token["selected"]]
    share = sum(token["entropy"] for token in chosen) / max(sum(entropies), 1e-12)
    told = (
        f"{len(chosen):,} of {len(targets):,} targets are selected ({_percent(len(chosen) / len(targets))} %); "
        f"they hold {_percent(share)} % of the entropy. "
    )
    steps = "".join(f'<i class="h{level}"></i>' for level in range(LEVELS))
    legend = (
        f'<div class="legend"><span class="scale">Entropy <span>0</span><span class="steps">{steps}</span>'
        f'<span>{top:.0f} nats or more</span></span><span><span class="sample sel">selected</span> for the loss</span>'
        '<span><span class="sample off">grey</span> no target</span></div>'
    )
    body = "".join(_token(token, top, len(targets)) for token in tokens)
    return (
        "<h2>Where the student is unsure</h2>\n<p>Held-out text. Each token is coloured by the entropy of the "
        f"student's prediction of it. {told}Point at a token for its figures.{' ' + esc(note) if note else ''}</p>\n"
        f'{legend}\n<div class="page">{body}</div>'
    )


def completions(made: Sequence[Record]) -> str:
    """What each model says, side by side."""
    if not made:
        return ""
    parts = ["<h2>Completions</h2>\n<p>The most likely token at every step, from the same prompts.</p>"]
    for one in made:
        answers = []
        for key, name in WHO:
            said = one.get(key)
            if said is not None:
                style, shown = ("said", esc(said)) if said.strip() else ("said none", "(nothing)")
                answers.append(
                    f'<div class="answer {key}"><div class="who">{name}</div><div class="{style}">{shown}</div></div>'
                )
        parts.append(f'<div class="prompt">{esc(one["prompt"])}</div><div class="answers">{"".join(answers)}</div>')
    return "\n".join(parts)


def reproduce(data: Record, config: Record) -> str:
    """Command, fingerprints, versions, configuration."""
    parts = []
    if data.get("command"):
        parts.append(f'<pre class="wrap">{esc(data["command"])}</pre>')
    lists = []
    for name, style in (("fingerprints", ' class="hex"'), ("versions", "")):
        pairs = data.get(name) or {}
        entries = "".join(f"<dt>{esc(str(k))}</dt><dd{style}>{esc(str(v))}</dd>" for k, v in pairs.items())
        lists += [f"<div><h3>{name.capitalize()}</h3><dl>{entries}</dl></div>"] if entries else []
    parts.append(f'<div class="lists">{"".join(lists)}</div>' if lists else "")
    if config:
        dump = esc(json.dumps(config, indent=2, ensure_ascii=False))
        parts.append(f"<details><summary>Configuration</summary><pre>{dump}</pre></details>")
    body = "\n".join(filter(None, parts))
    return f"<h2>Reproduce</h2>\n{body}" if body else ""


def _estimate(record: Record | None, key: str, model: str) -> Record | None:
    """An estimate of an evaluation: of one model, or (kl, agreement) of the pair."""
    if record is None:
        return None
    return (record.get(model) or {}).get(key) or record.get(key)


def _percent(fraction: float) -> str:
    return number(100 * fraction, 2 if fraction < 0.1 else 3 if fraction < 1 else 1)


def _value(estimate: Record, percent: bool) -> str:
    value = math.nan if estimate["value"] is None else float(estimate["value"])
    return f"{100 * value:.1f}" if percent else number(value)


def _cell(estimate: Record | None, percent: bool) -> str:
    if estimate is None:
        return DASH
    low, high = (_value({"value": estimate[end]}, percent) for end in ("low", "high"))
    return f"<b>{_value(estimate, percent)}</b><small>[{low}, {high}]</small>"


def _token(token: Record, top: float, targets: int) -> str:
    piece = token["token"]
    classes = ["off"]
    title = f"{visible(piece)}\nno target"
    if token["eligible"]:
        classes = [f"h{min(LEVELS - 1, int(LEVELS * token['entropy'] / top))}"]
        title = f"{visible(piece)}\nentropy {token['entropy']:.2f} nats\nlabel nll {token['nll']:.2f} nats"
        if token.get("rank"):
            title += f"\nrank {token['rank']} of {targets} by entropy"
    if token["selected"]:
        classes.append("sel")
        title += "\nselected"
    return span(piece, classes, title)


def span(piece: str, classes: Sequence[str], title: str) -> str:
    """A token of a text in `.page`, coloured by its classes; title: what is said when it is pointed at."""
    classes = [*classes]
    if not piece:
        classes.append("part")
    elif "\n" in piece:
        classes.append("nl")
    # The blank before a word stays uncoloured: at a line break it would hang there as a stub.
    blank = " " if piece.startswith(" ") and piece.strip() else ""
    return f'{blank}<span class="{" ".join(classes)}" title="{esc(title)}">{esc(piece[len(blank) :])}</span>'


def visible(piece: str) -> str:
    """The token in quotes, blanks and control characters made visible."""
    return f"“{piece}”".replace("\n", "↵").replace("\t", "⇥") if piece else "part of a character"
