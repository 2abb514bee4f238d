"""The numeric verifier: a truth table of tricky pairs, invariants over generated answers, and what it refuses."""

import random
import re
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.data.prompts import Prompt
from kdjax.verifiers import Verdict
from kdjax.verifiers.numbers import only_number
from kdjax.verifiers.numeric_answers import numeric

# (gold, response)
RIGHT = [
    ("7", "I think it is seven apples"),
    ("5", "The final answer is five"),
    ("1", 'The letter "t" occurs only once in the word "strawberry."'),
    ("3", "The letter 'r' occurs 3 times in the word."),
    ("8", "To find 8 / 1, we need to divide. 8 divided by 1 equals 8."),
    ("42", "6 * 7 is approximately 42, which is a beautiful example of how to multiply."),
    ("14", "6 + 8 = 14\n\nThis is standard arithmetic."),
    ("1", "The greatest common divisor of 18 and 17 is 1, which is the only divisor that appears to have any"),
    ("7", "7"),
    ("1/2", "0.5"),
    ("0.5", "1/2"),
    ("1/2", r"\boxed{\frac{1}{2}}"),
    ("1/2", r"\boxed{\dfrac12}"),
    ("-1/2", r"$-\frac{1}{2}$"),
    ("1.5", r"\boxed{1\frac{1}{2}}"),
    ("1.5", "1 1/2"),
    ("1.5", "1\u00bd"),
    ("1000", "1,000"),
    ("1,000", "1000"),
    ("1000", r"1\,000"),
    ("1000", "1{,}000"),
    ("1000", "1 000"),
    ("10000000", "1e7"),
    ("12000", r"1.2 \times 10^{4}"),
    ("12000", "1.2 x 10^4"),
    ("0.0012", "1.2e-3"),
    ("2000000", "2 million"),
    ("-3", "\u22123"),
    ("-3", "negative 3"),
    ("-3", "The answer is -3."),
    ("3", "3."),
    ("3", "3.0"),
    ("3", "The answer is 3."),
    ("5", "The answer is not 4 but 5"),
    ("5", r"\boxed{3} so \boxed{5}"),
    ("5", r"\boxed{\boxed{5}}"),
    ("4", "<think>hmm 5</think>4"),
    ("5", "$5.00"),
    ("-5", "-$5"),
    ("50%", "50%"),
    ("50", "50%"),
    ("0.5", "50%"),
    ("50%", "0.5"),
    ("50%", "50"),
    ("7", "7 apples"),
    ("7", r"\boxed{7 \text{ cm}^2}"),
    ("7", "7 cm^2"),
    ("7", "3 + 4 = 7"),
    ("7", "3 + 4 is 7"),
    ("7", "The sum of 3 and 4 is 7."),
    ("7", "The answer is 3 + 4 = 7"),
    ("7", "The answer is 7, since 5+3=8 minus 1."),
    ("2", "6 / 3 = 2"),
    ("7", "seven"),
    ("7", "Seven."),
    ("7", r"\boxed{x = 7}"),
    ("4", r"\sqrt{16} = 4"),
    ("7", "#### 7"),
    ("72", "She sold 24+48=72 clips.\n#### 72"),
    ("7", "**7**"),
    ("7", "**Answer:** 7"),
    ("7", "Answer:\n\n7"),
    ("7", r"The answer is $\boxed{7}$."),
    ("8", "2**3 = 8"),
    ("-5", "= - 5"),
    ("5", "1. First add 2 and 3\n2. The result is 5"),
    ("7", "The answer to 3 + 4 is 7"),
    ("12", "The greatest common divisor of 24 and 36 is 12."),
    ("12", "gcd(24, 36) = 12"),
    ("12", "The greatest common divisor (GCD) of 24 and 36 is **12**"),
    ("12", "<answer>12</answer>"),
    ("0", "0"),
    ("0", "-0"),
    ("7", "\u0667"),
    ("7", "\uff17"),
    ("5", "There are 5 r's in the word."),
    ("180", r"180^\circ"),
    ("180", "180\u00b0"),
    ("7", "(7)"),
    ("7", r"\(7\)"),
    ("7", '"7"'),
    ("7", "7!"),
    ("7", "x=7"),
    ("7", "The answer is 7 because 3+4 = 7"),
    ("100", "1e2 dollars"),
    ("7", "The result: 7"),
    ("5", r"\fbox{5}"),
    ("5", r"\boxed 5"),
    ("-7", "- 7 is what I get: = -7"),
    ("4", "Is it 3? No, it is 4."),
    ("1234567.5", "1,234,567.5"),
    ("8", "The answer is 8 (that is 5 + 3)."),
    ("42", "So the final answer is: **42**."),
    ("0.25", "25 percent"),
    ("7", "- 3\n- 4\nTotal: 7"),
    ("6", "The answer to the question is 6."),
    ("9", "Answer = 9"),
    (".5", "1/2"),
    ("+3", "3"),
    ("16", "4^2 = 16"),
    ("5", r"x \neq 4, x = 5"),
    ("3", r"3 \text{ apples}"),
    ("1/3", r"\frac{1}{3}"),
    # an equation whose one side is the bare number
    ("66", "66 = 11+55"),
    ("66", "11+55 = 66"),
    ("66", "So we have 66 = 11 + 55."),
    ("66", "60 + 6 = 66 = 2*30 + 12/2"),
    ("-5", "-5 = 5 - 10"),
    ("5", "5 = -5 + 10"),
    ("2.5", r"2.5 = 5 \times 0.5"),
]
WRONG = [
    ("2", "1. Add them\n2. Done"),
    ("5.5", "3 5/2"),
    ("8", "The letter 'r' occurs 3 times in the word."),
    ("1", "No"),
    ("2", "dinner occurs four times"),
    ("5", "To solve 5 - 8, we find the difference between 5 and 8 and then add 3 to that result, so that"),
    ("7", "17"),
    ("17", "7"),
    ("2", "2 million"),
    ("-3", "3"),
    ("3", "-3"),
    ("4", "The answer is not 4"),
    ("4", "The answer isn't 4, it is 5."),
    ("3", r"\boxed{3} so \boxed{5}"),
    ("4", ""),
    ("4", "<think>4"),
    ("50%", "5000%"),
    ("50", "0.5"),
    ("2", r"\boxed{7 \text{ cm}^2}"),
    ("4", "3 + 4 = 7"),
    ("4", "The sum of 3 and 4 is 7."),
    ("9", "The answer is 7 or 8"),
    ("4", "What is 0 + 4?"),
    ("3", "3,5"),
    ("8", "seven"),
    ("7", "I don't know"),
    ("3", "3:30"),
    ("1/3", "0.333"),
    ("1", "1/0"),
    ("1", "1e999999999"),
    ("4", r"x \neq 4, x = 5"),
    ("0.3333", "1/3"),
    ("1000", "1.000"),
    ("5", "5e1"),
    ("4", "It is never 4."),
    ("11", "66 = 11+55"),
    ("55", "66 = 11+55"),
]
UNDECIDED = [
    # of a model of 135M parameters: the number is there by chance
    ("2", "To evaluate the fraction 4 / 2, we simplify it by dividing both numerator and denominator by 2."),
    ("8", "You need to find the remainder when dividing 8 by 1.\n\nTo do this, you can simply"),
    ("0", "A simple question, but it has an answer that challenges our understanding of zero. In mathematics, 0"),
    ("0", "The concept of 0 * 0 can be understood as the absence. When we add 0 to a number, we"),
    ("1", "1 is not a number."),
    ("8", "A question that can be answered with a simple answer of 8, as 1 + 7 equals"),
    ("7", "The answer is"),
    ("4", "4 is half of it, or even twice as much as 4 for most people who think so and"),
    ("7", "One thousand seven."),
    ("1", "No one knows"),
    ("1/2", "one half"),
    ("12", r"\boxed{12"),
    ("7", "7 is the sum of 3 and 4."),
    ("4", "7 is the sum of 3 and 4."),
    ("7", "The answer is 7 or 8"),
    ("7", "3 + 4"),
    ("66", "66 = 11+54"),
    ("65", "66 = 11+54"),
    ("66", "60 + 6 = 11 + 55"),
    ("66", "66 = 11 + 5 * 1"),
    ("66", "66% = 11 + 55"),
    ("66", "66 = 11 + 55/0"),
    ("2", "6/3"),
    ("3.5", "3,5"),
    ("7", r"\boxed{2x}"),
    ("2", r"\boxed{2x}"),
    ("4", r"\sqrt{16}"),
    ("5", "10 - 5"),
    ("5", "10 -5"),
    ("5", "- 5"),
    ("3", "3, 4"),
    ("16", "4^2"),
    ("3", r"\boxed{3 or 4}"),
    ("5", "The answer is 5 of 6"),
    ("1/2", r"\boxed{\frac{x}{2}}"),
    ("2", r"\boxed{\frac{x}{2}}"),
]
CASES = [(*pair, verdict) for verdict, pairs in zip(Verdict, (RIGHT, WRONG, UNDECIDED), strict=True) for pair in pairs]


