"""Tasks of reasoning-gym: its scorers taken strictly, with scorers of our own in its place, and with the real ones."""

import importlib.util

import pytest

from kdjax.config import Prompts
from kdjax.data.prompts import Prompt, load_prompts
from kdjax.verifiers import VERIFIERS

reasoning_gym = VERIFIERS["reasoning_gym"]
# As the real ones do: partial credit for a substring, something for anything, and an error for what is no number.
FAKE = """
def get_score_answer_fn(name):
    def partial(answer, entry):
        return 1.0 if answer == entry["answer"] else 0.5 if entry["answer"] in answer else 0.05
    def strict(answer, entry):
        return float(int(answer) == int(entry["answer"]))
    def own(answer, entry):
        return float(answer == entry["metadata"])
    return {"partial": partial, "strict": strict, "own": own}[name]
"""


def judged(response, generator="partial", answer="12", **entry):
    about = {"generator": generator, "entry": {"question": "?", "answer": answer, **entry}}
    return reasoning_gym(response, Prompt("p", "?", answer, meta={"reasoning_gym": about}))


def test_only_full_marks_are_right(package):
    package("reasoning_gym", FAKE)
    for response in ("12", " 12\n", "The answer is 12.", r"\boxed{12}", "**12**", "12.", "<answer>12</answer>", "$12"):
        assert judged(response).verdict == "right", response
    for response in ("", "13", "12 or 13", "The answer is not 12", "1 2"):
        assert judged(response).verdict == "wrong", response
    assert judged("12 or 13").reason == "scored 0.5, the answer is 12"
    assert judged(r"\boxed{12").verdict == "undecided"


def test_a_scorer_that_raises_cannot_tell(package):
    package("reasoning_gym", FAKE)
    found = judged("twelve", "strict")
    assert found.verdict == "undecided"
    assert found.reason.startswith("the scorer raised ValueError: invalid literal")
    assert judged("The answer is 13.", "strict").verdict == "wrong"
    assert judged("12", "nosuch").reason == "reasoning-gym: KeyError: 'nosuch'"


def test_a_scorer_that_refuses_its_own_answer_cannot_tell(package):
    package("reasoning_gym", FAKE)
    assert judged("12", "own", metadata="13").reason == "the scorer does not accept its own gold answer: 0.0"
    assert judged("13", "own", answer=None, metadata="13").verdict == "right"


def test_without_the_package_it_says_what_to_install(absent):
    assert judged("12").reason == "reasoning-gym is not installed: pip install reasoning-gym"


@pytest.mark.parametrize("about", [None, "sum", {"generator": "sum"}, {"generator": 3, "entry": {}}])
def test_a_prompt_without_its_entry_is_refused(about):
    with pytest.raises(ValueError, match='"meta.reasoning_gym" of prompt \'p\' must be {"generator": name, "entry"'):
        reasoning_gym("12", Prompt("p", "?", "12", meta={"reasoning_gym": about}))


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
def test_the_real_package():
    prompts = load_prompts(Prompts(path="reasoning_gym:chain_sum,prime_factorization", size=6))
    assert {prompt.id.split("/")[0] for prompt in prompts} == {"chain_sum", "prime_factorization"}
    for prompt in prompts:
        assert reasoning_gym(f"The answer is {prompt.answer}.", prompt).verdict == "right"
        expected = "wrong" if prompt.id.startswith("chain_sum") else "undecided"
        assert reasoning_gym(f"It may be {prompt.answer}, or not, I think", prompt).verdict == expected
