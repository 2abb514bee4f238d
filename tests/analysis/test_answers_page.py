"""The page of what was selected: shares, groups, overlap, costs, and what is not known."""

import math
import re

import pytest

from kdjax.analysis.answers_page import CostGroup, Round, render, round_of, write_answers
from kdjax.analysis.report_charts import COLOURS, DASH, number
from tests.analysis.html_page import EVIL, opened

POOL = {"a": {"": 90, "malformed": 0, "wrong": 10}, "b": {"": 60, "wrong": 30, "loop": 5}}


def made(**changes):
    first = {"step": 0, "questions": 100, "teachers": {"a": 60, "b": 20}, "dropped": {"no_answer": 15, "error": 5}}
    first |= {"groups": [CostGroup(g, 30 + g, 1.5 * g, g / 4, math.nan) for g in (1, 2)]}
    first |= {"overlap": {"grape": 0.9, "random": math.nan}, "score": 1.25, "answer_nll": 0.5, "forced": 3}
    first |= {"answers_scored": 150, "tokens_scored": 30_000, "tokens_trained": 8_000}
    first |= {"scoring_seconds": 90.0, "training_seconds": 180.0, "scoring_flops": 2e12, "training_flops": 8e12}
    return Round(**(first | changes))


def shown(rounds, pool=POOL, **said):
    return opened(render(rounds, pool, **({"name": "x"} | said)))


def table(page, first):
    """Rows by their names of the table whose first heading this is."""
    found = next(rows for rows in page.tables if rows[0][0] == first)
    return {row[0]: row[1:] for row in found}


def test_one_round():
    page = shown([made(same_family=0.75)], chosen="One of group 1 is drawn.")
    assert (
        "195 answers of 2 teachers in the pool. Selected by scas: 80 answers to 80 of 100 questions. One of"
        in page.text
    )
    assert table(page, "Teacher")["a"] == ["90", "75.0"]
    assert table(page, "Teacher")["b"] == ["60", "25.0"]
    assert table(page, "Teacher")["of the student's family"] == ["", "75.0"]
    assert table(page, "Selection") == {"Selection": ["Round 1, %"], "grape": ["90.0"], "random": [DASH]}
    assert table(page, "Reason") == {"Reason": ["Round 1"], "no_answer": ["15"], "error": ["5"]}
    assert page.tables[-1] == [
        ["Teacher", "Rows", "Admitted", "wrong", "loop"],
        ["a", "100", "90", "10", "0"],
        ["b", "95", "60", "30", "5"],
    ]
    groups = table(page, "Group")
    assert groups["1"] == ["31", "1.50", "0.250", DASH]
    titles = re.findall(r"Share of the selected answers|Same answer as", page.text)
    assert titles == [], "one round is no curve"


def test_costs_of_the_rounds():
    second = made(step=200, scoring_seconds=30.0, training_seconds=math.nan, training_flops=math.nan, tokens_trained=0)
    figures = table(shown([made(), second]), "")
    assert figures["At step"] == ["0", "200"]
    assert figures["Questions with one answer alone"] == ["3", "3"]
    assert figures["Tokens scored, with padding"] == ["30,000", "30,000"]
    assert figures["Tokens trained, with padding"] == ["8,000", "0"]
    assert figures["Scoring, time"] == ["1m30s", "30s"]
    assert figures["Scoring to training, time"] == ["0.50", DASH]
    assert figures["Scoring to training, FLOPs"] == ["0.25", DASH]
    assert figures["Mean scas of the selected"] == ["1.25", "1.25"]
    assert figures["Scoring, FLOPs"] == [number(2e12)] * 2


def test_a_choice_without_scores_names_none():
    page = shown([made(), made()], score="")
    assert "2 rounds of selection; in the last, 80 answers to 80 of 100 questions." in page.text
    assert not [name for name in table(page, "") if name.startswith(("Mean", "Their"))]
    assert "Selected: 80 answers" in shown([made()], score="").text


