"""The page of one question: tokens and their colours, figures, the table, and that answers are never live."""

import dataclasses
import math
import re

import pytest

from kdjax.analysis.explain_page import Explained, ExplainedAnswer, render, write_explained
from kdjax.analysis.report_charts import DASH
from tests.analysis.html_page import EVIL, opened

NAN = math.nan


def answer(teacher="a", **changes):
    made = ExplainedAnswer(
        teacher,
        tokens=["It", " is", " 7", "\n", ""],
        nll=[0.0, 2.0, 4.0, 1.0, 0.5],
        brier=[0.0, 1.0, 1.9, 0.2, 0.1],
        rank=[1, 10, 1000, 2, 1],
        share=[0.0, 0.01, 0.04, -0.01, 0.0],
        figures={
            "n_answer": 5,
            "n_question": 41,
            "question_nll": 2.31,
            "sim_qq": 0.5,
            "head_question": 0.25,
            "answer_nll": 1.5,
            "head_norm": 0.04,
            "scas": 2.5,
        },
        group=1,
        score_rank=1,
        selected=True,
    )
    return dataclasses.replace(made, **changes)


def shown(*answers, **said):
    return opened(render(Explained("How many?", answers, **said)))


def token(page, piece):
    """Classes and title of a token."""
    its = next(its for its in page.of("span") if its.get("title", "").startswith(f"“{piece}”"))
    return its["class"].split(), its["title"]


def test_tokens_have_their_colours_and_figures():
    page = shown(answer())
    classes, title = token(page, " 7")
    assert classes == ["s9", "n9", "b9", "r9"], "the most of each; the rank ends at 100"
    assert title == "“ 7”\n100.00 % of H\nNLL 4.00 nats\nBrier 1.90\nrank 1,000"
    assert token(page, "It")[0] == ["s0", "n0", "b0", "r0"]
    classes, title = token(page, " is")
    assert classes == ["s4", "n4", "b4", "r4"], "a quarter of the largest share, by its square root; log of 10 by 100"
    assert "\n25.00 % of H" in title
    classes, title = token(page, "↵")
    assert (classes[0], classes[-1]) == ("m4", "nl"), "below 0"
    assert "\u221225.00 % of H" in title
    assert (
        "part"
        in next(its for its in page.of("span") if its.get("title", "").startswith("part of a character"))["class"]
    )


def test_the_scale_of_nll_is_that_of_all_answers():
    one = answer("b", nll=[8.0] * 5, score_rank=2, selected=False)
    page = shown(answer(), one)
    assert token(page, " 7")[0][1] == "n4"
    assert "8 nats or more" in page.text


def test_every_class_has_a_rule_and_needs_no_script():
    text = render(Explained("q", [answer()]))
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    page = opened(text)
    radios = [its["id"] for its in page.of("input")]
    assert radios == ["by-share", "by-nll", "by-brier", "by-rank"]
    assert ["checked" in its for its in page.of("input")] == [True, False, False, False]
    assert [its["for"] for its in page.of("label")] == radios
    for name, letters in zip(radios, ("sm", "n", "b", "r"), strict=True):
        for letter in letters:
            assert set(re.findall(rf"#{name}:checked~\.pool \.{letter}(\d)\b", style)) == set("123456789")
        assert f"#{name}:checked~.legend .of-{name[3:]}" in style
    assert text.index('id="by-rank"') < text.index('class="legend"') < text.index('class="pool"'), (
        "siblings that follow"
    )


def test_tokens_that_do_not_count_are_grey():
    page = shown(answer(nll=[NAN, 2, 4, 1, 0.5], share=[NAN, 0.01, 0.04, -0.01, 0.0]))
    assert token(page, "It") == (["off"], "“It”\nnot counted")
    assert token(page, " is")[0][0] == "s4"


