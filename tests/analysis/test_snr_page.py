"""snr.html: what is where in the pictures and in the table, and what is left out."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from kdjax.analysis import report_charts, snr_page
from tests.analysis.html_page import EVIL, opened

NONE = [None, None, None]


def measured(name, problems, snr, half=0.01, noise=2e-3):
    known = [snr, snr - half, snr + half] if half else [snr, None, None]
    scaled = [None if value is None else noise * value for value in known]
    return {"name": name, "problems": problems, "signal": scaled, "noise": [noise, None, None], "snr": known}


FOUND = [
    measured("0/4", 32, -0.004),
    measured("1/4", 32, 0.030),
    measured("2/4", 20, 0.040),
    measured("3/4", 3, 0.030, half=0),
    {"name": "4/4", "problems": 1, "signal": NONE, "noise": NONE, "snr": NONE},
]
BARS = [
    {"rate": rate, "problems": problems, "truncated": 0.0, "weight": weight}
    for rate, problems, weight in (
        ("0/4", 90, 0.0),
        ("1/4", 40, 1.5),
        ("2/4", 20, 2.0),
        ("3/4", 3, 1.5),
        ("4/4", 1, 0.0),
    )
] + [{"rate": "unjudged", "problems": 7, "truncated": 1.0, "weight": 0.0}]


@pytest.fixture(scope="module")
def page():
    return opened(snr_page.render(FOUND, BARS, 0.876, name=EVIL))


def test_table(page):
    (table,) = page.tables
    assert [cell.split(" ")[0] for cell in table[0][:3]] == ["Pass", "Problems", "Measured"]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert rows["1/4"][:2] == ["40", "32"]
    assert rows["1/4"][2] == "6.000[4.000, 8.000]", "signal, times 10^-5"
    assert "10⁻⁵" in table[0][3]
    assert "10⁻³" in table[0][4]
    assert rows["1/4"][3] == "2.000"
    assert rows["1/4"][4] == "0.030[0.020, 0.040]"
    assert rows["0/4"][4] == "\u22120.004[\u22120.014, 0.006]"
    assert rows["3/4"][4] == "0.030", "too few problems for an interval"
    assert rows["4/4"][1:] == ["1", *3 * [report_charts.DASH], "0.000", report_charts.DASH]
    assert rows["unjudged"] == ["7", "0", *3 * [report_charts.DASH], "0.000", report_charts.DASH]


def test_best_weights_have_the_sum_of_those_in_use(page):
    rows = {row[0]: row for row in page.tables[0][1:]}
    best = {name: float(rows[name][-1]) for name in ("0/4", "1/4", "2/4", "3/4")}
    problems = {"0/4": 90, "1/4": 40, "2/4": 20, "3/4": 3}
    assert sum(n * best[name] for name, n in problems.items()) == pytest.approx(40 * 1.5 + 20 * 2 + 3 * 1.5, abs=0.1)
    assert best["0/4"] == 0, "a signal below 0 is none"
    assert best["1/4"] / best["2/4"] == pytest.approx((0.03 / 1.03) / (0.04 / 1.04), abs=1e-3)


def test_says_what_the_weights_reach(page):
    assert "gains 88 % of what it would gain" in page.text
    assert "108" not in page.text
    assert "88 problems" in page.text, "those measured"
    assert EVIL in page.text
    assert "cannot be judged" in opened(snr_page.render(FOUND[-1:], BARS, math.nan, name="x")).text


def figure(text, title):
    return next(one for one in re.findall(r"<figure.*?</figure>", text, re.DOTALL) if f"<b>{title}</b>" in one)


def test_pictures():
    text = snr_page.render(FOUND, BARS, 0.9, name="x")
    snr = figure(text, "SNR of the gradients")
    dots = re.findall(r'<circle class="dot after( few)?" cx="([\d.]+)" cy="([\d.]+)"', snr)
    assert [bool(few) for few, _, _ in dots] == [False, False, False, True], "4/4 has one problem and no SNR"
    xs = [float(x) for _, x, _ in dots]
    assert xs[2] - xs[1] == pytest.approx(xs[1] - xs[0], abs=0.11), "at their pass rates"
    spans = re.findall(r'<path class="line after" d="M([\d.]+) ([\d.]+)V([\d.]+)"', snr)
    assert len(spans) == 3
    for (_, x, y), (at, low, high) in zip(dots, spans, strict=False):
        assert (x, float(y)) == (at, pytest.approx((float(low) + float(high)) / 2, abs=0.11))
    assert 'class="zero"' in snr, "the SNR is below 0 somewhere"
    curve = re.search(r'class="line guide" d="M([^"]*)"', snr)[1].split("L")
    assert len(curve) == 41
    assert curve[20].split()[0] == dots[2][1], "its top is at 1/2"
    columns = re.findall(r'<rect class="dot before"', figure(text, "Problems"))
    assert len(columns) == 5, "unjudged ones have no pass rate"
    heights = re.findall(r'<rect [^>]*height="([\d.]+)"', figure(text, "Weight of a problem"))
    assert float(heights[2]) / float(heights[1]) == pytest.approx(2.0 / 1.5, rel=0.01)
    assert [float(heights[k]) for k in (0, 4)] == [0, 0]


def test_the_guide_is_the_nearest_by_problems():
    exact = [measured(f"{k}/4", 10, 0.3 * k / 4 * (1 - k / 4)) for k in range(5)]
    assert snr_page.guide(exact) == pytest.approx(0.3)
    # one problem that is far off moves it less than ten would
    few, many = (snr_page.guide([*exact[:4], measured("3/4", n, 0.6)]) for n in (1, 10))
    assert 0.3 < few < many
    assert math.isnan(snr_page.guide([measured("1/4", 9, -0.1)]))
    assert math.isnan(snr_page.guide([measured("0/4", 9, 0.1)])), "p (1 - p) is 0 there"
    assert "line guide" not in figure(snr_page.render(FOUND[:1], BARS, 0.1, name="x"), "SNR of the gradients")


@pytest.mark.parametrize(
    ("name", "rate"), [("3/8", 0.375), ("0", 0), ("1", 1), ("0.2-0.3", 0.25), ("0.9-1.0", 0.95), ("12/16", 0.75)]
)
def test_bins_have_a_place(name, rate):
    assert snr_page.rate_of(name) == pytest.approx(rate)
    assert math.isnan(snr_page.rate_of("unjudged"))


def test_nothing_measured():
    text = snr_page.render([], BARS, math.nan, name="x")
    assert len(opened(text).tables[0]) == 1 + len(BARS)
    assert "SNR of the gradients" not in text
    empty = opened(snr_page.render([], [], math.nan, name="x"))
    assert not empty.of("svg")


def test_files(tmp_path):
    assert snr_page.write_snr(tmp_path, FOUND, BARS, 0.9, name="x") == tmp_path / "snr.html"
    svg = (tmp_path / "snr.svg").read_text()
    root = ET.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert svg.count("<circle") == 4
    assert "4 pass rates" in svg
    used = set(re.findall(r"var\((--\w+)\)", svg))
    assert used <= set(re.findall(r"(--\w+):", svg)), "its colours are in it"
    assert "prefers-color-scheme: dark" in svg
    ET.fromstring(snr_page.picture([]))
