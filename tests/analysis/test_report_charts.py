"""Axes, number formats and the geometry of the charts."""

import itertools
import math
import re

import pytest

from kdjax.analysis.report_charts import (
    BOTTOM,
    COLOURS,
    DASH,
    HEIGHT,
    LABEL_HEIGHT,
    LEFT,
    RIGHT,
    TIMES,
    TOP,
    WIDTH,
    Series,
    arm_css,
    chart,
    linear_axis,
    log_axis,
    number,
)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.3, 9.7), (-3, 4), (640, 655), (1e-7, 4e-4), (5, 5), (0, 0), (-2, -2), (1e8, 3e8)]
)
def test_linear_axis_holds_the_data_with_few_round_ticks(low, high):
    axis = linear_axis(low, high)
    assert axis.low <= low <= high <= axis.high
    assert 2 <= len(axis.ticks) <= 8
    steps = [b - a for a, b in itertools.pairwise(axis.ticks)]
    assert max(steps) == pytest.approx(min(steps))
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - nice) for nice in (1, 2, 2.5, 5)) < 1e-6


@pytest.mark.parametrize(("low", "high"), [(28.8, 1.1e6), (100, 300), (1, 1), (172, 2328), (1e-3, 1e300), (3, 9.99)])
def test_log_axis_holds_the_data_with_few_ticks(low, high):
    axis = log_axis(low, high)
    assert axis.low <= low * 1.001
    assert high * 0.999 <= axis.high
    assert 2 <= len(axis.ticks) <= 8
    assert axis.at(axis.low) == 0
    assert axis.at(axis.high) == pytest.approx(1)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (28.84, "28.8"),
        (0, "0"),
        (1.1e6, f"1.1 {TIMES} 10⁶"),
        (99_960, "99,960"),
        (9.99e5, f"1.0 {TIMES} 10⁶"),
        (2328.4, "2,328"),
        (0.04123, "0.0412"),
        (-2.5, "-2.50"),
        (3e-5, f"3.0 {TIMES} 10⁻⁵"),
        (float("nan"), DASH),
        (float("inf"), DASH),
    ],
)
def test_number(value, text):
    assert number(value).replace("\u00a0", " ") == text


def path_points(svg, kind):
    path = re.search(rf'class="line {kind}" d="M([^"]*)"', svg)[1]
    return [tuple(map(float, point.split())) for point in path.split("L")]


def test_points_land_where_the_axes_say():
    svg = chart("Loss", "nats", [Series("", [0, 50, 100], [10, 5, 0])])
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    assert path_points(svg, "after") == [(LEFT, TOP), ((LEFT + right) / 2, (TOP + bottom) / 2), (right, bottom)]


def test_log_scale():
    svg = chart("Perplexity", "", [Series("", [0, 1, 2], [1e6, 1e4, 1e2])], log=True)
    ys = [y for _, y in path_points(svg, "after")]
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.11)


def test_bad_points_are_left_out():
    nan = float("nan")
    svg = chart("x", "", [Series("", [0, 1, 2, 3], [1, nan, 3, 4])])
    assert len(path_points(svg, "after")) == 3
    assert "nan" not in svg
    assert chart("x", "", [Series("", [0, 1], [nan, nan])]) == ""
    assert len(path_points(chart("x", "", [Series("", [0, 1, 2], [0, 2, 4])], log=True), "after")) == 2


def test_band_is_drawn_around_the_line():
    svg = chart("x", "", [Series("", [0, 1], [2, 3], low=[1, 2], high=[3, 4])])
    assert svg.count("L", svg.index('class="band after"'), svg.index("Z")) == 3


def test_end_labels_do_not_overlap():
    series = [
        Series(name, [0, 1], [5, value], kind)
        for name, value, kind in (("a", 0, "after"), ("b", 0.01, "teacher"), ("c", 0, "before"))
    ]
    svg = chart("x", "", series)
    ys = sorted(float(y) for y in re.findall(r'class="value [^"]*" x="[^"]*" y="([^"]*)"', svg))
    assert len(ys) == 3
    assert all(b - a >= LABEL_HEIGHT - 0.11 for a, b in itertools.pairwise(ys))
    assert ys[-1] <= HEIGHT - BOTTOM
    assert 'class="value' not in chart("x", "", series, ends=False)


def test_long_runs_are_thinned_to_what_can_be_seen():
    many = list(range(20_000))
    points = path_points(chart("x", "", [Series("", many, many)]), "after")
    assert len(points) <= 400
    assert points[-1][0] == WIDTH - RIGHT


def test_power_of_ten_is_taken_out_of_small_numbers():
    svg = chart("Learning rate", "", [Series("", [0, 1, 2], [0.0, 4e-4, 1e-4])])
    assert f"{TIMES}10⁻⁴" in svg
    assert {">0<", ">1<", ">4<"} <= set(re.findall(r">\d<", svg))


def test_titles_are_escaped():
    assert "<b>a&lt;b</b>" in chart("a<b", "", [Series("", [0, 1], [0, 1])])


def test_points_have_bars_and_hollow_dots():
    nan = float("nan")
    points = Series("", [1, 2, 3, 4], [5, 6, nan, 8], low=[4, nan, 1, 8], high=[7, 9, 2, 10], mark="points")
    svg = chart("x", "", [points], ends=False)
    assert "nan" not in svg
    dots = re.findall(r'class="dot after( few)?" cx="([^"]*)" cy="([^"]*)"', svg)
    assert [few for few, _, _ in dots] == ["", " few", ""], "6 has no interval; what has no value is left out"
    bars = [tuple(map(float, bar)) for bar in re.findall(r'd="M([\d.]+) ([\d.]+)V([\d.]+)"', svg)]
    heights = [low - high for _, low, high in bars]
    assert heights[0] / heights[1] == pytest.approx((7 - 4) / (10 - 8), rel=0.01)
    assert float(dots[0][1]) > LEFT, "beside the axis and not on it"
    assert "few" not in chart("x", "", [Series("", [1, 2], [5, 6], mark="points")])


def test_columns_stand_on_zero():
    svg = chart("x", "", [Series("", [0, 1, 2], [50, 100, -25], mark="columns")])
    zero = float(re.search(r'class="zero" d="M[\d.]+ ([\d.]+)', svg)[1])
    tops = [tuple(map(float, one)) for one in re.findall(r'y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', svg)]
    assert [round(top + height, 1) for top, height in tops[:2]] == [zero, zero]
    assert tops[2][0] == zero
    assert tops[1][1] == pytest.approx(2 * tops[0][1], abs=0.31)
    assert tops[0][1] == pytest.approx(2 * tops[2][1], abs=0.31)
    above = chart("x", "", [Series("", [3, 4], [98, 99], mark="columns")])
    assert ">0<" in above, "0 is on the axis, however far"
    crowded = chart("x", "", [Series("", [0, 0.01, 1], [1, 1, 1], mark="columns")])
    assert float(re.search(r'width="([\d.]+)"', crowded)[1]) < 4, "columns never overlap"


def test_each_arm_has_a_colour_in_both_themes():
    light, dark = re.search(
        r":root\{([^}]*)\}@media \(prefers-color-scheme: dark\)\{:root\{([^}]*)\}\}", arm_css()
    ).groups()
    for theme in (light, dark):
        assert re.findall(r"--(arm\d):#", theme) == [f"arm{k}" for k in range(len(COLOURS))]