def test_figures_table_and_order():
    second = answer(
        "b", score_rank=2, group=2, selected=False, figures={"scas": 3.25, "n_answer": 1234, "head_norm": NAN}
    )
    wrong = ExplainedAnswer("c", text="It is 8.", verdict="wrong", reason="wrong")
    page = shown(wrong, second, answer(), groups=5, id="item-17", gold="7")
    (table,) = page.tables
    assert table[0] == ["Rank", "Teacher", "Group", "S", "H", "dA", "n", "State"], "what nobody has is left out"
    assert table[1] == ["1", "a", "1", "2.50", "0.0400", "1.50", "5", "selected, right"]
    assert table[2] == ["2", "b", "2", "3.25", DASH, DASH, "1,234", "right"]
    assert table[3] == [DASH, "c", *5 * [DASH], "wrong"]
    values = [its.get("data-value") for its in page.of("td")]
    assert values[:4] == ["1", None, "1", "2.5"], "the whole number, to sort by"
    assert values[8 + 4] == ""
    assert [its["id"] for its in page.of("article")] == ["answer0", "answer1", "answer2"]
    assert [its["href"] for its in page.of("a")] == ["#answer0", "#answer1", "#answer2"]
    assert len(page.of("article", "chosen")) == len(page.of("tr", "chosen")) == 1
    assert "3 answers, 2 of them ranked by scas, lowest first. Selected: a." in page.text
    for said in (
        "Answers to item-17",
        "41 tokens; mean NLL 2.31 nats; CQQ 2.67; HQQ 0.250",
        "Reference answer: 7",
        "It is 8.",
    ):
        assert said in page.text


def test_another_score_gets_a_column():
    page = shown(answer(figures={"lark": 0.5}), score="lark", lower=False)
    assert page.tables[0][0][3] == "lark"
    assert "ranked by lark, highest first" in page.text


def test_half_of_h():
    page = shown(answer(tokens=["x", " y", " z", "u", "v"], share=[0.5, 0.1, 0.3, 0.1, 0.0]))
    assert "Half of H is in 1 of 5 tokens, most in x" in page.text
    page = shown(answer(tokens=["x", " y", " z", "u", "v"], share=[0.35, 0.1, 0.35, 0.1, 0.1]))
    assert "Half of H is in 2 of 5 tokens, most in x z" in page.text
    assert "Half of H" not in shown(answer(share=[0.0] * 5)).text


def test_the_strip_of_a_long_answer():
    count = 240
    share = [0.0] * count
    share[100], share[101] = 0.4, 0.5  # both in cell 50 of 120
    share[10], share[11] = 0.3, -0.2
    figures = [1.0] * count
    long = answer(tokens=["x"] * count, nll=figures, brier=figures, rank=figures, share=share)
    strip = [
        its["class"].split()
        for its in shown(long).of("i")
        if its["class"].startswith(("s", "m")) and "n" in its["class"]
    ]
    assert len(strip) == 120
    assert [at for at, classes in enumerate(strip) if classes[0] != "s0"] == [5, 50]
    assert strip[5][0] == "s3", "the square root of a ninth of the most, 0.1 of 0.9"
    assert strip[50] == ["s9", "n9", "b4", "r0"]
    assert not shown(answer()).of("div", "strip")


def test_a_thousand_long_tokens_stay_small():
    count = 4000
    figures = [0.5] * count
    many = answer(tokens=[" word"] * count, nll=figures, brier=figures, rank=figures, share=[1e-4] * count)
    assert len(render(Explained("q", [many])).encode()) < 130 * count


def test_untrusted_text_is_text():
    evil = answer(EVIL, tokens=[EVIL, " is", " 7", "\n", ""], verdict=EVIL, reason="loop")
    other = ExplainedAnswer(EVIL, text=EVIL, reason=EVIL)
    said = dict.fromkeys(("id", "gold", "score", "chosen", "student", "command"), EVIL)
    page = opened(render(Explained(EVIL, [evil, other], **said)))
    assert page.text.count(EVIL) >= 12
    assert any(EVIL in its.get("title", "") for its in page.of("span"))


@pytest.mark.parametrize("name", ["nll", "brier", "rank", "share"])
def test_figures_of_another_answer(name):
    with pytest.raises(ValueError, match=rf"^{name} must have one value per token, got 4 for 5 tokens of 'a'\."):
        shown(answer(**{name: [0.0] * 4}))


def test_empty(tmp_path):
    page = shown()
    assert "0 answers, 0 of them ranked by scas, lowest first. None is selected." in page.text
    assert not page.of("article")
    nothing = shown(ExplainedAnswer("a", figures={"scas": NAN, "answer_nll": None}))
    assert nothing.tables[0][1] == [DASH, "a", DASH, "right"]
    out = write_explained(tmp_path / "new" / "x.html", Explained("q", [answer()]))
    assert "It" in opened(out.read_text()).text
