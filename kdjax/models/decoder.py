"""The decoder that the families share: its parameters, its checkpoint names and its forward pass.

What a family adds is declared in its spec tree (a "bq" leaf means that q has a bias, "q_norm" that heads are normed,
"post_attn_norm" that what attention adds is) and in fields of ModelConfig with neutral defaults. Where local and global
layers are mixed, which one a layer is goes through the scan with its weights: one program for both, whatever the depth.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from kdjax import registry
from kdjax.kernels.attention import RESIDUALS, attention
from kdjax.models.layers import ACTIVATIONS, Rope, project, rms_norm, rope_tables, rotate
from kdjax.models.params import ZEROS, ModelConfig, Normal, ParamSpec, TensorKey
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
BIASES = ("bq", "bk", "bv")
Product = Callable[..., Array]  # layers.project or layers.project_few
Mixer = Callable[..., Array]  # (q [B, T, N, H], k, v [B, T, G, H], segment_ids [B, T]) -> [B, T, N, H]
INPUT_AXES = {"embed": 1, "final_norm": 1, "head": 1, "wo": 2}  # how many leading axes of a layer's leaf are the input


def layer_spec(cfg: ModelConfig, init: Normal, **axes: int) -> ParamSpec:
    """A stacked parameter: `axes` maps logical axis names to sizes, in order, after "layers"."""
    return ParamSpec((cfg.layers, *axes.values()), ("layers", *axes), init)


def param_specs(cfg: ModelConfig, **extra: ParamSpec) -> dict[str, Any]:
    """The spec tree (see params.py); `extra` are the leaves that a family adds to `layers`."""
    matrix, neutral = Normal(0.0, cfg.initializer_range), Normal(1.0 - cfg.norm_offset, 0.0)
    d, f, h = {"embed": cfg.width}, {"mlp": cfg.mlp}, {"head_dim": cfg.head_dim}
    n, g = {"heads": cfg.heads}, {"kv_heads": cfg.kv_heads}
    layers = {
        "attn_norm": layer_spec(cfg, neutral, norm=cfg.width),
        "wq": layer_spec(cfg, matrix, **d, **n, **h),
        "wk": layer_spec(cfg, matrix, **d, **g, **h),
        "wv": layer_spec(cfg, matrix, **d, **g, **h),
        "wo": layer_spec(cfg, matrix, **n, **h, **d),
        "mlp_norm": layer_spec(cfg, neutral, norm=cfg.width),
        "w_gate": layer_spec(cfg, matrix, **d, **f),
        "w_up": layer_spec(cfg, matrix, **d, **f),
        "w_down": layer_spec(cfg, matrix, **f, **d),
    }
    if cfg.attention_bias:
        layers |= {"bq": layer_spec(cfg, ZEROS, **n, **h)}
        layers |= {name: layer_spec(cfg, ZEROS, **g, **h) for name in ("bk", "bv")}
    tree = {
        "embed": ParamSpec((cfg.vocab_size, cfg.width), ("vocab", "embed"), matrix),
        "final_norm": ParamSpec((cfg.width,), ("norm",), neutral),
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
# What an attention kernel leaves for its gradient is linear in T, so only "full" runs the kernel twice.
_POLICIES = jax.checkpoint_policies
_OF_KERNELS = _POLICIES.save_only_these_names(RESIDUALS)
REMAT: dict[str, Callable[..., Any]] = {
    # no matrix product
    "none": _POLICIES.save_from_both_policies(_POLICIES.dots_saveable, _OF_KERNELS),
    # attention, if it is made of matrix products: memory is linear in T
    "dots": _POLICIES.save_from_both_policies(_POLICIES.dots_with_no_batch_dims_saveable, _OF_KERNELS),
    # the whole layer: its input is all that is kept
    "full": _POLICIES.nothing_saveable,
}


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
    checkpoint = functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
    return trunk(cfg, params, tokens, segment_ids, positions, rules, compute_dtype, checkpoint)[0]


def trunk(
    cfg: ModelConfig,
    params: Params,
    tokens: Array,
    segment_ids: Array,
    positions: Array,
    rules: Rules,
    compute_dtype: Any,
    checkpoint: Callable[..., Any] | None,
    over: Callable[[Mixer], Mixer] = lambda mixer: mixer,
    last: bool = False,
) -> tuple[Array, Any]:
    """Hidden states, and without `checkpoint` the keys and values [L, B, T, G, H] that they were made of.

    over: makes of attention over rows what mixes these. last: with the hidden states come not keys and values but the
    residual stream [B, T, D] in the last layer after attention, and after that layer.
    """
    rope_of = ropes(cfg, positions)
    specs = (*[rules.heads_spec] * 3, rules.batch_spec(2)), rules.heads_spec
    mixer = functools.partial(attention, soft_cap=cfg.attn_soft_cap, implementation=rules.attention)
    kinds = [rules.rowwise(over(functools.partial(mixer, window=w)), *specs) for w in _windows(cfg, tokens.shape[1])]

    def layer(stream: tuple[Array, ...], inputs: tuple[Params, Array | None]) -> tuple[tuple[Array, ...], Any]:
        weights, local = at_use(inputs[0], rules, compute_dtype), inputs[1]
        seen: list[Array] = []

        def mix(q: Array, k: Array, v: Array) -> Array:
            seen.extend((k, v))
            if len(kinds) == 1:
                return kinds[0](q, k, v, segment_ids)
            return jax.lax.cond(local, *kinds, q, k, v, segment_ids)

        middle = attention_block(cfg, weights, stream[-1], rope_of(local), mix, rules)
        x = feed_forward(cfg, weights, middle, rules)
        return (middle, x) if last else (x,), None if checkpoint or last else tuple(seen)

    x = embed(cfg, params, tokens, rules, compute_dtype)
    scanned = params["layers"], kinds_of(cfg)
    stream: tuple[Array, ...] = (x, x) if last else (x,)
    stream, kept = jax.lax.scan(checkpoint(layer) if checkpoint else layer, stream, scanned)
    hidden = rules.reshard(norm(cfg, stream[-1], params["final_norm"]), rules.batch_spec(3))
    return hidden, stream if last else kept


# --- local and global layers


def kinds_of(cfg: ModelConfig) -> Array | None:
    """[L], which layers are local, if there are both kinds."""
    return jnp.asarray(cfg.local_layers) if len(set(cfg.local_layers)) > 1 else None


def ropes(cfg: ModelConfig, positions: Array) -> Callable[[Array | None], Rope]:
    """The RoPE tables of a layer, given whether it is local (None: all layers are of one kind)."""
    tables = {local: rope_tables(cfg, positions, local) for local in set(cfg.local_layers) or {False}}
    if len(tables) == 1:
        (only,) = tables.values()
        return lambda local: only
    return lambda local: jax.tree.map(functools.partial(jnp.where, local), tables[True], tables[False])


def _windows(cfg: ModelConfig, length: int) -> tuple[int, ...]:
    """The windows of rows of `length` positions, 0 = none: the one of all layers, or of local and of global ones."""
    if not any(cfg.local_layers) or not 0 < cfg.window < length:  # a window that is never full is none
        return (0,)
    return (cfg.window,) if all(cfg.local_layers) else (cfg.window, 0)


def in_reach(cfg: ModelConfig, distance: Array, local: Array | None) -> Array:
    """Whether a query sees a key that is `distance` before it: in a local layer only within the window."""
    seen = distance >= 0
    if not any(cfg.local_layers) or not cfg.window:
        return seen
    near = seen & (distance < cfg.window)
    return near if local is None else jnp.where(local, near, seen)


# --- the blocks


def norm(cfg: ModelConfig, x: Array, scale: Array) -> Array:
    """RMS norm with the scale as the family stores it."""
    return rms_norm(x, scale + cfg.norm_offset if cfg.norm_offset else scale, cfg.norm_eps)


def embed(cfg: ModelConfig, params: Params, tokens: Array, rules: Rules, dtype: Any) -> Array:
    """What enters the first layer."""
    rows = rules.embed(params["embed"], tokens, dtype)
    return rows if cfg.embed_scale == 1.0 else rows * jnp.asarray(cfg.embed_scale, dtype)


def at_use(stored: Params, rules: Rules, dtype: Any) -> Params:
    """One layer's weights as they are used: matrices, all heads in one axis, in the compute dtype. Norm scales stay.

    They are cast and made flat before they are gathered: less moves, and what is gathered cannot be reshaped.
    """

    def used(name: str, leaf: Array) -> Array:
        if name.endswith("_norm"):
            return leaf
        flat = flattened(name, leaf.astype(dtype))
        # What `gather` types as reduced can be multiplied by rows that are split, but not added to them.
        return rules.reshard(flat, P(rules.heads_spec[2])) if name in BIASES else rules.gather(flat)

    return {name: used(name, leaf) for name, leaf in stored.items()}


def flattened(name: str, leaf: Array) -> Array:
    """One layer's leaf as a matrix [in, out], a bias as a vector."""
    inputs = 0 if name in BIASES else INPUT_AXES.get(name, 1)
    return leaf.reshape(*(_product(part) for part in (leaf.shape[:inputs], leaf.shape[inputs:]) if part))


