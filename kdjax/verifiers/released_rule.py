"""Is it right by the rule released with SCAS (arXiv 2605.26872)? Kept to compare with it; `symbolic` is stricter."""

from __future__ import annotations

import re

from kdjax.data.prompts import Prompt
from kdjax.verifiers.extraction import final_part
from kdjax.verifiers.finding import Finding, gold_answer, right, undecided, wrong

TOLERANCE = 1e-6
_BOX = re.compile(r"\\boxed\{([^{}]*)\}")
_WORDS = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}")
_FRAC = re.compile(r"\\frac\{(-?\d+)\}\{(-?\d+)\}")
_SLASH = re.compile(r"(-?(?<!\d)\d++)\s*+/\s*+(-?\d+)")  # starts where digits start: linear in a long run of them
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def released_rule(response: str, prompt: Prompt) -> Finding:
    """Is the gold answer somewhere in the response, or else its last number the gold one?

    See `rule`. As with all verifiers thoughts are left out, and a response that gives no answer is wrong.
    """
    gold = gold_answer(prompt, "released_rule")
    text = final_part(response)
    if not text:
        return wrong("", "the response is empty or stops within its thoughts")
    found = rule(gold, text)
    shown = text[-200:]
    if found is None:
        return undecided(shown, "there is no number to compare")
    return right(shown) if found else wrong(shown, f"the answer is {gold}")


def rule(reference: str, output: str) -> bool | None:
    r"""The released rule to the letter: True, False, or None if it cannot be told.

    Without \boxed{}, \text{} and its like, $ and extra blanks: True if the reference occurs anywhere in the output,
    whatever the case: 7 in "17". Else numbers are compared, to 1e-6: of the text after the last "####" the first
    \frac{}{}, else the first a/b, else the last number. None if one side has none.
    """
    gold, said = _plain(reference), _plain(output)
    if gold and said and gold.lower() in said.lower():
        return True
    numbers = _number(gold), _number(said)
    if numbers[0] is None or numbers[1] is None:
        return None
    return abs(numbers[0] - numbers[1]) < TOLERANCE


def _plain(text: str) -> str:
    text = _WORDS.sub(r"\1", _BOX.sub(r"\1", text.strip()))
    return re.sub(r"\s+", " ", text.strip("$ "))


def _number(text: str) -> float | None:
    text = text.rpartition("####")[2]
    for pattern in (_FRAC, _SLASH):
        found = pattern.search(text)
        if found and float(found[2]) != 0:
            return float(found[1]) / float(found[2])
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None
