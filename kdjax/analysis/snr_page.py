"""`snr.html` of launch.curate: signal-to-noise of the gradients over the pass rate. Plain records in, no JAX."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from kdjax.analysis import report_page as page
from kdjax.analysis.report_charts import DASH, HEIGHT, MINUS, SUPERSCRIPT, TIMES, WIDTH, Series, chart
from kdjax.run_log import write_whole

Record = Mapping[str, Any]
Interval = tuple[float, float, float]
UNKNOWN: Interval = (math.nan, math.nan, math.nan)
RATE = "pass rate of the student"
CURVE = [k / 40 for k in range(41)]  # pass rates at which p (1 - p) is drawn
CAPTION = 40  # height of the heading of the picture alone
CSS = """
.charts { margin-top: 22px; align-items: end; }
.keys { gap: 0 12px; margin-left: 0; width: 100%; }
"""

FORMULA = (
    "Of the n problems of one pass rate with gradients g: signal = mean of <g_i, g_j> over different problems, which "
    "estimates ‖E g‖²; noise = mean of ‖g_i‖², minus the signal, which estimates tr Cov(g); SNR = signal / noise. The "
    "signal can come out below 0 where there is next to none. Intervals: 95 %, bootstrap over problems; a hollow dot "
    "has too few problems for one. Gradients are projected at random, which keeps their inner products in the mean. "
    "PACED (arXiv 2603.11178) expects the SNR to fall to 0 at both ends, about like p (1 - p)."
)


def write_snr(workdir: Path, found: Sequence[Record], bars: Sequence[Record], reached: float, *, name: str) -> Path:
    """Write workdir/snr.html and the picture alone, workdir/snr.svg; the path of the page is returned.

    found: `curation.snr.lines_of`: {"name", "problems", "signal", "noise", "snr": [value, low, high]}, null = not
    known. bars: the histogram in the summary of the weights: {"rate", "problems", "weight"}. reached: `snr.reached`.
    name: of the experiment. Raises OSError if they cannot be written.
    """
    write_whole(workdir / "snr.svg", picture(found))
    write_whole(workdir / "snr.html", render(found, bars, reached, name=name))
    return workdir / "snr.html"


def render(found: Sequence[Record], bars: Sequence[Record], reached: float, *, name: str) -> str:
    """The page as text; arguments as of `write_snr`."""
    measured = sum(line["problems"] for line in found)
    lead = (
        f"Where on the scale of difficulty do the gradients of different problems point the same way? One gradient for "
        f"each of {measured:,} problems, of the student before training, by how often the student solves them."
    )
    gain = (
        f"One small step with the weights in use gains {100 * reached:.0f} % of what it would gain with the best "
        "weights, which are SNR / (1 + SNR) by the SNR measured here."
        if math.isfinite(reached)
        else "The weights in use cannot be judged: no pass rate has both a known SNR above 0 and a weight."
    )
    drawn = [_snr_chart(found), _weight_chart(found, bars), _signal_chart(found), _problem_chart(found, bars)]
    sections = [
        page.header(f"Gradient signal-to-noise: {name}", lead),
        f'<div class="charts">{"".join(filter(None, drawn))}</div>' if any(drawn) else "",
        f"<h2>By pass rate</h2>\n<p>{gain}</p>\n{_table(found, bars)}",
        f'<p class="note">{page.esc(FORMULA)}</p>',
    ]
    return page.document(f"Gradient signal-to-noise: {name}", sections, css=CSS)


def picture(found: Sequence[Record]) -> str:
    """The chart of the SNR as an SVG file of its own, light and dark."""
    css = (resources.files("kdjax.analysis") / "report.css").read_text(encoding="utf-8")
    drawn = _snr_chart(found)
    inside = re.search(r"<svg[^>]*>(.*)</svg>", drawn, re.DOTALL)
    body = inside[1] if inside else '<text class="tick" x="8" y="20">no pass rate has enough problems</text>'
    said = f"{_known(found)} pass rates; bars: 95 % intervals; dashed: p (1 - p), scaled"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {-CAPTION} {WIDTH} {HEIGHT + CAPTION}">\n<style>'
        f'{_colours(css)}text{{font-family:system-ui,"Segoe UI",Roboto,Arial,sans-serif}}'
        ".name{fill:var(--ink);font-size:13px;font-weight:600}</style>\n"
        f'<rect x="0" y="{-CAPTION}" width="{WIDTH}" height="{HEIGHT + CAPTION}" fill="var(--paper)"/>'
        f'<text class="name" x="8" y="-23">Gradient signal-to-noise</text><text class="tick" x="8" y="-8">{said}</text>'
        f"{body}</svg>\n"
    )


def rate_of(name: str) -> float:
    """Place of a bin on the axis: '3/8' -> 0.375, '0.2-0.3' -> 0.25, '0' -> 0; NaN for one without a pass rate."""
    if fraction := re.fullmatch(r"(\d+)/(\d+)", name):
        return int(fraction[1]) / int(fraction[2])
    if between := re.fullmatch(r"([\d.]+)-([\d.]+)", name):
        return (float(between[1]) + float(between[2])) / 2
    return float(name) if re.fullmatch(r"[01]", name) else math.nan


def guide(found: Sequence[Record]) -> float:
    """Factor of p (1 - p) that is closest to the SNR: least squares, a bin counts as often as it has problems.

    NaN if nothing inside (0, 1) is known or the closest one is not above 0.
    """
    points = [(rate_of(line["name"]), _interval(line["snr"])[0], line["problems"]) for line in found]
    points = [(p * (1 - p), snr, n) for p, snr, n in points if math.isfinite(p) and math.isfinite(snr)]
    square = sum(n * g * g for g, _, n in points)
    factor = sum(n * g * snr for g, snr, n in points) / square if square else math.nan
    return factor if factor > 0 else math.nan


def _snr_chart(found: Sequence[Record]) -> str:
    factor = guide(found)
    curve = Series(f"p (1 {MINUS} p), scaled", CURVE, [factor * p * (1 - p) for p in CURVE], "guide")
    return chart(
        "SNR of the gradients", "95 % interval", [curve, _points(found, "snr", "measured")], x_unit=RATE, ends=False
    )


def _signal_chart(found: Sequence[Record]) -> str:
    return chart("Signal", "‖E g‖²", [_points(found, "signal", "")], x_unit=RATE, ends=False)


def _weight_chart(found: Sequence[Record], bars: Sequence[Record]) -> str:
    """Weights in use as columns; the best ones by the SNR measured, scaled to the same sum over problems, as dots."""
    used = [(rate_of(bar["rate"]), float(bar["weight"])) for bar in bars if bar["problems"]]
    used = [(x, y) for x, y in used if math.isfinite(x)]
    best = _best(found, bars)
    marks = [Series("in use", [x for x, _ in used], [y for _, y in used], "before", mark="columns")]
    marks.append(Series("best by the SNR", [*map(rate_of, best)], [*best.values()], "after", mark="points"))
    return chart("Weight of a problem", "mean of those of a pass rate", marks, x_unit=RATE, ends=False)


def _problem_chart(found: Sequence[Record], bars: Sequence[Record]) -> str:
    counts = [(rate_of(bar["rate"]), bar["problems"]) for bar in bars]
    measured = [(rate_of(line["name"]), line["problems"]) for line in found]
    counts, measured = ([pair for pair in pairs if math.isfinite(pair[0])] for pairs in (counts, measured))
    marks = [Series("all", *_columns(counts), "before", mark="columns")]
    marks.append(Series("measured", *_columns(measured), "after", mark="points"))
    return chart("Problems", "per pass rate", marks, x_unit=RATE, ends=False)


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [float(y) for _, y in pairs]


def _points(found: Sequence[Record], key: str, label: str) -> Series:
    kept = [(rate_of(line["name"]), *_interval(line[key])) for line in found]
    kept = [point for point in kept if math.isfinite(point[0])]
    x, y, low, high = (list(column) for column in zip(*kept, strict=True)) if kept else ([], [], [], [])
    return Series(label, x, y, "after", low, high, mark="points")


def _best(found: Sequence[Record], bars: Sequence[Record]) -> dict[str, float]:
    """Bin -> SNR / (1 + SNR), scaled so that the bins with a known SNR have the sum of weights that they have."""
    known = {line["name"]: _interval(line["snr"])[0] for line in found}
    raw = {name: max(snr, 0.0) / (1 + max(snr, 0.0)) for name, snr in known.items() if math.isfinite(snr)}
    their = [(raw[bar["rate"]], float(bar["weight"]), bar["problems"]) for bar in bars if bar["rate"] in raw]
    total = sum(n * best for best, _, n in their)
    factor = sum(n * weight for _, weight, n in their) / total if total else math.nan
    return {name: factor * value for name, value in raw.items()} if factor > 0 else {}


def _table(found: Sequence[Record], bars: Sequence[Record]) -> str:
    best, lines = _best(found, bars), {line["name"]: line for line in found}
    powers = {key: _power(found, key) for key in ("signal", "noise", "snr")}
    rows = []
    for bar in bars:
        line = lines.get(bar["rate"], {"problems": 0, "signal": UNKNOWN, "noise": UNKNOWN, "snr": UNKNOWN})
        cells = [f"{bar['problems']:,}", f"{line['problems']:,}"]
        cells += [_with_interval(line[key], power) for key, power in powers.items()]
        weights = (float(bar["weight"]) if bar["problems"] else math.nan, best.get(bar["rate"], math.nan))
        cells += [f"{weight:.3f}" if math.isfinite(weight) else DASH for weight in weights]
        columns = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f"<tr><th>{page.esc(str(bar['rate']))}</th>{columns}</tr>")
    units = [
        f" <small>{TIMES}10{str(power).translate(SUPERSCRIPT)}</small>" if power else "" for power in powers.values()
    ]
    names = [name + unit for name, unit in zip(("Signal", "Noise", "SNR"), units, strict=True)]
    heads = "".join(
        f"<th>{name}</th>" for name in ("Pass rate", "Problems", "Measured", *names, "Weight", "Best weight")
    )
    return (
        f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>\n'
        '<p class="note">Best weight: SNR / (1 + SNR), scaled to the same sum over problems; below 0 counts as 0.</p>'
    )


def _power(found: Sequence[Record], key: str) -> int:
    """Power of ten that is taken out of a column of small or large values."""
    values = [abs(_interval(line[key])[0]) for line in found]
    most = max((value for value in values if math.isfinite(value)), default=0.0)
    power = math.floor(math.log10(most)) if most else 0
    return power if power < -2 or power > 4 else 0


def _with_interval(values: Sequence[float | None], power: int) -> str:
    value, low, high = (each / 10.0**power for each in _interval(values))
    between = f"<small>[{low:.3f}, {high:.3f}]</small>" if math.isfinite(low + high) else ""
    return (f"{value:.3f}{between}" if math.isfinite(value) else DASH).replace("-", MINUS)


def _interval(values: Sequence[float | None]) -> Interval:
    value, low, high = (math.nan if each is None else float(each) for each in values)
    return value, low, high


def _known(found: Sequence[Record]) -> int:
    return sum(math.isfinite(_interval(line["snr"])[0]) for line in found)


def _colours(css: str) -> str:
    """Of report.css: the colours of both themes and the styles of what a chart is made of."""
    themes, rules = css.split("* { box-sizing", 1)
    kept = [line for line in rules.splitlines() if re.match(r"\.(grid|axis|zero|tick|line|dot|after|guide)\b", line)]
    return "\n".join([themes, *kept])
