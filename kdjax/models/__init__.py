"""Language models as plain functions over a parameter tree, cut in two: `hidden` (trunk) and `head`.

Axis letters are those of kdjax/types.py. Nothing here makes an array of shape [B, T, V].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from kdjax import registry
from kdjax.models import llama, params, qwen2, qwen3
from kdjax.models.params import ModelConfig, ParamSpec, RopeScaling, TensorKey
from kdjax.sharding import Rules
from kdjax.types import Array, Params


class Family(NamedTuple):
    """What a model family provides."""

    config_from_hf: Callable[[dict[str, Any]], ModelConfig]
    config_to_hf: Callable[[ModelConfig], dict[str, Any]]
    param_specs: Callable[[ModelConfig], dict[str, Any]]
    key_map: Callable[[ModelConfig], dict[str, TensorKey]]


# model_type of config.json -> family
FAMILIES: dict[str, Family] = {
    "llama": Family(llama.config_from_hf, llama.config_to_hf, llama.param_specs, llama.key_map),
    "qwen2": Family(qwen2.config_from_hf, qwen2.config_to_hf, qwen2.param_specs, qwen2.key_map),
    "qwen3": Family(qwen3.config_from_hf, qwen3.config_to_hf, qwen3.param_specs, qwen3.key_map),
}


def family(cfg: ModelConfig) -> Family:
    """The family record of `cfg`."""
    return registry.lookup(FAMILIES, cfg.family, "ModelConfig.family")


def config_from_hf(config: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a `config.json` dictionary, by its model_type."""
    return registry.lookup(FAMILIES, config.get("model_type", ""), "config.json model_type").config_from_hf(config)


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The `config.json` dictionary of `cfg`, as transformers reads it."""
    return family(cfg).config_to_hf(cfg)


def param_specs(cfg: ModelConfig) -> dict[str, Any]:
    """A tree of ParamSpec(shape, axes, init); see params.py for its names."""
    return family(cfg).param_specs(cfg)


def key_map(cfg: ModelConfig) -> dict[str, TensorKey]:
    """Checkpoint tensor name -> its place in the tree, a bijection with the (leaf, layer) pairs of `param_specs`."""
    return family(cfg).key_map(cfg)


def abstract_params(cfg: ModelConfig, rules: Rules = Rules(), dtype: Any = jnp.float32) -> Any:
    """The parameter tree as ShapeDtypeStruct, with storage shardings when `rules` has a mesh."""
    return params.abstract(param_specs(cfg), rules, dtype)


def init_params(cfg: ModelConfig, key: Array, rules: Rules = Rules()) -> Params:
    """Random float32 parameters, the same on every mesh."""
    return params.init(param_specs(cfg), key, rules)
