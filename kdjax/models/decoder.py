"""The decoder that the families share: its parameters, its checkpoint names and its forward pass.

What a family adds is declared in its spec tree (a "bq" leaf means that q has a bias, "q_norm" that heads are normed).
"""

from typing import Any

from kdjax.models.params import ONES, ZEROS, ModelConfig, Normal, ParamSpec, TensorKey

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
    """Checkpoint name -> place in the tree, for every leaf and layer of `specs`. Raises KeyError for a leaf without a name."""
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
        flat = (_product(shape[inputs:]), _product(shape[:inputs]))
    else:
        flat = shape if path[-1] == "embed" else (_product(shape),)
    return TensorKey(path, layer, shape, flat, transpose)


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
