"""One question and all its answers on a page: each token coloured by what it adds to the gradient. Imports no JAX.

The page needs nothing beside itself and works without scripts: the switch between the figures is CSS, scripts only
sort the table and show a token's figures at once.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from kdjax.analysis import report_page as page
from kdjax.analysis.report_charts import DASH, MINUS, number
from kdjax.run_log import write_whole

TOP = page.LEVELS - 1
CELLS = 120  # of the strip above a long answer
STRIP_FROM = 60  # tokens; a shorter answer is seen at a glance
MOST_RANK = 100.0  # RSR clips there too
MOST_BRIER = 2.0

# name among the figures, symbol as HTML, what it is; those of the table
COLUMNS = (
    ("scas", "S", "score of SCAS"),
    ("head_norm", "H", "squared norm of the head's gradient"),
    ("answer_nll", "d<sub>A</sub>", "mean NLL of the answer"),
    ("sim_aa", "sim<sub>AA</sub>", "likeness of the answer's tokens"),
    ("sim_aq", "sim<sub>AQ</sub>", "likeness of answer and question"),
    ("brier", "Brier", "mean Brier term"),
    ("n_answer", "n", "tokens"),
)
# further ones, beside an answer
EXTRA = (
    ("head_diagonal", "H<sub>diag</sub>", "H without products of different tokens"),
    ("head_cross", "H<sub>AQ</sub>", "product of the head's gradients of answer and question"),
    ("rsr", "RSR", "rank-surprisal ratio"),
)
# of the question, the same whatever the answer
QUESTION = (
    ("n_question", "{} tokens"),
    ("question_nll", "mean NLL {} nats"),
    ("c_qq", "C<sub>QQ</sub> {}"),
    ("head_question", "H<sub>QQ</sub> {}"),
)
# key, name, both ends of the scale
SWITCH = (
    ("share", "Share of the gradient", "below 0", "most in this answer"),
    ("nll", "NLL", "0", "{top} nats or more"),
    ("brier", "Brier", "0", "2"),
    ("rank", "Rank", "1", "100 or more"),
)


@dataclasses.dataclass(frozen=True)
class ExplainedAnswer:
    """One answer of the pool, with the figures of its tokens and of the whole.

    tokens: the text in pieces, "" = a part of a character. nll, brier, rank, share: one value per token, NaN = not one
    of the answer's; share: its part of H, which they sum to. figures: by the names of `curation/answers` (n_answer,
    answer_nll, sim_aa, head_norm ...) and scores by theirs (scas ...); NaN or missing = not known. score_rank, group:
    from 1, 0 = none. verdict: right | wrong | undecided. reason: why it cannot be selected, "" if it can. text: instead
    of tokens where it was not scored.
    """

    teacher: str
    tokens: Sequence[str] = ()
    nll: Sequence[float] = ()
    brier: Sequence[float] = ()
    rank: Sequence[float] = ()
    share: Sequence[float] = ()
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    group: int = 0
    score_rank: int = 0
    selected: bool = False
    verdict: str = "right"
    reason: str = ""
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Explained:
    """A question with its answers. score: what they are ranked by; lower: whether the lowest is preferred.

    gold: the reference answer, if there is one. chosen: how the choice was made, a sentence, as is `student`.
    """

    question: str
    answers: Sequence[ExplainedAnswer]
    id: str = ""
    gold: str = ""
    score: str = "scas"
    lower: bool = True
    groups: int = 0
    chosen: str = ""
    student: str = ""
    command: str = ""


def write_explained(out: Path, explained: Explained) -> Path:
    """Write the page; its path is returned. Raises as `render`, OSError if it cannot be written."""
    write_whole(out, render(explained))
    return out


def render(explained: Explained) -> str:
    """The page as text. Raises ValueError for an answer whose figures are not one per token."""
    for each in explained.answers:
        for name in ("nll", "brier", "rank", "share"):
            if len(getattr(each, name)) != len(each.tokens):
                raise ValueError(
                    f"{name} must have one value per token, got {len(getattr(each, name))} for {len(each.tokens)} "
                    f"tokens of {each.teacher!r}. Pass those of the same answer."
                )
    answers = sorted(explained.answers, key=lambda a: (a.score_rank or math.inf, bool(a.reason), a.teacher))
    title = f"Answers to {explained.id}" if explained.id else "Answers to a question"
    sections = [
        page.header(title, _lead(explained)),
        _question(explained),
        f"<h2>Answers</h2>\n{_table(explained, answers)}",
        _cards(explained, answers),
        f"<h2>How to read this</h2>\n{_own('explain_legend.html')}",
        page.reproduce({"command": explained.command}, {}),
    ]
    return page.document(title, sections, css=_own("explain.css") + _colours())


def _own(name: str) -> str:
    return (resources.files("kdjax.analysis") / name).read_text(encoding="utf-8")


def _lead(explained: Explained) -> str:
    answers = explained.answers
    ranked = sum(a.score_rank > 0 for a in answers)
    kept = [a.teacher for a in answers if a.selected]
    first = f"{len(answers):,} answers, {ranked:,} of them ranked by {explained.score}, "
    first += f"{'lowest' if explained.lower else 'highest'} first. "
    first += f"Selected: {', '.join(kept)}. " if kept else "None is selected. "
    return first + " ".join(filter(None, (explained.chosen, explained.student)))


def _question(explained: Explained) -> str:
    told = []
    for key, says in QUESTION:
        known = [value for a in explained.answers if math.isfinite(value := _figure(a, key))]
        told += [says.format(_shown(known[0], key))] if known else []
    gold = f'<p class="note">Reference answer: {page.esc(explained.gold)}</p>' if explained.gold else ""
    figures = f'<p class="note">{"; ".join(told)}</p>' if told else ""
    return f'<h2>Question</h2>\n<div class="page asked">{page.esc(explained.question)}</div>{figures}{gold}'


def _table(explained: Explained, answers: Sequence[ExplainedAnswer]) -> str:
    columns = [(key, symbol) for key, symbol, _ in COLUMNS if any(math.isfinite(_figure(a, key)) for a in answers)]
    if explained.score not in dict(columns) and any(math.isfinite(_figure(a, explained.score)) for a in answers):
        columns.insert(0, (explained.score, page.esc(explained.score)))
    heads = "<th>Rank</th><th>Teacher</th><th>Group</th>"
    for key, symbol in columns:
        heads += f"<th{' class=by' if key == explained.score else ''}>{symbol}</th>"
    rows = []
    for at, each in enumerate(answers):
        rank, group = (_number_cell(place or math.nan, str(place or DASH)) for place in (each.score_rank, each.group))
        cells = [_number_cell(_figure(each, key), _shown(_figure(each, key), key)) for key, _ in columns]
        name = f'<td class="who"><a href="#answer{at}">{page.esc(each.teacher)}</a></td>'
        kind = ' class="chosen"' if each.selected else ""
        rows.append(f"<tr{kind}>{rank}{name}{group}{''.join(cells)}<td>{_state(each)}</td></tr>")
    return (
        f'<div class="wide"><table class="sortable"><thead><tr>{heads}<th>State</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _number_cell(value: float, shown: str) -> str:
    """Sorted by the value, not by what is shown of it; an unknown one comes last."""
    return f'<td data-value="{value if math.isfinite(value) else ""}">{shown}</td>'


def _state(each: ExplainedAnswer) -> str:
    said = [each.verdict] if each.verdict else []
    said += [each.reason] if each.reason and each.reason != each.verdict else []
    said = ["selected", *said] if each.selected else said
    return page.esc(", ".join(said)) or DASH


def _cards(explained: Explained, answers: Sequence[ExplainedAnswer]) -> str:
    """The switch, its scales, and the answers; all in one block so that the switch reaches them without scripts."""
    nll = sorted(value for a in answers for value in a.nll if math.isfinite(value))
    top = max(1.0, math.ceil(nll[min(len(nll) - 1, int(0.98 * len(nll)))])) if nll else 1.0
    switch, scales = "", ""
    for at, (key, name, low, high) in enumerate(SWITCH):
        checked = " checked" if at == 0 else ""
        switch += f'<input type="radio" name="by" id="by-{key}"{checked}><label for="by-{key}">{name}</label>'
        steps = "".join(f'<i class="h{level}"></i>' for level in range(page.LEVELS))
        below = "".join(f'<i class="m{level}"></i>' for level in range(TOP, 0, -3)) if key == "share" else ""
        told = high.format(top=f"{top:.0f}")
        scales += (
            f'<span class="scale of-{key}">{low} <span class="steps">{below}{steps}</span><span>{told}</span></span>'
        )
    cards = "".join(_card(at, each, top) for at, each in enumerate(answers))
    return f'<div class="explain">{switch}<div class="legend">{scales}</div>\n<div class="pool">{cards}</div></div>'


def _card(at: int, each: ExplainedAnswer, top: float) -> str:
    badges = [("chosen", "selected")] if each.selected else []
    badges += [("", f"rank {each.score_rank}")] if each.score_rank else []
    badges += [("", f"group {each.group}")] if each.group else []
    badges += [("", each.verdict)] if each.verdict else []
    badges += [("off", each.reason)] if each.reason and each.reason != each.verdict else []
    marks = " ".join(f'<span class="badge {kind}">{page.esc(text)}</span>' for kind, text in badges)
    figures = "".join(
        f"<div><dt>{symbol}</dt><dd>{_shown(value, key)}</dd></div>"
        for key, symbol, _ in (*COLUMNS, *EXTRA)
        if math.isfinite(value := _figure(each, key))
    )
    body = "".join(_tokens(each, top)) if each.tokens else page.esc(each.text)
    label = page.esc(f"Answer of {each.teacher}")
    return (
        f'<article class="card{" chosen" if each.selected else ""}" id="answer{at}">'
        f"<h3>{page.esc(each.teacher)} {marks}</h3>"
        f"{f'<dl>{figures}</dl>' if figures else ''}{_where(each)}{_strip(each, top)}"
        f'<div class="page text" tabindex="0" role="group" aria-label="{label}">{body}</div></article>\n'
    )


def _tokens(each: ExplainedAnswer, top: float) -> list[str]:
    most = max((abs(value) for value in each.share if math.isfinite(value)), default=0.0)
    total = math.fsum(value for value in each.share if math.isfinite(value))
    made = []
    for piece, nll, brier, rank, share in zip(each.tokens, each.nll, each.brier, each.rank, each.share, strict=True):
        title = page.visible(piece)
        if not all(map(math.isfinite, (nll, brier, rank, share))):
            made.append(page.span(piece, ["off"], f"{title}\nnot counted"))
            continue
        part = f"{100 * share / total:.2f} %" if total > 0 else number(share)
        title += f"\n{part} of H\nNLL {nll:.2f} nats\nBrier {brier:.2f}\nrank {rank:,.0f}"
        made.append(page.span(piece, _levels(nll, brier, rank, share, top, most), title.replace("\n-", f"\n{MINUS}")))
    return made


def _levels(nll: float, brier: float, rank: float, share: float, top: float, most: float) -> list[str]:
    """The steps of the four colour scales: classes s (share; m if it is below 0), n, b, r with 0 to 9."""
    of_share = _level(math.sqrt(abs(share) / most) if most > 0 else 0.0)
    of_rank = math.log(max(rank, 1.0)) / math.log(MOST_RANK)
    sign = "m" if share < 0 and of_share else "s"
    return [f"{sign}{of_share}", f"n{_level(nll / top)}", f"b{_level(brier / MOST_BRIER)}", f"r{_level(of_rank)}"]


def _level(fraction: float) -> int:
    return min(TOP, max(0, round(TOP * fraction)))


def _strip(each: ExplainedAnswer, top: float) -> str:
    """Where in a long answer the colours are: cells of equally many tokens; share is summed, the others are means."""
    columns = zip(each.nll, each.brier, each.rank, each.share, strict=True)
    known = [values for values in columns if all(map(math.isfinite, values))]
    if len(known) < STRIP_FROM:
        return ""
    count = min(CELLS, len(known))
    edges = [round(k * len(known) / count) for k in range(count + 1)]
    cells = [known[a:b] for a, b in itertools.pairwise(edges)]
    sums = [math.fsum(share for *_, share in cell) for cell in cells]
    most, made = max(map(abs, sums)), []
    for cell, share in zip(cells, sums, strict=True):
        nll, brier, rank = (math.fsum(column) / len(cell) for column in list(zip(*cell, strict=True))[:3])
        made.append(f'<i class="{" ".join(_levels(nll, brier, rank, share, top, most))}"></i>')
    return f'<div class="strip" aria-hidden="true">{"".join(made)}</div>'


def _where(each: ExplainedAnswer) -> str:
    """How few tokens hold half of H, and which hold the most."""
    pairs = [(share, piece) for share, piece in zip(each.share, each.tokens, strict=True) if math.isfinite(share)]
    pairs.sort(key=lambda pair: -pair[0])
    total = math.fsum(share for share, _ in pairs)
    if not total > 0:
        return ""
    held, count = 0.0, 0
    while held < total / 2 and count < len(pairs):
        held, count = held + pairs[count][0], count + 1
    most = " ".join(f"<q>{page.esc(_short(piece))}</q>" for _, piece in pairs[: min(4, count)])
    return (
        f'<p class="note">Half of H is in {count:,} of {len(pairs):,} token{"s" if len(pairs) > 1 else ""}, most in '
        f"{most}</p>"
    )


def _short(piece: str) -> str:
    return page.visible(piece).strip("“”").strip() or "␣"


def _figure(each: ExplainedAnswer, key: str) -> float:
    if key == "c_qq":
        return _figure(each, "question_nll") ** 2 * _figure(each, "sim_qq")
    value = each.figures.get(key)
    return math.nan if value is None else float(value)


def _shown(value: float, key: str) -> str:
    if not math.isfinite(value):
        return DASH
    return (f"{value:,.0f}" if key.startswith("n_") else number(value)).replace("-", MINUS)


def _colours() -> str:
    """The four scales; a checked button colours what follows it."""
    rules = []
    for key, letter in (("share", "s"), ("nll", "n"), ("brier", "b"), ("rank", "r")):
        at = f"#by-{key}:checked~.pool"
        rules += [
            f"{at} .{letter}{k}{{background:rgb(var(--heat)/{k / TOP * page.HEAT:.3f})}}" for k in range(1, TOP + 1)
        ]
        rules.append(f"#by-{key}:checked~.legend .of-{key}{{display:inline-flex}}")
    cold = [f"background:rgb(var(--cold)/{k / TOP * page.HEAT:.3f})" for k in range(TOP + 1)]
    rules += [f"#by-share:checked~.pool .m{k},.steps .m{k}{{{cold[k]}}}" for k in range(1, TOP + 1)]
    return "".join(rules)
