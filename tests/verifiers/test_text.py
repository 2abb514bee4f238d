"""Exact texts, regular expressions, and where an answer is taken from."""

import pytest

from kdjax.data.prompts import Prompt
from kdjax.verifiers import Verdict
from kdjax.verifiers.extraction import boxed, final_part, plain, stated
from kdjax.verifiers.texts import exact, regex


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("none", None),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}} {", r"\{1, 2\}"),
        (r"\boxed{a \} b}", r"a \} b"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{}", ""),
        (r"\boxed 7$", "7"),
        ("\\boxed{\n7\n}", "7"),
        ("<answer>a</answer> <Answer>\nb </Answer>", "b"),
        (r"<answer>\boxed{3}</answer>", "3"),
    ],
)
def test_the_last_box_with_its_braces_balanced(text, content):
    assert boxed(text) == content


@pytest.mark.parametrize("text", [r"\boxed{", r"\boxed{1} \boxed{\frac{1}{2}", r"\boxed{1\}"])
def test_a_box_that_is_cut_off_is_told_from_none(text):
    with pytest.raises(EOFError, match="not closed"):
        boxed(text)


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("I do not know", None),
        ("The answer is 4. I am sure.", "4"),
        ("the answer is 4.5, or so", "4.5, or so"),
        ("Answer: a\nThe final answer is: b", "b"),
        ("**Answer:** b", "b"),
        ("The answer to the first riddle is b", "b"),
        ("Answer:\n\nb\nc", "b"),
        ("x\n#### 72", "72"),
        ("The answer is not 4.", None),
        ("The answers are 1 and 2", "1 and 2"),
    ],
)
def test_what_is_stated_as_the_answer(text, rest):
    assert stated(text) == rest


def test_thoughts_are_no_answer():
    assert final_part("<think>3</think>\n4 ") == "4"
    assert final_part("3</think>4") == "4"  # the template opened it
    assert final_part("<think>4") == ""
    assert final_part(" 4\n") == "4"


@pytest.mark.parametrize(
    "text",
    ["Paris", "**Paris**.", '"Paris."', r"\(Paris\)", "$Paris$", r"\text{Paris}", "`Paris`", "\u201cParis\u201d"],
)
def test_marks_around_a_text_do_not_count(text):
    assert plain(text) == "Paris"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Paris", "right"),
        (" paris.\n", "right"),
        ("The answer is Paris.", "right"),
        ("Let me think.\nPARIS", "right"),
        (r"It is \boxed{\text{Paris}}", "right"),
        (r"Paris, so \boxed{London}", "wrong"),
        ("Paris is the capital", "wrong"),
        ("the City of  Light", "right"),
        ("London", "wrong"),
        ("", "wrong"),
        (r"\boxed{Par", "undecided"),
    ],
)
def test_exact(response, expected):
    prompt = Prompt("p", "?", "Paris", meta={"answers": ["City of Light", "the city of light"]})
    assert exact(response, prompt).verdict == expected


def test_exact_refuses_other_answers_that_are_no_texts():
    with pytest.raises(
        ValueError,
        match='"meta.answers" of prompt \'p\' must be a list of texts, or absent, got "Rome"'.replace(
            '"Rome"', "'Rome'"
        ),
    ):
        exact("Rome", Prompt("p", "?", "Paris", meta={"answers": "Rome"}))


def test_regex_searches_the_stripped_answer():
    assert regex("a 42 b", Prompt("p", "?", r"\b42\b")).extracted == "42"
    assert regex(" 42\n", Prompt("p", "?", r"^42$")).verdict == Verdict.RIGHT
    assert regex("a 421 b", Prompt("p", "?", r"\b42\b")).verdict == Verdict.WRONG
    assert regex("<think>42</think>7", Prompt("p", "?", "42")).verdict == Verdict.WRONG


def test_regex_refuses_what_is_no_pattern():
    with pytest.raises(
        ValueError, match=r"the answer of prompt 'p' must be a regular expression .*, got '\(4'; missing"
    ):
        regex("4", Prompt("p", "?", "(4"))
