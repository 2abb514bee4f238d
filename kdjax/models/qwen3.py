"""Qwen3 (dense): llama with an RMS norm on every query and key head, and a head size of its own."""

from typing import Any

from kdjax.models import decoder, hf_config
from kdjax.models.params import ONES, ModelConfig, TensorKey


def config_from_hf(config: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a qwen3 `config.json`; ValueError names a field that is missing or not implemented."""
    hf_config.refuse_sliding_window(config)
    hf_config.refuse(config, "attention_bias", (False, None), "attention biases of qwen3 models are not implemented")
    return hf_config.read_config(config, "qwen3", head_dim=128)


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The `config.json` dictionary of `cfg`."""
    return hf_config.write_config(cfg, "Qwen3ForCausalLM") | {"attention_bias": False, "use_sliding_window": False}


def param_specs(cfg: ModelConfig) -> dict[str, Any]:
    """The spec tree; see params.py."""
    head_norm = decoder.layer_spec(cfg, ONES, norm=cfg.head_dim)
    return decoder.param_specs(cfg, q_norm=head_norm, k_norm=head_norm)


def key_map(cfg: ModelConfig) -> dict[str, TensorKey]:
    """Checkpoint tensor name -> its place in the tree: total and bijective."""
    return decoder.key_map(param_specs(cfg))
