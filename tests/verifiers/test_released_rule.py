"""The rule released with SCAS, to the letter: what it accepts that it should not is kept."""

import pytest

from kdjax.data.prompts import Prompt
from kdjax.verifiers import VERIFIERS, Verdict
from kdjax.verifiers.released_rule import rule

# (reference, output, released, verifier of ours, its verdict); None: our policy is open, or needs math-verify
TABLE = [
    ("7", r"\boxed{7}", True, "symbolic", Verdict.RIGHT),
    ("7", "17", True, "symbolic", Verdict.WRONG),
    ("7", "#### 8 and 7", True, "numeric", None),
    ("A", "I am A", True, None, None),
    ("1/2", "0.5", True, "symbolic", Verdict.RIGHT),
    ("1/2", r"\frac{1}{2}", True, "symbolic", Verdict.RIGHT),
    ("x+1", "1+x", True, None, None),
    ("7", "x = 6, not seven", False, "numeric", Verdict.WRONG),
    ("7", "", None, "symbolic", Verdict.WRONG),
]


@pytest.mark.parametrize(("reference", "output", "released", "ours", "verdict"), TABLE)
def test_invariant_19(reference, output, released, ours, verdict):
    assert rule(reference, output) is released
    found = VERIFIERS["released_rule"](output, Prompt("p", "?", reference)).verdict
    assert (found == Verdict.RIGHT) == (released is True)
    if ours is not None:
        found = VERIFIERS[ours](output, Prompt("p", "?", reference)).verdict
        assert found != Verdict.RIGHT if verdict is None else found == verdict


@pytest.mark.parametrize(
    ("reference", "output", "released"),
    [
        ("3/4", "5-3/4", True),
        ("2/3", "it is 5-3/4", False),  # the first fraction, with the dash before it as its sign
        ("0.75", r"so \frac{3}{4} of 12", True),
        ("1200", r"$1,200$ in all", True),
        ("Yes", r"\text{yes}", True),
        ("5", "3/0 is none", False),
        ("five", "5", None),
        ("2", "1 then 2.0000001", True),
    ],
)
def test_details(reference, output, released):
    assert rule(reference, output) is released


def test_digits_without_end_take_no_time():
    assert rule("7", "1" * 100_000) is False