def verdict(gold, response, **meta):
    return numeric(response, Prompt("p", "?", gold, meta=meta)).verdict


@pytest.mark.parametrize(("gold", "response", "expected"), CASES)
def test_truth_table(gold, response, expected):
    assert numeric(response, Prompt("p", "?", gold)).verdict == expected


def test_a_finding_says_what_was_read_and_why():
    found = numeric("It is 12 = 3 * 4. The answer is 12 apples.", Prompt("p", "?", "13"))
    assert (found.extracted, found.reason) == ("12", "the answer is 13")
    both = numeric("The answer is 7 or 8.", Prompt("p", "?", "7"))
    assert both.extracted == "7 | 8"
    assert "several ways" in both.reason


# --- invariants: the renderings are our own, the comparison is of Fraction

numerators, denominators = st.integers(-(10**9), 10**9), st.integers(1, 9999)
FRAMES = [
    "{}",
    "The answer is {}.",
    "**{}**",
    r"\boxed{{{}}}",
    "First 3 + 4 = 7.\nFinal answer: {}",
    "#### {}",
    "<think>it may be 99</think> {}",
    "x = {}",
    "${}$",
    r"\({}\)",
]


def written(value, style):
    sign, size = ("-" if value < 0 else ""), abs(value)
    if size.denominator == 1:
        forms = [f"{size.numerator}", f"{size.numerator:,}", f"{size.numerator}.0", f"{size.numerator}.", f"{size}.00"]
    else:
        above, below = size.numerator, size.denominator
        forms = [f"{above}/{below}", rf"\frac{{{above}}}{{{below}}}", rf"\dfrac{{{above}}}{{{below}}}"]
        if above > below:
            forms.append(f"{above // below} {above % below}/{below}")
    return sign + forms[style % len(forms)]


