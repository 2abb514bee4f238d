"""Weights in and out against transformers + torch: the same logits on random small models of every family."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import models
from kdjax.models import hf_io, io

torch = pytest.importorskip("torch", reason="torch is the oracle of the parity tests; pip install torch==2.13.0")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4  # largest |difference| of logits, float32 on both sides
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
CASES = [(family, tied) for family in models.FAMILIES for tied in (True, False)]
over_cases = pytest.mark.parametrize(
    ("family", "tied"), CASES, ids=[f"{f}-{'tied' if t else 'untied'}" for f, t in CASES]
)


def make_torch(family, tied, **changes):
    """A model with every parameter random, norms and biases included, of a size that keeps logits near 1."""
    own = {"qwen3": {"head_dim": 16}, "gemma3_text": {"sliding_window": 5, "query_pre_attn_scalar": 8}}
    sizes = SIZES | {"head_dim": 8} | own.get(family, {}) | changes
    config = transformers.AutoConfig.for_model(family, tie_word_embeddings=tied, **sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def tokens():
    return np.random.default_rng(1).integers(0, SIZES["vocab_size"], (2, 24)).astype(np.int32)


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(tokens().astype(np.int64))).logits.float().numpy()


def our_logits(cfg, params):
    ids = jnp.asarray(tokens())
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    hidden = models.hidden(cfg, params, ids, jnp.ones_like(ids), positions)
    head = models.head(cfg, params)
    weight = head.weight.T if head.vocab_major else head.weight
    return np.asarray(jnp.einsum("btd,dv->btv", hidden, weight, precision="highest"))


def assert_close(ours, theirs):
    assert np.max(np.abs(theirs)) > 0.5  # there is something to compare
    assert np.max(np.abs(ours - theirs)) <= TOLERANCE


@over_cases
def test_what_transformers_saves_gives_the_same_logits_here(tmp_path, family, tied):
    model = make_torch(family, tied)
    model.save_pretrained(tmp_path)
    loaded = io.load_model(tmp_path)
    assert loaded.cfg.tied is tied
    assert_close(our_logits(loaded.cfg, loaded.params), torch_logits(model))


@over_cases
def test_what_we_save_gives_the_same_logits_in_transformers(tmp_path, family, tied):
    specs_of = hf_io.make_config(make_torch(family, tied).config.to_dict(), "config")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: jnp.asarray(s.init.mean + 0.2 * rng.standard_normal(s.shape), jnp.float32),
        models.param_specs(specs_of),
    )
    out = hf_io.save_hf(tmp_path / "out", specs_of, params)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == 2
    assert_close(our_logits(specs_of, params), torch_logits(model.eval()))


def test_llama3_rope_scaling_survives_both_ways(tmp_path):
    model = make_torch("llama", True, rope_parameters=LLAMA3 | {"original_max_position_embeddings": 32})
    model.save_pretrained(tmp_path / "in")
    loaded = io.load_model(tmp_path / "in")
    assert loaded.cfg.rope_scaling == models.RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    assert_close(our_logits(loaded.cfg, loaded.params), torch_logits(model))
    again = transformers.AutoModelForCausalLM.from_pretrained(
        hf_io.save_hf(tmp_path / "out", loaded.cfg, loaded.params)
    )
    np.testing.assert_array_equal(torch_logits(again.eval()), torch_logits(model))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_shards_of_transformers(tmp_path, dtype):
    make_torch("qwen3", False).to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = io.load_model(tmp_path)
    assert loaded.source.endswith(f"Hugging Face checkpoint in {dtype}")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_close(our_logits(loaded.cfg, loaded.params), torch_logits(model.eval()))


def test_our_shards_in_half_precision_load_in_transformers(tmp_path):
    cfg, params = io.load_model("synthetic").cfg, io.load_model("synthetic").params
    out = hf_io.save_hf(tmp_path / "out", cfg, params, dtype="bfloat16", shard_bytes=50_000)
    assert transformers.AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)
    assert_close(our_logits(cfg, rounded), torch_logits(model.eval()))


# GGUF, written from the torch model by the published rule: llama rows of q and k are stored for interleaved RoPE.

GGUF_KIND = gguf.GGMLQuantizationType


def permute(rows, heads):
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path, model, kind):
    """Matrices in `kind`, vectors in F32. Returns what the file holds, by Hugging Face name, as `gguf` reads it."""
    config, family = model.config, model.config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(str(path), family)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"])
    if family == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, family.upper()), config.num_hidden_layers)
    held = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = value.numpy().astype(np.float32)
        stored = kind if value.ndim == 2 else GGUF_KIND.F32
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads and family == "llama":
            value = permute(value, heads)
        if family == "gemma3" and name.endswith("norm.weight"):
            value = value + np.float32(1)
        data = gguf.quants.quantize(value, stored)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(target, data, raw_dtype=stored)
        held[name] = gguf.quants.dequantize(data, stored).reshape(value.shape)
        if heads and family == "llama":  # undo the order of rows
            held[name] = held[name][np.argsort(permute(np.arange(len(value)), heads))]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@over_cases
def test_gguf_in_float32_gives_the_logits_of_its_source(tmp_path, family, tied):
    model = make_torch(family, tied)
    write_gguf(tmp_path / "m.gguf", model, GGUF_KIND.F32)
    loaded = io.load_model(tmp_path / "m.gguf")
    assert (loaded.cfg.family, loaded.cfg.tied) == (family, tied)
    assert loaded.source == "m, GGUF in F32"
    assert_close(our_logits(loaded.cfg, loaded.params), torch_logits(model))


def test_gguf_scales_of_gemma_norms_are_those_that_transformers_reads(tmp_path):
    """The converter adds 1 to them, as the model does."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = make_torch("gemma3_text", True)
    write_gguf(tmp_path / "m.gguf", model, GGUF_KIND.F32)
    theirs = load_gguf_checkpoint(str(tmp_path / "m.gguf"), return_tensors=True, model_to_load=model)["tensors"]
    with io.open_model(io.fetch.locate(tmp_path / "m.gguf")) as (_, checkpoint, _):
        assert set(theirs) == set(checkpoint.shapes)
        for name, tensor in theirs.items():
            np.testing.assert_array_equal(checkpoint.read(name), tensor.numpy())


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_quantised_gguf_gives_the_logits_of_its_dequantised_weights(tmp_path, kind):
    model = make_torch("llama", False)
    held = write_gguf(tmp_path / f"small.{kind}.gguf", model, GGUF_KIND[kind])
    model.load_state_dict({name: torch.tensor(value) for name, value in held.items()})
    loaded = io.load_model(tmp_path / f"small.{kind}.gguf")
    assert loaded.source == (f"small, dequantised from {kind}" if "Q" in kind else f"small, GGUF in {kind}")
    assert_close(our_logits(loaded.cfg, loaded.params), torch_logits(model))
