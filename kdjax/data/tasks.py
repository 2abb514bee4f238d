"""The built-in task "arith": small questions of sums and logic, all that there are of each kind, with exact answers.

On a model of 135M parameters the pass rates of the default kinds spread over the whole of [0, 1].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kdjax import registry

DEFAULT = ("sum1", "arith1", "sum2", "gcd")  # sum1 before arith1, which has its questions too
LARGEST = 30  # of gcd
WORDS = (
    "apple banana bottle butter cabbage carrot cheese cherry coffee common copper cotton dinner dollar effect "
    "engineer errand forest garden giraffe hammer happiness harbour history island jacket kettle kitten ladder "
    "lantern letter lettuce library lizard marble memory message mirror mississippi mountain needle number occurrence "
    "office orange paper parallel parrot pepper pillow planet pocket puzzle rabbit raspberry referee ribbon river "
    "saddle scissors season sentence session silver slippers spring strawberry success summer supper tennis tomorrow "
    "tooth tunnel vacuum valley village wagon whisper willow window winter yellow zebra"
)
THINGS = "birds cups dogs ferns hats kings lamps pears stars trees"
NAMES = "Anna Ben Carl Dora Emil Fay"
RELATIONS = (("taller", "tallest", "shortest"), ("older", "oldest", "youngest"), ("faster", "fastest", "slowest"))
Made = dict[str, Any]  # the fields of a Prompt


def arith(kinds: Sequence[str]) -> list[list[Made]]:
    """All questions of each of these kinds of `KINDS`; no kind = `DEFAULT`."""
    return [list(registry.lookup(KINDS, kind, "prompts.path 'arith:...'")()) for kind in kinds or DEFAULT]


def _calculations(kind: str, numbers: range, signs: str) -> Iterator[Made]:
    results: dict[str, Callable[[int, int], int]] = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "/": lambda a, b: a // b,
    }
    for a, b, sign in itertools.product(numbers, numbers, signs):
        if sign == "/" and (b == 0 or a % b):
            continue
        # 3 + 4 and 4 + 3 are one thing to know, in whatever kind they occur
        first, second = sorted((a, b)) if sign in "+*" else (a, b)
        yield {
            "id": f"{kind}/{a}{sign}{b}",
            "prompt": f"What is {a} {sign} {b}?",
            "answer": str(results[sign](a, b)),
            "verifier": "numeric",
            "meta": {"kind": kind, "group": f"{first}{sign}{second}"},
        }


def _divisors() -> Iterator[Made]:
    for a, b in itertools.permutations(range(2, LARGEST + 1), 2):
        yield {
            "id": f"gcd/{a},{b}",
            "prompt": f"What is the greatest common divisor of {a} and {b}?",
            "answer": str(math.gcd(a, b)),
            "verifier": "numeric",
            "meta": {"kind": "gcd", "group": f"gcd {min(a, b)},{max(a, b)}"},
        }


def _letters() -> Iterator[Made]:
    for word in WORDS.split():
        for letter in sorted(set(word)):
            yield {
                "id": f"letters/{word},{letter}",
                "prompt": f'How many times does the letter "{letter}" occur in the word "{word}"?',
                "answer": str(word.count(letter)),
                "verifier": "numeric",
                "meta": {"kind": "letters", "group": f"letters {word}"},
            }


# premises about a, b, c, the first about a and b; a claim; does it follow? why
FIGURES = (
    (
        "All {a} are {b}. All {b} are {c}.",
        "all {a} are {c}",
        "yes",
        "The {a} are among the {b}, which are all {c}.",
    ),
    (
        "All {a} are {b}. No {b} are {c}.",
        "no {a} are {c}",
        "yes",
        "The {a} are among the {b}, which are never {c}.",
    ),
    ("Some {a} are {b}. All {b} are {c}.", "some {a} are {c}", "yes", "The {a} that are {b} are {c} too."),
    ("No {a} are {b}. All {c} are {b}.", "no {a} are {c}", "yes", "All {c} are among the {b}, where no {a} are."),
    ("All {a} are {b}. All {c} are {b}.", "all {a} are {c}", "no", "The {a} and the {c} may be different {b}."),
    (
        "All {a} are {b}. Some {b} are {c}.",
        "some {a} are {c}",
        "no",
        "The {b} that are {c} may be no {a}.",
    ),
    (
        "Some {a} are {b}. Some {b} are {c}.",
        "some {a} are {c}",
        "no",
        "The {b} that are {c} may be no {a}.",
    ),
    ("All {a} are {b}. No {c} are {a}.", "no {c} are {b}", "no", "The {c} may be among the {b} that are no {a}."),
)


def _syllogisms() -> Iterator[Made]:
    for (a, b, c), (number, (premises, claim, answer, _)) in itertools.product(
        itertools.permutations(THINGS.split(), 3), enumerate(FIGURES, start=1)
    ):
        named = {"a": a, "b": b, "c": c}
        yield {
            "id": f"syll/{a},{b},{c}/{number}",
            "prompt": f"{premises.format(**named)} Does it follow that {claim.format(**named)}? Answer yes or no.",
            "answer": answer,
            "verifier": "choice",
            "meta": {"kind": "syll", "group": f"syll {a},{b},{c}", "choices": ["yes", "no"]},
        }


def _orders() -> Iterator[Made]:
    """Three people in order, told in two sentences that may come in the other order; who is first or last?"""
    for people, (more, most, least), turned, asked in itertools.product(
        itertools.permutations(NAMES.split(), 3), RELATIONS, (False, True), (0, 2)
    ):
        told = [f"{high} is {more} than {low}." for high, low in itertools.pairwise(people)]
        yield {
            "id": f"order/{','.join(people)}/{most if asked == 0 else least}{'/turned' if turned else ''}",
            "prompt": f"{' '.join(told[::-1] if turned else told)} Who is the {least if asked else most} of the three?",
            "answer": people[asked],
            "verifier": "choice",
            "meta": {"kind": "order", "group": f"order {','.join(sorted(people))} {most}", "choices": sorted(people)},
        }


KINDS: dict[str, Callable[[], Iterator[Made]]] = {
    "sum1": lambda: _calculations("sum1", range(10), "+-"),
    "sum2": lambda: _calculations("sum2", range(10, 100), "+-"),
    "arith1": lambda: _calculations("arith1", range(10), "+-*/"),
    "gcd": _divisors,
    "letters": _letters,
    "syll": _syllogisms,
    "order": _orders,
}