def test_equal_teachers_are_named():
    name = "Drawn from equal teachers"
    equals = made(taken_teachers=("a", "b"))
    assert table(shown([equals, made(taken_teachers=("b",))]), "")[name] == ["a, b", "b"]
    assert name not in table(shown([made(), made(taken_teachers=("b",))]), "")
    counts = {"questions": 9, "teachers": {"a": 9}, "dropped": {}, "forced": 0, "means_of_groups": {}}
    assert round_of(counts, step=0).taken_teachers == ()
    assert round_of(counts | {"taken_teachers": ["a", "b"]}, step=0).taken_teachers == ["a", "b"]


def test_tiles():
    page = shown([made(), made(teachers={"a": 10, "b": 30}, overlap={"grape": 0.2, "rsr": 0.4})])
    for said in ("75.0 %b", "40.0 %the same as rsr", "3m00sbeside 6m00s of training"):
        assert said in page.text


def figure(text, title):
    return next(one for one in re.findall(r"<figure.*?</figure>", text, re.DOTALL) if f"<b>{title}</b>" in one)


def test_curves_over_the_rounds():
    many = {f"t{k:02}": 20 - k for k in range(12)}
    text = render([made(teachers=many), made(teachers={"t00": 7, "t11": 1})], {}, name="x")
    shares = figure(text, "Share of the selected answers")
    keys = re.findall(r"</i>([^<]*)</span>", shares)
    assert keys == [f"t{k:02}" for k in range(len(COLOURS) - 1)] + ["5 others"]
    last = dict(re.findall(r'class="value arm(\d)"[^>]*>([^<]*)<', shares))
    assert (last["0"], last["7"], last["1"]) == ("87.5", "12.5", "0")
    assert "Same answer as" in text


def test_groups_in_the_first_and_the_last_round():
    text = render([made(), made(groups=[CostGroup(1, 5, 1.0), CostGroup(2, 5, 2.0)])], POOL, name="x")
    scas = figure(text, "scas")
    assert dict(re.findall(r'class="value (\w+)"[^>]*>([^<]*)<', scas)) == {"before": "3.00", "after": "2.00"}
    assert "<b>Length</b>" not in text, "nothing is known of it"
    alone = figure(render([made()], POOL, name="x"), "scas")
    assert "before" not in alone
    assert 'class="keys"' not in alone


def test_a_round_by_its_manifest():
    counts = {"questions": 9, "selected": 7, "forced": 1, "dropped": {"none_valid": 2}, "rows": 7, "teachers": {"a": 7}}
    counts |= {"means_of_groups": {"1": {"answers": 7, "score": 0.5, "answer_nll": 0.25, "n_answer": 12.0}}}
    found = round_of(counts, step=3, tokens_scored=100)
    assert (found.step, found.questions, found.selected, found.forced, found.tokens_scored) == (3, 9, 7, 1, 100)
    assert found.dropped == {"none_valid": 2}
    assert found.groups == [CostGroup(1, 7, 0.5, 0.25, 12.0)]
    assert math.isnan(found.same_family)
    assert (found.overlap, round_of(counts | {"overlap": {"rsr": 0.5}}, step=3).overlap) == ({}, {"rsr": 0.5})
    found = round_of(counts | {"same_family": {"admitted": 40, "selected": 0}}, step=3)
    assert found.same_family == 0
    assert table(shown([found]), "Teacher")["of the student's family"] == ["40", "0.0"]


def test_untrusted_names_are_text():
    evil = made(teachers={EVIL: 4}, dropped={EVIL: 1}, overlap={EVIL: 0.5})
    page = shown(
        [evil, evil], {EVIL: {"": 1, EVIL.replace("_", " "): 2}}, name=EVIL, score=EVIL, chosen=EVIL, command=EVIL
    )
    assert page.text.count(EVIL) >= 12


@pytest.mark.parametrize("pool", [{}, POOL])
def test_nothing_selected(pool, tmp_path):
    page = shown([], pool)
    assert "Nothing is selected yet." in page.text
    assert len(page.tables) == bool(pool)
    none = shown([Round(0, 10, {}, {"no_answer": 10})], pool)
    assert "0 answers to 0 of 10 questions" in none.text
    assert not none.of("div", "tiles")
    known = write_answers(tmp_path / "x.html", [Round(0, 10, {"a": 0, "b": 0})], pool, name="x").read_text()
    assert table(opened(known), "Teacher")["a"][-1] == DASH