def attention_block(
    cfg: ModelConfig,
    w: Params,
    x: Array,
    rope: Any,
    mix: Callable[..., Array],
    rules: Rules,
    product: Product = project,
) -> Array:
    """x + the attention block; `mix` turns q [B, T, N, H] (scaled, rotated) and k, v [B, T, G, H] into [B, T, N, H]."""
    normed = rules.reshard(norm(cfg, x, w["attn_norm"]), rules.batch_spec(3))
    q, k, v = (product(normed, w[name]) for name in ("wq", "wk", "wv"))
    if "bq" in w:  # [N * H] each
        q, k, v = q + w["bq"][None, None], k + w["bk"][None, None], v + w["bv"][None, None]
    q, k, v = (flat.reshape(*flat.shape[:2], -1, cfg.head_dim) for flat in (q, k, v))
    if "q_norm" in w:
        q, k = norm(cfg, q, w["q_norm"]), norm(cfg, k, w["k_norm"])
    mixed = mix(rotate(q, rope, (cfg.query_pre_attn_scalar or cfg.head_dim) ** -0.5), rotate(k, rope), v)
    added = rules.reshard(product(mixed.reshape(*x.shape[:2], -1), w["wo"], rules.summed), rules.residual)
    return x + (norm(cfg, added, w["post_attn_norm"]) if "post_attn_norm" in w else added)


def feed_forward(cfg: ModelConfig, w: Params, x: Array, rules: Rules, product: Product = project) -> Array:
    """x + the gated feed-forward block."""
    normed = rules.reshard(norm(cfg, x, w["mlp_norm"]), rules.batch_spec(3))
    gate = ACTIVATIONS[cfg.activation](product(normed, w["w_gate"]))
    added = rules.reshard(product(gate * product(normed, w["w_up"]), w["w_down"], rules.summed), rules.residual)
    return x + (norm(cfg, added, w["post_mlp_norm"]) if "post_mlp_norm" in w else added)
