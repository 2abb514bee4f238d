"""A real third-party model: the Llama of google-tunix with the weights of SmolLM2-135M, as teacher and as student.

Skipped where either is not there. tunix is no dependency of kdjax, and of it only the module of the model is imported:
its package imports trainers and samplers, which need a great deal more.
"""

import functools
import importlib
import importlib.util
import pathlib
import sys
import types

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kdjax import models
from kdjax.build import build_parts
from kdjax.config import default_config, from_config_dict
from kdjax.models import fetch, flax_bridge, flax_models, io
from kdjax.sharding import Rules
from kdjax.step import init_state, make_train_step
from kdjax.types import Batch

pytestmark = [
    pytest.mark.real_model,
    # What tunix 0.1.7 still uses of flax and jax.
    pytest.mark.filterwarnings("ignore:'sharding' is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'.value' access is now deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:jax.interpreters.pxla:DeprecationWarning"),
]
LAYER = {
    "input_layernorm/w": "attn_norm",
    "attn/q_proj/w": "wq",
    "attn/k_proj/w": "wk",
    "attn/v_proj/w": "wv",
    "attn/o_proj/w": "wo",
    "post_attention_layernorm/w": "mlp_norm",
    "mlp/gate_proj/kernel": "w_gate",
    "mlp/up_proj/kernel": "w_up",
    "mlp/down_proj/kernel": "w_down",
}
WHOLE = {"embedder/input_embedding": "embed", "final_norm/w": "final_norm"}


@pytest.fixture(scope="module")
def llama3():
    """tunix.models.llama3.model, with RoPE at the base that its config asks for."""
    found = importlib.util.find_spec("tunix")
    if found is None:
        pytest.skip("google-tunix is not installed; pip install --no-deps google-tunix==0.1.7")
    bare = types.ModuleType("tunix")
    bare.__path__ = list(found.submodule_search_locations)
    with pytest.MonkeyPatch.context() as patch:
        before = set(sys.modules)
        patch.setitem(sys.modules, "tunix", bare)
        setting = flax.config.flax_always_shard_variable  # tunix changes it for the whole process
        try:
            module = importlib.import_module("tunix.models.llama3.model")
        except (ImportError, AttributeError) as error:
            pytest.skip(f"google-tunix does not go with this flax or jax: {error}")
        # 0.1.7 does not hand config.rope_theta on: without this its RoPE has base 1e6 whatever the config says.
        patch.setattr(module, "apply_rope", functools.partial(module.apply_rope, rope_theta=100_000))
        yield module
        flax.config.update("flax_always_shard_variable", setting)
        for name in set(sys.modules) - before:
            if name.startswith("tunix."):
                del sys.modules[name]


@pytest.fixture(scope="module")
def smollm2():
    """load(keep=None): SmolLM2, or the student of some of its layers."""
    name = pathlib.Path(fetch.SMOLLM2_MEMBER).name
    if not (fetch.cache_dir() / name).is_file():
        pytest.skip(f"{name} is not in the model cache; fetch it with kdjax.models.fetch.smollm2()")
    return functools.cache(lambda keep=None: io.load_model(fetch.SMOLLM2, keep=keep))


def tunix_module(llama3, cfg, params):
    """The Llama3 of tunix with the weights of a kdjax tree, none of which is copied."""
    config = llama3.ModelConfig(
        num_layers=cfg.layers,
        vocab_size=cfg.vocab_size,
        embed_dim=cfg.width,
        hidden_dim=cfg.mlp,
        num_heads=cfg.heads,
        head_dim=cfg.head_dim,
        num_kv_heads=cfg.kv_heads,
        rope_theta=int(cfg.rope_theta),
        norm_eps=cfg.norm_eps,
        weight_tying=True,
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: llama3.Llama3(config, rngs=nnx.Rngs(0))))

    def weight(path, shape):
        name = flax_bridge.path_name(path)
        if name in WHOLE:
            return params[WHOLE[name]]
        _, layer, rest = name.split("/", 2)
        found = params["layers"][LAYER[rest]][int(layer)]
        assert found.shape == shape.shape
        return found

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(weight, state))


def call(module, batch):
    with jax.numpy_rank_promotion("allow"):  # tunix multiplies [B, T, D] with [D]
        return module(batch.tokens, batch.positions, None, flax_bridge.attention_mask(batch))[0]


