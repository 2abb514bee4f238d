"""Every way to spread a model over 8 devices: the hidden states and gradients of one, nothing whole by accident."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kdjax import models
from kdjax.config import Mesh
from kdjax.sharding import Rules, make_rules

DEVICES, T, VOCAB, WIDTH = 8, 16, 48, 32
TENSOR = ("tp", "fsdp_tp")
MESHES = {
    "dp": Mesh("dp"),
    "fsdp": Mesh("fsdp"),
    "fsdp on two axes": Mesh("fsdp", "replica:2,data:2,model:2"),
    "tp": Mesh("tp", "data:4,model:2"),
    "fsdp_tp": Mesh("fsdp_tp", "data:2,model:4"),
    "slices": Mesh("fsdp_tp", "replica:2,data:2,model:2"),
    "sequence": Mesh("fsdp_tp", "data:4,model:2", sequence=True),
}
# (family, mesh, remat, tied)
CASES = [("llama", name, "none", True) for name in MESHES]
CASES += [(family, "fsdp", "full", False) for family in models.FAMILIES if family != "llama"]
CASES += [(family, "fsdp_tp", "dots", False) for family in models.FAMILIES if family != "llama"]


def config(family: str, tied: bool, tensor: bool) -> models.ModelConfig:
    """Without tensor parallelism 3 heads, which do not divide by 8, so that wo is split along its other side."""
    shape = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8 if tensor else 3, "num_key_value_heads": 4 if tensor else 1, "head_dim": 8}
    return models.config_from_hf({"model_type": family, "tie_word_embeddings": tied, **shape, **heads})


def stored(cfg, tree, rules):
    place = functools.partial(jax.tree.map, lambda x, spec: jax.device_put(x, rules.storage(spec.axes, spec.shape)))
    return place(tree, models.param_specs(cfg))


def batch(rules: Rules):
    """tokens, segment_ids, positions [8, T]: two documents and padding, at other places in every row."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (DEVICES, T), dtype=np.int32)
    place = np.arange(T, dtype=np.int32)[None]
    cut = np.arange(2, DEVICES + 2, dtype=np.int32)[:, None]
    segments = np.where(place < cut, 1, np.where(place < 13, 2, 0)).astype(np.int32)
    positions = np.where(segments == 1, place, np.maximum(place - cut, 0))
    return [jax.device_put(x, rules.batch(2)) for x in (tokens, segments, positions)]


@functools.cache
def run(cfg, mesh: str | None, remat: str):
    """(hidden states, gradients, parameters) of a scalar that goes through trunk and head."""
    rules = make_rules(MESHES[mesh]) if mesh else Rules()
    params = stored(cfg, models.init_params(cfg, jax.random.key(1)), rules)
    inputs = batch(rules)

    def scalar(params):
        hidden = models.hidden(cfg, params, *inputs, rules=rules, remat=remat)
        head = models.head(cfg, params)
        weight = rules.reshard(head.weight, P())
        logits = hidden @ (weight.T if head.vocab_major else weight)  # tiny here
        return jnp.sum(jnp.tanh(logits)) / T, hidden

    (_, hidden), grads = jax.jit(jax.value_and_grad(scalar, has_aux=True))(params)
    return hidden, grads, params, rules


@pytest.mark.parametrize(("family", "mesh", "remat", "tied"), CASES)
def test_equals_one_device(family, mesh, remat, tied):
    cfg = config(family, tied, MESHES[mesh].preset in TENSOR)
    hidden, grads, _, rules = run(cfg, mesh, remat)
    expected_hidden, expected_grads, _, _ = run(cfg, None, "none")

    assert hidden.sharding.is_equivalent_to(rules.batch(3), 3)
    np.testing.assert_allclose(hidden, expected_hidden, atol=1e-5)
    assert float(jnp.max(jnp.abs(expected_grads["embed"]))) > 1e-2
    scale = max(1.0, *(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected_grads)))
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=1e-5 * scale), grads, expected_grads)


def test_biases_that_are_split_by_heads():
    """8 heads over 8 devices: at rest each has one head's bias."""
    cfg = config("qwen2", False, True)
    hidden, grads, params, _ = run(cfg, "fsdp", "none")
    assert params["layers"]["bq"].sharding.spec == P(None, "data", None)
    expected_hidden, expected_grads, _, _ = run(cfg, None, "none")
    np.testing.assert_allclose(hidden, expected_hidden, atol=1e-5)
    scale = max(1.0, *(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected_grads)))
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=1e-5 * scale), grads, expected_grads)
    assert float(jnp.max(jnp.abs(expected_grads["layers"]["bv"]))) > 1e-3


@pytest.mark.parametrize(("family", "mesh", "remat", "tied"), CASES)
def test_parameters_and_gradients_are_stored_by_the_rules(family, mesh, remat, tied):
    cfg = config(family, tied, MESHES[mesh].preset in TENSOR)
    _, grads, params, rules = run(cfg, mesh, remat)
    size = dict(rules.mesh.shape)
    matrix = {"dp": 1, "fsdp": DEVICES, "tp": size.get("model", 1), "fsdp_tp": DEVICES}[MESHES[mesh].preset]
    for path, spec in jax.tree_util.tree_leaves_with_path(models.param_specs(cfg)):
        name = jax.tree_util.keystr(path)
        for tree in (params, grads):
            leaf = functools.reduce(lambda node, key: node[key.key], path, tree)
            assert leaf.sharding.is_equivalent_to(rules.storage(spec.axes, spec.shape), leaf.ndim), name
            # Norm scales and biases are all that may stay whole: every matrix has sides that divide.
            if {"embed", "vocab", "mlp"} & set(spec.axes):
                parts = matrix // size.get("replica", 1)
                assert math.prod(leaf.addressable_shards[0].data.shape) * parts == leaf.size, name


def test_fsdp_keeps_no_gathered_weight_for_the_backward_pass():
    # The kept activations are about half of this; with the gathered weights of all layers it would be twice this.
    cfg = models.ModelConfig("llama", VOCAB, 64, layers=8, heads=8, kv_heads=8, head_dim=8, mlp=512, tied=True)
    rules = make_rules(Mesh("fsdp"))
    inputs = batch(rules)

    def scalar(params):
        return jnp.sum(models.hidden(cfg, params, *inputs, rules=rules) ** 2)

    compiled = jax.jit(jax.grad(scalar)).lower(models.abstract_params(cfg, rules)).compile()
    whole = sum(math.prod(spec.shape) for spec in jax.tree.leaves(models.param_specs(cfg)["layers"])) * 4
    assert compiled.memory_analysis().temp_size_in_bytes < whole


def test_init_draws_the_same_everywhere_and_stores_by_the_rules():
    cfg, rules = config("llama", True, False), make_rules(Mesh("fsdp"))
    drawn, expected = models.init_params(cfg, jax.random.key(1), rules), models.init_params(cfg, jax.random.key(1))
    jax.tree.map(lambda d, e: np.testing.assert_allclose(d, e, atol=1e-7), drawn, expected)
    abstract = models.abstract_params(cfg, rules, jnp.bfloat16)
    same = jax.tree.map(lambda d, a: a.sharding == d.sharding and a.dtype == jnp.bfloat16, drawn, abstract)
    assert all(jax.tree.leaves(same))