@settings(max_examples=150)
@given(numerators, denominators, st.integers(0, 99), st.sampled_from(FRAMES))
def test_a_number_is_right_however_it_is_written(above, below, style, frame):
    value = Fraction(above, below)
    assert verdict(str(value), frame.format(written(value, style))) == Verdict.RIGHT


@settings(max_examples=150)
@given(numerators, denominators, numerators, denominators, st.integers(0, 99), st.sampled_from(FRAMES))
def test_another_number_is_never_right(above, below, other, by, style, frame):
    gold, value = Fraction(above, below), Fraction(other, by)
    expected = Verdict.RIGHT if gold == value else Verdict.WRONG
    assert verdict(str(gold), frame.format(written(value, style))) == expected


@settings(max_examples=100)
@given(st.integers(-(10**6), 10**6), st.integers(-12, 12))
def test_decimals_and_powers_of_ten_are_exact(digits, power):
    value = digits * Fraction(10) ** power
    for shown in (f"{digits}e{power}", rf"{digits} \times 10^{{{power}}}", f"{digits} x 10^{power}"):
        assert verdict(str(value), shown) == Verdict.RIGHT
        assert verdict(str(value + Fraction(1, 10**13)), shown) == Verdict.WRONG


def test_tolerance_is_absolute_and_only_where_it_is_given():
    assert verdict("3.14159", "3.14") == Verdict.WRONG
    assert verdict("3.14159", "3.14", tolerance=0.01) == Verdict.RIGHT
    assert verdict("3.14159", "3.13", tolerance="1/100") == Verdict.WRONG
    assert verdict("1/3", "0.333", tolerance="0.001") == Verdict.RIGHT


@pytest.mark.parametrize("tolerance", [-1, "much", True, [1]])
def test_a_bad_tolerance_is_refused(tolerance):
    message = "\"meta.tolerance\" of prompt 'p' must be a number of at least 0, got " + re.escape(repr(tolerance))
    with pytest.raises(ValueError, match=message):
        verdict("3", "3", tolerance=tolerance)


@pytest.mark.parametrize(
    "gold", ["x+1", "3, 4", "3 or 4", "3 + 4", "seven", "3,5", "12:30", "not 4", "x = 3", "about 3 or so, I think"]
)
def test_a_gold_answer_that_is_no_number_is_refused(gold):
    assert only_number(gold) is None
    with pytest.raises(ValueError, match="the answer of prompt 'p' must be a number for the verifier 'numeric', got "):
        verdict(gold, "3")


@pytest.mark.parametrize("gold", [None, "", "  "])
def test_a_missing_gold_answer_is_refused(gold):
    with pytest.raises(ValueError, match="prompt 'p' must have an \"answer\" for the verifier 'numeric', got"):
        verdict(gold, "3")


PIECES = [
    "9",
    "1 ",
    "1,",
    "1/",
    "- ",
    "= 3 ",
    "{",
    "\\boxed{",
    "\\frac{",
    "**",
    "*a",
    "answer is ",
    "not ",
    "a^",
    " ",
    "1e9",
]


@pytest.mark.parametrize("piece", PIECES)
def test_a_long_response_is_read_in_time(piece):
    began = time.process_time()
    numeric(piece * 20_000 + random.Random(0).choice(["", "7"]), Prompt("p", "?", "7"))
    assert time.process_time() - began < 2
