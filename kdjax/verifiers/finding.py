"""What a verifier says: right, wrong or undecided, and why."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

from kdjax.data.prompts import Prompt


class Verdict(enum.StrEnum):
    """Is the answer right? Undecided is neither: it counts as not tried.

    A response that gives no answer is wrong. Undecided is what cannot be told: two readings of which one is right, a
    package that is not installed, a check that raised or took too long.
    """

    RIGHT = "right"
    WRONG = "wrong"
    UNDECIDED = "undecided"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A verdict, the answer that was read out of the response ("" if none), and the reason of what is not right."""

    verdict: Verdict
    extracted: str = ""
    reason: str = ""


Verifier = Callable[[str, Prompt], Finding]


def right(extracted: str) -> Finding:
    """It is right."""
    return Finding(Verdict.RIGHT, extracted)


def wrong(extracted: str, reason: str) -> Finding:
    """It is wrong."""
    return Finding(Verdict.WRONG, extracted, reason)


def undecided(extracted: str, reason: str) -> Finding:
    """It cannot be told."""
    return Finding(Verdict.UNDECIDED, extracted, reason)


def agreed(verdicts: dict[str, bool], gold: str) -> Finding:
    """From readings of one response (text -> is it right?): right if all are, wrong if none is, else undecided."""
    shown = " | ".join(verdicts)
    if not verdicts:
        return wrong("", "the response gives no answer")
    if all(verdicts.values()):
        return right(shown)
    if not any(verdicts.values()):
        return wrong(shown, f"the answer is {gold}")
    return undecided(shown, "it can be read in several ways, of which one is right")


def gold_answer(prompt: Prompt, verifier: str) -> str:
    """The gold answer; ValueError that names the prompt if there is none."""
    if prompt.answer is None or not prompt.answer.strip():
        raise ValueError(
            f'prompt {prompt.id!r} must have an "answer" for the verifier {verifier!r}, got {prompt.answer!r}; it '
            "compares with it. Add it, or set another verifier."
        )
    return prompt.answer


def setting(prompt: Prompt, verifier: str, name: str, must_be: str, holds: Callable[[Any], bool]) -> Any:
    """meta[name] of the prompt, checked; ValueError that names the prompt if it does not do."""
    value = prompt.meta.get(name)
    if not holds(value):
        raise ValueError(
            f'"meta.{name}" of prompt {prompt.id!r} must be {must_be}, got {value!r:.80}; the verifier {verifier!r} '
            "reads it. Mend it, or set another verifier."
        )
    return value
