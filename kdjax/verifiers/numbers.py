"""Numbers in text as exact fractions: signs, separators, fractions, powers of ten, percent, the LaTeX of all these."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from fractions import Fraction

LONGEST = 400  # digits, and powers of ten: more is noise, and slow
UNIT = 3  # words around a number that is a whole answer
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}  # powers of ten
_INT = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_INT}(?:\.\d+)?|\.\d+)"
_POWER = r"(?:[eE](?P<e>[+-]?\d+)|\s?[*x]\s?10\s?(?:\^|\*\*)\s?[{(]?\s?(?P<ten>[+-]?\d+)\s?[)}]?)"
_NUMBER = re.compile(
    rf"(?<![\w.,])(?<!\d:)(?:(?P<whole>{_INT})\s+(?:and\s+)?(?P<part>\d+)/(?P<of>\d+)"
    rf"|(?P<above>{_DECIMAL})\s?/\s?(?P<below>-?{_DECIMAL})"
    rf"|(?P<comma>\d+,(?:\d\d?|\d{{4,}}))"  # 3,5: a decimal comma, or a list
    rf"|(?P<decimal>{_DECIMAL}){_POWER}?)"
    rf"(?!\d|[.,:]\d|[eE][+-]?\d|\w*\^)"
    rf"(?:\s?(?P<percent>%|percent\b|per cent\b)|\s?(?P<scale>{'|'.join(SCALES)})\b)?",
)
_VARIABLE = re.compile(r"[xyznπθ](?![A-Za-z])|\s?[√π]")
_OPERATOR_BEFORE = re.compile(
    r"(?:[+*/÷^±√¤{]|[\d)]\s+(?:plus|minus|times|over)|\b(?:divid|multipl)\w*(?:\s+[\w(),]+){0,4}?\s+by|(?<=[\d)])\s*-|(?<=\w)-)\s*$",
    re.IGNORECASE,
)
_OPERATOR_AFTER = re.compile(
    r"\s*(?:[+*/÷^±√¤{]|-\s*[\d(¤]|-\w(?!\w)|(?:plus|minus|times|(?:divided |multiplied )?by|over)\s+-?[\d(])",
    re.IGNORECASE,
)
_NOT = re.compile(
    r"(?:\bnot|n['\u2019]t|\bnever|≠|!=)(?:\s+(?:equal(?:\s+to)?|be|a|the|always|exactly))*\s*-?$", re.IGNORECASE
)
# minus, en dash, figure dash, small and full-width hyphen; times, dots; fraction slash, em dash, division slash
_DASHES = dict.fromkeys(map(ord, "\u2212\u2013\u2012\ufe63\uff0d"), "-")
_SIGNS = (
    _DASHES | dict.fromkeys(map(ord, "\u00d7\u2715\u22c5\u00b7\u2217"), "*") | {0x2044: "/", 0x2014: " , ", 0x2215: "/"}
)
_SIGNS |= {0xFF10 + digit: str(digit) for digit in range(10)}
_LATEX = (
    (r"\\(?:left|right|displaystyle|bigl?|bigr)\b|\\[,!]|\{,\}(?=\D|$)", ""),
    (r"\{,\}", ","),
    (r"\\[()\[\];: ]|\\q?quad\b|~", " "),
    (r"\\(?:times|cdot)\b", "*"),
    (r"\\div\b", "÷"),
    (r"\\pm\b", "±"),
    (r"\\neq?\b", "≠"),
    (r"\\(?:approx|simeq|equiv)\b", "="),
    (r"\\([%$&#])", r"\1"),
    (r"\\(?:text\w*|math(?:rm|bf|it|sf)|mbox)\s*\{([^{}]*)\}", r" \1 "),
    (r"(?<=\d)\s*\\[dtc]?frac", r" \\frac"),
    (r"\\[dtc]?frac\s*(\d)\s*(\d)", r"\1/\2 "),
    (r"\\[dtc]?frac\s*\{\s*(-?[\d.]+)\s*\}\s*\{\s*(-?[\d.]+)\s*\}", r"\1/\2 "),
    (r"\^\s*\{?\s*(?:\\circ|°)\s*\}?", " degrees "),
    (r"°", " degrees "),
    (r"\\[A-Za-z]+", "¤"),  # what else there is makes an expression
)
_MARKS = (
    (r"(?<![\d)])\*\*|\*\*(?![\d(])", ""),  # emphasis, and not a power
    (r"(?<![\w*)])\*([^*\n]+)\*(?![\w*(])", r"\1"),
    (r"`", ""),
    (r"(?<=-)[$€£¥]\s?", ""),
    (r"[$€£¥]", " "),
    (
        r"(?<![\d.,])(\d{1,3})[ \u00a0\u2007\u2009\u202f](?=\d{3}(?:[ \u00a0\u2007\u2009\u202f]\d{3})*(?![\d.,/]))",
        r"\1",
    ),
    (r"\b(?:negative|minus)\s+(?=[\d.])", "-"),
    (r"(?<=[A-Za-z])\^\{?-?\d+\}?", ""),  # cm^2
)


@dataclasses.dataclass(frozen=True)
class Number:
    """A number that was found: how it is written, its readings (mostly one), where it stands in the cleaned text.

    joined: it is part of an expression or of a product with a variable. negated: the text says that it is not this.
    """

    text: str
    values: tuple[Fraction, ...]
    percent: bool
    start: int
    end: int
    joined: bool
    negated: bool

    def agrees(self, gold: Number, tolerance: Fraction = Fraction(0)) -> bool | None:
        """Is it within `tolerance` of the gold number? None if one of its readings is and another is not.

        A percent sign may be left off, and a percentage may be given as a fraction: 50 % is 50 and 1/2.
        """
        golds = {gold.values[0]}
        if gold.percent and not self.percent:
            golds.add(gold.values[0] / 100)
        shown = [
            any(abs(reading - one) <= tolerance for one in golds for reading in self._readings(value, gold))
            for value in self.values
        ]
        return shown[0] if len(set(shown)) == 1 else None

    def _readings(self, value: Fraction, gold: Number) -> tuple[Fraction, ...]:
        return (value, value / 100) if self.percent and not gold.percent else (value,)


def clean(text: str) -> str:
    """The text with one sign for each thing: LaTeX, dashes, currency, emphasis and fraction characters replaced."""
    text = "".join(_fraction_character(c) if c > "\x7f" else c for c in text.translate(_SIGNS))
    for pattern, replacement in (*_LATEX, *_MARKS):
        text = re.sub(pattern, replacement, text)
    return text


def numbers(cleaned: str) -> list[Number]:
    """All numbers of a text from `clean`, in order. What is too long, or divides by zero, is none."""
    found = []
    for match in _NUMBER.finditer(cleaned):
        values = _values(match)
        if values:
            start, values = _signed(cleaned, match.start(), values)
            before = cleaned[max(0, start - 60) : start]  # as far as a pattern looks
            after = cleaned[match.end() : match.end() + 20]
            joined = bool(_OPERATOR_BEFORE.search(before) or _OPERATOR_AFTER.match(after) or _VARIABLE.match(after))
            divided = match["below"] is not None and values[0].denominator == 1  # 6/3 is still to be worked out
            text = cleaned[start : match.end()].strip()
            percent = match["percent"] is not None
            negated = bool(_NOT.search(before))
            found.append(Number(text, values, percent, start, match.end(), joined or divided, negated))
    return found


def only_number(text: str) -> Number | None:
    """The number that a text is, perhaps with a unit of up to three words; None if it is none, several or ambiguous."""
    cleaned = clean(text)
    found = numbers(cleaned)
    if len(found) != 1 or found[0].joined or found[0].negated or len(found[0].values) > 1:
        return None
    rest = cleaned[: found[0].start] + " " + cleaned[found[0].end :]
    return None if re.search(r"\d|[=<>]", rest) or len(rest.split()) > UNIT else found[0]


def _fraction_character(character: str) -> str:
    if unicodedata.decomposition(character).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", character).replace("\u2044", "/")
    return character


def _values(match: re.Match[str]) -> tuple[Fraction, ...]:
    if len(match.group()) > LONGEST or abs(int(match["e"] or match["ten"] or 0)) > LONGEST:
        return ()
    if match["whole"]:
        whole, part, of = (int(match[name].replace(",", "")) for name in ("whole", "part", "of"))
        return (whole + Fraction(part, of),) if part < of else ()
    if match["above"]:
        above, below = (Fraction(match[name].replace(",", "")) for name in ("above", "below"))
        return (above / below,) if below else ()
    if match["comma"]:
        whole_text, _, rest = match["comma"].partition(",")
        # As a list it is no number: a reading that no gold answer has
        return (Fraction(f"{whole_text}.{rest}"), Fraction(f"1{'0' * LONGEST}7"))
    value = Fraction(match["decimal"].replace(",", "")) * Fraction(10) ** int(match["e"] or match["ten"] or 0)
    return (value * 10 ** SCALES[match["scale"]],) if match["scale"] else (value,)


def _signed(text: str, start: int, values: tuple[Fraction, ...]) -> tuple[int, tuple[Fraction, ...]]:
    """(where the number starts with its sign, its values): a dash is a sign unless something stands before it."""
    before = text[max(0, start - 40) : start].rstrip(" ")
    if not before or before[-1] not in "+-":
        return start, values
    shift = start - len(text[max(0, start - 40) : start]) + len(before) - 1
    spaced, sign, left = shift < start - 1, before[-1], before[:-1].rstrip(" ")
    tight = before[-2:-1] not in ("", " ", "\t", "\n", *"([{=:,;|>\"'*")
    if tight or (left and (left[-1].isdigit() or left[-1] in ")}")):
        return start, values  # an operator
    if sign == "+":
        return shift, values
    negative = tuple(-value for value in values)
    if not spaced or re.search(r"(?:[=(:]|\b(?:is|equals|are))$", left):
        return shift, negative
    return shift, (*negative, *values)  # "- 5": negative, or an item of a list
