"""The decoder that the families share: its parameters, its checkpoint names and its forward pass.

What a family adds is declared in its spec tree (a "bq" leaf means that q has a bias, "q_norm" that heads are normed).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax import registry
from kdjax.models.layers import attend, causal_attention, project, rms_norm, rope_tables, rotate, swiglu
from kdjax.models.params import ONES, ZEROS, ModelConfig, Normal, ParamSpec, TensorKey
from kdjax.sharding import Rules
from kdjax.types import Params

# leaf -> (name in a Hugging Face checkpoint, stored [out, in]); leaves of `layers` are under model.layers.<layer>.
NAMES: dict[str, tuple[str, bool]] = {
    "embed": ("model.embed_tokens.weight", False),
    "final_norm": ("model.norm.weight", False),
    "head": ("lm_head.weight", True),
    "attn_norm": ("input_layernorm.weight", False),
    "wq": ("self_attn.q_proj.weight", True),
    "wk": ("self_attn.k_proj.weight", True),
    "wv": ("self_attn.v_proj.weight", True),
    "wo": ("self_attn.o_proj.weight", True),
    "bq": ("self_attn.q_proj.bias", False),
    "bk": ("self_attn.k_proj.bias", False),
    "bv": ("self_attn.v_proj.bias", False),
    "q_norm": ("self_attn.q_norm.weight", False),
    "k_norm": ("self_attn.k_norm.weight", False),
    "mlp_norm": ("post_attention_layernorm.weight", False),
    "w_gate": ("mlp.gate_proj.weight", True),
    "w_up": ("mlp.up_proj.weight", True),
    "w_down": ("mlp.down_proj.weight", True),
}
INPUT_AXES = {"embed": 1, "final_norm": 1, "head": 1, "wo": 2}  # how many leading axes of a layer's leaf are the input


def layer_spec(cfg: ModelConfig, init: Normal, **axes: int) -> ParamSpec:
    """A stacked parameter: `axes` maps logical axis names to sizes, in order, after "layers"."""
    return ParamSpec((cfg.layers, *axes.values()), ("layers", *axes), init)


def param_specs(cfg: ModelConfig, **extra: ParamSpec) -> dict[str, Any]:
    """The spec tree (see params.py); `extra` are the leaves that a family adds to `layers`."""
    matrix = Normal(0.0, cfg.initializer_range)
    d, f, h = {"embed": cfg.width}, {"mlp": cfg.mlp}, {"head_dim": cfg.head_dim}
    n, g = {"heads": cfg.heads}, {"kv_heads": cfg.kv_heads}
    layers = {
        "attn_norm": layer_spec(cfg, ONES, norm=cfg.width),
        "wq": layer_spec(cfg, matrix, **d, **n, **h),
        "wk": layer_spec(cfg, matrix, **d, **g, **h),
        "wv": layer_spec(cfg, matrix, **d, **g, **h),
        "wo": layer_spec(cfg, matrix, **n, **h, **d),
        "mlp_norm": layer_spec(cfg, ONES, norm=cfg.width),
        "w_gate": layer_spec(cfg, matrix, **d, **f),
        "w_up": layer_spec(cfg, matrix, **d, **f),
        "w_down": layer_spec(cfg, matrix, **f, **d),
    }
    if cfg.attention_bias:
        layers |= {"bq": layer_spec(cfg, ZEROS, **n, **h)}
        layers |= {name: layer_spec(cfg, ZEROS, **g, **h) for name in ("bk", "bv")}
    tree = {
        "embed": ParamSpec((cfg.vocab_size, cfg.width), ("vocab", "embed"), matrix),
        "final_norm": ParamSpec((cfg.width,), ("norm",), ONES),
        "layers": layers | extra,
    }
    if not cfg.tied:
        tree["head"] = ParamSpec((cfg.width, cfg.vocab_size), ("embed", "vocab"), matrix)
    return tree


def key_map(specs: dict[str, Any], names: dict[str, tuple[str, bool]] = NAMES) -> dict[str, TensorKey]:
    """Checkpoint name -> place in the tree, for every leaf and layer of `specs`; `names` has an entry for each leaf."""
    found = {}
    for leaf, spec in specs.items():
        if leaf != "layers":
            found[names[leaf][0]] = _tensor_key((leaf,), None, spec.shape, names[leaf][1])
    for leaf, spec in specs["layers"].items():
        name, transpose = names[leaf]
        for layer in range(spec.shape[0]):
            found[f"model.layers.{layer}.{name}"] = _tensor_key(("layers", leaf), layer, spec.shape[1:], transpose)
    return found


def _tensor_key(path: tuple[str, ...], layer: int | None, shape: tuple[int, ...], transpose: bool) -> TensorKey:
    if transpose:
        inputs = INPUT_AXES.get(path[-1], 1)
        flat: tuple[int, ...] = (_product(shape[inputs:]), _product(shape[:inputs]))
    else:
        flat = shape if path[-1] == "embed" else (_product(shape),)
    return TensorKey(path, layer, shape, flat, transpose)


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


# What the backward pass recomputes, for `jax.checkpoint` around one layer. Gathered weights are never kept.
# Keeping what is cheap to redo (norms, RoPE, silu, exp) costs more time in memory traffic than redoing it, on CPU too.
REMAT: dict[str, Callable[..., Any]] = {
    "none": jax.checkpoint_policies.dots_saveable,  # no matrix product
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # attention: memory is linear in T
    "full": jax.checkpoint_policies.nothing_saveable,  # the whole layer: its input is all that is kept
}


class Cache(NamedTuple):
    """Keys and values [L, B, C, G, H] of the first C positions of every row."""

    keys: Array
    values: Array


def hidden(
    cfg: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    *,
    rules: Rules = Rules(),
    compute_dtype: Any = jnp.float32,
    remat: str = "none",
) -> Float[Array, "B T D"]:
    """The trunk: hidden states after the final norm, in `compute_dtype`. Ids outside the vocabulary give nan.

    Raises ValueError for an unknown `remat`; see REMAT.
    """
    policy = registry.lookup(REMAT, remat, "student.remat")
    rope = rope_tables(cfg, positions)

    def layer(x: Array, stored: Params) -> tuple[Array, None]:
        weights = _at_use(stored, rules, compute_dtype)
        mix = functools.partial(causal_attention, segment_ids=segment_ids)
        return _feed_forward(cfg, weights, _attention(cfg, weights, x, rope, mix)), None

    x = _embed(params, tokens, rules, compute_dtype)
    x, _ = jax.lax.scan(jax.checkpoint(layer, policy=policy, prevent_cse=False), x, params["layers"])
    return rms_norm(x, rules.gather(params["final_norm"]), cfg.norm_eps)


def init_cache(cfg: ModelConfig, batch: int, capacity: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache for `capacity` positions of `batch` rows."""
    zeros = jnp.zeros((cfg.layers, batch, capacity, cfg.kv_heads, cfg.head_dim), dtype)
    return Cache(zeros, zeros)


