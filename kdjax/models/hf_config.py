"""The part of a Hugging Face `config.json` that decoder families share, read strictly and written back.

A field that would change the computation in a way this library does not implement is refused by name; fields that do
not (dropout, cache switches, dtypes, versions) are ignored.
"""

from typing import Any

from kdjax.models.params import ModelConfig, RopeScaling

NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MAX_POSITIONS = 2048  # what transformers assumes for a llama that does not say


def refuse(config: dict[str, Any], name: str, allowed: tuple, why: str) -> None:
    """ValueError unless field `name` is absent or one of `allowed`."""
    if name in config and config[name] not in allowed:
        raise ValueError(f"config.json {name} must be {allowed[0]!r}, got {config[name]!r}; {why}. Use another model.")


def read_config(config: dict[str, Any], family: str, head_dim: int | None = None, **fields: Any) -> ModelConfig:
    """The ModelConfig of a `config.json`. `head_dim` is the family's default; None = width / heads.

    `fields` set or overwrite ModelConfig fields that only the family knows.
    """
    missing = [name for name in NEEDED if config.get(name) is None]
    if missing:
        raise ValueError(f"config.json must have {missing[0]!r}, got none; the shape of a {family} model needs it.")
    refuse(config, "hidden_act", ("silu", "swish"), "only SwiGLU feed-forward layers are implemented")
    refuse(config, "mlp_bias", (False, None), "feed-forward biases are not implemented")
    refuse(config, "quantization_config", (None,), "only plain bf16, f16 and f32 tensors can be read")
    width, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or head_dim or width // heads
    if heads % kv_heads:
        raise ValueError(
            f"config.json num_key_value_heads must divide num_attention_heads = {heads}, got {kv_heads}; heads share."
        )
    if head_dim % 2:
        raise ValueError(f"config.json head_dim must be even, got {head_dim}; RoPE rotates pairs.")
    theta, scaling = _rope(config)
    return ModelConfig(
        **{
            "family": family,
            "vocab_size": config["vocab_size"],
            "width": width,
            "layers": config["num_hidden_layers"],
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "mlp": config["intermediate_size"],
            "rope_theta": theta,
            "rope_scaling": scaling,
            "norm_eps": float(config.get("rms_norm_eps") or 1e-6),
            "tied": bool(config.get("tie_word_embeddings", False)),
            "max_positions": config.get("max_position_embeddings") or MAX_POSITIONS,
            "initializer_range": float(config.get("initializer_range", 0.02)),
            "bos_id": config.get("bos_token_id"),
            "eos_ids": _ids(config.get("eos_token_id")),
            "pad_id": config.get("pad_token_id"),
        }
        | fields
    )


def refuse_sliding_window(config: dict[str, Any]) -> None:
    """ValueError if any layer attends through a window (Qwen2 and Qwen3 may)."""
    layers = config.get("num_hidden_layers") or 0
    kinds = config.get("layer_types")
    if kinds is None:
        windowed = config.get("use_sliding_window") and config.get("sliding_window") is not None
        kinds = ["sliding_attention"] * bool(windowed and config.get("max_window_layers", 28) < layers)
    other = sorted(set(kinds) - {"full_attention"})
    if other:
        raise ValueError(
            f"config.json layer_types must be 'full_attention' throughout, got {other[0]!r} (use_sliding_window); "
            "windowed attention is not implemented. Use another model."
        )


def write_config(cfg: ModelConfig, architecture: str) -> dict[str, Any]:
    """A `config.json` dictionary that `read_config` and transformers (v4 and v5) read back to the same model."""
    eos: Any = cfg.eos_ids[0] if len(cfg.eos_ids) == 1 else list(cfg.eos_ids) or None
    return {
        "architectures": [architecture],
        "model_type": cfg.family,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_positions,
        "initializer_range": cfg.initializer_range,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": _rope_dict(cfg.rope_scaling),
        "attention_dropout": 0.0,
        "bos_token_id": cfg.bos_id,
        "eos_token_id": eos,
        "pad_token_id": cfg.pad_id,
    }


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _rope(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers v5) or `rope_theta` + `rope_scaling` (v4)."""
    found: dict[str, Any] = dict(config.get("rope_parameters") or {}) | dict(config.get("rope_scaling") or {})
    theta = float(found.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = found.get("rope_type") or found.get("type") or "default"
    partial = found.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (1.0, None):
        raise ValueError(
            f"config.json partial_rotary_factor must be 1.0, got {partial!r}; RoPE turns whole heads here. "
            "Use another model."
        )
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", _factor(found, "factor"))
    if kind == "llama3":
        factor, low, high = (_factor(found, name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
        if high <= low:
            raise ValueError(
                f"config.json high_freq_factor must be above low_freq_factor = {low}, got {high}; frequencies "
                "between them are blended. Set rope_scaling as the model was published."
            )
        name = "original_max_position_embeddings"
        original = found.get(name) or config.get("max_position_embeddings") or MAX_POSITIONS
        return theta, RopeScaling("llama3", factor, low, high, int(original))
    raise ValueError(
        f"config.json rope_type must be 'default', 'linear' or 'llama3', got {kind!r}; it is not implemented. "
        "Use another model."
    )


def _factor(found: dict[str, Any], name: str) -> float:
    if found.get(name) is None:
        raise ValueError(f"config.json rope_scaling must have {name!r}, got {found!r}; its rope_type needs it.")
    if found[name] <= 0:
        raise ValueError(f"config.json rope_scaling must have a positive {name!r}, got {found[name]!r}.")
    return float(found[name])


def _rope_dict(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_positions,
    }
