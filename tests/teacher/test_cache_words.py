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


@pytest.mark.parametrize("code", [1, 50, 63])
@pytest.mark.parametrize("token", [0, 131071, 131072, 140000, 151643, 151935, 262143])
def test_a_short_word_by_hand(token, code):
    raw = words.encode_words(np.array([token]), np.array([code]), 3)
    assert raw == (token + code * 2**18).to_bytes(3, "little")
    ids, codes = words.decode_words(np.frombuffer(raw, np.uint8), 3)
    assert (ids.tolist(), codes.tolist()) == ([token], [code])


@pytest.mark.parametrize("code", [1, 64, 65535])
@pytest.mark.parametrize("token", [0, 262143, 262144, 2**24 - 1])
def test_a_long_word_by_hand(token, code):
    raw = words.encode_words(np.array([token]), np.array([code]), 5)
    assert raw == (token + code * 2**24).to_bytes(5, "little")
    ids, codes = words.decode_words(np.frombuffer(raw, np.uint8), 5)
    assert (ids.tolist(), codes.tolist()) == ([token], [code])


@given(st.sampled_from([(3, 2**18 - 1, 63), (5, 2**24 - 1, 65535)]), st.data())
def test_any_words_come_back(size, data):
    bytes_, largest, most = size
    pair = st.tuples(st.integers(0, largest), st.integers(1, most))
    ids, codes = np.array(data.draw(st.lists(pair, max_size=20)), np.int64).reshape(-1, 2).T
    raw = words.encode_words(ids.astype(np.int32), codes.astype(np.uint16), bytes_)
    assert len(raw) == bytes_ * len(ids)
    back = words.decode_words(np.frombuffer(raw, np.uint8), bytes_)
    assert [part.dtype for part in back] == [np.int32, np.uint16]
    assert [part.tolist() for part in back] == [ids.tolist(), codes.tolist()]


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
