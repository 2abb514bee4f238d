"""Is it the right number? The answer is found in the box, after "the answer is", or at the end; compared exactly."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from kdjax.data.prompts import Prompt
from kdjax.verifiers.extraction import announced, final_part, plain
from kdjax.verifiers.finding import Finding, agreed, gold_answer, setting, undecided, wrong
from kdjax.verifiers.numbers import Number, clean, numbers, only_number

LONGEST_TEXT = 4000  # characters at the end that are read; the patterns take up to the square of it
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
WORDS = _WORDS.split()
_SMALL = {word: str(number) for number, word in enumerate(WORDS)} | {"once": "1", "twice": "2"}
_WORD = re.compile(
    rf"\b(?:{'|'.join(word for word in _SMALL if word != 'one')})\b", re.IGNORECASE
)  # one may be a pronoun
_COMPOUND = re.compile(
    r"\b(?:thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|half|third|quarter|dozen|twenty-\w+)\b",
    re.IGNORECASE,
)
_FILLER = re.compile(
    r"[\s:=(\[\"'>]*(?:(?:also|thus|therefore|approximately|about|around|exactly|simply|just|only|the|a|number|value|"
    r"equal|to|still)\s+)*",
    re.IGNORECASE,
)
_GOES_ON = re.compile(r"\s*(?:(?:or|and|to|of|out of)\b|[,;]\s*-?\d|/)", re.IGNORECASE)
_OVER = re.compile(r"\s*(?:$|[.;:!,(]|(?:is the|because|since|as)\b)", re.IGNORECASE)
_ASSERTS = re.compile(
    r"\b(?:is|are|was|be|makes?|gives?|gets?|leaves|have|has|had|equals|totals?|yields|contains|occurs?|appears?|remains?)"
    r"\s+(?:(?:approximately|about|exactly|only|just|still|then|also|therefore|now)\s+)*$",
    re.IGNORECASE,
)
_ENDS = re.compile(r"\s*(?:[^\W\d]+[\u00b2\u00b3]?\s*){0,2}[.!,;:)\"'*\]]*\s*$")
_SHORT = 8  # words: a line that is no longer may lack its full stop, and was not cut off
_EQUALS = re.compile(r"(?<![!<>≠])=|≈|\bequals?\b", re.IGNORECASE)
_SUM = re.compile(r"\s*-?\d+(?:\.\d+)?(?:\s*[-+*/]\s*\d+(?:\.\d+)?)+\s*[.!]?\s*")
_ITEM = re.compile(r"^\s*(\d+)[.)]\s+(?=\S)", re.MULTILINE)


def numeric(response: str, prompt: Prompt) -> Finding:
    r"""Is the number of the response the gold number?

    Read from: the last \boxed{} (braces balanced) or <answer>; else the last "answer is", "answer:", "####"; else the
    last sentence with a number: what it asserts ("is 7", "= 7"), ends or starts with. A number counts with its sign,
    fraction or mixed number, thousands separators, power of ten, percent, and as a word if there are no digits; units
    and currency are ignored, "not 4" is not 4. Comparison is of exact fractions; meta["tolerance"] allows an absolute
    difference. Where the text can be read in several ways they all have to agree, else it is undecided; so are
    expressions that are not worked out, and an answer that is cut off.
    Raises ValueError if the gold answer is no number.
    """
    answer = gold_answer(prompt, "numeric")
    gold = only_number(answer)
    if gold is None:
        raise ValueError(
            f"the answer of prompt {prompt.id!r} must be a number for the verifier 'numeric', got {answer!r}; it is "
            "compared as an exact fraction. Set the verifier to 'symbolic' or 'exact'."
        )
    tolerance = Fraction(str(setting(prompt, "numeric", "tolerance", "a number of at least 0", _is_tolerance) or 0))
    text = final_part(response)[-LONGEST_TEXT:]
    if not text:
        return wrong("", "the response is empty or stops within its thoughts")
    if not re.search(r"\d", text):
        if _COMPOUND.search(text):
            return undecided("", "the only numbers are in words")
        text = _SMALL.get(plain(text).lower()) or _WORD.sub(lambda word: _SMALL[word.group().lower()], text)
    try:
        found, sure = readings(text)
    except EOFError as error:
        return undecided("", f"{error}: it is cut off")
    if not found and re.search(r"\bone\b", text, re.IGNORECASE):
        return undecided("", "'one' may be a number")
    if not found:
        return wrong("", "the response has no number that could be the answer")
    if all(number.joined for number in found):
        return undecided(" | ".join(number.text for number in found), "it is an expression that is not worked out")
    verdicts = {number.text: number.agrees(gold, tolerance) for number in found}
    if None in verdicts.values():
        return undecided(" | ".join(verdicts), "a dash or comma can be read in two ways, of which one is right")
    if not sure and any(verdicts.values()):
        return undecided(" | ".join(verdicts), "the number is there, but nothing says that it is the answer")
    return agreed({shown: verdict is True for shown, verdict in verdicts.items()}, answer)


def readings(text: str) -> tuple[list[Number], bool]:
    """The numbers that may be meant as the answer, mostly one, and whether the text says so; joined ones if no others.

    Raises EOFError if the last box is not closed, or nothing follows "the answer is".
    """
    content = announced(text)
    if content is not None:
        return _leading(clean(content)), True
    text = clean(text)
    items = {int(match[1]) for match in _ITEM.finditer(text) if len(match[1]) < 3}
    if {1, 2} <= items:  # numbers of a list
        text = _ITEM.sub("", text)
    for line in reversed(text.split("\n")):
        for part in reversed(re.split(r"(?<=[.!?])\s+", line)):
            if not part.rstrip().endswith("?") and any(not number.negated for number in numbers(part)):
                return _closing(part, part.rstrip().endswith((".", "!")) or len(line.split()) <= _SHORT)
    return [], True


def _closing(part: str, whole: bool) -> tuple[list[Number], bool]:
    """Of a sentence that is not announced as the answer: what it asserts ("is 7", "= 7"), ends or starts with.

    Else its last number, for which nothing speaks.
    """
    equal = _after_equals(part)
    if equal is not None:
        return _worked_out(part[: -len(equal)], equal) or _leading(equal), True
    found = [number for number in numbers(part) if not number.negated]
    free = [number for number in found if not number.joined]
    if not free:
        return found, True
    meant = [free[-1]] if whole and _ENDS.match(part[free[-1].end :]) else []
    if not part[: free[0].start].strip(" \"'([") and _OVER.match(part[free[0].end :]):
        meant.append(free[0])  # "7 is the sum of 3 and 4", "7, because ..."
    meant += [number for number in free if _ASSERTS.search(part[max(0, number.start - 40) : number.start])][-1:]
    return (list(dict.fromkeys(meant)), True) if meant else (free[-1:], False)


def _leading(span: str) -> list[Number]:
    """Of what is announced as the answer: what it starts with, unless it goes on."""
    found = [number for number in numbers(span) if not number.negated]
    free = [number for number in found if not number.joined]
    if not found:
        return []
    starts = _FILLER.fullmatch(span[: found[0].start]) is not None
    if starts and not found[0].joined and not _GOES_ON.match(span[found[0].end :]):
        return found[:1]
    equal = _after_equals(span)
    if equal is not None:
        return _leading(equal)
    if not free:
        return found
    return list(dict.fromkeys((free[0], free[-1])))


def _after_equals(span: str) -> str | None:
    found = [number.start for number in numbers(span) if not number.negated]
    equals = [match.end() for match in _EQUALS.finditer(span) if found and match.end() <= found[-1]]
    # not an item of a list: "= - 5" is negative
    return re.sub(r"^\s*-\s+(?=[\d.])", "-", span[equals[-1] :]) if equals else None


def _worked_out(before: str, span: str) -> list[Number]:
    """Of "66 = 11 + 55", `span` being what follows "=", the number before it, if that is the value; else []."""
    value = _value(span)
    bare = [number for number in numbers(before) if not (number.joined or number.negated or number.percent)]
    return [one for one in bare[-1:] if one.values == (value,) and not _EQUALS.sub("", before[one.end :]).strip()]


def _value(span: str) -> Fraction | None:
    """What plain numbers between + - * / come to; None of anything else."""
    if not _SUM.fullmatch(span):
        return None
    span = span.strip(" \t.!")
    first, *rest = re.split(r"\s*([-+*/])\s*", f"0{span}" if span.startswith("-") else span)
    total, term = Fraction(0), Fraction(first)
    for sign, digits in zip(rest[::2], rest[1::2], strict=True):
        number = Fraction(digits)
        if sign in "+-":
            total, term = total + term, number if sign == "+" else -number
        elif sign == "*":
            term *= number
        elif number:
            term /= number
        else:
            return None
    return total + term


def _is_tolerance(value: Any) -> bool:
    if value is None:
        return True
    try:
        return not isinstance(value, bool) and Fraction(str(value)) >= 0
    except (ValueError, ZeroDivisionError):
        return False
