"""Which answers share a call of the student, and as what arrays.

A row of the student is one question and up to GROUP answers, [question, right-aligned][answer]...[answer], see
models/shared_prefix.py. Widths and numbers of answers are powers of two, so few programs are compiled. A student
without such rows reads [question][answer], left-aligned, with its padding last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import numpy as np

from kdjax.curation.answers.encode import Encoded, EncodedAnswer

GROUP = 8  # answers in a row; more spare little: 8 cost 9/16 of one by one, 16 cost 17/32
QUESTION, ANSWER = 32, 16  # least widths, tokens


@dataclasses.dataclass(frozen=True, order=True)
class Shape:
    """Widths of question and answers in tokens, answers in a row, rows in a call of one device."""

    question: int
    answer: int
    answers: int
    rows: int

    @property
    def tokens(self) -> int:
        """Tokens that a row has room for."""
        return self.question + self.answers * self.answer

    def holds(self, other: Shape) -> bool:
        """Whether a row of that shape fits into this one."""
        return other.question <= self.question and other.answer <= self.answer and other.answers <= self.answers


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Answers of one question that share a row."""

    of: Encoded
    answers: tuple[EncodedAnswer, ...]


@flax.struct.dataclass
class AnswerBatch:
    """Rows of T places with M answers each, of at most A tokens, to questions of at most Q.

    tokens, segment_ids, positions: int32 [B, T] as in `types.Batch`. Of every token of an answer, [B, M, A], and of a
    question, [B, Q]: place, where it is read; before, where it is predicted; in, whether it counts. question_told: bool
    [B, Q], whether it counts and is predicted by another, as the first of a text is not.
    """

    tokens: Any
    segment_ids: Any
    positions: Any
    answer_place: Any
    answer_before: Any
    answer_in: Any
    question_place: Any
    question_before: Any
    question_in: Any
    question_told: Any


def groups_of(encoded: Encoded, seq_len: int, room: int, largest: int = GROUP) -> list[tuple[Shape, Group]]:
    """The answers without an error, by length, in the groups that take the fewest places in all.

    room: tokens of a device's call. A row is no larger unless its one answer is; attention, which repeats the question,
    may see twice as many. largest: answers in a group at most, a power of two.
    """
    answers = sorted((each for each in encoded.answers if not each.error), key=lambda each: len(each.tokens.ids))
    question = _width(len(encoded.question.ids), QUESTION, seq_len)
    widths = [_width(len(each.tokens.ids), ANSWER, seq_len) for each in answers]
    # of the first n answers: places, where their last group starts, its shape
    best: list[tuple[int, int, Shape | None]] = [(0, 0, None)]
    for end in range(1, len(answers) + 1):
        options = []
        for start in range(max(0, end - largest), end):
            shape = _shape(question, widths[end - 1], end - start, room)
            if shape is not None:
                options.append((best[start][0] + shape.tokens, start, shape))
        best.append(min(options))
    found: list[tuple[Shape, Group]] = []
    end = len(answers)
    while end:
        _, start, shape = best[end]
        if shape is not None:
            found.append((shape, Group(encoded, tuple(answers[start:end]))))
        end = start
    return found[::-1]


def _shape(question: int, answer: int, count: int, room: int) -> Shape | None:
    """Of a row for `count` answers, None if it is too large."""
    answers = 1 << (count - 1).bit_length()
    seen = answers * (question + answer)  # by attention
    if answers > 1 and (question + answers * answer > room or seen > 2 * room):
        return None
    return Shape(question, answer, answers, max(1, min(room // (question + answers * answer), 2 * room // seen)))


def _width(length: int, least: int, seq_len: int) -> int:
    """The next power of two, but no more than what seq_len asks for."""
    return max(length, min(max(least, 1 << max(0, length - 1).bit_length()), -(-seq_len // ANSWER) * ANSWER))


def arrays_of(groups: Sequence[Group], shape: Shape, rows: int, shared: bool) -> AnswerBatch:
    """`rows` rows on the host, those after the groups empty. shared: of several answers, else of one, left-aligned."""
    length, m = shape.tokens, shape.answers
    tokens, segments, positions = (np.zeros((rows, length), np.int32) for _ in range(3))
    place, before = (np.zeros((rows, m, shape.answer), np.int32) for _ in range(2))
    asked, asked_before = (np.zeros((rows, shape.question), np.int32) for _ in range(2))
    inside, asked_in = np.zeros(place.shape, bool), np.zeros(asked.shape, bool)
    told = np.zeros(asked.shape, bool)
    for row, group in enumerate(groups):
        question = group.of.question
        n = len(question.ids)
        first = shape.question - n if shared else 0  # place of the question
        tokens[row, first : first + n], segments[row, first : first + n] = question.ids, 1
        positions[row, first : first + n] = np.arange(n)
        asked[row, :n] = first + np.arange(n)
        asked_before[row, 1:n] = asked[row, : n - 1]
        asked_in[row, :n], told[row, 1:n] = question.counted, question.counted[1:]
        for number, answer in enumerate(group.answers):
            k = len(answer.tokens.ids)
            at = first + n + number * shape.answer
            tokens[row, at : at + k], segments[row, at : at + k] = answer.tokens.ids, 1
            positions[row, at : at + k] = n + np.arange(k)
            place[row, number, :k] = at + np.arange(k)
            before[row, number, :k] = np.concatenate([[first + n - 1], place[row, number, : k - 1]])[:k]
            inside[row, number, :k] = answer.tokens.counted
    return AnswerBatch(tokens, segments, positions, place, before, inside, asked, asked_before, asked_in, told)
