"""Line charts as inline SVG: plain numbers in, one `<figure>` out. Colours come from classes in report.css."""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 44, 50, 12, 36
LABEL_HEIGHT = 13.0
MOST_POINTS = 400
COLUMN = 18.0  # widest column, in pixels
# Of lines that are told apart by colour, light and dark: kinds "arm0", "arm1", ...; further ones begin again.
COLOURS = (
    ("#1d5fae", "#79aef0"),
    ("#c2521c", "#f0935e"),
    ("#2c7d4f", "#6cc491"),
    ("#7a4fb0", "#b795e6"),
    ("#8a6410", "#d8b25c"),
    ("#b03a6b", "#ec8bb3"),
    ("#3b7f8c", "#7fc6d3"),
    ("#6b6f76", "#a6abb3"),
)
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
TIMES, MINUS, DASH, SPACE = "\u00d7", "\u2212", "\u2013", "\u00a0"  # the space does not break


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a chart. kind: "after" | "before" | "teacher" | "raw" | "guide" | "arm0" ..., the CSS class.

    low, high: a band around y. mark: "line" | "points", each with its interval (hollow without one), which low and high
    that are not finite mean | "columns", from 0 (on no log axis).
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    kind: str = "after"
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dots: bool = False
    mark: str = "line"


@dataclasses.dataclass(frozen=True)
class Axis:
    """A linear or log10 map of [low, high] to pixels, with its ticks and the power of ten taken out of their labels."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False
    power: int = 0

    def at(self, value: float) -> float:
        """Position of `value` in [0, 1]."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def chart(
    title: str, unit: str, series: Sequence[Series], *, x_unit: str = "step", log: bool = False, ends: bool = True
) -> str:
    """A titled chart. Points that are not finite (on a log axis: not positive) are left out; "" if none is left.

    ends: write the last value of each line beside it.
    """
    series = [clean for clean in (_finite(one, log) for one in series) if clean.x]
    if not series:
        return ""
    every_y = [value for one in series for value in (*one.y, *one.low, *one.high)]
    every_y += [0.0 for one in series if one.mark == "columns"]
    x = _x_axis([value for one in series for value in one.x], aside=any(one.mark != "line" for one in series))
    y = log_axis(min(every_y), max(every_y)) if log else linear_axis(min(every_y), max(every_y))
    unit = " ".join(filter(None, (f"{TIMES}10{str(y.power).translate(SUPERSCRIPT)}" if y.power else "", unit)))
    parts = [*_grid(x, y, x_unit), *(MARKS[one.mark](one, x, y) for one in series)]
    parts += _end_labels(series, x, y) if ends else []
    keys = [one for one in series if one.label]
    legend = "".join(f'<span class="key {one.kind}"><i></i>{html.escape(one.label)}</span>' for one in keys)
    legend = f'<span class="keys">{legend}</span>' if len(keys) > 1 else ""
    name = html.escape(title)
    return (
        f'<figure class="chart"><figcaption><b>{name}</b> <span class="unit">{html.escape(unit)}</span>'
        f"{legend}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg></figure>'
    )


