"""The decoder of kdjax/models/llama.py once more, as an NNX and as a linen module, to be bridged back."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from kdjax.models import flax_bridge

LEAVES = ("attn_norm", "wq", "wk", "wv", "wo", "mlp_norm", "w_gate", "w_up", "w_down")
NAMES = {"wq": ("fsdp", "tp", None), "wo": ("tp", None, "fsdp"), "w_down": ("unheard", None)}  # metadata of some


def norm(x, scale, eps):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * scale[None, None]


def rope(x, positions, theta):
    half = x.shape[-1] // 2
    angles = positions[:, :, None, None] * (theta ** (-jnp.arange(half) / half))[None, None, None]
    turned = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angles)
    return jnp.concatenate([turned.real, turned.imag], -1)


def block(cfg, w, x, positions, mask):
    """One layer; w: leaf name -> array."""
    y = norm(x, w["attn_norm"], cfg.norm_eps)
    q, k, v = (jnp.einsum("btd,dnh->btnh", y, w[name]) for name in ("wq", "wk", "wv"))
    q, k = rope(q, positions, cfg.rope_theta), rope(k, positions, cfg.rope_theta)
    k, v = (jnp.repeat(a, cfg.heads // cfg.kv_heads, axis=2) for a in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / cfg.head_dim**0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), -1)
    x = x + jnp.einsum("bnts,bsnh,nhd->btd", weights, v, w["wo"])
    y = norm(x, w["mlp_norm"], cfg.norm_eps)
    return x + (jax.nn.silu(y @ w["w_gate"]) * (y @ w["w_up"])) @ w["w_down"]


class NnxLayer(nnx.Module):
    def __init__(self, weights):
        for name, value in weights.items():
            setattr(self, name, nnx.Param(value, out_sharding=NAMES.get(name), eager_sharding=False))


class NnxLlama(nnx.Module):
    """Tied; with state that is not trained, and dropout that must be off."""

    def __init__(self, cfg, params):
        self.cfg = cfg
        self.embed = nnx.Param(params["embed"])
        self.final_norm = nnx.Param(params["final_norm"])
        self.layers = nnx.List(
            NnxLayer({name: params["layers"][name][layer] for name in LEAVES}) for layer in range(cfg.layers)
        )
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(7))
        self.calls = nnx.Cache(jnp.zeros((), jnp.int32))
        self.table = jnp.arange(4.0)

    def unembed(self, x):
        return x @ self.embed[...].T

    def __call__(self, tokens, positions, mask):
        self.calls[...] += 1
        x = self.dropout(self.embed[...][tokens])
        for layer in self.layers:
            x = block(self.cfg, {name: getattr(layer, name)[...] for name in LEAVES}, x, positions, mask)
        return self.unembed(norm(x, self.final_norm[...], self.cfg.norm_eps))


class LinenLayer(nn.Module):
    cfg: object
    shapes: tuple

    @nn.compact
    def __call__(self, x, positions, mask):
        draw = nn.initializers.zeros_init()
        w = {
            name: self.param(name, nn.with_partitioning(draw, NAMES[name]) if name in NAMES else draw, shape)
            for name, shape in self.shapes
        }
        return block(self.cfg, w, x, positions, mask)


class LinenLlama(nn.Module):
    """Untied: the head is a Dense of its own."""

    cfg: object
    shapes: tuple

    @nn.compact
    def __call__(self, tokens, positions, mask):
        x = nn.Embed(self.cfg.vocab_size, self.cfg.width, name="embed")(tokens)
        for number in range(self.cfg.layers):
            x = LinenLayer(self.cfg, self.shapes, name=f"layer_{number}")(x, positions, mask)
        scale = self.param("norm", nn.initializers.ones_init(), (self.cfg.width,))
        return nn.Dense(self.cfg.vocab_size, use_bias=False, name="lm_head")(norm(x, scale, self.cfg.norm_eps))


def nnx_bridge(cfg, params, module=None, **changes):
    """The bridged NNX module with the weights of a tied kdjax tree, or `module`."""

    def hidden(module, batch):
        module.unembed = lambda x: x
        return module(batch.tokens, batch.positions, flax_bridge.attention_mask(batch))

    given = {
        "hidden": hidden,
        "head": lambda module: module.embed,
        "vocab_size": cfg.vocab_size,
        "max_positions": cfg.max_positions,
        "tokenizer": "synthetic",
    }
    return flax_bridge.from_nnx(module or NnxLlama(cfg, params), **(given | changes))


def linen_module(cfg, params):
    """(module, boxed variables) with the weights of an untied kdjax tree."""
    stacked = params["layers"]
    module = LinenLlama(cfg, tuple((name, stacked[name].shape[1:]) for name in LEAVES))
    text = jnp.zeros((1, 2), jnp.int32)
    variables = module.init(jax.random.key(0), text, text, jnp.ones((1, 2, 2), bool))
    tree = {
        "embed": {"embedding": params["embed"]},
        "norm": params["final_norm"],
        "lm_head": {"kernel": params["head"]},
        **{f"layer_{n}": {name: stacked[name][n] for name in LEAVES} for n in range(cfg.layers)},
    }

    def fill(path, box):
        value = tree
        for key in path:
            value = value[key.key]
        return box.replace_boxed(value) if isinstance(box, nn.Partitioned) else value

    boxed = jax.tree_util.tree_map_with_path(
        fill, variables["params"], is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
    )
    return module, {"params": boxed}


def linen_bridge(cfg, params, **changes):
    """The bridged linen module with the weights of an untied kdjax tree."""
    module, variables = linen_module(cfg, params)

    def without_head(call, args, kwargs, context):
        return args[0] if context.module.name == "lm_head" else call(*args, **kwargs)

    def hidden(variables, batch):
        with nn.intercept_methods(without_head):
            return module.apply(variables, batch.tokens, batch.positions, flax_bridge.attention_mask(batch))

    given = {
        "hidden": hidden,
        "head": lambda variables: variables["params"]["lm_head"]["kernel"],
        "vocab_size": cfg.vocab_size,
        "max_positions": cfg.max_positions,
        "tokenizer": "synthetic",
    }
    return flax_bridge.from_linen(variables, **(given | changes))
