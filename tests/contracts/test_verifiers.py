"""What every entry of VERIFIERS must keep, found through the table; how one is picked for a prompt."""

import dataclasses
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kdjax.data.prompts import Prompt
from kdjax.verifiers import VERIFIERS, Finding, Verdict, abilities, check_prompts, verify, worker

# A prompt that each can check, a response that is right, and one that is wrong.
EXAMPLES = {
    "numeric": (Prompt("p", "1 + 2?", "3"), "3", "4"),
    "symbolic": (Prompt("p", "?", "x+1"), "x+1", ""),
    "choice": (Prompt("p", "A or B?", "B"), "B", "A"),
    "exact": (Prompt("p", "capital?", "Paris"), "paris", "Rome"),
    "regex": (Prompt("p", "?", "^a+$"), "aa", "ab"),
    "reasoning_gym": (
        Prompt("p", "?", "3", meta={"reasoning_gym": {"generator": "g", "entry": {"answer": "3"}}}),
        None,
        "",
    ),
    "instructions": (Prompt("p", "?", meta={"instructions": [{"check": "lower"}]}), "abc", "ABC"),
    "code": (Prompt("p", "?", meta={"tests": "assert f() == 1"}), None, ""),
    "released_rule": (Prompt("p", "1 + 2?", "3"), "3", "4"),
}
every_verifier = pytest.mark.parametrize("name", VERIFIERS)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No package that may be there, no code of a model."""
    monkeypatch.setattr(worker, "installed", lambda name: False)
    monkeypatch.delenv("KDJAX_RUN_CODE", raising=False)


def test_every_verifier_has_an_example():
    assert set(EXAMPLES) == set(VERIFIERS)


@every_verifier
def test_tells_right_from_wrong(name):
    prompt, right, wrong = EXAMPLES[name]
    found = VERIFIERS[name](wrong, prompt)
    assert found.verdict == Verdict.WRONG
    assert found.reason
    if right is not None:
        found = VERIFIERS[name](right, prompt)
        assert found == Finding(Verdict.RIGHT, found.extracted)
        assert found.extracted
    else:  # decided by what is not here
        found = VERIFIERS[name]("anything", prompt)
        assert found.verdict == Verdict.UNDECIDED
        assert found.reason


@every_verifier
@settings(max_examples=40)
@given(response=st.text(alphabet=st.sampled_from("a3A0.,-=/\\{}()[]$%*\n `<>?&\u00bd\u2212\u0663\ufffd"), max_size=40))
@example(response="\\boxed{")
@example(response="\x00\ud7ff\U0001f600")
@example(response="<think>")
def test_any_text_gets_a_verdict_and_the_same_one_again(name, response):
    prompt, *_ = EXAMPLES[name]
    found = VERIFIERS[name](response, prompt)
    assert isinstance(found.verdict, Verdict)
    assert isinstance(found.extracted, str)
    assert bool(found.reason) == (found.verdict != Verdict.RIGHT)
    assert found == VERIFIERS[name](response, prompt)


@every_verifier
@pytest.mark.parametrize("response", ["", "  \n", "<think>3 B paris aa abc", "</think>"])
def test_no_answer_is_wrong(name, response):
    assert VERIFIERS[name](response, EXAMPLES[name][0]).verdict == Verdict.WRONG


@every_verifier
def test_a_prompt_that_it_cannot_check_is_refused_at_any_response(name):
    bare = Prompt("q7", "?")
    for response in ("", "3"):
        with pytest.raises(ValueError, match="prompt 'q7' must"):
            VERIFIERS[name](response, bare)


@every_verifier
@pytest.mark.parametrize(
    "piece", ["a ", "*", "```\n", "answer is ", "B or ", "(A", "\\boxed{", "not ", " ", "\n", "-1/"]
)
def test_a_long_response_is_judged_in_time(name, piece):
    began = time.process_time()
    VERIFIERS[name](piece * 20_000 + "x", EXAMPLES[name][0])
    assert time.process_time() - began < 3


@every_verifier
def test_says_what_it_does(name):
    first = (VERIFIERS[name].__doc__ or "").split("\n")[0]
    assert first.endswith("?")


def test_the_verifier_of_the_prompt_comes_before_the_default():
    prompt = Prompt("p", "?", "3")
    assert verify("3.0", prompt, "numeric").verdict == "right"
    assert verify("3.0", prompt, "exact").verdict == "wrong"
    assert verify("3.0", dataclasses.replace(prompt, verifier="exact"), "numeric").verdict == "wrong"
    assert (
        verify("3", dataclasses.replace(prompt, verifier="tests.contracts.test_verifiers:own")).verdict == "undecided"
    )


def test_abilities_tell_what_else_a_verdict_depends_on(monkeypatch):
    before = abilities()
    assert set(before) == {"code", "math-verify", "reasoning-gym"}
    assert before["code"] == ""
    monkeypatch.setenv("KDJAX_RUN_CODE", "1")
    monkeypatch.setattr("importlib.metadata.version", lambda package: f"{package} 9")
    assert abilities() == {"code": "1", "math-verify": "math-verify 9", "reasoning-gym": "reasoning-gym 9"}


def own(response, prompt):
    return Finding(Verdict.UNDECIDED, response, "a verifier of somebody else")


@pytest.mark.parametrize(
    ("prompt", "default", "message"),
    [
        (Prompt("q7", "?", "3"), "", "prompts.verifier must be set, got ''; prompt 'q7' names no verifier"),
        (
            Prompt("q7", "?", "3"),
            "numerik",
            "prompts.verifier must be a known name .* Did you mean 'numeric'",
        ),
        (Prompt("q7", "?", "3", "numerik"), "", "\"verifier\" of prompt 'q7' must be a known name"),
        (Prompt("q7", "?", "x"), "numeric", "the answer of prompt 'q7' must be a number"),
    ],
)
def test_prompts_that_cannot_be_verified_are_told_before_answers_are_generated(prompt, default, message):
    with pytest.raises(ValueError, match=message):
        check_prompts([Prompt("p", "?", "3", "numeric"), prompt], default)
