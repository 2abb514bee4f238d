"""Answers to questions of reasoning-gym, by its own scorers, strictly: full marks or wrong."""

from __future__ import annotations

from typing import Any

from kdjax.data.prompts import Prompt
from kdjax.verifiers import worker
from kdjax.verifiers.extraction import announced, final_part, plain
from kdjax.verifiers.finding import Finding, right, setting, undecided, wrong
from kdjax.verifiers.numbers import only_number

FULL_MARKS = 0.999  # scorers give partial credit for the gold answer within a text, and for wrong and empty ones
LONGEST = 1000  # characters that may be one number and its unit
SECONDS = 20.0  # that one response may take


def reasoning_gym(response: str, prompt: Prompt) -> Finding:
    r"""Does the scorer of the generator give full marks (>= 0.999) to what the response answers?

    Read from: the last \boxed{} or <answer>; else after the last "answer is"; else the whole response; tried as it
    stands, without marks around it, and as the number that it is. meta["reasoning_gym"] = {"generator", "entry"}, as
    `load_prompts` makes it. Undecided: the package is not installed, the scorer raises, takes over 20 s, or does not
    give full marks to its own gold answer (some entries do not survive a file). Raises ValueError if meta lacks the
    entry.
    """
    about = setting(prompt, "reasoning_gym", "reasoning_gym", '{"generator": name, "entry": {...}}', _is_about)
    text = final_part(response)
    if not text:
        return wrong("", "the response is empty or stops within its thoughts")
    try:
        content = announced(text)
    except EOFError as error:
        return undecided("", f"{error}: it is cut off")
    content = text if content is None else content
    if not worker.installed("reasoning_gym"):
        return undecided(content, "reasoning-gym is not installed: pip install reasoning-gym")
    number = only_number(content) if len(content) < LONGEST else None
    forms = [content, plain(content), *([number.text.replace(",", "")] if number else [])]
    gold = about["entry"].get("answer")
    tried = list(dict.fromkeys(forms)) + ([gold] if isinstance(gold, str) else [])
    try:
        scores = worker.ask("reasoning_gym", about["generator"], tried, about["entry"], seconds=SECONDS)
    except (TimeoutError, RuntimeError) as error:
        return undecided(content, f"reasoning-gym: {error}")
    if isinstance(gold, str):
        of_gold = scores.pop()
        if isinstance(of_gold, str) or of_gold < FULL_MARKS:
            return undecided(content, f"the scorer does not accept its own gold answer: {of_gold}")
    raised = [score for score in scores if isinstance(score, str)]
    if any(not isinstance(score, str) and score >= FULL_MARKS for score in scores):
        return right(content)
    if raised:
        return undecided(content, f"the scorer raised {raised[0]}")
    return wrong(content, f"scored {max(scores):g}" + (f", the answer is {gold}" if gold is not None else ""))


def _is_about(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return isinstance(value.get("generator"), str) and isinstance(value.get("entry"), dict)
