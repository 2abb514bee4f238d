"""What every entry of FAMILIES must do. A new family is covered without a line here."""

import copy
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import models
from kdjax.models.params import from_file, to_file

VOCAB = 40
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 32
SCALINGS = {"plain": None, "linear": {"rope_type": "linear", "factor": 2.5}, "llama3": LLAMA3}
OWN = {  # besides; a small window, of layers of which one sees the whole past
    "gemma3_text": {
        "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_local_base_freq": 60.0, "query_pre_attn_scalar": 7, "final_logit_softcapping": 9.0,
    },
}  # fmt: skip


def config(family: str, tied: bool = True, rope: str = "plain", **changes) -> models.ModelConfig:
    """Two kv heads for four query heads, and a head size that is not width / heads where the family allows it."""
    shape = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 128}
    rope_fields = {"rope_theta": 500.0, "rope_scaling": SCALINGS[rope]}
    fields = {"model_type": family, "tie_word_embeddings": tied, "rms_norm_eps": 1e-5, "eos_token_id": [2, 3]}
    return models.config_from_hf(fields | shape | heads | rope_fields | OWN.get(family, {}) | changes)


@functools.cache
def parameters(cfg: models.ModelConfig):
    """Random ones in all leaves (norms and biases too), large enough for attention to be far from uniform."""
    rng = np.random.default_rng(7)

    def draw(spec):
        noise = rng.standard_normal(spec.shape, np.float32)
        return jnp.asarray(1 + 0.2 * noise if spec.init == models.params.ONES else 0.3 * noise)

    return jax.tree.map(draw, models.param_specs(cfg))


def row(*lengths: int, total: int):
    """segment_ids and positions [1, total] of documents of these lengths in one row, padding after them."""
    segments = np.zeros(total, np.int32)
    positions = np.zeros(total, np.int32)
    start = 0
    for number, length in enumerate(lengths, 1):
        segments[start : start + length] = number
        positions[start : start + length] = np.arange(length)
        start += length
    return jnp.asarray(segments)[None], jnp.asarray(positions)[None]


@pytest.fixture(params=models.FAMILIES)
def family(request):
    return request.param


def influence(cfg, tokens, segments, positions):
    """|d(random projection of hidden[t]) / d(embedding at s)| as [t, s]; every token of the row is another one."""
    projection = jnp.asarray(np.random.default_rng(1).standard_normal(cfg.width, np.float32))
    params = parameters(cfg)

    def outputs(embed):
        return models.hidden(cfg, params | {"embed": embed}, tokens, segments, positions)[0] @ projection

    by_row = jax.jit(jax.jacrev(outputs))(params["embed"])  # [T, V, D]
    return np.abs(np.asarray(by_row)).max(-1)[:, np.asarray(tokens[0])]


def test_gradients_flow_from_the_past_of_the_own_segment_only(family):
    cfg, length = config(family), 18
    tokens = jnp.asarray(np.random.default_rng(2).permutation(VOCAB)[None, :length], jnp.int32)
    segments, positions = row(7, 8, total=length)
    found = influence(cfg, tokens, segments, positions) > 0
    same = np.asarray(segments)[0][:, None] == np.asarray(segments)[0][None]
    np.testing.assert_array_equal(found, np.tril(same))


def test_a_packed_document_is_as_it_is_alone(family):
    cfg = config(family)
    tokens = np.random.default_rng(3).integers(0, VOCAB, (1, 20), dtype=np.int32)
    run = jax.jit(functools.partial(models.hidden, cfg))
    packed = run(parameters(cfg), tokens, *row(6, 9, total=20))
    for start, end in ((0, 6), (6, 15)):
        alone = run(parameters(cfg), np.roll(tokens, -start, 1), *row(end - start, total=20))
        np.testing.assert_allclose(packed[:, start:end], alone[:, : end - start], atol=1e-5)


def test_padding_edits_move_nothing(family):
    cfg = config(family)
    run = functools.partial(jax.jit(functools.partial(models.hidden, cfg)), parameters(cfg))
    tokens = np.random.default_rng(4).integers(0, VOCAB, (1, 16), dtype=np.int32)
    segments, positions = row(5, 6, total=16)
    before = np.asarray(run(tokens, segments, positions))
    edited = np.concatenate([tokens[:, :11], (tokens[:, 11:] + 1) % VOCAB], 1)
    after = np.asarray(run(edited, segments, positions.at[:, 11:].set(9)))
    np.testing.assert_array_equal(before[:, :11], after[:, :11])
    assert np.isfinite(after).all()
    assert (before[:, 11:] != after[:, 11:]).any()


@pytest.mark.parametrize("tied", [True, False])
def test_key_map_is_total_and_bijective(family, tied):
    cfg = config(family, tied)
    wanted = set()
    for path, spec in jax.tree_util.tree_leaves_with_path(models.param_specs(cfg)):
        names = tuple(key.key for key in path)
        stacked = spec.axes[0] == "layers"
        layers = range(spec.shape[0]) if stacked else [None]
        wanted |= {(names, layer, spec.shape[1:] if stacked else spec.shape) for layer in layers}
    keys = models.key_map(cfg)
    found = [(key.path, key.layer, key.shape) for key in keys.values()]
    assert len(found) == len(set(found))
    assert set(found) == wanted
    for key in keys.values():
        tensor = np.arange(math.prod(key.shape), dtype=np.float32).reshape(key.file_shape)
        inside = from_file(key, tensor)
        assert inside.shape == key.shape
        np.testing.assert_array_equal(to_file(key, inside), tensor)
        if key.transpose:  # [out, in] in the file: a column of it is what one input does
            np.testing.assert_array_equal(inside.reshape(key.file_shape[::-1])[0], tensor[:, 0])


