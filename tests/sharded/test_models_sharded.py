"""dp and fsdp on 8 devices: the same hidden states and gradients as one device, and nothing left whole by accident."""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import models
from kdjax.sharding import DATA, Rules, make_rules

DEVICES, T, VOCAB = 8, 24, 48
CONFIGS = {
    "llama": models.ModelConfig("llama", VOCAB, 32, layers=3, heads=3, kv_heads=1, head_dim=8, mlp=40, tied=True),
    "qwen2": models.ModelConfig("qwen2", VOCAB, 32, 2, heads=4, kv_heads=2, head_dim=8, mlp=40, attention_bias=True),
    "qwen3": models.ModelConfig("qwen3", VOCAB, 36, 2, heads=8, kv_heads=2, head_dim=16, mlp=48),  # 36: not by 8
}


def batch(rules: Rules):
    """tokens, segment_ids, positions [8, T]: two documents and padding, in other places in every row."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (DEVICES, T), dtype=np.int32)
    cut = np.arange(DEVICES)[:, None] + 5
    place = np.arange(T, dtype=np.int32)[None]
    segment = np.where(place < cut, 1, np.where(place < 20, 2, 0)).astype(np.int32)
    positions = np.where(segment == 1, place, place - cut).astype(np.int32)
    return [jax.device_put(x, rules.batch(2)) for x in (tokens, segment, positions)]


def run(cfg, rules, remat):
    """(hidden states, gradients, parameters) of a scalar that goes through trunk and head."""
    params = models.init_params(cfg, jax.random.key(1), rules)
    inputs = batch(rules)

    def scalar(params):
        hidden = models.hidden(cfg, params, *inputs, rules=rules, remat=remat)
        head = models.head(cfg, params, rules=rules)
        logits = hidden @ (head.weight.T if head.vocab_major else head.weight)  # tiny here
        return jnp.sum(jnp.tanh(logits)) / T, hidden

    (_, hidden), grads = jax.jit(jax.value_and_grad(scalar, has_aux=True))(params)
    return hidden, grads, params


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize(("preset", "remat"), [("dp", "none"), ("fsdp", "none"), ("fsdp", "full")])
def test_equals_one_device(family, preset, remat):
    cfg, rules = CONFIGS[family], make_rules(preset, DEVICES)
    hidden, grads, params = run(cfg, rules, remat)
    expected_hidden, expected_grads, expected_params = run(cfg, Rules(), "none")

    jax.tree.map(lambda p, e: np.testing.assert_allclose(p, e, atol=1e-7), params, expected_params)
    assert hidden.sharding.spec[0] == DATA
    np.testing.assert_allclose(hidden, expected_hidden, atol=1e-5)
    assert max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(expected_grads)) > 1e-2
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=1e-5), grads, expected_grads)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_fsdp_splits_parameters_and_gradients(family):
    cfg, rules = CONFIGS[family], make_rules("fsdp", DEVICES)
    _, grads, params = run(cfg, rules, "none")
    specs = models.param_specs(cfg)
    for path, spec in jax.tree_util.tree_leaves_with_path(specs):
        for tree in (params, grads):
            leaf = jax.tree_util.tree_reduce(lambda node, key: node[key.key], path, tree) if False else tree
            for key in path:
                leaf = leaf[key.key]
            name = jax.tree_util.keystr(path)
            assert leaf.sharding.is_equivalent_to(rules.storage(spec.axes, spec.shape), leaf.ndim), name
            matrix = "norm" not in spec.axes and "bk" not in name and "bv" not in name and "bq" not in name
            parts = DEVICES if matrix else 1
            assert math.prod(leaf.addressable_shards[0].data.shape) * parts == leaf.size, name
