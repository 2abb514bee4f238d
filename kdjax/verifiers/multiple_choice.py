"""Multiple choice: which option does the response take, by its letter or by its text?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from kdjax.data.prompts import Prompt
from kdjax.verifiers.extraction import announced, final_part, plain
from kdjax.verifiers.finding import Finding, agreed, gold_answer, setting, undecided, wrong

LETTERS = "ABCDEFGHIJ"
_STARTS = re.compile(r"\W*(?:(?:option|choice|letter)\s+)?\(?\b([A-Z])\b(?:[).:,;]|\s*$|\s*\n|\s+-)", re.IGNORECASE)
_CHOSEN = re.compile(
    r"\b(?:option|choice|letter|choose|chose|pick|select|correct is|go with)\b"
    r"(?:\s+(?:is|option|choice|letter))*\W*\b([A-Z])\b(?![a-z'])",
    re.IGNORECASE,
)
_IN_BRACKETS = re.compile(r"\(([A-Z])\)")
_ALONE = re.compile(  # not the words A and I
    r"(?<![\w'])([B-HJ])(?![\w'])|(?<![\w'])([AI])(?=\s*(?:[.,;:!?)]|$|\s(?:or|and)\s+[A-J]\b))"
)
_DENIED = re.compile(r"\s*(?:is|are)\s+(?:not|wrong|incorrect|false)\b", re.IGNORECASE)
_NOT_BEFORE = re.compile(
    r"(?:\bnot|n['\u2019]t|\bneither|\bnor|\bnever|\brather than|\binstead of)\W+(?:be\W+|option\W+|\()*$", re.I
)


def choice(response: str, prompt: Prompt) -> Finding:
    r"""Is the option that the response takes the gold one?

    The gold answer is a letter, or one of the texts in meta["choices"] (letters are then A, B, ... in that order). Read
    from: the last \boxed{} or <answer>; else after the last "answer is"; else what the response starts with ("B.",
    "(b)", "Yes, ..."); else "I choose B", "(B)", letters and texts of options anywhere. Letters that are denied
    ("not B") do not count. Several options, of which one is the gold one, are undecided; so is a text without
    meta["choices"].
    Raises ValueError if the gold answer is no option.
    """
    answer = gold_answer(prompt, "choice").strip()
    given = setting(prompt, "choice", "choices", "a list of at least 2 texts, or absent", _is_choices)
    texts = tuple(map(_normal, given or ()))
    gold = _letter_of(answer, texts)
    if gold is None:
        raise ValueError(
            f"the answer of prompt {prompt.id!r} must be one of its options for the verifier 'choice', got {answer!r}; "
            f"the options are {', '.join(given or LETTERS)}. Mend it, or set meta.choices."
        )
    text = final_part(response)
    if not text:
        return wrong("", "the response is empty or stops within its thoughts")
    try:
        taken = _taken(text, texts)
    except EOFError as error:
        return undecided("", f"{error}: it is cut off")
    if not taken and not texts:
        return undecided("", "the response names no letter, and the options are not in meta.choices")
    return agreed({letter: letter == gold for letter in taken}, answer)


def _taken(text: str, texts: Sequence[str]) -> list[str]:
    """The letters of the options that the response may take, mostly one."""
    letters = LETTERS[: len(texts)] if texts else LETTERS
    content = announced(text)
    span = text if content is None else content
    whole = _letter_of(plain(span), texts)
    if whole:
        return [whole]
    start = _STARTS.match(span)
    if start and start[1].upper() in letters and not _DENIED.match(span[start.end() :]):
        following = span[start.end() :]
        if not texts:
            return _and_others(start[1], following)
        also = _mentioned(following, texts)[:1] if "\n" not in span else []  # "B) Paris"
        return list(dict.fromkeys([start[1].upper(), *also]))
    first = _text_at_start(span, texts)
    return [first] if first else _anywhere(span, letters) or _mentioned(span, texts)


def _anywhere(span: str, letters: str) -> list[str]:
    """The letter that is said to be chosen last; else all in brackets; else all that stand alone."""
    for pattern in (_CHOSEN, _IN_BRACKETS, _ALONE):
        found = [
            "".join(filter(None, match.groups())).upper()
            for match in pattern.finditer(span)
            if not _NOT_BEFORE.search(span[max(0, match.start() - 30) : match.end() - 1])
        ]
        kept = [letter for letter in dict.fromkeys(found) if letter in letters]
        if kept:
            return kept[-1:] if pattern is _CHOSEN else kept
    return []


def _and_others(letter: str, following: str) -> list[str]:
    """'B or C': both; '(B) A long story': B."""
    other = re.match(r"\s*(?:or|and|/)\s*\(?([A-J])\b", following)
    return [letter.upper(), other[1]] if other else [letter.upper()]


def _text_at_start(span: str, texts: Sequence[str]) -> str | None:
    said = _normal(span)
    fits = [
        (len(text), place)
        for place, text in enumerate(texts)
        if re.match(rf"{re.escape(text)}\s*(?:$|[.,;:!(-])", said)
    ]
    return LETTERS[max(fits)[1]] if fits else None


def _mentioned(span: str, texts: Sequence[str]) -> list[str]:
    said, found = _normal(span), []
    for place in sorted(range(len(texts)), key=lambda i: -len(texts[i])):  # "not valid" before "valid"
        pattern = rf"(?<!\w){re.escape(texts[place])}(?!\w)"
        if re.search(pattern, said):
            found.append(LETTERS[place])
            said = re.sub(pattern, " ", said)
    return sorted(found)


def _letter_of(text: str, texts: Sequence[str]) -> str | None:
    said = _normal(text)
    if said in texts:
        return LETTERS[texts.index(said)]
    match = re.fullmatch(r"\(?([A-Za-z])\)?", text.strip())
    letters = LETTERS[: len(texts)] if texts else LETTERS
    return match[1].upper() if match and match[1].upper() in letters else None


def _normal(text: str) -> str:
    return " ".join(plain(text).casefold().split())


def _is_choices(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, (list, tuple)) or not 2 <= len(value) <= len(LETTERS):
        return False
    return all(isinstance(text, str) and text.strip() for text in value) and len({*map(_normal, value)}) == len(value)
