"""Row tiles, and the logits, log-probabilities and gradients of one tile."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.kernels.tiles import (
    MASKED,
    NO_ID,
    chunk_of,
    log_softmax,
    mask_chunk,
    row_tiles,
    split_rows,
    tile_gradients,
    tile_logits,
    tile_softmax,
)
from tests.kernels import oracle
from tests.kernels.problems import SHAPES, make_problem


@hypothesis.given(st.integers(0, 5000), st.integers(1, 600))
@hypothesis.example(300, 64)
@hypothesis.example(9, 8)
@hypothesis.settings(max_examples=300)
def test_row_tiles(rows, at_most):
    count, size = row_tiles(rows, at_most)
    assert count >= 1
    assert count * size >= rows
    assert (count - 1) * size < max(rows, 1)  # no tile is all padding
    assert size <= at_most + 7
    if count > 1:
        assert size % 8 == 0
        assert rows > at_most
    else:
        assert size == max(rows, 1)  # one tile is never padded


def test_row_tiles_are_even():
    """300 rows in tiles of 256 are 2 x 152, not 256 and 44 with 212 rows of padding."""
    assert row_tiles(300, 256) == (2, 152)
    assert row_tiles(257, 256) == (2, 136)
    assert row_tiles(256, 256) == (1, 256)
    assert row_tiles(0, 256) == (1, 1)


@pytest.mark.parametrize("shape", [(10,), (10, 3), (10, 2, 2)])
def test_split_rows(shape):
    rows = jnp.arange(1, 1 + np.prod(shape)).reshape(shape)
    tiles = split_rows(rows, 3, 4)
    assert tiles.shape == (3, 4, *shape[1:])
    flat = np.asarray(tiles).reshape(12, *shape[1:])
    np.testing.assert_array_equal(flat[:10], rows)
    assert not flat[10:].any()
    np.testing.assert_array_equal(split_rows(rows, 2, 5).reshape(shape), rows)


@pytest.mark.parametrize("name", SHAPES)
def test_tile_logits(name):
    p = make_problem(SHAPES[name])
    logits = tile_logits(p.hidden, p.head)
    assert logits.shape == (SHAPES[name].rows, SHAPES[name].vocab)
    np.testing.assert_allclose(logits, p.oracle.logits(p.hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["tied", "untied_padded", "tied_padded_capped", "tiles_tied_padded_capped"])
@pytest.mark.parametrize("size", [1, 4, 5])
def test_chunks(name, size):
    """Of equal size, each id once, the rest masked; together they are the tile, and their gradients its gradient."""
    p = make_problem(SHAPES[name])
    whole = np.asarray(tile_logits(p.hidden, p.head))
    seen = []
    for at in range(-(-p.head.vocab_size // size)):
        chunk = chunk_of(p.head, jnp.int32(at), size)
        raw = tile_logits(p.hidden, chunk.head)
        start, ids, counts = int(chunk.start), np.asarray(chunk.ids), np.asarray(chunk.ids != NO_ID)
        np.testing.assert_allclose(raw, whole[:, start : start + size], rtol=1e-5, atol=1e-5)
        masked = np.asarray(mask_chunk(raw, chunk))
        np.testing.assert_array_equal(masked[:, counts], np.asarray(raw)[:, counts])
        assert (masked[:, ~counts] == MASKED).all()
        assert chunk.masked or counts.all()
        assert int(chunk.first) == start
        np.testing.assert_array_equal(ids[counts], np.arange(start, start + size)[counts])
        seen.extend(ids[counts])
    assert seen == list(range(p.head.vocab_size))


def test_tile_logits_of_bfloat16_are_not_rounded():
    p = make_problem(SHAPES["tied"], jnp.bfloat16)
    logits = tile_logits(p.hidden, p.head)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, p.oracle.logits(p.hidden.astype(jnp.float32)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["tied", "untied_padded", "tied_padded_capped", "tiles_tied_padded_capped"])
def test_tile_gradients(name):
    """Against JAX's own transposition of tile_logits."""
    p = make_problem(SHAPES[name])
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(SHAPES[name].rows, SHAPES[name].vocab)), jnp.float32)
    logits, transpose = jax.vjp(
        lambda hidden, w: tile_logits(hidden, dataclasses.replace(p.head, weight=w)), p.hidden, p.head.weight
    )
    for got, want in zip(tile_gradients(weight, logits, p.hidden, p.head), transpose(weight), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", [log_softmax, lambda logits: tile_softmax(logits)[0]], ids=["log", "tile"])
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_log_softmax(function, shift):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 17)).round(3) * 4, jnp.float32) + shift
    np.testing.assert_allclose(function(logits), oracle.log_softmax(logits), rtol=1e-5, atol=1e-6)


def test_tile_softmax_is_consistent():
    logits = jnp.array([[1e4, -1e4, 0], [0, -90, -104], [-1e4, -1e4, -1e4]], jnp.float32)
    logp, p = tile_softmax(logits)
    assert np.isfinite(logp).all()
    np.testing.assert_allclose(p, np.exp(oracle.log_softmax(logits)), rtol=1e-6, atol=1e-37)
    np.testing.assert_allclose(jnp.sum(p, -1), 1.0, rtol=1e-6)
