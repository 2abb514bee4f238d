"""Does the response keep to instructions about its form? IFEval-style checks that need no judge."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from kdjax import registry
from kdjax.data.prompts import Prompt
from kdjax.verifiers.extraction import final_part
from kdjax.verifiers.finding import Finding, right, setting, wrong

_WORD = re.compile(r"\w+(?:['\u2019\-]\w+)*")


def instructions(response: str, prompt: Prompt) -> Finding:
    """Does the response pass all checks of meta["instructions"], a list of {"check": name in CHECKS, its arguments}?

    An empty response passes none. Reads no gold answer. Raises ValueError that names prompt and check for one that is
    not known or has other arguments.
    """
    given = setting(prompt, "instructions", "instructions", 'a non-empty list of {"check": name, ...}', _is_list)
    text, failed = final_part(response), []
    for number, one in enumerate(given):
        where = f'"meta.instructions[{number}]" of prompt {prompt.id!r}'
        arguments = {name: value for name, value in one.items() if name != "check"}
        check = registry.lookup(CHECKS, one["check"], f"the check of {where}")
        try:
            passed = check(text, **arguments)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{where} must have the arguments of the check {one['check']!r}, got {arguments}; {error}. It takes "
                f"{', '.join(list(inspect.signature(check).parameters)[1:]) or 'none'}."
            ) from error
        if not passed:
            failed.append(json.dumps(one, ensure_ascii=False))
    if not text:
        return wrong("", "the response is empty or stops within its thoughts")
    return wrong(text[:200], f"fails {', '.join(failed)}") if failed else right(text[:200])


def _is_list(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(isinstance(one, dict) and isinstance(one.get("check"), str) for one in value)


# --- counts, each in [at_least, at_most]


def _counted(count: Callable[[str], int]) -> Callable[..., bool]:
    def check(text: str, at_least: int = 0, at_most: int | None = None) -> bool:
        return _within(count(text), at_least, at_most)

    return check


def _within(number: int, at_least: int, at_most: int | None) -> bool:
    if at_least <= 0 and at_most is None:
        raise ValueError("one of at_least and at_most must be set")
    return at_least <= number and (at_most is None or number <= at_most)


def count_words(text: str) -> int:
    """Words; what a hyphen or apostrophe joins is one."""
    return len(_WORD.findall(text))


def _sentences(text: str) -> int:
    return sum(1 for part in re.split(r"[.!?]+(?=\s|$)|\n", text) if _WORD.search(part))


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _lines(text: str) -> int:
    return sum(1 for line in text.split("\n") if line.strip())


def _capitals(text: str) -> int:
    return sum(1 for word in _WORD.findall(text) if word.isupper() and len(word) > 1)


def _times(word: str, text: str) -> int:
    if not word.strip():
        raise ValueError("a word must not be empty")
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def _keyword_count(text: str, word: str, at_least: int = 0, at_most: int | None = None) -> bool:
    return _within(_times(word, text), at_least, at_most)


def _letter_count(text: str, letter: str, at_least: int = 0, at_most: int | None = None) -> bool:
    if len(letter) != 1:
        raise ValueError("letter must be one character")
    return _within(text.casefold().count(letter.casefold()), at_least, at_most)


def _sections(text: str, word: str, at_least: int = 0, at_most: int | None = None) -> bool:
    found = re.findall(rf"^\W*{re.escape(word)}\s+(?:\d+|[IVXLC]+|[A-Z])\b", text, re.MULTILINE | re.IGNORECASE)
    return _within(len(found), at_least, at_most)


# --- words


def _words(values: Sequence[str]) -> Sequence[str]:
    if isinstance(values, str) or not values:
        raise ValueError("words must be a non-empty list")
    return values


def _keywords(text: str, words: Sequence[str]) -> bool:
    return all(_times(word, text) for word in _words(words))


def _forbidden(text: str, words: Sequence[str]) -> bool:
    return not any(_times(word, text) for word in _words(words))


# --- the whole


def _json(text: str) -> bool:
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?```", text, re.DOTALL | re.IGNORECASE)
    try:
        return isinstance(json.loads(fenced[1] if fenced else text), (dict, list))
    except (ValueError, RecursionError):
        return False


def _one_case(text: str, same: str) -> bool:
    return text == same and any(c.isalpha() for c in text)


def _starts_with(text: str, start: str) -> bool:
    return text.casefold().startswith(start.casefold())


def _ends_with(text: str, end: str) -> bool:
    return text.casefold().endswith(end.casefold())


def _one_of(text: str, options: Sequence[str]) -> bool:
    return sum(_times(option, text) > 0 for option in _words(options)) == 1


def _postscript(text: str, mark: str = "P.S.") -> bool:
    return re.search(rf"^\s*{re.escape(mark)}\s*\S", text, re.MULTILINE) is not None


def _paragraph_starts(text: str, paragraph: int, word: str) -> bool:
    found = _paragraphs(text)
    if paragraph < 1:
        raise ValueError("paragraph counts from 1")
    return len(found) >= paragraph and bool(_WORD.findall(found[paragraph - 1])[:1] == [word])


def _two_responses(text: str, mark: str = "******") -> bool:
    parts = [part.strip() for part in text.split(mark)]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


# name -> (response, **arguments) -> is it kept?
CHECKS: dict[str, Callable[..., bool]] = {
    "words": _counted(count_words),
    "sentences": _counted(_sentences),
    "paragraphs": _counted(lambda text: len(_paragraphs(text))),
    "lines": _counted(_lines),
    "characters": _counted(len),
    "capital_words": _counted(_capitals),
    "bullets": _counted(lambda text: len(re.findall(r"^\s*[*\-•]\s+\S", text, re.MULTILINE))),
    "numbered": _counted(lambda text: len(re.findall(r"^\s*\d+[.)]\s+\S", text, re.MULTILINE))),
    "highlights": _counted(lambda text: len(re.findall(r"\*[ \t]*[^*\s][^*\n]*\*", text))),
    "placeholders": _counted(lambda text: len(re.findall(r"\[[^\[\]\n]+\]", text))),
    "sections": _sections,
    "keyword_count": _keyword_count,
    "letter_count": _letter_count,
    "keywords": _keywords,
    "forbidden": _forbidden,
    "one_of": _one_of,
    "starts_with": _starts_with,
    "ends_with": _ends_with,
    "paragraph_starts": _paragraph_starts,
    "upper": lambda text: _one_case(text, text.upper()),
    "lower": lambda text: _one_case(text, text.lower()),
    "json": _json,
    "no_commas": lambda text: "," not in text,
    "quoted": lambda text: len(text) > 2 and text[0] == text[-1] == '"',
    "title": lambda text: re.search(r"<<[ \t]*[^<>\s][^<>\n]*>>", text) is not None,
    "postscript": _postscript,
    "two_responses": _two_responses,
}
