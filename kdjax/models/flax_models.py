"""Models of `flax_bridge` by their path, "flax:module:attribute": opened, loaded, run on a mesh, continued.

What `io`, `tokenizer` and the table of families call; users write only what flax_bridge.py shows.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import registry
from kdjax.models.flax_bridge import PREFIX, FlaxModel, batch_of, path_name
from kdjax.models.params import ModelConfig, ParamSpec
from kdjax.sharding import Rules
from kdjax.types import Array, Params

_newest: dict[str, tuple[Any, str]] = {}  # path -> (the object that it named, ModelConfig.family of its model)
_models: dict[str, FlaxModel] = {}  # ModelConfig.family -> the model; its params are () once they were loaded


def open_model(path: str, where: str = "teacher.path") -> FlaxModel:
    """The model that "flax:module:attribute" names: a FlaxModel, or a function without arguments that returns one.

    The function is called once, and again if the name stands for another one, as in a notebook. Raises ValueError that
    leads with `where`.
    """
    found: Any = registry.lookup({}, path.removeprefix(PREFIX), where)
    if path not in _newest or _newest[path][0] is not found:
        _make(path, found, where)
    return _models[_newest[path][1]]


def load(path: str, dtype: Any, rules: Rules, where: str = "teacher.path") -> tuple[ModelConfig, Params, str]:
    """(config, weights in `dtype` stored as `rules` says, fingerprint); integers stay what they are.

    The bridge lets go of the module's own arrays; another call makes the module anew. Raises ValueError for a module
    without weights, for a student with parameters that have no gradient, and for tensor parallelism.
    """
    model = open_model(path, where)
    if isinstance(model.params, tuple):
        model = _make(path, _newest[path][0], where)
    _check_preset(rules, where.partition(".")[0])
    for at, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(f"{where} must be a model with weights, got shapes alone from {path!r}. Load them in it.")
        if where.startswith("student") and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"{where} must be a model of floating-point parameters, got {leaf.dtype} in {path_name(at)!r} of "
                f"{path!r}; a student's are trained. Take weights that are not quantised."
            )
    digest = fingerprint(model)

    def stored(leaf: Any, spec: ParamSpec) -> Array:
        host = leaf if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable else np.asarray(leaf)
        cast = host.astype(dtype) if jnp.issubdtype(host.dtype, jnp.floating) else host
        return jax.device_put(cast, rules.storage(spec.axes, spec.shape))

    params = jax.tree.map(stored, model.params, model.specs)
    _models[model.cfg.family] = dataclasses.replace(model, params=())
    return model.cfg, params, digest


def fingerprint(model: FlaxModel) -> str:
    """sha256 hex over weights and constant state as they came, sizes and `version`; the code itself is not in it."""
    digest = hashlib.sha256(f"{model.constants} {dataclasses.replace(model.cfg, family='')}".encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        digest.update(f"{path_name(path)} {leaf.shape} {leaf.dtype}".encode())
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding) and not leaf.is_fully_addressable:
            leaf = jax.device_put(leaf, NamedSharding(leaf.sharding.mesh, P()))
        digest.update(np.ascontiguousarray(np.asarray(leaf)).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def fingerprint_of(path: str, where: str = "teacher.path") -> str:
    """The fingerprint of a path's model; the module is made anew if its weights were loaded before."""
    model = open_model(path, where)
    return fingerprint(_make(path, _newest[path][0], where) if isinstance(model.params, tuple) else model)


def tokenizer_of(path: str, where: str = "data.tokenizer") -> str:
    """Where the tokenizer of a path's model is. Raises ValueError if the model does not say."""
    found = open_model(path, where).tokenizer
    if not found:
        raise ValueError(
            f"{where} must be a model with a tokenizer, got {path!r}, which names none. Set data.tokenizer, or "
            "tokenizer= where flax_bridge makes the model."
        )
    return found


def check_packing(cfg: ModelConfig | None, where: str) -> None:
    """Raises ValueError if documents that share a row would see each other in this model."""
    if cfg is not None and cfg.family in _models and not _models[cfg.family].reads_segments:
        raise ValueError(
            f"data.packing must be 'row' with {where}={_path_of(cfg.family)!r}, got 'pack'; its `hidden` does not read "
            "batch.segment_ids, so documents that share a row would see each other. Set data.packing='row', or give "
            "the module flax_bridge.attention_mask(batch)."
        )


def refuse_init(kind: str, path: str) -> None:
    """Raises ValueError for a student that is to be cut from, or drawn like, a Flax model."""
    if kind != "own" and path.startswith(PREFIX):
        raise ValueError(
            f"student.init.kind must be 'own' with {path!r}, got {kind!r}; kdjax does not know the layers of a Flax "
            "model. Make the student in a function of its own and set student.path='flax:module:function'."
        )