def test_a_misshaped_tensor_is_refused(family):
    key = models.key_map(config(family))["model.norm.weight"]
    with pytest.raises(ValueError, match=r"tensor of final_norm must be \(24,\), got \(23,\)"):
        from_file(key, np.zeros(23))
    with pytest.raises(ValueError, match=r"tensor of final_norm must be \(24,\), got \(23,\)"):
        to_file(key, np.zeros(23))


@pytest.mark.parametrize("rope", SCALINGS)
def test_config_survives_the_hugging_face_form(family, rope):
    cfg = config(family, rope=rope)
    assert models.config_from_hf(models.config_to_hf(cfg)) == cfg
    assert hash(cfg) == hash(copy.deepcopy(cfg))


def test_init_follows_the_specs(family):
    cfg = config(family, tied=False, hidden_size=64, intermediate_size=64, initializer_range=0.05)
    drawn = models.init_params(cfg, jax.random.key(0))
    abstract = models.abstract_params(cfg)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    for spec, leaf in zip(jax.tree.leaves(models.param_specs(cfg)), jax.tree.leaves(drawn), strict=True):
        assert float(jnp.mean(leaf)) == pytest.approx(spec.init.mean, abs=0.01)
        assert float(jnp.std(leaf)) == pytest.approx(spec.init.std, rel=0.1)
    matrices = [drawn["layers"][name].reshape(3, -1)[:, :99] for name in ("w_gate", "w_up")]
    assert not jnp.any(matrices[0] == matrices[1])  # every leaf has a key of its own


def test_bfloat16_is_close_and_masters_stay_float32(family):
    cfg = config(family)
    params, length = parameters(cfg), 12
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, VOCAB, (2, length)), jnp.int32)
    segments, positions = (jnp.tile(x, (2, 1)) for x in row(length, total=length))

    def run(params, dtype):
        return models.hidden(cfg, params, tokens, segments, positions, compute_dtype=dtype)

    def loss(params):
        return jnp.sum(run(params, jnp.bfloat16).astype(jnp.float32))

    exact, rounded = (jax.jit(run, static_argnums=1)(params, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    assert models.head(cfg, params, compute_dtype=jnp.bfloat16).weight.dtype == jnp.bfloat16
    error = jnp.linalg.norm(rounded.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert 0 < error < 0.03  # 2^-8 a rounding, some tens of them
    grads = jax.eval_shape(jax.grad(loss), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


def test_cache_equals_uncached_for_prompts_of_different_length(family):
    cfg = config(family)
    params = parameters(cfg)
    tokens = jnp.asarray(np.random.default_rng(6).integers(0, VOCAB, (2, 12)), jnp.int32)
    lengths, prompt = jnp.asarray([3, 7]), 7
    segments, positions = (jnp.tile(x, (2, 1)) for x in row(12, total=12))
    run = jax.jit(functools.partial(models.hidden, cfg))
    expected = np.asarray(run(params, tokens, segments, positions))

    step = jax.jit(functools.partial(models.hidden_cached, cfg))
    padded = jnp.where(jnp.arange(prompt)[None] < lengths[:, None], tokens[:, :prompt], 39)
    cache = models.init_cache(cfg, 2, 12, jnp.float32)
    hidden, cache = step(params, padded, positions[:, :prompt], cache)
    np.testing.assert_allclose(hidden[0, :3], expected[0, :3], atol=2e-5)
    np.testing.assert_allclose(hidden[1], expected[1, :prompt], atol=2e-5)
    for made in range(5):
        at = (lengths + made)[:, None]
        hidden, cache = step(params, jnp.take_along_axis(tokens, at, 1), at, cache)
        np.testing.assert_allclose(hidden[:, 0], expected[np.arange(2), at[:, 0]], atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rope", SCALINGS)
def test_logits_are_those_of_transformers(family, tied, rope):
    torch = pytest.importorskip("torch", reason="torch is the oracle of parity")
    transformers = pytest.importorskip("transformers")
    cfg = config(family, tied, rope)
    params = parameters(cfg)

    fields = models.config_to_hf(cfg)
    theirs_config = transformers.AutoConfig.for_model(**fields)
    assert models.config_from_hf(theirs_config.to_dict()) == cfg
    theirs = transformers.AutoModelForCausalLM.from_config(theirs_config, attn_implementation="eager").eval()
    state = {}
    for name, key in models.key_map(cfg).items():
        leaf = functools.reduce(lambda node, part: node[part], key.path, params)
        tensor = to_file(key, np.asarray(leaf if key.layer is None else leaf[key.layer]))
        state[name] = torch.tensor(tensor)
    known = set(theirs.state_dict()) - ({"lm_head.weight"} if tied else set())
    assert known == set(state)
    theirs.load_state_dict(state, strict=not tied)

    tokens = np.random.default_rng(8).integers(0, VOCAB, (2, 90))  # beyond original_max_position_embeddings
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    segments, positions = (jnp.tile(x, (2, 1)) for x in row(90, total=90))
    hidden = jax.jit(functools.partial(models.hidden, cfg))(params, jnp.asarray(tokens, jnp.int32), segments, positions)
    head = models.head(cfg, params)
    assert head.vocab_major == tied
    logits = hidden @ (head.weight.T if tied else head.weight)
    logits = head.soft_cap * jnp.tanh(logits / head.soft_cap) if head.soft_cap else logits
    assert np.abs(expected).max() > 3
    assert float(np.abs(logits - expected).max()) <= 1e-4
