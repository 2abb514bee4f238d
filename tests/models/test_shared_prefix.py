"""Rows of one question and many answers against plain rows: the same states, no answer in sight of another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import models
from kdjax.models import flax_models, shared_prefix

VOCAB, Q, A, M = 48, 8, 6, 3
ASKED, ANSWERED = (8, 3), ((6, 2, 1), (1, 6, 6))  # tokens, of two rows; plain rows of four lengths


@functools.cache
def config(family: str, **changes) -> models.ModelConfig:
    """Windows of five positions in gemma3: an answer's last tokens see little of the question, or nothing."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    own = {"sliding_window": 5, "layer_types": kinds} if family.startswith("gemma") else {}
    return models.config_from_hf({"model_type": family, **sizes, **heads, **own, **changes})


def rows():
    """tokens, segment_ids, positions [2, Q + M A]."""
    rng = np.random.default_rng(0)
    tokens, segments, positions = (np.zeros((2, Q + M * A), np.int32) for _ in range(3))
    for row, n in enumerate(ASKED):
        spans = [(Q - n, n, 0)] + [(Q + m * A, k, n) for m, k in enumerate(ANSWERED[row])]
        for start, length, position in spans:
            at = slice(start, start + length)
            tokens[row, at], segments[row, at] = rng.integers(1, VOCAB, length), 1
            positions[row, at] = position + np.arange(length)
    return tokens, segments, positions


def run(cfg, params, inputs, question=Q, answers=M, tap="", **options):
    parts = {"question": question, "answers": answers, "tap": tap}
    jitted = jax.jit(functools.partial(models.hidden_and_states, cfg, **parts, **options))
    return [np.asarray(side) for side in jitted(params, *map(jnp.asarray, inputs))]


def plain(tap, cfg, params, ids):
    """Hidden and tapped states of one row, the last block taken apart."""
    ids = jnp.asarray(ids)[None]
    at, one = jnp.arange(ids.shape[1])[None], jnp.ones_like(ids)
    hidden = models.hidden(cfg, params, ids, one, at)
    _, states = models.hidden_and_states(cfg, params, ids, one, at, question=1, answers=1, tap=tap)
    return np.asarray(hidden[0]), np.asarray(states[0])


@pytest.mark.parametrize("family", models.FAMILIES)
def test_states_are_those_of_plain_rows(family):
    cfg = config(family)
    params = models.init_params(cfg, jax.random.key(0))
    tokens, segments, positions = rows()
    for tap in shared_prefix.TAPS if family == "llama" else ("up",):
        hidden, states = run(cfg, params, (tokens, segments, positions), tap=tap)
        for row, n in enumerate(ASKED):
            for m, k in enumerate(ANSWERED[row]):
                places = np.r_[Q - n : Q, Q + m * A : Q + m * A + k]
                want = plain(tap, cfg, params, tokens[row, places])
                np.testing.assert_allclose(hidden[row, places], want[0], atol=2e-5)
                np.testing.assert_allclose(states[row, places], want[1], atol=1e-4)  # of up to 15


def test_one_answer_is_a_plain_row():
    cfg = config("gemma3_text")
    params = models.init_params(cfg, jax.random.key(0))
    inputs = [side[:, : Q + A] for side in rows()]
    hidden, _ = run(cfg, params, inputs, answers=1)
    np.testing.assert_allclose(hidden, models.hidden(cfg, params, *map(jnp.asarray, inputs)), atol=1e-6)


def test_an_answer_sees_neither_the_others_nor_padding():
    cfg = config("gemma3_text")
    params = models.init_params(cfg, jax.random.key(0))
    tokens, segments, positions = rows()
    edited = np.where(segments == 0, 7, tokens)  # padding
    second = slice(Q + A, Q + A + ANSWERED[0][1])
    edited[0, second] = (tokens[0, second] + 1) % VOCAB
    before, after = (run(cfg, params, (each, segments, positions)) for each in (tokens, edited))
    moved = np.zeros(tokens.shape, bool)
    moved[0, second] = True
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old[~moved & (segments > 0)], new[~moved & (segments > 0)])
        assert (old[moved] != new[moved]).any(-1).all()


def test_every_attention_gives_the_same():
    """What spares the question's queries and what does not."""
    cfg = config("gemma3_text")
    params = models.init_params(cfg, jax.random.key(0))
    found = [run(cfg, params, rows(), rules=models.Rules(attention=name)) for name in ("xla", "reference")]
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_what_the_tapped_states_are():
    """From what the last block is given, by its own weights; gemma3's norms multiply by 1 + their scale."""
    for family, offset in (("llama", 0.0), ("gemma3_text", 1.0)):
        cfg = config(family)
        params = models.init_params(cfg, jax.random.key(0))
        last = {name: np.asarray(leaf[-1], np.float64) for name, leaf in params["layers"].items()}
        _, given = run(cfg, params, rows(), tap="up_input")
        _, up = run(cfg, params, rows(), tap="up")
        np.testing.assert_allclose(up, given @ last["w_up"], atol=1e-5)
        size = np.sqrt(np.mean(np.square(given / (last["mlp_norm"] + offset)), -1))
        np.testing.assert_allclose(size, 1.0, atol=1e-3)
        hidden, out = run(cfg, params, rows(), tap="block_output")
        scale = np.asarray(params["final_norm"], np.float64) + offset
        wide = out.astype(np.float64)
        normed = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + cfg.norm_eps) * scale
        np.testing.assert_allclose(hidden, normed, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answers": 4}, "^answers must divide what the question leaves of the row, got 4 for 18 of 26 places"),
        ({"question": 26}, "^answers must divide .*got 3 for 0 of 26 places. Give every answer"),
        ({"tap": "ups"}, "^answers.tap must be a known name .*got 'ups'. Did you mean 'up'"),
    ],
)
def test_bad_arguments(options, message):
    cfg = config("llama")
    with pytest.raises(ValueError, match=message):
        run(cfg, models.abstract_params(cfg), rows(), **options)


def test_a_flax_model_has_no_such_rows(monkeypatch):
    cfg = models.ModelConfig("flax:a:b", 8, 4, 1, 1, 1, 4, 4)
    monkeypatch.setitem(flax_models._models, cfg.family, object())
    assert not models.shares_prefixes(cfg)
    assert models.shares_prefixes(config("llama"))
    with pytest.raises(ValueError, match="^the model must be of a family of kdjax .*got 'flax:a:b'. Take its hidden"):
        models.hidden_and_states(cfg, {}, *map(jnp.asarray, rows()), question=Q, answers=M)
