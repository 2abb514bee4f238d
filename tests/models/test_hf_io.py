"""Hugging Face directories in and out, without torch: layout, dtypes, shards, meshes, atomicity, identity."""

import json
import math
import shutil
import tracemalloc

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import load_file, save_file

from kdjax import models, sharding
from kdjax.config import Mesh
from kdjax.models import hf_io, io, synthetic

SIZES = {"vocab_size": 48, "width": 16, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 24}
OWN = {
    "qwen2": {"attention_bias": True},
    "gemma3_text": {
        "norm_offset": 1.0, "embed_scale": 4.0, "activation": "gelu_tanh", "query_pre_attn_scalar": 7.5, "window": 6,
        "attn_soft_cap": 50.0, "logit_soft_cap": 30.0, "local_layers": (True, False, True), "local_rope_theta": 20.0,
    },
}  # fmt: skip


def make_config(family, tied, **changes):
    own = OWN.get(family, {})
    return models.ModelConfig(family=family, tied=tied, eos_ids=(2,), bos_id=1, **SIZES | own | changes)


def make_params(cfg):
    """Every leaf random, norms and biases included."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda spec: rng.standard_normal(spec.shape, np.float32), models.param_specs(cfg))


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def saved(tmp_path):
    cfg = make_config("llama", tied=True)
    params = make_params(cfg)
    return hf_io.save_hf(tmp_path / "model", cfg, params), cfg, params


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_out_and_in_again_is_the_identity(tmp_path, family, tied):
    cfg = make_config(
        family, tied, rope_scaling=models.RopeScaling("llama3", 8.0, 1.0, 4.0, 64), rope_theta=5e5, norm_eps=1e-5
    )
    params = make_params(cfg)
    found = hf_io.read_hf(hf_io.save_hf(tmp_path / "out", cfg, params))
    assert found[0] == cfg
    assert_same(found[1], params)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_file_holds_output_by_input_matrices_under_hugging_face_names(tmp_path, tied):
    cfg = make_config("qwen2", tied)
    params = jax.tree.map(np.asarray, make_params(cfg))
    tensors = load_file(hf_io.save_hf(tmp_path / "out", cfg, params) / "model.safetensors")
    layers = params["layers"]
    for layer in range(cfg.layers):
        root = f"model.layers.{layer}."
        np.testing.assert_array_equal(tensors[root + "self_attn.q_proj.weight"], layers["wq"][layer].reshape(16, 32).T)
        np.testing.assert_array_equal(tensors[root + "self_attn.v_proj.bias"], layers["bv"][layer].reshape(16))
        np.testing.assert_array_equal(tensors[root + "self_attn.o_proj.weight"], layers["wo"][layer].reshape(32, 16).T)
        np.testing.assert_array_equal(tensors[root + "mlp.down_proj.weight"], layers["w_down"][layer].T)
        np.testing.assert_array_equal(tensors[root + "post_attention_layernorm.weight"], layers["mlp_norm"][layer])
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], params["embed"])
    assert ("lm_head.weight" in tensors) is not tied
    if not tied:
        np.testing.assert_array_equal(tensors["lm_head.weight"], params["head"].T)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_dtypes_of_the_file_and_of_memory_are_independent(tmp_path, saved, stored, wanted):
    _, cfg, params = saved
    out = hf_io.save_hf(tmp_path / "out", cfg, params, dtype=stored)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == stored
    assert {str(value.dtype) for value in load_file(out / "model.safetensors").values()} == {stored}
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype(stored).astype(wanted), params)
    assert_same(hf_io.read_hf(out, jnp.dtype(wanted))[1], expected)


def test_shards_are_cut_by_size_and_read_back(tmp_path, saved):
    _, cfg, params = saved
    limit = 6000
    out = hf_io.save_hf(tmp_path / "out", cfg, params, shard_bytes=limit)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = {file: load_file(out / file) for file in files}
    assert index["weight_map"] == {name: file for file in files for name in tensors[file]}
    sizes = {file: sum(value.nbytes for value in tensors[file].values()) for file in files}
    assert all(sizes[file] <= limit or len(tensors[file]) == 1 for file in files)
    assert (
        index["metadata"]["total_size"] == sum(sizes.values()) == 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    )
    assert_same(hf_io.read_hf(out)[1], params)


@pytest.mark.parametrize("preset", ["single", "dp", "fsdp"])
def test_leaves_arrive_on_the_shards_that_the_rules_ask_for(saved, preset):
    path, cfg, params = saved
    rules = sharding.make_rules(Mesh(preset))
    found = hf_io.read_hf(path, rules=rules)[1]
    assert_same(found, params)
    specs = models.param_specs(cfg)
    for spec, leaf in zip(jax.tree.leaves(specs), jax.tree.leaves(found), strict=True):
        assert leaf.sharding == (rules.storage(spec.axes, spec.shape) or SingleDeviceSharding(jax.devices()[0]))
    if preset == "fsdp":
        assert found["layers"]["wq"].addressable_shards[0].data.shape == (3, 16 // 8, 4, 8)
    out = hf_io.save_hf(path.parent / "again", cfg, found)
    assert (out / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


def test_the_host_holds_a_few_leaves_and_never_the_model(tmp_path, monkeypatch):
    cfg = make_config("llama", True, layers=12, width=128, heads=16, kv_heads=16, head_dim=16, mlp=256)
    params = make_params(cfg)
    out = hf_io.save_hf(tmp_path / "out", cfg, params)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    empty = np.empty
    # The CPU client takes an array at a multiple of 64 bytes as it is: that one is the student, and no copy of it.
    monkeypatch.setattr(np, "empty", lambda shape, dtype: empty(math.prod(shape) + 1, dtype)[1:].reshape(shape))
    tracemalloc.start()
    hf_io.read_hf(out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3.5 * max(sizes) < 0.5 * sum(sizes)


def test_old_rotary_buffers_are_ignored_and_other_extras_are_not(saved):
    path, _, params = saved
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, path / "model.safetensors")
    assert_same(hf_io.read_hf(path)[1], params)
    tensors["model.layers.0.self_attn.extra"] = np.ones(4, np.float32)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"got an unknown tensor, 'model\.layers\.0\.self_attn\.extra'"):
        hf_io.read_hf(path)


def test_a_tied_model_may_repeat_its_embedding_as_head(saved):
    path, _, params = saved
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, path / "model.safetensors")
    assert_same(hf_io.read_hf(path)[1], params)
    tensors["lm_head.weight"][5, 5] += 1
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"'lm_head\.weight' equal to 'model\.embed_tokens\.weight', got another tensor"
    ):
        hf_io.read_hf(path)


def test_save_goes_into_an_empty_directory_but_not_over_content(tmp_path, saved):
    _, cfg, params = saved
    (tmp_path / "empty").mkdir()
    assert hf_io.read_hf(hf_io.save_hf(tmp_path / "empty", cfg, params))[0] == cfg
    with pytest.raises(ValueError, match=r"out must be a new or empty directory, got '.*empty', which has content"):
        hf_io.save_hf(tmp_path / "empty", cfg, params)


class Killed(BaseException):
    pass


class Tokenizer:
    def save_pretrained(self, directory):
        (directory / "tokenizer.json").write_text("{")
        raise Killed


def test_a_save_that_dies_leaves_nothing_behind(tmp_path, saved):
    _, cfg, params = saved
    with pytest.raises(Killed):
        hf_io.save_hf(tmp_path / "new" / "out", cfg, params, Tokenizer())
    assert list((tmp_path / "new").iterdir()) == []


def test_leftovers_of_a_killed_save_are_replaced(tmp_path, saved):
    _, cfg, params = saved
    stale = tmp_path / ".out.partial"
    stale.mkdir()
    (stale / "model-00001-of-00009.safetensors").write_text("half")
    out = hf_io.save_hf(tmp_path / "out", cfg, params)
    assert not stale.exists()
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]


def test_load_model_says_what_it_loaded(saved):
    path, cfg, params = saved
    loaded = io.load_model(path, dtype=jnp.bfloat16)
    assert (loaded.cfg, loaded.name, loaded.tokenizer_path) == (cfg, "model", str(path))
    assert loaded.source == "model, Hugging Face checkpoint in float32"
    assert_same(loaded.params, jax.tree.map(lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16), params))


def test_config_is_read_without_weights(saved):
    path, cfg, _ = saved
    (path / "model.safetensors").unlink()
    assert io.load_config(path) == cfg


def test_a_hub_id_brings_what_is_needed_and_no_more(saved, monkeypatch):
    """The network is not there in tests: the download is replaced by one that filters like the real one."""
    path, cfg, params = saved
    hub = ["config.json", "model.safetensors", "original/model.safetensors", "tokenizer.json", "pytorch_model.bin"]
    asked = []

    def snapshot_download(repo, allow_patterns, ignore_patterns):
        found = filter_repo_objects(hub, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        asked.append((repo, sorted(found)))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = io.load_model("someone/small")
    assert (loaded.name, loaded.cfg, loaded.tokenizer_path) == ("someone/small", cfg, "someone/small")
    assert loaded.source == "someone/small, Hugging Face checkpoint in float32"
    assert_same(loaded.params, params)
    assert io.load_config("someone/small") == cfg
    whole, light = asked
    assert whole == ("someone/small", ["config.json", "model.safetensors", "tokenizer.json"])
    assert light == ("someone/small", ["config.json", "tokenizer.json"])


def test_fingerprint_follows_every_byte_and_nothing_else(tmp_path, saved):
    path, _, _ = saved
    first = io.load_model(path).fingerprint
    shutil.copytree(path, tmp_path / "elsewhere")
    assert io.load_model(tmp_path / "elsewhere", dtype=jnp.bfloat16).fingerprint == first
    seen = {first}
    for file, at in (("model.safetensors", -1), ("model.safetensors", -20_000), ("config.json", None)):
        content = bytearray((path / file).read_bytes())
        if at is None:
            content = content.replace(b'"max_position_embeddings": 2048', b'"max_position_embeddings": 4096')
        else:
            content[at] ^= 1
        (path / file).write_bytes(content)
        seen.add(io.load_model(path).fingerprint)
    assert len(seen) == 4


def test_the_synthetic_model_is_the_same_every_time_and_says_that_it_is_random():
    first, second = io.load_model("synthetic"), io.load_model("synthetic", rules=sharding.make_rules(Mesh("fsdp")))
    assert first.fingerprint == second.fingerprint
    assert_same(first.params, second.params)
    assert "random weights" in first.source
    assert first.cfg == io.load_config("synthetic") == synthetic.config()
    assert io.load_model("synthetic", dtype=jnp.bfloat16).params["embed"].dtype == jnp.bfloat16
