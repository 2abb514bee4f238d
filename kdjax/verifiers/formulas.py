"""Are two formulas equal? By math-verify, where it is installed."""

from __future__ import annotations

import re

from kdjax.data.prompts import Prompt
from kdjax.verifiers import worker
from kdjax.verifiers.extraction import announced, final_part, plain
from kdjax.verifiers.finding import Finding, gold_answer, right, undecided, wrong
from kdjax.verifiers.numbers import only_number

SECONDS = 10.0  # that one comparison may take
LONGEST = 1000  # characters of a formula


def symbolic(response: str, prompt: Prompt) -> Finding:
    r"""Is the formula of the response equal to the gold one, x+1 to 1+x?

    Read from: the last \boxed{} or <answer>; else after the last "answer is"; else the last line. Two numbers are
    compared exactly, equal texts are equal; the rest is math-verify's (pip install "math-verify[antlr4_13_2]"), in a
    process of its own with limits of time and memory. Undecided: it is not installed, it cannot read one side, it takes
    over 10 s.
    """
    gold = gold_answer(prompt, "symbolic").strip()
    text = final_part(response)
    if not text:
        return wrong("", "the response is empty or stops within its thoughts")
    try:
        answer = announced(text)
    except EOFError as error:
        return undecided("", f"{error}: it is cut off")
    answer = plain(text.split("\n")[-1] if answer is None else answer)
    if not answer:
        return wrong("", "the box is empty")
    if len(answer) > LONGEST:
        return undecided(answer[:100], f"the formula is longer than {LONGEST} characters")
    numbers = only_number(gold), only_number(answer)
    if numbers[0] and numbers[1]:
        return right(answer) if numbers[1].agrees(numbers[0]) else wrong(answer, f"the answer is {gold}")
    if _bare(answer) == _bare(gold):
        return right(answer)
    if not worker.installed("math_verify"):
        return undecided(answer, 'math-verify is not installed: pip install "math-verify[antlr4_13_2]"')
    try:
        equal = worker.ask("symbolic", plain(gold), answer, seconds=SECONDS)
    except (TimeoutError, RuntimeError) as error:
        return undecided(answer, f"math-verify: {error}")
    if isinstance(equal, str):
        return undecided(answer, f"math-verify cannot read {equal!r}")
    return right(answer) if equal else wrong(answer, f"the answer is {gold}")


def _bare(text: str) -> str:
    return re.sub(r"\s+|\\(?:left|right|,|!)|\$", "", text)