def linear_axis(low: float, high: float, count: int = 4) -> Axis:
    """Ticks at 1, 2, 2.5 or 5 times a power of ten; the ends are ticks. Zero is an end if the data come near it."""
    if low >= 0 and low < 0.35 * high:
        low = 0.0
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    step = _nice_step((high - low) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(step * k for k in range(first, last + 1))
    largest = math.floor(math.log10(max(abs(ticks[0]), abs(ticks[-1]))))
    return Axis(ticks[0], ticks[-1], ticks, power=largest if largest < -2 or largest > 6 else 0)


def log_axis(low: float, high: float) -> Axis:
    """Ticks at powers of ten, thinned out to six; over less than a decade and a half at 1, 2, 5."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if math.log10(high / low) < 1.5:
        marks = [m * 10.0**k for k in range(first, last + 1) for m in (1, 2, 5)]
        below, above = [m for m in marks if m <= low * 1.001], [m for m in marks if m >= high * 0.999]
        low, high = max(below, default=low / 2), min(above, default=high * 2)
        if low == high:
            low, high = low / 2, high * 2
        return Axis(low, high, tuple(m for m in marks if low <= m <= high), log=True)
    every = math.ceil((last - first) / 6)
    return Axis(10.0**first, 10.0**last, tuple(10.0**k for k in range(first, last + 1, every)), log=True)


def number(value: float, digits: int = 3) -> str:
    """'28.8', '0.0412', '1,254', '1.1 x 10^6': about `digits` significant digits, no trailing noise."""
    if not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)))
    if power >= 5 or power < -3:
        mantissa = f"{value / 10.0**power:.{max(digits - 2, 0)}f}"
        if abs(float(mantissa)) >= 10:
            return number(math.copysign(10.0 ** (power + 1), value), digits)
        return f"{mantissa}{SPACE}{TIMES}{SPACE}10{str(power).translate(SUPERSCRIPT)}"
    return f"{value:,.{max(digits - 1 - power, 0)}f}"


def _nice_step(rough: float) -> float:
    base = 10.0 ** math.floor(math.log10(rough))
    return next(m * base for m in (1, 2, 2.5, 5, 10) if m * base >= rough * (1 - 1e-9))


def arm_css() -> str:
    """Styles of the kinds "arm0", "arm1", ... in both themes."""
    light, dark = ("".join(f"--arm{at}:{pair[side]};" for at, pair in enumerate(COLOURS)) for side in (0, 1))
    every = "".join(
        f".line.arm{k},.band.arm{k},.dot.arm{k},.value.arm{k}{{color:var(--arm{k})}}"
        f".key.arm{k} i{{border-color:var(--arm{k})}}"
        for k in range(len(COLOURS))
    )
    return f":root{{{light}}}@media (prefers-color-scheme: dark){{:root{{{dark}}}}}{every}"


def _x_axis(values: Sequence[float], aside: bool = False) -> Axis:
    """From the first to the last value exactly; ticks at nice numbers inside, whole if the values are.

    aside: some room beside the first and the last.
    """
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 1, high + 1
    step = _nice_step((high - low) / 5)
    if all(value == int(value) for value in values):
        step = max(1.0, math.ceil(step))
    ticks = (step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1))
    room = 0.05 * (high - low) if aside else 0.0
    return Axis(low - room, high + room, tuple(ticks))


def _finite(one: Series, log: bool) -> Series:
    if one.mark == "points" and one.low:
        ends = [
            (a, b) if math.isfinite(a) and math.isfinite(b) else (y, y)
            for y, a, b in zip(one.y, one.low, one.high, strict=True)
        ]
        one = dataclasses.replace(one, low=[a for a, _ in ends], high=[b for _, b in ends])
    banded = bool(one.low)
    bands = zip(one.low, one.high, strict=True) if banded else ((y, y) for y in one.y)
    points = [(x, y, *band) for x, y, band in zip(one.x, one.y, bands, strict=True)]
    kept = [p for p in points if all(v is not None and math.isfinite(v) and (v > 0 or not log) for v in p[1:])]
    x, y, low, high = (list(column) for column in zip(*kept, strict=True)) if kept else ([], [], [], [])
    return dataclasses.replace(one, x=x, y=y, low=low if banded else (), high=high if banded else ())


def _px(value: float, axis: Axis) -> float:
    return round(LEFT + axis.at(value) * (WIDTH - LEFT - RIGHT), 1)


def _py(value: float, axis: Axis) -> float:
    return round(HEIGHT - BOTTOM - axis.at(value) * (HEIGHT - TOP - BOTTOM), 1)


def _grid(x: Axis, y: Axis, x_unit: str) -> list[str]:
    right, bottom, parts = WIDTH - RIGHT, HEIGHT - BOTTOM, []
    for tick in y.ticks:
        at = _py(tick, y)
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{right}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{at + 3.5}" text-anchor="end">{_tick(tick, y)}</text>')
    for tick in x.ticks:
        at = _px(tick, x)
        parts.append(f'<path class="axis" d="M{at} {bottom}v4"/>')
        parts.append(f'<text class="tick" x="{at}" y="{bottom + 17}" text-anchor="middle">{_tick(tick, x)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    if y.low < 0 < y.high and not y.log:
        parts.append(f'<path class="zero" d="M{LEFT} {_py(0, y)}H{right}"/>')
    parts.append(f'<text class="tick" x="{right}" y="{HEIGHT - 3}" text-anchor="end">{html.escape(x_unit)}</text>')
    return parts


def _tick(value: float, axis: Axis) -> str:
    if axis.log:
        plain = axis.ticks[0] >= 1e-2 and axis.ticks[-1] < 1e5
        return f"{value:,.10g}" if plain else _power(value)
    shown = value / 10.0**axis.power
    step = (axis.ticks[1] - axis.ticks[0]) / 10.0**axis.power if len(axis.ticks) > 1 else abs(shown) or 1.0
    decimals = next((d for d in range(6) if abs(step * 10**d - round(step * 10**d)) < 1e-6 * 10**d * step), 6)
    text = f"{shown:,.{decimals}f}"
    return "0" if float(text.replace(",", "")) == 0 else text.replace("-", MINUS)


def _power(value: float) -> str:
    """'10^6' or '2 x 10^6', with superscripts."""
    power = math.floor(math.log10(value) + 1e-9)
    factor = round(value / 10.0**power)
    return (f"{factor}{TIMES}" if factor > 1 else "") + f"10{str(power).translate(SUPERSCRIPT)}"


def _line(one: Series, x: Axis, y: Axis) -> str:
    keep = _thinned(len(one.x))
    points = [(_px(one.x[i], x), _py(one.y[i], y)) for i in keep]
    path = "M" + "L".join(f"{a} {b}" for a, b in points)
    parts = []
    if one.low:
        edge = [(_px(one.x[i], x), _py(one.high[i], y)) for i in keep]
        edge += [(_px(one.x[i], x), _py(one.low[i], y)) for i in reversed(keep)]
        parts.append(f'<path class="band {one.kind}" d="M{"L".join(f"{a} {b}" for a, b in edge)}Z"/>')
    parts.append(f'<path class="line {one.kind}" d="{path}"/>')
    if one.dots or len(points) == 1:
        parts += [f'<circle class="dot {one.kind}" cx="{a}" cy="{b}" r="2.6"/>' for a, b in points]
    return "".join(parts)


def _points(one: Series, x: Axis, y: Axis) -> str:
    """A dot per value, with its interval as a bar; hollow where there are intervals and this one is not known."""
    parts = []
    for at, value in enumerate(one.y):
        a, b = _px(one.x[at], x), _py(value, y)
        known = not one.low or one.low[at] < one.high[at]
        if one.low and known:
            parts.append(f'<path class="line {one.kind}" d="M{a} {_py(one.low[at], y)}V{_py(one.high[at], y)}"/>')
        parts.append(f'<circle class="dot {one.kind}{"" if known else " few"}" cx="{a}" cy="{b}" r="3.4"/>')
    return "".join(parts)


def _columns(one: Series, x: Axis, y: Axis) -> str:
    """A column per value, from 0, as wide as the closest two have room for."""
    at = [_px(value, x) for value in one.x]
    gap = min((b - a for a, b in itertools.pairwise(sorted(at))), default=COLUMN)
    wide, base = round(min(COLUMN, 0.8 * gap), 1), _py(0, y)
    parts = []
    for middle, top in zip(at, (_py(value, y) for value in one.y), strict=True):
        corner = f'x="{round(middle - wide / 2, 1)}" y="{min(top, base)}"'
        parts.append(f'<rect class="dot {one.kind}" {corner} width="{wide}" height="{round(abs(base - top), 1)}"/>')
    return "".join(parts)


MARKS = {"line": _line, "points": _points, "columns": _columns}


def _thinned(count: int) -> list[int]:
    """At most MOST_POINTS indices, evenly spread, both ends kept."""
    if count <= MOST_POINTS:
        return list(range(count))
    return sorted({round(k * (count - 1) / (MOST_POINTS - 1)) for k in range(MOST_POINTS)})


def _end_labels(series: Sequence[Series], x: Axis, y: Axis) -> list[str]:
    """The last value of each line to its right, pushed apart so that labels never overlap."""
    shown = sorted((one for one in series if one.kind not in ("raw", "guide")), key=lambda one: _py(one.y[-1], y))
    parts: list[str] = []
    free = TOP - LABEL_HEIGHT
    for place, line in enumerate(shown):
        lowest = HEIGHT - BOTTOM - LABEL_HEIGHT * (len(shown) - 1 - place)  # room for those that follow
        free = min(max(_py(line.y[-1], y) + 3.5, free + LABEL_HEIGHT), lowest)
        at = _px(line.x[-1], x) + 7
        text = number(line.y[-1] / 10.0**y.power)
        parts.append(f'<text class="value {line.kind}" x="{at}" y="{round(free, 1)}">{text}</text>')
    return parts
