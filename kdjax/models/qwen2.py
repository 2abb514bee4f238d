"""Qwen2 and Qwen2.5: llama with biases on q, k and v."""

from typing import Any

from kdjax.models import decoder, hf_config
from kdjax.models.params import ModelConfig, TensorKey


def config_from_hf(config: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a qwen2 `config.json`; ValueError names a field that is missing or not implemented."""
    hf_config.refuse_sliding_window(config)
    return hf_config.read_config(config, "qwen2", attention_bias=True)


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The `config.json` dictionary of `cfg`."""
    return hf_config.write_config(cfg, "Qwen2ForCausalLM") | {"use_sliding_window": False}


def param_specs(cfg: ModelConfig) -> dict[str, Any]:
    """The spec tree; see params.py."""
    return decoder.param_specs(cfg)


def key_map(cfg: ModelConfig) -> dict[str, TensorKey]:
    """Checkpoint tensor name -> its place in the tree: total and bijective."""
    return decoder.key_map(param_specs(cfg))
