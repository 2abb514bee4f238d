"""The choice of a token against sorting in float64 and against the frequencies that it should have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from kdjax.generation.sampling import Sampling, keep, next_tokens

V = 700  # three blocks, the last of them not full
DRAWS, ROWS = 10_000, 16  # few shapes, so that few programs are compiled
FILTERS = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(top_p=0.8),
    Sampling(top_k=7),
    Sampling(min_p=0.1),
    Sampling(temperature=1.5, top_p=0.7, top_k=40, min_p=0.02),
]


def logits_of(rows, seed=0):
    return 2.5 * np.random.default_rng(seed).standard_normal((rows, V)).astype(np.float32)


def oracle(logits, settings):
    """The distribution of one row: probabilities sorted, cut off and divided by their sum again after every filter."""
    p = np.exp((logits.astype(np.float64) - logits.max()) / settings.temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if settings.top_k:
        p[order[settings.top_k :]] = 0
        p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= settings.top_p]] = 0
    p /= p.sum()
    p[p < settings.min_p * p.max()] = 0
    return p / p.sum()


SOME = [Sampling(temperature=0), FILTERS[0], FILTERS[-1]]
draw = jax.jit(next_tokens, static_argnames="settings")


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_kept_tokens_are_those_of_sorting(settings):
    logits = logits_of(ROWS)
    weights = np.exp((logits - logits.max(-1, keepdims=True)) / np.float32(settings.temperature))
    kept = np.asarray(keep(jnp.asarray(weights), settings))
    wanted = np.stack([oracle(row, settings) for row in logits])
    np.testing.assert_array_equal(kept > 0, wanted > 0)
    np.testing.assert_allclose(kept / kept.sum(-1, keepdims=True), wanted, atol=1e-6)


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_frequencies_are_the_distribution(settings):
    (logits,) = logits_of(1, seed=3)
    keys = jax.random.split(jax.random.key(5), DRAWS)
    tokens, _ = draw(jnp.tile(logits[None], (DRAWS, 1)), keys, settings)
    wanted = oracle(logits, settings)
    counts = np.bincount(np.asarray(tokens), minlength=V)
    assert counts[wanted == 0].sum() == 0
    order = np.argsort(-wanted)
    common = order[wanted[order] * DRAWS >= 10]
    seen, due = counts[common], wanted[common] * DRAWS
    rest = DRAWS - due.sum()
    if rest > 10:  # all rare tokens as one
        seen, due = np.append(seen, DRAWS - seen.sum()), np.append(due, rest)
    assert len(due) > 4
    assert stats.chisquare(seen, due * seen.sum() / due.sum()).pvalue > 1e-3


@pytest.mark.parametrize("settings", SOME, ids=str)
def test_log_probabilities_are_the_models_own(settings):
    logits = logits_of(ROWS, seed=1)
    tokens, logp = draw(jnp.asarray(logits), jax.random.split(jax.random.key(0), ROWS), settings)
    wide = logits.astype(np.float64)
    wanted = wide[np.arange(ROWS), tokens] - np.log(np.exp(wide).sum(-1))
    np.testing.assert_allclose(logp, wanted, atol=1e-5)


def test_greedy_takes_the_lower_id_on_ties_and_ties_with_the_last_are_kept():
    logits = np.zeros((ROWS, V), np.float32)
    logits[0, [400, 9]], logits[1, V - 1] = 3.0, 3.0
    tokens, _ = draw(jnp.asarray(logits), jax.random.split(jax.random.key(0), ROWS), Sampling(temperature=0))
    assert tokens.tolist() == [9, V - 1] + [0] * (ROWS - 2)
    kept = keep(jnp.asarray([[1.0, 0.5, 0.5, 0.25]]), Sampling(top_k=2))
    assert kept.tolist() == [[1.0, 0.5, 0.5, 0.0]]


def test_extreme_logits_and_one_token():
    logits = np.full((ROWS, V), -1e4, np.float32)
    logits[:, 3], logits[0, 5], logits[1, V - 1], logits[2, 3] = -1e4 + 40, 1e4, 1e4, 1e4
    for settings in SOME:
        tokens, logp = draw(jnp.asarray(logits), jax.random.split(jax.random.key(1), ROWS), settings)
        assert tokens.tolist() == [5, V - 1] + [3] * (ROWS - 2)
        np.testing.assert_allclose(logp, 0, atol=1e-5)


def test_a_row_is_drawn_with_its_own_key():
    logits, keys = logits_of(ROWS, seed=2), jax.random.split(jax.random.key(7), ROWS)
    order = np.random.default_rng(0).permutation(ROWS)
    first, _ = draw(jnp.asarray(logits), keys, Sampling())
    second, _ = draw(jnp.asarray(logits[order]), keys[order], Sampling())
    other, _ = draw(jnp.asarray(logits), keys[order], Sampling())
    np.testing.assert_array_equal(np.asarray(first)[order], second)
    assert (np.asarray(other) != np.asarray(first)).any()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -0.1, r"Sampling.temperature must be at least 0, got -0.1; 0 takes the most likely token"),
        ("temperature", float("nan"), r"Sampling.temperature must be at least 0, got nan"),
        ("top_p", 0.0, r"Sampling.top_p must be in \(0, 1\], got 0.0; it is a probability mass. Set it to 1"),
        ("top_k", -1, r"Sampling.top_k must be at least 0, got -1; it is a number of tokens. Set it to 0"),
        ("min_p", 1.0, r"Sampling.min_p must be in \[0, 1\), got 1.0; it is a share of the largest"),
    ],
)
def test_values_without_a_meaning(field, value, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{field: value})
