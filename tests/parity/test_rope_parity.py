"""RoPE of the published Llama 3.1 and 3.2 and of Gemma 3 against transformers, and against a known vector."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import models
from kdjax.models import layers

torch = pytest.importorskip("torch", reason="torch is the oracle of the parity tests; pip install torch==2.13.0")
transformers = pytest.importorskip("transformers")

LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# name -> (shape, factor) of the published config.json
PUBLISHED = {
    "Llama-3.1-8B": ({"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}, 32, None, 8.0),
    "Llama-3.1-70B": ({"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}, 64, None, 8.0),
    "Llama-3.2-1B": ({"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}, 32, 64, 32.0),
    "Llama-3.2-3B": ({"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}, 24, 128, 32.0),
}
POSITIONS = [0, 1, 2047, 8191, 8192, 50_000, 131_071]


def published(name, new_form):
    """The config.json as published (transformers 4), or as transformers 5 writes it."""
    shape, heads, head_dim, factor = PUBLISHED[name]
    config = LLAMA | shape | {"num_attention_heads": heads} | ({"head_dim": head_dim} if head_dim else {})
    scaling = SCALING | {"rope_type": "llama3", "factor": factor}
    if new_form:
        return config | {"rope_parameters": scaling | {"rope_theta": 500000.0}}
    return config | {"rope_theta": 500000.0, "rope_scaling": scaling}


@pytest.mark.parametrize("new_form", [False, True], ids=["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_llama_turns_as_in_transformers(name, new_form):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields = published(name, new_form)
    cfg = models.config_from_hf(fields)
    assert cfg.rope_scaling == models.RopeScaling("llama3", PUBLISHED[name][3], 1.0, 4.0, 8192)
    assert models.config_from_hf(models.config_to_hf(cfg)) == cfg
    config = transformers.AutoConfig.for_model(**fields)
    assert models.config_from_hf(config.to_dict()) == dataclasses.replace(cfg, bos_id=1, eos_ids=(2,))
    rope = LlamaRotaryEmbedding(config)
    ours = np.asarray(layers.rope_frequencies(cfg))
    np.testing.assert_allclose(ours, rope.inv_freq.numpy(), rtol=1e-6)
    unscaled = np.asarray(layers.rope_frequencies(dataclasses.replace(cfg, rope_scaling=None)))
    kept, stretched = ours == unscaled, np.isclose(ours * PUBLISHED[name][3], unscaled, rtol=1e-12)
    assert kept.any() and stretched.any() and not (kept | stretched).all()  # noqa: PT018
    cos, sin = rope(torch.zeros(1), torch.tensor([POSITIONS]))
    half = cfg.head_dim // 2
    tables = layers.rope_tables(cfg, jnp.asarray([POSITIONS], jnp.int32))
    # Angles up to 131071 in float32: their last bit is 2^-7.
    for table, theirs in zip(tables, (cos, sin), strict=True):
        np.testing.assert_allclose(table, theirs.numpy()[:, :, :half], atol=2**-6)


def test_llama3_frequencies_of_the_snapshot_that_transformers_is_held_to():
    """Base 10000, heads of 128, factor 10, 2048 positions of pretraining; five digits."""
    cfg = models.ModelConfig(
        "llama", 8, 4096, 1, 32, 32, 128, 8, rope_scaling=models.RopeScaling("llama3", 10.0, 1.0, 4.0, 2048)
    )
    snapshot = {
        0: 1.0000e00, 1: 8.6596e-01, 15: 1.1548e-01, 30: 1.3335e-02, 31: 1.0730e-02, 32: 7.7785e-03, 35: 2.8248e-03,
        38: 8.9549e-04, 40: 3.4539e-04, 41: 2.7384e-04, 48: 1.0000e-04, 63: 1.1548e-05,
    }  # fmt: skip
    found = layers.rope_frequencies(cfg)
    assert len(found) == 64
    np.testing.assert_allclose([found[pair] for pair in snapshot], list(snapshot.values()), rtol=5e-5)


@pytest.mark.parametrize("factor", [None, 8.0])
def test_gemma_turns_as_in_transformers(factor):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    scaling = {"rope_type": "linear", "factor": factor} if factor else None
    fields = {"model_type": "gemma3_text", "rope_scaling": scaling, "hidden_size": 2560, "num_hidden_layers": 12}
    cfg = models.config_from_hf(fields)
    rope = Gemma3RotaryEmbedding(transformers.AutoConfig.for_model(**fields))
    for local, name in ((False, "full_attention"), (True, "sliding_attention")):
        theirs = getattr(rope, f"{name}_inv_freq").numpy()
        np.testing.assert_allclose(layers.rope_frequencies(cfg, local), theirs, rtol=1e-6)
