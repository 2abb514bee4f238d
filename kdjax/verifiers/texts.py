"""Is it the right text? By equality up to form, and by a regular expression."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from kdjax.data.prompts import Prompt
from kdjax.verifiers.extraction import boxed, final_part, plain, stated
from kdjax.verifiers.finding import Finding, gold_answer, right, setting, undecided, wrong

LONGEST_TEXT = 20_000  # characters that a pattern is tried on


def exact(response: str, prompt: Prompt) -> Finding:
    r"""Is the answer the gold text, or one of meta["answers"], up to case, blanks and marks around it?

    Read from: the last \boxed{} or <answer>; else the whole response, its last line, what follows "the answer is".
    """
    gold = gold_answer(prompt, "exact")
    others = setting(prompt, "exact", "answers", "a list of texts, or absent", _is_texts) or ()
    text = final_part(response)
    if not text:
        return wrong("", "the response is empty or stops within its thoughts")
    try:
        content, said = boxed(text), stated(text)
    except EOFError as error:
        return undecided("", f"{error}: it is cut off")
    golds = {normal(one) for one in (gold, *others)}
    places = [content] if content is not None else [text, text.split("\n")[-1], *([said] if said else [])]
    for place in places:
        if normal(place) in golds:
            return right(plain(place))
    return wrong(plain(places[-1])[:200], f"the answer is {gold}")


def regex(response: str, prompt: Prompt) -> Finding:
    """Does the gold answer, a pattern of Python's `re`, occur in the response (in its last 20,000 characters)?

    Anchor it (^...$) to fit all of it, which is stripped; flags go into the pattern: (?i). Raises ValueError if it is
    no pattern. A pattern that backtracks without end is not stopped.
    """
    pattern = gold_answer(prompt, "regex")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"the answer of prompt {prompt.id!r} must be a regular expression for the verifier 'regex', got {pattern!r}"
            f"; {error}. Mend it, or set the verifier to 'exact'."
        ) from error
    text = final_part(response)[-LONGEST_TEXT:]
    found = compiled.search(text)
    return right(found.group()) if found else wrong(text[:200], f"nothing fits {pattern}")


def normal(text: str) -> str:
    """A text up to case, blanks, width of characters, emphasis, quotation marks and a full stop."""
    return " ".join(plain(unicodedata.normalize("NFKC", text)).casefold().split())


def _is_texts(value: Any) -> bool:
    return value is None or (isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value))