def hidden_cached(
    cfg: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: Cache,
    *,
    compute_dtype: Any = jnp.float32,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Hidden states of tokens that come after those in the cache, and the cache with them added at their `positions`.

    A query sees the keys at index <= its own position, so padding on the right of a prompt is never seen: it is
    overwritten before a query reaches it. What lies beyond the capacity is not kept. One device; nothing is kept for a
    gradient.
    """
    rope = rope_tables(cfg, positions)
    capacity = cache.keys.shape[2]
    mask = jnp.arange(capacity)[None, None] <= positions[:, :, None]
    rows = jnp.arange(tokens.shape[0])[:, None]

    def layer(carry: tuple[Array, Cache], inputs: tuple[Params, Array]) -> tuple[tuple[Array, Cache], None]:
        # The cache is carried and written in place; as a scanned input it would be copied whole for every token.
        x, cache = carry
        weights, number = _at_use(inputs[0], Rules(), compute_dtype), inputs[1]
        filled = []

        def mix(q: Array, k: Array, v: Array) -> Array:
            for old, new in zip(cache, (k, v), strict=True):
                filled.append(old.at[number, rows, positions].set(new.astype(old.dtype)))
            keys, values = (jax.lax.dynamic_index_in_dim(f, number, keepdims=False).astype(q.dtype) for f in filled)
            return attend(q, keys, values, mask)

        x = _attention(cfg, weights, x, rope, mix)
        return (_feed_forward(cfg, weights, x), Cache(*filled)), None

    x = _embed(params, tokens, Rules(), compute_dtype)
    (x, cache), _ = jax.lax.scan(layer, (x, cache), (params["layers"], jnp.arange(cfg.layers)))
    return rms_norm(x, params["final_norm"], cfg.norm_eps), cache


def _embed(params: Params, tokens: Array, rules: Rules, dtype: Any) -> Array:
    # Rows are cast after the look-up, so that their gradients are added up in the dtype of the table.
    table = rules.gather(params["embed"])
    rows = table.at[tokens].get(mode="fill", wrap_negative_indices=False, out_sharding=rules.batch(3))
    return rows.astype(dtype)


def _at_use(stored: Params, rules: Rules, dtype: Any) -> Params:
    """One layer's weights, whole and in the compute dtype; cast first, so that less is gathered. Norm scales stay."""
    return {name: rules.gather(leaf if name.endswith("_norm") else leaf.astype(dtype)) for name, leaf in stored.items()}


def _attention(cfg: ModelConfig, w: Params, x: Array, rope: Any, mix: Callable[..., Array]) -> Array:
    """x + the attention block; `mix` turns q [B, T, N, H] (scaled, rotated) and k, v [B, T, G, H] into [B, T, N, H]."""
    normed = rms_norm(x, w["attn_norm"], cfg.norm_eps)
    q, k, v = (project(normed, w[name]) for name in ("wq", "wk", "wv"))
    if "bq" in w:
        q, k, v = q + w["bq"][None, None], k + w["bk"][None, None], v + w["bv"][None, None]
    if "q_norm" in w:
        q, k = rms_norm(q, w["q_norm"], cfg.norm_eps), rms_norm(k, w["k_norm"], cfg.norm_eps)
    mixed = mix(rotate(q, rope, cfg.head_dim**-0.5), rotate(k, rope), v)
    return x + project(mixed.reshape(*x.shape[:2], -1), w["wo"].reshape(-1, cfg.width))


def _feed_forward(cfg: ModelConfig, w: Params, x: Array) -> Array:
    """x + the SwiGLU block."""
    normed = rms_norm(x, w["mlp_norm"], cfg.norm_eps)
    return x + project(swiglu(project(normed, w["w_gate"]), project(normed, w["w_up"])), w["w_down"])
