"""Gemma 3, the text part: norms before and after each block, and local layers with a window among global ones.

What sets it apart from llama: the embeddings are multiplied by sqrt(D); a norm multiplies by 1 + its scale; the outputs
of attention and of the feed-forward block are normed too, before they are added to the residual stream; heads of q and
k are normed; the gate goes through the tanh form of GELU. Five of six layers are local: they see the last `window`
positions and have RoPE of a smaller base; the global ones may stretch theirs.
"""

from typing import Any

from kdjax.models import decoder, hf_config
from kdjax.models.params import ModelConfig, Normal, TensorKey

LOCAL, GLOBAL = "sliding_attention", "full_attention"  # entries of layer_types
PATTERN = 6  # where a config has no layer_types, every sixth layer is global
THETA, LOCAL_THETA = 1e6, 1e4
DEFAULTS: dict[str, Any] = {  # published files leave out what transformers' Gemma3TextConfig assumes
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
POSITIVE = (
    "sliding_window", "sliding_window_pattern", "_sliding_window_pattern", "query_pre_attn_scalar",
    "attn_logit_softcapping", "final_logit_softcapping",
)  # fmt: skip
OF_ALL_PARTS = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "quantization_config")
NAMES = decoder.NAMES | {
    "post_attn_norm": ("post_attention_layernorm.weight", False),
    "mlp_norm": ("pre_feedforward_layernorm.weight", False),
    "post_mlp_norm": ("post_feedforward_layernorm.weight", False),
}


def config_from_hf(config: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a gemma3_text `config.json`, or of the text part of a gemma3 one (text and images).

    ValueError names a field that is missing or not implemented.
    """
    if config.get("model_type") == "gemma3":
        if not isinstance(config.get("text_config"), dict):
            raise ValueError(
                f"config.json text_config must be there with model_type 'gemma3', got {config.get('text_config')!r}; "
                "it is a model of text and images. Set model_type to 'gemma3_text' if it is not."
            )
        shared = {name: config[name] for name in OF_ALL_PARTS if config.get(name) is not None}
        config = config["text_config"] | shared
    hf_config.refuse(config, "attention_bias", (False, None), "attention biases of gemma models are not implemented")
    hf_config.refuse(config, "hidden_activation", ("gelu_pytorch_tanh", None), "gemma models use the tanh form of GELU")
    hf_config.refuse(config, "use_bidirectional_attention", (False, None), "attention is causal here")
    config = DEFAULTS | {name: value for name, value in config.items() if name != "hidden_act"}
    for name in POSITIVE:
        if config.get(name) is not None and config[name] <= 0:
            raise ValueError(f"config.json {name} must be positive, got {config[name]!r}. Use another model.")
    local = _local_layers(config)
    ropes = _ropes(config)
    return hf_config.read_config(
        config | {"rope_theta": THETA, "rope_scaling": None} | ropes[GLOBAL],
        "gemma3_text",
        norm_offset=1.0,
        embed_scale=config["hidden_size"] ** 0.5,
        activation="gelu_tanh",
        query_pre_attn_scalar=float(config["query_pre_attn_scalar"]),
        attn_soft_cap=float(config.get("attn_logit_softcapping") or 0),
        logit_soft_cap=float(config.get("final_logit_softcapping") or 0),
        window=config["sliding_window"] or 0,
        local_layers=local,
        local_rope_theta=ropes[LOCAL],
    )


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The `config.json` dictionary of `cfg`: of a text-only model, in the form that transformers 4 and 5 read."""
    written = hf_config.write_config(cfg, "Gemma3ForCausalLM") | {
        "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh",
        "use_bidirectional_attention": False,
        "query_pre_attn_scalar": _whole(cfg.query_pre_attn_scalar or cfg.head_dim),
        "attn_logit_softcapping": cfg.attn_soft_cap or None,
        "final_logit_softcapping": cfg.logit_soft_cap or None,
        "sliding_window": cfg.window or None,
        "layer_types": [LOCAL if local else GLOBAL for local in cfg.local_layers or (False,) * cfg.layers],
        "rope_local_base_freq": cfg.local_rope_theta,
    }
    del written["hidden_act"]  # gemma's name for it is hidden_activation
    return written


def param_specs(cfg: ModelConfig) -> dict[str, Any]:
    """The spec tree; see params.py."""
    neutral = Normal(1.0 - cfg.norm_offset, 0.0)
    block_norm = decoder.layer_spec(cfg, neutral, norm=cfg.width)
    head_norm = decoder.layer_spec(cfg, neutral, norm=cfg.head_dim)
    return decoder.param_specs(
        cfg, q_norm=head_norm, k_norm=head_norm, post_attn_norm=block_norm, post_mlp_norm=block_norm
    )


def key_map(cfg: ModelConfig) -> dict[str, TensorKey]:
    """Checkpoint tensor name -> its place in the tree: total and bijective."""
    return decoder.key_map(param_specs(cfg), NAMES)


def _whole(number: float) -> int | float:
    return int(number) if number == int(number) else number


def _local_layers(config: dict[str, Any]) -> tuple[bool, ...]:
    """Which layers are local."""
    layers, kinds = config["num_hidden_layers"], config.get("layer_types")
    if kinds is None:
        pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or PATTERN
        kinds = [LOCAL if (layer + 1) % pattern else GLOBAL for layer in range(layers)]
    strange = sorted(set(kinds) - {LOCAL, GLOBAL})
    if strange:
        raise ValueError(
            f"config.json layer_types must be {LOCAL!r} or {GLOBAL!r}, got {strange[0]!r}; it is not implemented. "
            "Use another model."
        )
    if len(kinds) != layers:
        raise ValueError(
            f"config.json layer_types must have an entry for each of the {layers} layers, got {len(kinds)}; a layer "
            "is local or global. Set num_hidden_layers or layer_types."
        )
    return tuple(kind == LOCAL for kind in kinds)


def _ropes(config: dict[str, Any]) -> dict[str, Any]:
    """GLOBAL -> the fields that `read_config` takes, LOCAL -> a base; from the spelling of transformers 4 or 5."""
    new = config.get("rope_parameters")
    if new is None:
        theta, scaling = config.get("rope_theta") or THETA, config.get("rope_scaling")
        old = {"rope_parameters": None, "rope_theta": theta, "rope_scaling": scaling}
        return {GLOBAL: old, LOCAL: float(config.get("rope_local_base_freq") or LOCAL_THETA)}
    if not isinstance(new.get(GLOBAL), dict):
        raise ValueError(
            f"config.json rope_parameters must have {GLOBAL!r}, got {sorted(new)}; global and local layers of gemma "
            "models turn at different speeds. Set one entry for each kind of layer."
        )
    local = new.get(LOCAL) or {}
    if local.get("rope_type", "default") != "default":
        raise ValueError(
            f"config.json rope_parameters.{LOCAL}.rope_type must be 'default', got {local['rope_type']!r}; only global "
            "layers stretch RoPE here. Use another model."
        )
    stretched = {"rope_parameters": {"rope_theta": THETA} | new[GLOBAL], "rope_scaling": None}
    return {GLOBAL: stretched, LOCAL: float(local.get("rope_theta") or LOCAL_THETA)}