def functions(family: str) -> dict[str, Any]:
    """The fields of a `models.Family` for the family of an opened model."""

    def refuse(*_: Any) -> Any:
        raise ValueError(
            "the model must be of a family of kdjax to be written as a Hugging Face directory, got "
            f"{_path_of(family)!r}, whose tensors have names of their own. Take the parameters from the checkpoint and "
            "save them with its own tools."
        )

    return {
        "config_from_hf": refuse,
        "config_to_hf": refuse,
        "key_map": refuse,
        "param_specs": lambda cfg: _models[cfg.family].specs,
        "hidden": hidden,
        "init_cache": init_cache,
        "move_cache": move_cache,
        "unrolled": lambda cfg, params, dtype: params,
        "hidden_cached": hidden_cached,
        "hidden_and_states": None,
    }


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
    """As `models.hidden`: the module on each device's own rows, with parameters that are gathered there."""
    if remat != "none":
        raise ValueError(
            f"student.remat must be 'none' with {_path_of(cfg.family)!r}, got {remat!r}; the module itself says what "
            "the backward pass recomputes. Use nnx.remat or nn.remat in it."
        )
    _check_preset(rules, "mesh")
    model = _models[cfg.family]
    specs = jax.tree.map(lambda spec: rules.storage_spec(spec.axes, spec.shape), model.specs)

    def whole(part: Array, spec: P) -> Array:
        # Cast first, so that less moves; the gradient is reduce-scattered back.
        part = part.astype(compute_dtype) if jnp.issubdtype(part.dtype, jnp.floating) else part
        for axis, names in enumerate(spec):
            if names is not None:
                part = jax.lax.all_gather(part, names, axis=axis, tiled=True)
        return part

    def local(params: Params, tokens: Array, segment_ids: Array, positions: Array) -> Array:
        found = model.hidden(jax.tree.map(whole, params, specs), batch_of(tokens, segment_ids, positions))
        return found.astype(compute_dtype)

    row = rules.batch_spec(2)
    return rules.rowwise(local, (specs, row, row, row), rules.batch_spec(3))(params, tokens, segment_ids, positions)


def init_cache(
    cfg: ModelConfig,
    batch: int,
    capacity: int,
    dtype: Any = jnp.float32,
    *,
    layers: bool = False,
    rules: Rules = Rules(),
) -> Array:
    """The tokens so far, int32 [B, C]; the module is run on all of them for every new one."""
    rows, spec = batch // rules.batch_shards, rules.batch_spec(2)
    return rules.rowwise(lambda: jnp.zeros((rows, capacity), jnp.int32), (), spec)()


def move_cache(
    cfg: ModelConfig,
    cache: Array | None,
    read: Array,
    source: Array,
    new_tokens: int,
    *,
    layers: bool = False,
    rules: Rules = Rules(),
) -> Array:
    """As `decoder_cached.move_cache`, which says what the arguments are."""
    if cache is None:
        cache = init_cache(cfg, source.shape[0], read.shape[1] + new_tokens, rules=rules)

    def move(cache: Array, read: Array, source: Array) -> Array:
        prompts = jnp.maximum(source, 0) // (source.shape[0] // read.shape[0])
        new = jnp.pad(read[prompts], ((0, 0), (0, cache.shape[1] - read.shape[1])))
        return jnp.where(source[:, None] >= 0, new, cache)

    row = rules.batch_spec(2)
    return rules.rowwise(move, (row, row, rules.batch_spec(1)), row)(cache, read, source)


def hidden_cached(
    cfg: ModelConfig,
    params: Params,
    tokens: Array,
    positions: Array,
    cache: Array,
    *,
    rules: Rules = Rules(),
    compute_dtype: Any = jnp.float32,
) -> tuple[Array, Array]:
    """As `models.hidden_cached`; what is right of a position is not seen by a causal model."""
    row, states = rules.batch_spec(2), rules.batch_spec(3)

    def put(cache: Array, tokens: Array, positions: Array) -> tuple[Array, Array]:
        cache = cache.at[jnp.arange(cache.shape[0])[:, None], positions].set(tokens.astype(jnp.int32))
        return cache, jnp.broadcast_to(jnp.arange(cache.shape[1], dtype=jnp.int32)[None], cache.shape)

    def at_positions(found: Array, positions: Array) -> Array:
        return jnp.take_along_axis(found, positions[:, :, None], axis=1)

    cache, at = rules.rowwise(put, (row, row, row), (row, row))(cache, tokens, positions)
    found = hidden(cfg, params, cache, jnp.ones_like(cache), at, rules=rules, compute_dtype=compute_dtype)
    return rules.rowwise(at_positions, (states, row), states)(found, positions), cache


def _path_of(family: str) -> str:
    return family.partition("#")[0]


def _make(path: str, found: Any, where: str) -> FlaxModel:
    model = found() if callable(found) else found
    if not isinstance(model, FlaxModel):
        raise ValueError(
            f"{where} must name a FlaxModel or a function without arguments that returns one, got {path!r} with "
            f"{type(model).__name__}. Return what flax_bridge.from_nnx or from_linen returns."
        )
    # A family of its own each time: programs that were compiled for an older model of this name are not for this one.
    family = path if path not in _models else f"{path}#{len(_models)}"
    model = dataclasses.replace(model, cfg=dataclasses.replace(model.cfg, family=family))
    _newest[path], _models[family] = (found, family), model
    return model


def _check_preset(rules: Rules, side: str) -> None:
    if rules.mesh is not None and rules.preset.tensor:
        where = "teacher.preset" if side == "teacher" else "mesh.preset"
        raise ValueError(
            f"{where} must be 'dp' or 'fsdp' with a Flax model, got one of tensor parallelism; the module does not say "
            f"how its work is split. Set {where}='fsdp': on the same mesh the model axis then splits rows."
        )
