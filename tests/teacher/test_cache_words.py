"""Words, entropies and log-probabilities as bytes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdjax.teacher.cache import words

QWEN = 151936


@pytest.mark.parametrize(
    ("vocab_size", "largest_code", "size"),
    [
        (QWEN, 50, 3),
        (2**18, 63, 3),
        (2**18 + 1, 63, 5),
        (2**18, 64, 5),
        (1000, 65535, 5),
        (2**24, 1, 5),
    ],
)
def test_words_are_short_where_18_and_6_bits_do(vocab_size, largest_code, size):
    assert words.word_bytes(vocab_size, largest_code) == size


START = np.array([0])


def back(planes, first, size):
    steps, codes = words.decode_words(planes)
    return words.follow(steps, first, size), codes


@pytest.mark.parametrize("code", [1, 50, 63])
@pytest.mark.parametrize("token", [0, 131071, 131072, 140000, 151643, 151935, 262143])
def test_a_short_word_by_hand(token, code):
    planes = words.encode_words(np.array([token]), np.array([code]), START, 3)
    assert planes.tobytes() == (token + code * 2**18).to_bytes(3, "little")
    ids, codes = back(planes, START, 3)
    assert (ids.tolist(), codes.tolist()) == ([token], [code])


@pytest.mark.parametrize("code", [1, 64, 65535])
@pytest.mark.parametrize("token", [0, 262143, 262144, 2**24 - 1])
def test_a_long_word_by_hand(token, code):
    planes = words.encode_words(np.array([token]), np.array([code]), START, 5)
    assert planes.tobytes() == (token + code * 2**24).to_bytes(5, "little")
    ids, codes = back(planes, START, 5)
    assert (ids.tolist(), codes.tolist()) == ([token], [code])


@pytest.mark.parametrize("size", [3, 5])
def test_steps_and_planes_by_hand(size):
    ids, codes, first = np.int32([7, 9, 265, 4, 4, 3]), np.uint16([1, 2, 3, 4, 5, 6]), np.array([0, 3])
    bits = words.ID_BITS[size]
    steps = [7, 2, 256, 4, 0, 2**bits - 1]  # a position's first id is itself; the last step leads down
    plain = [(step + (code << bits)).to_bytes(size, "little") for step, code in zip(steps, codes.tolist(), strict=True)]
    planes = words.encode_words(ids, codes, first, size)
    assert planes.tolist() == [[word[plane] for word in plain] for plane in range(size)]
    found, _ = words.decode_words(planes)
    assert found.tolist() == steps
    assert back(planes, first, size)[0].tolist() == ids.tolist()


@given(st.sampled_from([(3, 2**18 - 1, 63), (5, 2**24 - 1, 65535)]), st.data())
def test_any_words_come_back(size, data):
    bytes_, largest, most = size
    pair = st.tuples(st.integers(0, largest), st.integers(1, most))
    positions = data.draw(st.lists(st.lists(pair, min_size=1, max_size=9), max_size=9))
    first = np.cumsum([0, *map(len, positions)])[:-1]
    ids, codes = np.array([one for position in positions for one in position], np.int64).reshape(-1, 2).T
    planes = words.encode_words(ids.astype(np.int32), codes.astype(np.uint16), first, bytes_)
    assert planes.shape == (bytes_, len(ids))
    found = back(planes, first, bytes_)
    assert [part.dtype for part in found] == [np.int32, np.uint16]
    assert [part.tolist() for part in found] == [ids.tolist(), codes.tolist()]


def test_steps_may_sum_to_more_than_32_bits():
    ids = np.tile(np.int32([2**24 - 1, 0]), 3000)  # sums to 2^36
    first = np.arange(0, 6000, 3)
    planes = words.encode_words(ids, np.ones(6000, np.uint16), first, 5)
    assert words.decode_words(planes)[0].sum(dtype=np.int64) > 2**33
    np.testing.assert_array_equal(back(planes, first, 5)[0], ids)


def test_an_entropy_is_off_by_half_a_step_at_most():
    entropy = np.linspace(0, math.log(QWEN), 1001).astype(np.float32)
    raw = words.encode_entropy(entropy, QWEN)
    assert len(raw) == len(entropy)
    back = words.decode_entropy(np.frombuffer(raw, np.uint8), QWEN)
    assert back.dtype == np.float32
    assert np.abs(back - entropy).max() <= math.log(QWEN) / 510 + 1e-5
    assert back[0] == 0
    assert back[-1] == pytest.approx(math.log(QWEN), abs=1e-5)
    assert list(words.encode_entropy(np.array([math.log(QWEN) * 0.25]), QWEN)) == [64]  # 63.75


def test_rounding_may_put_an_entropy_just_outside():
    assert list(words.encode_entropy(np.float32([-1e-6, math.log(7) + 1e-6]), 7)) == [0, 255]


@pytest.mark.parametrize("bad", [-0.1, 2.0, np.nan, np.inf])
def test_what_is_no_entropy_is_refused(bad):
    with pytest.raises(ValueError, match=r"entropy must be in \[0, ln 7\] nats, got values"):
        words.encode_entropy(np.float32([0.5, bad]), 7)


def test_log_probs_are_half_precision():
    values = np.float32([0, -1e-3, -0.1, -11.9, -300.25])
    raw = words.encode_log_prob(values)
    assert len(raw) == 10
    back = words.decode_log_prob(np.frombuffer(raw, np.uint8))
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, values, rtol=2**-11)


@pytest.mark.parametrize("bad", [np.nan, -np.inf, -70000.0])
def test_what_fits_no_half_is_refused(bad):
    with pytest.raises(ValueError, match=r"label_logp must be finite and at least -65504.0, got"):
        words.encode_log_prob(np.float32([-1, bad]))
