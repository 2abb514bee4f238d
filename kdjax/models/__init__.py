"""Language models as plain functions over a parameter tree, cut in two: `hidden` (trunk) and `head`.

Axis letters are those of kdjax/types.py. Nothing here makes an array of shape [B, T, V].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from kdjax import registry
from kdjax.models import decoder, decoder_cached, flax_models, gemma3, llama, qwen2, qwen3, shared_prefix
from kdjax.models.params import ModelConfig, ParamSpec, RopeScaling, TensorKey, abstract, init
from kdjax.sharding import Rules
from kdjax.types import Array, Head, Params

__all__ = [
    "FAMILIES",
    "Family",
    "ModelConfig",
    "ParamSpec",
    "RopeScaling",
    "TensorKey",
    "abstract_params",
    "config_from_hf",
    "config_to_hf",
    "family_of",
    "head",
    "hidden",
    "hidden_and_states",
    "hidden_cached",
    "init_cache",
    "init_params",
    "key_map",
    "param_specs",
    "shares_prefixes",
]


class Family(NamedTuple):
    """What a model family provides; one that differs from the shared decoder by its specs only leaves the rest out."""

    config_from_hf: Callable[[dict[str, Any]], ModelConfig]
    config_to_hf: Callable[[ModelConfig], dict[str, Any]]
    param_specs: Callable[[ModelConfig], dict[str, Any]]
    key_map: Callable[[ModelConfig], dict[str, TensorKey]]
    hidden: Callable[..., Array] = decoder.hidden
    init_cache: Callable[..., Any] = decoder_cached.init_cache
    move_cache: Callable[..., Any] = decoder_cached.move_cache
    unrolled: Callable[..., Params] = decoder_cached.unrolled
    hidden_cached: Callable[..., tuple[Array, Any]] = decoder_cached.hidden_cached
    hidden_and_states: Callable[..., tuple[Array, Array]] | None = shared_prefix.hidden_and_states


# model_type of config.json -> family
FAMILIES: dict[str, Family] = {
    "gemma3_text": Family(gemma3.config_from_hf, gemma3.config_to_hf, gemma3.param_specs, gemma3.key_map),
    "llama": Family(llama.config_from_hf, llama.config_to_hf, llama.param_specs, llama.key_map),
    "qwen2": Family(qwen2.config_from_hf, qwen2.config_to_hf, qwen2.param_specs, qwen2.key_map),
    "qwen3": Family(qwen3.config_from_hf, qwen3.config_to_hf, qwen3.param_specs, qwen3.key_map),
}
# model_type of models of more than text -> the family of their text part
TEXT_PARTS: dict[str, str] = {"gemma3": "gemma3_text"}


def family_of(cfg: ModelConfig) -> Family:
    """The family record of `cfg`."""
    if cfg.family.startswith(flax_models.PREFIX):
        return Family(**flax_models.functions(cfg.family))
    return registry.lookup(FAMILIES, cfg.family, "ModelConfig.family")


def config_from_hf(config: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a `config.json` dictionary, by its model_type."""
    kind = config.get("model_type") or ""
    return registry.lookup(FAMILIES, TEXT_PARTS.get(kind, kind), "config.json model_type").config_from_hf(config)


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The `config.json` dictionary of `cfg`, as transformers reads it."""
    return family_of(cfg).config_to_hf(cfg)


def param_specs(cfg: ModelConfig) -> dict[str, Any]:
    """A tree of ParamSpec(shape, axes, init); see params.py for its names."""
    return family_of(cfg).param_specs(cfg)


def key_map(cfg: ModelConfig) -> dict[str, TensorKey]:
    """Checkpoint tensor name -> its place in the tree, a bijection with the (leaf, layer) pairs of `param_specs`."""
    return family_of(cfg).key_map(cfg)


def abstract_params(cfg: ModelConfig, rules: Rules = Rules(), dtype: Any = jnp.float32) -> Any:
    """The parameter tree as ShapeDtypeStruct, with storage shardings when `rules` has a mesh."""
    return abstract(param_specs(cfg), rules, dtype)


def init_params(cfg: ModelConfig, key: Array, rules: Rules = Rules()) -> Params:
    """Random float32 parameters, stored as `rules` says; the same on every mesh but for rounding."""
    return init(param_specs(cfg), key, rules)


def hidden(
    cfg: ModelConfig,
    params: Params,
    tokens: Array,
    segment_ids: Array,
    positions: Array,
    *,
    rules: Rules = Rules(),
    compute_dtype: Any = jnp.float32,
    remat: str = "none",
) -> Array:
    """The trunk: tokens, segment_ids, positions [B, T] -> hidden states [B, T, D] after the final norm.

    Attention is causal and stays within a segment; segment 0 is padding. Parameters are used in `compute_dtype`; norms,
    RoPE and softmax are in float32. remat: "none" | "dots" | "full", what the backward pass recomputes.
    """
    run = family_of(cfg).hidden
    return run(cfg, params, tokens, segment_ids, positions, rules=rules, compute_dtype=compute_dtype, remat=remat)


def head(cfg: ModelConfig, params: Params, *, compute_dtype: Any = jnp.float32) -> Head:
    """The last linear map, as it is stored: the embedding [V, D] itself if tied, else [D, V]."""
    weight = params["embed" if cfg.tied else "head"].astype(compute_dtype)
    return Head(weight, vocab_size=cfg.vocab_size, vocab_major=cfg.tied, soft_cap=cfg.logit_soft_cap)


def init_cache(cfg: ModelConfig, batch: int, capacity: int, dtype: Any = jnp.float32, *, rules: Rules = Rules()) -> Any:
    """An empty cache for `capacity` positions of each row."""
    return family_of(cfg).init_cache(cfg, batch, capacity, dtype, rules=rules)


def hidden_cached(
    cfg: ModelConfig,
    params: Params,
    tokens: Array,
    positions: Array,
    cache: Any,
    *,
    rules: Rules = Rules(),
    compute_dtype: Any = jnp.float32,
) -> tuple[Array, Any]:
    """Hidden states [B, T, D] of tokens [B, T] at `positions` [B, T], after those in the cache; and the filled cache.

    T > 1: whole prompts, from their first tokens on, into an empty cache. T = 1: one more token of every row. Prompts
    of different lengths are padded on the right; a query sees what is at positions <= its own.
    """
    run = family_of(cfg).hidden_cached
    return run(cfg, params, tokens, positions, cache, rules=rules, compute_dtype=compute_dtype)


def shares_prefixes(cfg: ModelConfig) -> bool:
    """Whether `hidden_and_states` runs for this model."""
    return family_of(cfg).hidden_and_states is not None


def hidden_and_states(
    cfg: ModelConfig,
    params: Params,
    tokens: Array,
    segment_ids: Array,
    positions: Array,
    *,
    question: int,
    answers: int,
    tap: str = "",
    rules: Rules = Rules(),
    compute_dtype: Any = jnp.float32,
) -> tuple[Array, Array]:
    """Hidden states [B, T, D] and tapped states [B, T, F] of rows of a question and its answers; see shared_prefix.py.

    Raises ValueError for a model whose layers kdjax does not know, for an unknown tap and a row of another length.
    """
    run = family_of(cfg).hidden_and_states
    if run is None:
        raise ValueError(
            f"the model must be of a family of kdjax for its layers to be looked into, got {cfg.family!r}. Take its "
            "hidden states alone, one answer a row."
        )
    parts = {"question": question, "answers": answers, "tap": tap}
    return run(cfg, params, tokens, segment_ids, positions, rules=rules, compute_dtype=compute_dtype, **parts)
