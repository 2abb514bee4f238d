"""Scripted teachers: right answers to the questions of the built-in task "arith", written in several styles.

They know the gold answer, so that pools can be made in which teachers differ in manner and not in knowledge. To add a
style: one function of what is `Known` of a question, and one line in STYLES. Another kind of question: a line in KNOWN.
"""

import dataclasses
import math
import re
from collections.abc import Callable

from kdjax.data.prompts import Prompt
from kdjax.data.tasks import FIGURES, RELATIONS

WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}


@dataclasses.dataclass(frozen=True)
class Known:
    """Of one question. equation: the answer with all that is asked, in signs; words: in a sentence; working: how it is
    found, in a sentence or two."""

    answer: str
    equation: str
    words: str
    working: str


Style = Callable[[Known], str]


def scripted(prompt: Prompt, style: Style) -> str:
    """The answer to a question of "arith" in this style. Raises ValueError for a question of another task."""
    question = prompt.prompt if isinstance(prompt.prompt, str) else prompt.prompt[-1]["content"]
    for pattern, known in KNOWN.items():
        found = re.search(pattern, question)
        if found is not None and prompt.answer is not None:
            return style(known(found, prompt.answer))
    raise ValueError(
        "prompts.path must be 'arith' without the kind 'letters' for --model=scripted, got the question "
        f"{prompt.id!r}; nothing is written for others. Set it to 'arith'."
    )


def _sum(found: re.Match[str], result: str) -> Known:
    a, sign, b = int(found[1]), found[2], int(found[3])
    return Known(result, f"{a} {sign} {b} = {result}", f"{a} {WORDS[sign]} {b} equals {result}.", _reckoned(a, sign, b))


def _reckoned(a: int, sign: str, b: int) -> str:
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


def _divisor(found: re.Match[str], result: str) -> Known:
    a, b = int(found[1]), int(found[2])
    lists = [", ".join(str(d) for d in range(1, n + 1) if n % d == 0) for n in (a, b)]
    return Known(
        result,
        f"gcd({a}, {b}) = {result}",
        f"The greatest number that divides both {a} and {b} is {result}.",
        f"{a} is divided by {lists[0]}. {b} is divided by {lists[1]}. The greatest in both is {math.gcd(a, b)}.",
    )


def _syllogism(found: re.Match[str], answer: str) -> Known:
    premises, claim = found[1], found[2]
    a, b, c = dict.fromkeys(re.findall(r"(\w+)(?: are|\.)", premises))  # first "... a are b."
    (reason,) = (
        reason.format(a=a, b=b, c=c)
        for form, claimed, _, reason in FIGURES
        if (form.format(a=a, b=b, c=c), claimed.format(a=a, b=b, c=c)) == (premises, claim)
    )
    verb = "follows" if answer == "yes" else "does not follow"
    return Known(answer, f"{answer}: {premises}", f"{answer.capitalize()}, it {verb} that {claim}.", reason)


def _order(found: re.Match[str], answer: str) -> Known:
    pairs, asked = [(found[1], found[3]), (found[4], found[5])], found[6]
    if pairs[0][0] == pairs[1][1]:
        pairs.reverse()
    (most,) = (most for more, most, _ in RELATIONS if more == found[2])
    line = (pairs[0][0], pairs[0][1], pairs[1][1])
    return Known(
        answer,
        f"{answer}: {' > '.join(line)}",
        f"The {asked} of the three is {answer}.",
        f"From the {most} on they are {', '.join(line[:2])} and {line[2]}.",
    )


KNOWN: dict[str, Callable[[re.Match[str], str], Known]] = {
    r"What is (\d+) ([-+*/]) (\d+)\b(?! [-+*/])": _sum,
    r"greatest common divisor of (\d+) and (\d+)\b": _divisor,
    r"(\w+ \w+ are \w+\. \w+ \w+ are \w+\.) Does it follow that (\w+ \w+ are \w+)\?": _syllogism,
    r"(\w+) is (\w+) than (\w+)\. (\w+) is \2 than (\w+)\. Who is the (\w+) of the three\?": _order,
}


def _steps(known: Known) -> str:
    return f"{known.working}\nThe answer is {known.answer}."


def _tutor(known: Known) -> str:
    return (
        f"Let us look at it together, one step after the other. {known.working} "
        f"You can check this by going back the other way. So, well done: the answer is {known.answer}."
    )


STYLES: dict[str, Style] = {
    "bare": lambda known: known.answer,
    "sentence": lambda known: f"The answer is {known.answer}.",
    "equation": lambda known: known.equation,
    "words": lambda known: known.words,
    "boxed": lambda known: f"The final answer is $\\boxed{{{known.answer}}}$.",
    "steps": _steps,
    "tutor": _tutor,
}
