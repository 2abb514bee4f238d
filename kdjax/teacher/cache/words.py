"""What one stored entry, entropy and log-probability is in bytes; all little endian, all vectorised.

A word is a step in its low bits and a code above: 18 + 6 bits in 3 bytes, or 24 + 16 bits in 5 bytes. A step leads
from the id before to this one, modulo 2^18 (2^24); the first of a position is the id itself. Words are stored as
planes: the lowest byte of each, then the next byte of each, and so on. So what is alike comes together, and compresses
(`shards.py`). An entropy is one byte, round(255 H / ln V); a log-probability is a float16.
"""

from __future__ import annotations

import math

import numpy as np

# bytes per word -> bits of the step; the others are the code's
ID_BITS = {3: 18, 5: 24}
MAX_VOCAB = 1 << ID_BITS[5]
MAX_CODE = (1 << 8 * 5 - ID_BITS[5]) - 1
MAX_SHORT_CODE = (1 << 8 * 3 - ID_BITS[3]) - 1

ENTROPY_STEPS = 255
ENTROPY_SLACK = 1e-3  # how far outside [0, ln V], as a share of ln V, rounding may have put an entropy


def word_bytes(vocab_size: int, largest_code: int) -> int:
    """3 if every id is below 2^18 and every code at most 63, else 5."""
    return 3 if vocab_size <= 1 << ID_BITS[3] and largest_code <= MAX_SHORT_CODE else 5


def encode_words(ids: np.ndarray, codes: np.ndarray, first: np.ndarray, size: int) -> np.ndarray:
    """uint8 [size, M]: the planes of M words of `size` bytes, which is what `word_bytes` says.

    ids [M], codes [M]: must fit. first: int [n], the places in 0..M-1 where a position begins, ascending from 0.
    """
    ids = ids.astype(np.int64)
    steps = ids.copy()
    steps[1:] -= ids[:-1]
    steps[first] = ids[first]
    mask = (1 << ID_BITS[size]) - 1
    words = (steps & mask | codes.astype(np.int64) << ID_BITS[size]).astype("<u8")
    return words.view(np.uint8).reshape(-1, 8)[:, :size].T


def decode_words(planes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """steps uint32 [M] and codes uint16 [M] from the planes, uint8 [size, M]."""
    size, count = planes.shape
    word = np.dtype("<u4" if size == 3 else "<u8")
    padded = np.zeros((count, word.itemsize), np.uint8)
    padded[:, :size] = planes.T
    words = padded.view(word)[:, 0]
    bits = ID_BITS[size]
    mask, shift = word.type((1 << bits) - 1), word.type(bits)
    return (words & mask).astype(np.uint32), (words >> shift).astype(np.uint16)


def follow(steps: np.ndarray, first: np.ndarray, size: int) -> np.ndarray:
    """ids int32 [M] from steps uint32 [M]; `first` as in encode_words. Sums may overflow: 2^18, 2^24 divide 2^32."""
    reached = np.cumsum(steps, dtype=np.uint32)
    before = reached[first] - steps[first]
    reached -= np.repeat(before, np.diff(first, append=len(steps)))
    return (reached & np.uint32((1 << ID_BITS[size]) - 1)).astype(np.int32)


def encode_entropy(entropy: np.ndarray, vocab_size: int) -> bytes:
    """One byte per entropy (nats). Raises ValueError if one is not in [0, ln V], give or take rounding."""
    share = np.asarray(entropy, np.float64) / math.log(vocab_size)
    if not (np.abs(share - 0.5) <= 0.5 + ENTROPY_SLACK).all():
        raise ValueError(
            f"entropy must be in [0, ln {vocab_size}] nats, got values from {np.min(entropy)} to {np.max(entropy)}."
        )
    return np.rint(ENTROPY_STEPS * np.clip(share, 0, 1)).astype(np.uint8).tobytes()


def decode_entropy(raw: np.ndarray, vocab_size: int) -> np.ndarray:
    """float32 nats from uint8; off by at most ln V / 510."""
    return raw.astype(np.float32) * np.float32(math.log(vocab_size) / ENTROPY_STEPS)


def encode_log_prob(log_prob: np.ndarray) -> bytes:
    """Two bytes per log-probability (nats). Raises ValueError if one does not fit a float16."""
    largest = float(np.finfo(np.float16).max)
    if not (np.abs(log_prob) <= largest).all():
        raise ValueError(f"label_logp must be finite and at least {-largest}, got {np.min(log_prob)} among them.")
    return np.asarray(log_prob).astype("<f2").tobytes()


def decode_log_prob(raw: np.ndarray) -> np.ndarray:
    """float32 from the bytes (uint8, two per value) of float16."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)
