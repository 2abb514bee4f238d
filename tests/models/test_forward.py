"""Layers against float64 numpy, rematerialisation, and what config.json may hold."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import models
from kdjax.kernels.attention import attention
from kdjax.models import layers
from kdjax.models.decoder import REMAT

CFG = models.ModelConfig("llama", 57, 16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=24, tied=True)
HF = {
    "model_type": "llama",
    "vocab_size": 57,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def inputs(rows: int, length: int):
    tokens = np.random.default_rng(0).integers(0, CFG.vocab_size, (rows, length), dtype=np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return jnp.asarray(tokens), jnp.ones((rows, length), jnp.int32), jnp.asarray(positions)


def test_attention_is_finite_at_extreme_scores():
    q = jnp.asarray(np.random.default_rng(0).choice([-1e4, 1e4], (1, 140, 2, 4)), jnp.float32)
    segments = jnp.asarray([[1] * 100 + [0] * 40], jnp.int32)
    value, grads = jax.value_and_grad(lambda q: jnp.sum(attention(q, q[:, :, :1], q[:, :, 1:], segments)))(q)
    assert jnp.isfinite(value)
    assert jnp.all(jnp.isfinite(grads))


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_rms_norm_is_computed_in_float32(dtype, tolerance):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 500)) * 300, dtype)  # squares need the range
    scale = jnp.linspace(0.5, 2, 500)
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(scale, np.float64)
    found = layers.rms_norm(x, scale, 1e-5)
    assert found.dtype == dtype
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=tolerance)


def test_rope_scores_depend_on_the_distance_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 4)), jnp.float32) for _ in range(2))

    def score(query_at, key_at):
        ropes = (layers.rope_tables(CFG, jnp.asarray([[at]], jnp.int32)) for at in (query_at, key_at))
        turned = [layers.rotate(x, rope) for x, rope in zip((q, k), ropes, strict=True)]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-5)
    assert score(7, 3) != pytest.approx(score(8, 3), abs=1e-2)
    assert score(5, 5) == pytest.approx(float(jnp.sum(q * k)), abs=1e-6)


def test_an_unknown_rope_scaling_is_refused():
    cfg = models.ModelConfig(**{**vars(CFG), "rope_scaling": models.RopeScaling("yarn", 2.0)})
    with pytest.raises(ValueError, match="rope_scaling.kind must be 'linear' or 'llama3', got 'yarn'"):
        layers.rope_frequencies(cfg)


@functools.cache
def compiled_gradient(remat: str, rows: int, length: int):
    def scalar(params, *inputs):
        return jnp.sum(jnp.tanh(models.hidden(CFG, params, *inputs, remat=remat)))

    return jax.jit(jax.grad(scalar)).lower(models.abstract_params(CFG), *inputs(rows, length)).compile()


def test_remat_changes_memory_and_not_the_gradient():
    programs = {remat: compiled_gradient(remat, 3, 100) for remat in REMAT}
    params = models.init_params(CFG, jax.random.key(0))
    gradients = {remat: program(params, *inputs(3, 100)) for remat, program in programs.items()}
    for remat in REMAT:
        compare = functools.partial(np.testing.assert_allclose, atol=1e-4)
        jax.tree.map(compare, gradients[remat], gradients["full"])
    memory = {remat: program.memory_analysis().temp_size_in_bytes for remat, program in programs.items()}
    assert memory["none"] > memory["dots"] > memory["full"]


def test_an_unknown_remat_is_refused():
    with pytest.raises(ValueError, match=r"student\.remat must be a known name .* Did you mean 'full'"):
        models.hidden(CFG, models.init_params(CFG, jax.random.key(0)), *inputs(1, 4), remat="ful")


def test_nothing_has_the_size_of_logits():
    rows, length = 3, 100
    shapes = re.findall(r"\w+\[([\d,]+)\]", compiled_gradient("none", rows, length).as_text())
    sizes = {int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes}
    assert rows * length * CFG.width in sizes
    assert rows * length * CFG.vocab_size not in sizes


def test_an_id_outside_the_vocabulary_gives_nan():
    tokens, segments, positions = inputs(2, 4)
    tokens = tokens.at[0, 2].set(CFG.vocab_size)
    run = jax.jit(functools.partial(models.hidden, CFG))
    hidden = run(models.init_params(CFG, jax.random.key(0)), tokens, segments, positions)
    assert jnp.all(jnp.isnan(hidden[0, 2]))
    assert not jnp.any(jnp.isnan(hidden[1]))


def test_config_is_a_static_argument():
    run = jax.jit(models.hidden, static_argnames=("cfg", "remat", "compute_dtype"))
    params = models.init_params(CFG, jax.random.key(0))
    same = models.ModelConfig(**vars(CFG))
    for cfg in (CFG, same):
        assert run(cfg, params, *inputs(2, 4)).shape == (2, 4, CFG.width)
    assert run._cache_size() == 1


# --- config.json

LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 8}
REFUSED = [
    ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
    ({"mlp_bias": True}, "mlp_bias must be False, got True"),
    ({"attention_bias": True}, "attention_bias must be False, got True"),
    ({"model_type": "qwen3", "attention_bias": True}, "attention_bias must be False, got True"),
    ({"quantization_config": {"bits": 4}}, "quantization_config must be None"),
    ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads = 4, got 3"),
    ({"head_dim": 5}, "head_dim must be even, got 5"),
    ({"hidden_size": None}, "must have 'hidden_size', got none"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0, got 0.5"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type must be .*got 'dynamic'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type must be .*got 'yarn'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling must have 'low_freq_factor'"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling must have 'factor'"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_scaling must have a positive 'factor', got 0"),
    ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor must be above low_freq_factor = 1.0, got"),
    ({"model_type": "qwen2", "max_window_layers": 1} | SLIDING, "layer_types .*got 'sliding_attention'"),
    ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "got 'sliding_attention'"),
    ({"model_type": "lama"}, "model_type must be .* Did you mean 'llama'"),
    ({"model_type": None}, "model_type must be .*got ''"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_a_config_that_would_be_computed_wrongly_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        models.config_from_hf(HF | change)


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match=r"ModelConfig\.family must be .* Did you mean 'qwen3'"):
        models.param_specs(models.ModelConfig(**{**vars(CFG), "family": "qwen4"}))


def test_defaults_of_config_json():
    cfg = models.config_from_hf(HF)
    assert (cfg.head_dim, cfg.tied, cfg.rope_theta, cfg.eos_ids, cfg.bos_id) == (4, False, 1e4, (), None)
    assert models.config_from_hf(HF | {"num_key_value_heads": None}).kv_heads == 4
    assert models.config_from_hf(HF | {"model_type": "qwen3"}).head_dim == 128
    assert models.config_from_hf(HF | {"eos_token_id": 2}).eos_ids == (2,)
    assert models.config_from_hf(HF | {"eos_token_id": [2, 5]}).eos_ids == (2, 5)
    # a window that no layer uses
    unused = HF | SLIDING | {"model_type": "qwen2", "max_window_layers": 2}
    assert models.config_from_hf(unused).attention_bias
    assert models.config_from_hf(unused | {"use_sliding_window": False, "max_window_layers": 0}).layers == 2


def test_both_spellings_of_rope_are_read():
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = HF | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **llama3}}
    new = HF | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **llama3}}
    assert models.config_from_hf(old) == models.config_from_hf(new)
    assert models.config_from_hf(new).rope_scaling == models.RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    older = models.config_from_hf(HF | {"rope_scaling": {"type": "linear", "factor": 4}})
    assert older.rope_scaling == models.RopeScaling("linear", 4.0)
