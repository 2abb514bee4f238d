"""Gemma 3: what its config.json may hold, and layers of two kinds in one scan, on one device and on eight."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import models
from kdjax.config import Mesh
from kdjax.models import prune
from kdjax.sharding import Rules, make_rules

IDS = {"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0}
PATTERN = (True, True, True, True, True, False)
STRETCHED = {"factor": 8.0, "rope_type": "linear"}
# As published, shortened by what no reader needs. The text part of 4B says nothing of heads, bases or vocabulary.
GEMMA3_1B = IDS | {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attention_bias": False, "head_dim": 256,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152, "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
    "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16", "vocab_size": 262144,
}  # fmt: skip
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 106],
    "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": STRETCHED, "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_hidden_layers": 27},
}  # fmt: skip
GEMMA3_27B = GEMMA3_4B | {
    "text_config": {
        "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "model_type": "gemma3_text",
        "num_attention_heads": 32, "num_hidden_layers": 62, "num_key_value_heads": 16, "query_pre_attn_scalar": 168,
        "rope_scaling": STRETCHED, "sliding_window": 1024,
    }
}  # fmt: skip
TINY = {
    "model_type": "gemma3_text", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "rope_local_base_freq": 50.0,
    "query_pre_attn_scalar": 4,
}  # fmt: skip
LENGTH = 16


# --- config.json


def test_the_published_1b():
    expected = models.ModelConfig(
        "gemma3_text", 262144, 1152, layers=26, heads=4, kv_heads=1, head_dim=256, mlp=6912, rope_theta=1e6, tied=True,
        max_positions=32768, bos_id=2, eos_ids=(1, 106), pad_id=0, norm_offset=1.0, embed_scale=1152**0.5,
        activation="gelu_tanh", query_pre_attn_scalar=256.0, window=512, local_layers=(PATTERN * 5)[:26],
    )  # fmt: skip
    assert models.config_from_hf(GEMMA3_1B) == expected


def test_the_text_part_of_the_published_4b_and_27b():
    small, large = models.config_from_hf(GEMMA3_4B), models.config_from_hf(GEMMA3_27B)
    linear = models.RopeScaling("linear", 8.0)
    expected = models.ModelConfig(
        "gemma3_text", 262208, 2560, layers=34, heads=8, kv_heads=4, head_dim=256, mlp=10240, rope_theta=1e6,
        rope_scaling=linear, tied=True, max_positions=131072, bos_id=2, eos_ids=(1, 106), pad_id=0, norm_offset=1.0,
        embed_scale=2560**0.5, activation="gelu_tanh", query_pre_attn_scalar=256.0, window=1024,
        local_layers=(PATTERN * 6)[:34],
    )  # fmt: skip
    assert small == expected
    assert (large.head_dim, large.query_pre_attn_scalar, large.local_layers.count(False)) == (128, 168.0, 10)
    assert models.config_from_hf(models.config_to_hf(large)) == large


def test_all_spellings_of_the_layers_and_their_ropes_are_read():
    """sliding_window_pattern and rope_theta of transformers 4, layer_types and rope_parameters of 5, and a mixture."""
    old = {name: value for name, value in TINY.items() if name not in ("layer_types", "rope_local_base_freq")}
    old |= {"rope_theta": 7e5, "rope_local_base_freq": 300.0, "rope_scaling": STRETCHED}
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    first = models.config_from_hf(old | {"sliding_window_pattern": 2})
    assert first.local_layers == (True, False, True)
    assert (first.rope_theta, first.local_rope_theta, first.rope_scaling.factor) == (7e5, 300.0, 8.0)
    assert models.config_from_hf(old | {"_sliding_window_pattern": 2}) == first
    assert models.config_from_hf(old | {"layer_types": types, "sliding_window_pattern": 3}) == first
    new = {name: value for name, value in old.items() if not name.startswith("rope")} | {"layer_types": types}
    stretched = STRETCHED | {"rope_theta": 7e5}
    ropes = {"full_attention": stretched, "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}}
    assert models.config_from_hf(new | {"rope_parameters": ropes}) == first
    bare = models.config_from_hf(new | {"rope_parameters": {"full_attention": {"rope_type": "default"}}})
    assert (bare.rope_theta, bare.local_rope_theta, bare.rope_scaling) == (1e6, 1e4, None)


def test_without_a_window_no_layer_sees_less():
    cfg = models.config_from_hf(TINY | {"sliding_window": None})
    assert (cfg.window, cfg.local_layers) == (0, (True, False, True))  # they still turn at another speed
    assert models.config_from_hf(models.config_to_hf(cfg)) == cfg


REFUSED = [
    ({"hidden_activation": "gelu"}, "hidden_activation must be 'gelu_pytorch_tanh', got 'gelu'"),
    ({"attention_bias": True}, "attention_bias must be False, got True"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention must be False, got True"),
    ({"layer_types": ["full_attention"]}, "layer_types must have an entry for each of the 3 layers, got 1"),
    ({"layer_types": ["chunked_attention"] * 3}, "layer_types must be .*got 'chunked_attention'"),
    ({"rope_parameters": {"rope_type": "default"}}, r"rope_parameters must have 'full_attention', got \['rope_type'\]"),
    (
        {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "linear", "factor": 2}}},
        r"rope_parameters\.sliding_attention\.rope_type must be 'default', got 'linear'",
    ),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type must be .*got 'yarn'"),
    ({"sliding_window": -1}, "sliding_window must be .*got -1"),
    ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be .*got 0"),
    ({"sliding_window_pattern": 0, "layer_types": None}, "sliding_window_pattern must be .*got 0"),
    ({"final_logit_softcapping": -3.0}, "final_logit_softcapping must be .*got -3"),
    ({"model_type": "gemma3", "text_config": {"quantization_config": 1}}, "quantization_config must be None"),
    ({"model_type": "gemma3"}, "text_config"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_a_config_that_would_be_computed_wrongly_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        models.config_from_hf(TINY | change)


# --- layers of two kinds


def parameters(cfg):
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), jnp.float32), models.param_specs(cfg))


def inputs(rules: Rules = Rules(), rows: int = 8):
    """Two documents in a row, cut at another place in each, and padding."""
    place = np.arange(LENGTH, dtype=np.int32)[None]
    cut = np.arange(5, 5 + rows, dtype=np.int32)[:, None]
    segments = np.where(place < cut, 1, np.where(place < LENGTH - 1, 2, 0)).astype(np.int32)
    positions = np.where(segments == 1, place, np.maximum(place - cut, 0))
    tokens = np.random.default_rng(0).integers(0, TINY["vocab_size"], segments.shape, dtype=np.int32)
    return [jax.device_put(x, rules.batch(2)) for x in (tokens, segments, positions)]


def test_a_local_layer_sees_its_window_and_a_global_one_everything():
    """By gradient: with all layers local, W - 1 positions per layer are reached; one global layer reaches the rest."""
    plain = {"num_hidden_layers": 2, "sliding_window": 3}

    def reached(*kinds):
        cfg = models.config_from_hf(TINY | plain | {"layer_types": list(kinds)})
        tokens = jnp.arange(LENGTH, dtype=jnp.int32)[None]
        rest = jnp.ones_like(tokens), tokens
        params = parameters(cfg)

        def last(embed):
            return jnp.sum(models.hidden(cfg, params | {"embed": embed}, tokens, *rest)[0, -1] ** 3)

        felt = np.abs(np.asarray(jax.jit(jax.grad(last))(params["embed"]))).max(-1)[:LENGTH] > 0
        return LENGTH - int(np.argmax(felt)) if felt.any() else 0

    local, everything = "sliding_attention", "full_attention"
    assert reached(local, local) == 2 * (3 - 1) + 1
    assert reached(local, everything) == LENGTH


def test_a_window_that_no_row_fills_is_no_window():
    """Then one program serves both kinds of layer, and the result is that of layers without a window."""
    wide, none = (models.config_from_hf(TINY | {"sliding_window": size}) for size in (LENGTH, None))
    params = parameters(wide)
    run = jax.jit(models.hidden, static_argnames="cfg")
    np.testing.assert_array_equal(run(wide, params, *inputs()), run(none, params, *inputs()))
    narrow = models.config_from_hf(TINY | {"sliding_window": LENGTH // 2})
    assert float(jnp.max(jnp.abs(run(narrow, params, *inputs()) - run(wide, params, *inputs())))) > 1e-3
    program = run.lower(wide, params, *inputs()).as_text()
    assert "stablehlo.case" not in program
    assert "stablehlo.case" in run.lower(narrow, params, *inputs()).as_text()


def test_the_program_does_not_grow_with_depth():
    def operations(depth):
        kinds = ["sliding_attention", "full_attention"] * (depth // 2)
        cfg = models.config_from_hf(TINY | {"num_hidden_layers": depth, "layer_types": kinds})
        run = jax.jit(jax.grad(lambda p, *rest: jnp.sum(models.hidden(cfg, p, *rest, remat="dots"))))
        text = run.lower(models.abstract_params(cfg), *inputs()).as_text()
        return len(re.findall(r"stablehlo\.\w+", text)), text.count("stablehlo.while")

    assert operations(4) == operations(12)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_the_gradient_is_that_of_the_description(remat):
    cfg = models.config_from_hf(TINY)
    run = jax.jit(jax.grad(lambda p: jnp.sum(models.hidden(cfg, p, *inputs(), remat=remat) ** 2)))
    compare = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-3)
    jax.tree.map(compare, run(parameters(cfg)), gradient_layer_by_layer(cfg))


@functools.cache
def gradient_layer_by_layer(cfg):
    return jax.jit(jax.grad(lambda p: jnp.sum(layer_by_layer(cfg, p) ** 2)))(parameters(cfg))


def layer_by_layer(cfg, params):
    """The model as its description reads, in a Python loop: no scan, no checkpoint, a mask for each layer."""
    tokens, segments, positions = inputs()
    x = params["embed"][tokens] * cfg.width**0.5
    rms = lambda x, w: x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + cfg.norm_eps) * (1 + w[(None,) * (x.ndim - 1)])  # noqa: E731
    for at, local in enumerate(cfg.local_layers):
        w = {name: leaf[at] for name, leaf in params["layers"].items()}
        theta = 50.0 if local else 1e6
        angle = positions[:, :, None, None] * theta ** (-jnp.arange(0, 8, 2) / 8)[None, None, None]

        def turn(x, angle=angle):
            a, b = x[..., :4], x[..., 4:]
            c, s = jnp.cos(angle), jnp.sin(angle)
            return jnp.concatenate([a * c - b * s, b * c + a * s], -1)

        normed = rms(x, w["attn_norm"])
        q, k, v = (jnp.einsum("btd,dnh->btnh", normed, w[name]) for name in ("wq", "wk", "wv"))
        q, k = turn(rms(q, w["q_norm"])), turn(rms(k, w["k_norm"]))
        scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, 2, 2)) / 4**0.5
        distance = jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH)[None]
        seen = (distance >= 0) & (distance < (5 if local else LENGTH))
        seen = seen[None] & (segments[:, :, None] == segments[:, None, :])
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), -1)
        mixed = jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v, 2, 2))
        x = x + rms(jnp.einsum("btnh,nhd->btd", mixed, w["wo"]), w["post_attn_norm"])
        normed = rms(x, w["mlp_norm"])
        gate = jax.nn.gelu(normed @ w["w_gate"], approximate=True)
        x = x + rms((gate * (normed @ w["w_up"])) @ w["w_down"], w["post_mlp_norm"])
    return rms(x, params["final_norm"])


def test_eight_devices_are_one():
    """Tensor parallelism and rows split along T between blocks: the norms after a block work on parts of rows."""
    cfg = models.config_from_hf(TINY | {"attn_logit_softcapping": 2.0})

    def gradient(rules):
        def scalar(params):
            hidden = models.hidden(cfg, params, *inputs(rules), rules=rules, remat="dots")
            return jnp.sum(jnp.tanh(hidden)) / LENGTH, hidden

        place = lambda leaf, spec: jax.device_put(leaf, rules.storage(spec.axes, spec.shape))  # noqa: E731
        params = jax.tree.map(place, parameters(cfg), models.param_specs(cfg))
        return jax.jit(jax.grad(scalar, has_aux=True))(params)

    found, expected = gradient(make_rules(Mesh("fsdp_tp", "data:4,model:2", sequence=True))), gradient(Rules())
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), found, expected)


# --- the rest of the library


def test_the_head_carries_the_soft_cap():
    cfg = models.config_from_hf(TINY | {"final_logit_softcapping": 30.0})
    assert models.head(cfg, parameters(cfg)).soft_cap == 30.0
    assert models.head(models.config_from_hf(TINY), parameters(cfg)).soft_cap == 0.0


def test_a_cut_keeps_the_kind_of_each_layer():
    cfg = models.config_from_hf(GEMMA3_1B)
    keep = prune.default_keep(26, 6)
    assert prune.cut_config(cfg, keep).local_layers == tuple(cfg.local_layers[layer] for layer in keep)
    assert False in prune.cut_config(cfg, keep).local_layers
    assert prune.cut_config(dataclasses.replace(cfg, local_layers=()), keep).local_layers == ()