def bridged(llama3, cfg, params):
    def hidden(module, batch):
        module.embedder.decode = lambda x: x
        return call(module, batch)

    return flax_bridge.from_nnx(
        tunix_module(llama3, cfg, params),
        hidden=hidden,
        head=lambda module: module.embedder.input_embedding,
        vocab_size=cfg.vocab_size,
        max_positions=cfg.max_positions,
        tokenizer="smollm2-135m",
    )


@pytest.fixture
def opened(llama3, smollm2, monkeypatch):
    """opened(keep) -> the bridged model as a config would load it."""
    module = types.ModuleType("of_tunix")
    monkeypatch.setitem(sys.modules, "of_tunix", module)

    def load(keep=None):
        native = smollm2(keep)
        module.model = lambda: bridged(llama3, native.cfg, native.params)
        return io.load_model("flax:of_tunix:model")

    return load


@pytest.fixture
def batch():
    """Two documents in each row, and padding."""
    rng = np.random.default_rng(5)
    segments = np.repeat(np.array([[1, 2, 0], [1, 2, 3]]), (9, 12, 3), axis=1)
    positions = np.concatenate([np.arange(9), np.arange(12), np.arange(3)])[None].repeat(2, 0)
    return Batch(
        tokens=jnp.asarray(rng.integers(3, 49152, segments.shape), jnp.int32),
        segment_ids=jnp.asarray(segments, jnp.int32),
        positions=jnp.asarray(positions, jnp.int32),
        loss_mask=jnp.asarray(segments > 0),
        row_id=jnp.arange(2, dtype=jnp.int32),
        epoch=jnp.zeros(2, jnp.int32),
        weight=jnp.ones(2, jnp.float32),
    )


def logits_of(loaded, batch):
    run = jax.jit(lambda params: models.hidden(loaded.cfg, params, batch.tokens, batch.segment_ids, batch.positions))
    return np.asarray(jnp.einsum("btd,vd->btv", run(loaded.params), loaded.params["embed"], precision="highest"))


def test_same_logits_as_smollm2(opened, smollm2, batch):
    found, wanted = logits_of(opened(), batch), logits_of(smollm2(), batch)
    assert np.max(np.abs(wanted)) > 10
    # Rounding of 30 layers in float32: of logits up to 33, a float64 pass differs from ours by 2.2e-4 and from tunix's
    # by 2.5e-4 at most, 2e-5 in the mean. With RoPE at tunix's own base the difference is 7.
    assert np.max(np.abs(found - wanted)) <= 5e-4
    assert np.sqrt(np.mean(np.square(found - wanted))) <= 5e-5
    np.testing.assert_array_equal(found.argmax(-1), wanted.argmax(-1))


def test_cut_where_tunix_has_its_head(llama3, smollm2):
    native = smollm2((0, 29))
    module = tunix_module(llama3, native.cfg, native.params)
    assert (
        flax_bridge.check_logits(bridged(llama3, native.cfg, native.params), jax.jit(lambda batch: call(module, batch)))
        < 2e-4
    )


def test_one_training_step_as_a_student(opened, smollm2, batch):
    """SE-KD from the whole SmolLM2 into its first and last layer: tunix's module learns what ours learns."""
    teacher, native, student = smollm2(), smollm2((0, 29)), opened((0, 29))
    config = default_config()
    config.teacher.path = config.student.path = "unused"
    config.data.seq_len = batch.tokens.shape[1]
    config.optim.warmup, config.optim.schedule, config.optim.eps = 0, "constant", 1e-2
    config.train.batch_size = 2
    after, losses = [], []
    for side in (native, student):
        parts = build_parts(from_config_dict(config), side.cfg, teacher.cfg, Rules())
        step = jax.jit(make_train_step(parts), donate_argnums=0)
        state = init_state(parts, jax.tree.map(jnp.copy, side.params), 0)
        state, report = step(state, teacher.params, jax.tree.map(lambda a: a[None], batch))
        after.append(state.params)
        losses.append(float(report.metrics["loss"][0] / report.metrics["loss"][1]))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    moved = np.max(np.abs(np.asarray(after[0]["embed"] - native.params["embed"])))
    assert moved > 1e-5
    np.testing.assert_allclose(after[1]["embed"], after[0]["embed"], atol=1e-3 * moved)
    for layer in (0, 1):
        found = after[1]["flax"]["layers"][str(layer)]["mlp"]["down_proj"]["kernel"]
        np.testing.assert_allclose(found, after[0]["layers"]["w_down"][layer], atol=1e-3 * moved)
    assert flax_models.open_model("flax:of_tunix:model").specs["flax"]["layers"]["0"]["attn"]["q_proj"]["w"].axes == (
        "embed",
        "mlp",
        None,
    )
