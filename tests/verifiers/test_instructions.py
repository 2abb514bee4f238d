"""Every check of the form of a response: texts that keep it, texts that do not, arguments that it refuses."""

import time

import pytest

from kdjax.data.prompts import Prompt
from kdjax.verifiers import CHECKS
from kdjax.verifiers.form import instructions

# check, arguments, texts that pass, texts that fail
CASES = [
    ("words", {"at_least": 2, "at_most": 3}, ["one two", "well-known don't x"], ["one", "a b c d"]),
    ("sentences", {"at_least": 2, "at_most": 2}, ["A b. C d!", "Is it 3.5? Yes"], ["One.", "A. B. C."]),
    ("paragraphs", {"at_least": 2, "at_most": 2}, ["a\n\nb", "a\nb\n \n\nc"], ["a\nb", "a\n\nb\n\nc"]),
    ("lines", {"at_most": 2}, ["a", "a\n\nb"], ["a\nb\nc"]),
    ("characters", {"at_most": 5}, ["12345"], ["123456"]),
    ("capital_words", {"at_least": 2}, ["NASA and ESA"], ["NASA and I", "Nasa"]),
    ("bullets", {"at_least": 2, "at_most": 2}, ["* a\n* b", "- a\n  - b"], ["* a", "- a\n- b\n- c", "a - b - c"]),
    ("numbered", {"at_least": 2}, ["1. a\n2) b"], ["1. a", "1.5\n2.5"]),
    ("highlights", {"at_least": 1}, ["a *b* c", "**b**"], ["a b", "* a", "**"]),
    ("placeholders", {"at_least": 2}, ["[name], [town]"], ["[name]", "[]"]),
    (
        "sections",
        {"word": "Part", "at_least": 2},
        ["Part 1\nx\nPart II\ny", "**Part A**\n## part B"],
        ["Part 1", "x Part 1 Part 2"],
    ),
    ("keyword_count", {"word": "cat", "at_least": 2}, ["Cat, cat"], ["cat cats", "concat cat"]),
    ("letter_count", {"letter": "e", "at_most": 1}, ["Ok", "E"], ["eE"]),
    ("keywords", {"words": ["red fox", "dog"]}, ["Dog. A RED FOX!"], ["red dog fox", "dogs and a red fox"]),
    ("forbidden", {"words": ["bad", "worse"]}, ["a badge"], ["Bad.", "it got worse"]),
    ("one_of", {"options": ["yes", "no"]}, ["Yes!"], ["yes and no", "maybe"]),
    ("starts_with", {"start": "Dear"}, ["dear all"], ["My dear"]),
    ("ends_with", {"end": "Any questions?"}, ["So. any questions?"], ["Any questions? No."]),
    ("paragraph_starts", {"paragraph": 2, "word": "Then"}, ["a\n\nThen b"], ["Then a\n\nb", "Then", "a\n\nthen"]),
    ("upper", {}, ["ALL 3!"], ["ALl", "123"]),
    ("lower", {}, ["all 3!"], ["All", "123"]),
    ("json", {}, ['{"a": [1]}', "[]", "```json\n{}\n```"], ["{'a': 1}", "3", "Here: {}", "[" * 100_000]),
    ("no_commas", {}, ["a b"], ["a, b"]),
    ("quoted", {}, ['"a b"'], ['"a', '"a" b', '""']),
    ("title", {}, ["<<A tale>>\nx"], ["<A>", "<<>>", "<< >>"]),
    ("postscript", {}, ["a\nP.S. b"], ["a P.S. b", "a\nP.S."]),
    ("two_responses", {}, ["a\n******\nb"], ["a", "a******a", "a******", "a******b******c"]),
]


def judged(text, *given):
    return instructions(text, Prompt("p", "?", meta={"instructions": list(given)}))


def test_every_check_is_here():
    assert [case[0] for case in CASES] == list(CHECKS)


@pytest.mark.parametrize(("check", "arguments", "passing", "failing"), CASES)
def test_check(check, arguments, passing, failing):
    for text in passing:
        assert judged(text, {"check": check, **arguments}).verdict == "right", text
    for text in ["", *failing]:
        assert judged(text, {"check": check, **arguments}).verdict == "wrong", text


def test_all_have_to_be_kept_and_the_reason_names_those_that_are_not():
    found = judged("a, b", {"check": "lower"}, {"check": "no_commas"}, {"check": "words", "at_least": 3})
    assert found.verdict == "wrong"
    assert found.reason == 'fails {"check": "no_commas"}, {"check": "words", "at_least": 3}'


@pytest.mark.parametrize("check", ["highlights", "title", "placeholders", "sentences", "words"])
def test_long_texts_are_checked_in_time(check):
    arguments = {} if check == "title" else {"at_least": 10**6}
    for piece in ("*a", "<<a", "[a", "a. ", "a-", "* ", "<< "):
        began = time.process_time()
        assert judged(piece + 50_000 * piece[-1] + piece * 10_000, {"check": check, **arguments}).verdict == "wrong"
        assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"check": "word"}, "the check of .*of prompt 'p' must be a known name .*got 'word'. Did you mean 'words'"),
        ({"check": "words", "atleast": 3}, "got {'atleast': 3}; .* It takes at_least, at_most"),
        ({"check": "words"}, "one of at_least and at_most must be set"),
        ({"check": "words", "at_least": "3"}, "must have the arguments of the check 'words', got {'at_least': '3'}"),
        ({"check": "keywords", "words": "fox"}, "words must be a non-empty list"),
        ({"check": "keyword_count", "word": "", "at_least": 1}, "a word must not be empty"),
        ({"check": "letter_count", "letter": "ab", "at_least": 1}, "letter must be one character"),
        ({"check": "paragraph_starts", "paragraph": 0, "word": "a"}, "paragraph counts from 1"),
        ({"check": "no_commas", "at_most": 1}, "It takes none"),
    ],
)
@pytest.mark.parametrize("text", ["", "a b c"])
def test_bad_arguments_are_refused_whatever_the_response(given, message, text):
    with pytest.raises(ValueError, match=message):
        judged(text, given)


@pytest.mark.parametrize("given", [None, [], "words", [{"at_least": 3}], [3]])
def test_no_instructions_are_refused(given):
    with pytest.raises(ValueError, match="\"meta.instructions\" of prompt 'p' must be a non-empty list"):
        instructions("a", Prompt("p", "?", meta={"instructions": given}))
