"""Scripted teachers: right by the verifier, different in manner, and honest about what they cannot answer."""

import re

import pytest

from kdjax.config import Prompts
from kdjax.data.prompts import Prompt, load_prompts
from kdjax.data.styles import STYLES, scripted
from kdjax.verifiers import Verdict, verify


@pytest.fixture(scope="module")
def questions():
    kinds = "arith:sum1,arith1,sum2,gcd,syll,order"
    return load_prompts(Prompts(path=kinds, size=1500, instruction=" Reply with the answer only."))


@pytest.mark.parametrize("style", STYLES)
def test_every_answer_is_right(questions, style):
    for prompt in questions:
        said = scripted(prompt, STYLES[style])
        assert verify(said, prompt).verdict == Verdict.RIGHT, (prompt, said)


def test_what_is_shown_on_the_way_is_true(questions):
    sums = 0
    for prompt in questions:
        for left, sign, right, result in re.findall(
            r"(-?\d+) ([-+]) (\d+) = (-?\d+)", scripted(prompt, STYLES["steps"])
        ):
            assert int(left) + (int(right) if sign == "+" else -int(right)) == int(result), prompt
            sums += 1
    assert sums > 200


def test_styles_differ(questions):
    for prompt in questions[::50]:
        assert len({scripted(prompt, style) for style in STYLES.values()}) == len(STYLES)


@pytest.mark.parametrize("text", ["Do all birds sing?", "What is 3 + 4 + 5?"])
def test_other_questions_are_refused(text):
    with pytest.raises(ValueError, match="^prompts.path must be 'arith' without the kind 'letters' for --model=scri"):
        scripted(Prompt("x", text, "7"), STYLES["bare"])
