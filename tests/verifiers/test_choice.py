"""The verifier of multiple choice: letters and texts of options in the usual forms, denials, several at once."""

import pytest

from kdjax.data.prompts import Prompt
from kdjax.verifiers import Verdict
from kdjax.verifiers.multiple_choice import choice

CITIES = ["Paris", "London", "New York"]
YES_NO = ["yes", "no"]
# gold, response, options
RIGHT = [
    ("B", "B", None),
    ("B", "B.", None),
    ("B", "(B)", None),
    ("(B)", "b", None),
    ("B", "The answer is (B).", None),
    ("B", "Answer: B", None),
    ("B", "**B**", None),
    ("B", r"\boxed{B}", None),
    ("B", r"So \boxed{A}? No: \boxed{\text{B}}", None),
    ("B", "I choose option B because A is bad", None),
    ("B", "Option B", None),
    ("B", "The correct option is B", None),
    ("B", "Not A but B", None),
    ("A", "I think A.", None),
    ("C", "A is wrong, B is wrong, so the answer is C.", None),
    ("B", "<think>A?</think>B", None),
    ("B", "B) London", CITIES),
    ("B", "London", CITIES),
    ("London", "B", CITIES),
    ("new york", "The answer is New York.", CITIES),
    ("Paris", "It has always been Paris", CITIES),
    ("yes", "Yes, it follows.", YES_NO),
    ("yes", "Yes it does", YES_NO),
    ("yes", "It follows, so yes", YES_NO),
    ("no", "No.", YES_NO),
    ("no", "no no no", YES_NO),
    ("invalid", "It is invalid.", ["valid", "invalid"]),
    ("not valid", "It is not valid.", ["valid", "not valid"]),
]
WRONG = [
    ("C", "A or B", None),
    ("B", "The answer is not B", CITIES),
    ("B", "", None),
    ("B", "<think>B", None),
    ("B", "I don't know", CITIES),
    ("London", "Paris", CITIES),
    ("yes", "No, not at all", YES_NO),
    ("yes", "The answer is no.", YES_NO),
    ("valid", "It is not valid.", ["valid", "not valid"]),
    ("A", "D", CITIES),
]
UNDECIDED = [
    ("B", "A or B", None),
    ("B", "(A) is wrong; (B) is right", None),
    ("A", "A dog is here", None),
    ("B", "London, I think", None),
    ("D", r"\boxed{D", None),
    ("B", "B) Paris", CITIES),
    ("Paris", "Paris or London?", CITIES),
    ("yes", "yes or no", YES_NO),
    ("yes", "No doubt: yes", YES_NO),
]
CASES = [(*case, verdict) for verdict, cases in zip(Verdict, (RIGHT, WRONG, UNDECIDED), strict=True) for case in cases]


def prompt(gold, choices=None):
    return Prompt("p", "?", gold, meta={"choices": choices} if choices is not None else {})


@pytest.mark.parametrize(("gold", "response", "choices", "expected"), CASES)
def test_truth_table(gold, response, choices, expected):
    assert choice(response, prompt(gold, choices)).verdict == expected


@pytest.mark.parametrize(
    "frame", ["{}", "({})", "{}.", "{}) because", "The answer is {}.", "Answer: ({})", r"\boxed{{{}}}"]
)
def test_of_ten_letters_only_the_gold_one_is_right(frame):
    for gold in "ABCDEFGHIJ":
        verdicts = {letter: choice(frame.format(letter), prompt(gold)).verdict for letter in "ABCDEFGHIJ"}
        assert [letter for letter, verdict in verdicts.items() if verdict != Verdict.WRONG] == [gold]
        assert verdicts[gold] == Verdict.RIGHT


@pytest.mark.parametrize(("gold", "choices"), [("Rome", CITIES), ("D", CITIES), ("K", None), ("Paris", None)])
def test_a_gold_answer_that_is_no_option_is_refused(gold, choices):
    with pytest.raises(ValueError, match=f"the answer of prompt 'p' must be one of its options .*, got '{gold}'"):
        choice("A", prompt(gold, choices))


@pytest.mark.parametrize("choices", [[], ["one"], "AB", ["a", 2], ["a", " A."], [""] * 2, list("abcdefghijk")])
def test_bad_options_are_refused(choices):
    with pytest.raises(ValueError, match="\"meta.choices\" of prompt 'p' must be a list of at least 2 texts"):
        choice("A", prompt("A", choices))
