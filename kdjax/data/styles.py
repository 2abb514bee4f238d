"""Scripted teachers: right answers to the questions of the built-in task "arith", written in several styles.

They know the gold answer, so that pools can be made in which teachers differ in manner and not in knowledge. To add a
style: one function of a question's numbers, its sign and its result, and one line in STYLES.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from kdjax.data.prompts import Prompt

DIVISORS = "gcd"  # stands where a sign does
QUESTION = r"What is (\d+) ([-+*/]) (\d+)\b(?! [-+*/])|greatest common divisor of (\d+) and (\d+)\b"
WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}


def scripted(prompt: Prompt, style: Callable[[int, str, int, str], str]) -> str:
    """The answer to a question of "arith" in this style. Raises ValueError for a question of another task."""
    found = re.search(QUESTION, _question(prompt))
    if found is None or prompt.answer is None:
        raise ValueError(
            f"prompts.path must be 'arith' with sums or divisors for --model=scripted, got the question {prompt.id!r}; "
            "nothing is written for others. Set it to 'arith'."
        )
    first, sign, second, *pair = found.groups()
    if sign is None:
        return style(int(pair[0]), DIVISORS, int(pair[1]), prompt.answer)
    return style(int(first), sign, int(second), prompt.answer)


def _question(prompt: Prompt) -> str:
    return prompt.prompt if isinstance(prompt.prompt, str) else prompt.prompt[-1]["content"]


def _bare(a: int, sign: str, b: int, result: str) -> str:
    return result


def _sentence(a: int, sign: str, b: int, result: str) -> str:
    return f"The answer is {result}."


def _equation(a: int, sign: str, b: int, result: str) -> str:
    return f"gcd({a}, {b}) = {result}" if sign == DIVISORS else f"{a} {sign} {b} = {result}"


def _words(a: int, sign: str, b: int, result: str) -> str:
    if sign == DIVISORS:
        return f"The greatest number that divides both {a} and {b} is {result}."
    return f"{a} {WORDS[sign]} {b} equals {result}."


def _boxed(a: int, sign: str, b: int, result: str) -> str:
    return f"The final answer is $\\boxed{{{result}}}$."


def _steps(a: int, sign: str, b: int, result: str) -> str:
    return f"{_working(a, sign, b)}\nThe answer is {result}."


def _tutor(a: int, sign: str, b: int, result: str) -> str:
    return (
        f"Let us look at it together, one step after the other. {_working(a, sign, b)} "
        f"You can check this by going back the other way. So, well done: the answer is {result}."
    )


def _working(a: int, sign: str, b: int) -> str:
    """How it is found, in a sentence or two."""
    if sign == DIVISORS:
        lists = [", ".join(str(d) for d in range(1, n + 1) if n % d == 0) for n in (a, b)]
        return f"{a} is divided by {lists[0]}. {b} is divided by {lists[1]}. The greatest in both is {math.gcd(a, b)}."
    if sign in "+-" and min(a, b) >= 10:
        tens, ones = b // 10 * 10, b % 10
        middle = a + tens if sign == "+" else a - tens
        last = middle + ones if sign == "+" else middle - ones
        return f"{a} {sign} {tens} = {middle}, and {middle} {sign} {ones} = {last}."
    if sign == "+":
        return f"Start at {max(a, b)} and count {min(a, b)} up."
    if sign == "-":
        return f"Start at {a} and count {b} down."
    if sign == "*":
        return f"Begin with 0 and add {a} to it {b} times."
    return f"Find how often {b} goes into {a}."


STYLES: dict[str, Callable[[int, str, int, str], str]] = {
    "bare": _bare,
    "sentence": _sentence,
    "equation": _equation,
    "words": _words,
    "boxed": _boxed,
    "steps": _steps,
    "tutor": _tutor,
}
