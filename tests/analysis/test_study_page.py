"""The page of a study: what it shows, that it needs nothing else, that nothing from outside is live in it."""

import dataclasses
import re

import pytest

from kdjax.analysis import study_page, study_table
from kdjax.analysis.study import default_study, from_study_config
from kdjax.analysis.study_stats import Mean
from kdjax.config import Data, Eval, OnPolicy, Prompts
from tests.analysis.html_page import Page

EVIL = "<script>alert('x')</script>\"&<img src=x onerror=alert(1)>"


def study():
    made = default_study()
    made.base.teacher.path = "synthetic"
    made.base.student.init.kind = "cut"
    made.base.data.path = EVIL
    made.arms = {"dense": {}, "se_kd": {}}
    return from_study_config(made)


def record(name, seed, perplexity):
    keys = ("kl", "agreement", "accuracy", "ece", "nll")
    cells = {key: {"value": 0.1 + seed / 100, "low": 0.0, "high": 1.0} for key in keys}
    cells["perplexity"] = {"value": perplexity, "low": perplexity - 1, "high": perplexity + 1}
    costs = dict.fromkeys(("targets_supervised", "temporary_bytes", "argument_bytes", "cache_bytes"))
    costs |= {
        "tokens_of_text": 51200,
        "steps": 100,
        "tokens_covered": 51200,
        "tokens_trained": 51200,
        "seconds_per_step": 1.5,
    }
    costs |= {"preparation_seconds": 30.0, "steps_seconds": 150.0, "total_seconds": 180.0, "whole_seconds": 200.0}
    costs |= {"processor_seconds": 300.0, "resident_bytes": 2**30}
    phase = {"seconds": 200.0, "processor_seconds": 300.0, "resident_bytes": 2**30, "attempts": 1}
    curve = [{"step": 0, "perplexity": 1e6}, {"step": 50, "perplexity": None}, {"step": 100, "perplexity": perplexity}]
    said = {"arm": name.removesuffix("@time"), "name": name, "seed": seed, "timed": name.endswith("@time")}
    said |= {"hardware": "2 CPU cores", "versions": {"jax": "0.0"}}
    return (
        said
        | {"figures": cells, "teacher": {}, "heldout_tokens": 4000, "costs": costs, "curve": curve}
        | {"phases": {"train": phase}}
    )


@pytest.fixture(scope="module")
def text():
    records = [record("dense", seed, 300.0 + seed) for seed in (0, 1, 2)]
    records += [record("se_kd", seed, 290.0 + 1.5 * seed) for seed in (0, 1, 2)]
    records += [record("se_kd@time", seed, 310.0 + 2 * seed) for seed in (0, 1, 2)]
    arms = study_table.summarise(records, "dense")
    return study_page.render(study(), records, arms, [f"rs_kd/0: train failed: {EVIL}"], [EVIL], f"python -m x {EVIL}")


def test_well_formed_self_contained_and_escaped(text):
    page = Page(text)
    assert page.open == page.badly_nested == []
    assert "http" not in text, "no address of anything outside"
    assert not {tag for tag, _ in page.elements} & {"img", "link", "iframe", "object"}
    assert not [attrs for _, attrs in page.elements if attrs.keys() & {"src", "href"}]
    assert [tag for tag, _ in page.elements].count("script") == 1, "only our own"
    assert EVIL not in text
    assert "".join(page.texts).count(EVIL) >= 4, "all of it is there, as text"


def test_the_lead_says_what_is_trained_on_and_judged():
    made, judged = study(), " Judged on the same 4,000 held-out tokens"
    for answers, fraction, prompts, lead in [
        ("", 0.0, 0, f"covers 51,200 tokens of text.{judged}."),
        ("", 1.0, 9, f"covers 800 answers to prompts of arith.{judged} of text, and on answers to 9 held-out prompts."),
        ("gold", 0.5, 0, f"covers 800 answers to prompts of arith.{judged} of text."),
        ("", 0.5, 0, f"covers 800 rows, text of text and answers to prompts of arith.{judged} of text."),
    ]:
        fields = {
            "data": Data(path="text", seq_len=64),
            "prompts": Prompts(path="arith", answers=answers),
            "on_policy": OnPolicy(fraction=fraction),
            "eval": Eval(prompts=prompts),
        }
        of = dataclasses.replace(made, base=dataclasses.replace(made.base, **fields), equal_time=False)
        assert lead in study_page._lead(of, [record("dense", 0, 300.0)])


def test_both_themes_have_a_colour_for_each_arm(text):
    light, dark = re.search(r":root\{([^}]*)\}@media \(prefers-color-scheme: dark\)\{:root\{([^}]*)\}\}", text).groups()
    used = set(re.findall(r'class="line (arm\d)"', text))
    assert used == {"arm0", "arm1"}
    for theme in (light, dark):
        assert {f"arm{k}" for k in range(len(study_page.COLOURS))} == set(re.findall(r"--(arm\d):#", theme))


def test_sections_plots_and_curves(text):
    assert re.findall(r"<h2>([^<]*)</h2>", text) == [
        "Equal tokens",
        "Equal time",
        "Curves",
        "Not there",
        "Reproduce",
    ]
    titles = re.findall(r"<figcaption><b>([^<]*)</b>", text)
    assert titles.count("perplexity, minus dense") == 2
    assert [title for title in titles if "on the way" in title] == [
        "Held-out perplexity on the way, equal tokens",
        "Held-out perplexity on the way, equal tokens",
        "Held-out perplexity on the way, equal time",
    ]
    # perplexity: -10, -9.5, -9: better; the other figures do not differ at all
    assert "se_kd: -9.5000 [-10.7421, -8.2579], better" in text
    assert "<td>-9.5<small>[-10.7, -8.3]</small><small>better</small></td>" in text
    assert "<td>+0.000<small>[+0.000, +0.000]</small><small>cannot say</small></td>" in text


def test_points_of_a_curve_are_where_their_tokens_and_seconds_are():
    records = [record("dense", 0, 300.0), record("dense", 1, 400.0)]
    (line,) = study_page._lines(records, {"dense": "arm0"}, over_time=False)
    assert line.x == [0, 25600, 51200]
    assert (line.y[-1], line.low[-1], line.high[-1]) == (350.0, 300.0, 400.0)
    (line,) = study_page._lines(records, {"dense": "arm0"}, over_time=True)
    assert line.x == [30, 105, 180]


def arm(name, low, high, said):
    differences = {"kl": Mean(3, (low + high) / 2, low, high)}
    return study_table.Arm(name, (0, 1, 2), {}, differences, {"kl": said}, {}, {})


def test_a_difference_is_drawn_beside_the_zero_line():
    svg = study_page.difference_plot(
        "KL", "kl", True, [arm("a", -0.4, -0.2, "better"), arm("b", -0.1, 0.3, "worse")], "d"
    )
    zero = float(re.search(r'class="zero" d="M([\d.]+) ', svg)[1])
    spans = [tuple(map(float, found)) for found in re.findall(r'class="span" d="M([\d.]+) [\d.]+H([\d.]+)"', svg)]
    assert spans[0][0] < spans[0][1] < zero
    assert spans[1][0] < zero < spans[1][1]
    assert zero - spans[0][1] == pytest.approx((spans[0][1] - spans[0][0]), abs=0.11)  # both are 0.2 wide
    assert re.findall(r'<g class="(\w+)">', svg) == ["after", "teacher"]
    assert "better is left" in svg
    nan = float("nan")
    assert study_page.difference_plot("KL", "kl", True, [arm("a", nan, nan, "cannot say")], "d") == ""
