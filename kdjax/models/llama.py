"""Llama: Llama 2 and 3.x, SmolLM2 and everything else whose model_type is "llama"."""

from typing import Any

from kdjax.models import decoder, hf_config
from kdjax.models.params import ModelConfig, TensorKey


def config_from_hf(config: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a llama `config.json`; ValueError names a field that is missing or not implemented."""
    hf_config.refuse(config, "attention_bias", (False, None), "attention biases of llama models are not implemented")
    return hf_config.read_config(config, "llama")


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The `config.json` dictionary of `cfg`."""
    return hf_config.write_config(cfg, "LlamaForCausalLM") | {"attention_bias": False, "mlp_bias": False}


def param_specs(cfg: ModelConfig) -> dict[str, Any]:
    """The spec tree; see params.py."""
    return decoder.param_specs(cfg)


def key_map(cfg: ModelConfig) -> dict[str, TensorKey]:
    """Checkpoint tensor name -> its place in the tree: total and bijective."""
    return decoder.key_map(param_specs(cfg))
