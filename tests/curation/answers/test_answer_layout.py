"""Which answers share a row: each once, in rows that hold them, at no more cost than one by one."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from answer_problems import question

from kdjax.curation.answers.layout import Shape, arrays_of, groups_of

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=20)


def shapes(asked, lengths, seq_len=512, room=2048, **options):
    encoded = question("x", np.random.default_rng(0), asked, lengths)
    found = groups_of(encoded, seq_len, room, **options)
    rows = [answer.row for _, group in found for answer in group.answers]
    assert sorted(rows) == sorted(answer.row for answer in encoded.answers)
    return found


@hypothesis.given(st.integers(1, 300), LENGTHS, st.sampled_from([64, 600, 4096]))
def test_each_answer_once_in_a_row_that_holds_it(asked, lengths, room):
    found = shapes(asked, lengths, room=room)
    for shape, group in found:
        assert asked <= shape.question
        assert all(len(answer.tokens.ids) <= shape.answer for answer in group.answers)
        assert len(group.answers) <= shape.answers <= 8
        assert shape.answers == 1 or shape.tokens <= room
        assert shape.answers == 1 or shape.answers * (shape.question + shape.answer) <= 2 * room
        assert shape.rows == 1 or shape.rows * shape.tokens <= room
    alone = sum(shape.tokens for shape, _ in shapes(asked, lengths, room=room, largest=1))
    assert sum(shape.tokens for shape, _ in found) <= alone


def test_groups_by_hand():
    def told(*args, **options):
        return [(shape.question, shape.answer, shape.answers) for shape, _ in shapes(*args, **options)]

    assert told(64, [64] * 8) == [(64, 64, 8)]
    assert told(64, [16] * 9) == [(64, 16, 1), (64, 16, 8)]
    # 64 + 4 * 16 and 64 + 256, against 64 + 8 * 256 together
    assert told(64, [9, 200, 16, 3, 12]) == [(64, 16, 4), (64, 256, 1)]
    assert told(400, [400, 300], seq_len=450) == [(464, 464, 2)]  # no more than what seq_len asks for
    assert told(64, [64] * 8, room=192) == [(64, 64, 2)] * 4
    assert told(64, [64] * 8, largest=1) == [(64, 64, 1)] * 8
    ((shape, _),) = shapes(20, [10])
    assert shape == Shape(32, 16, 1, 2048 // 48)


@pytest.mark.parametrize("shared", [True, False])
def test_arrays(shared):
    encoded = question("x", np.random.default_rng(0), 3, (2, 4) if shared else (4,))
    group = groups_of(encoded, 64, 256)[0][1]
    count = len(group.answers)
    batch = arrays_of([group], Shape(5, 6, count, 2), 2, shared)
    assert batch.tokens.shape == (2, 5 + count * 6)
    assert not batch.segment_ids[1].any()
    assert not batch.answer_in[1].any()
    first = 2 if shared else 0
    np.testing.assert_array_equal(batch.question_place[0, :3], first + np.arange(3))
    np.testing.assert_array_equal(batch.tokens[0, batch.question_place[0, :3]], encoded.question.ids)
    np.testing.assert_array_equal(batch.question_told[0, :3], [False, *encoded.question.counted[1:]])
    for number, answer in enumerate(group.answers):
        n = len(answer.tokens.ids)
        place, before = batch.answer_place[0, number, :n], batch.answer_before[0, number, :n]
        np.testing.assert_array_equal(batch.tokens[0, place], answer.tokens.ids)
        np.testing.assert_array_equal(batch.positions[0, place], 3 + np.arange(n))
        np.testing.assert_array_equal(batch.positions[0, before], 2 + np.arange(n))
        assert before[0] == first + 2  # of all answers the question's last token
        np.testing.assert_array_equal(batch.answer_in[0, number, :n], answer.tokens.counted)
    assert batch.segment_ids.sum() == 3 + sum(len(answer.tokens.ids) for answer in group.answers)
    np.testing.assert_array_equal(batch.segment_ids[0, :first], 0)
