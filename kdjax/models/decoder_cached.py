"""The shared decoder with a cache of keys and values: prompts in one pass, then a token of every row at a time."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from kdjax.kernels.attention import attend
from kdjax.models.decoder import (
    Product,
    at_use,
    attention_block,
    embed,
    feed_forward,
    flattened,
    in_reach,
    kinds_of,
    norm,
    ropes,
    trunk,
)
from kdjax.models.layers import project, project_few
from kdjax.models.params import ModelConfig
from kdjax.sharding import Rules
from kdjax.types import Params

Pair = tuple[Array, Array]  # keys and values
EMPTY = 2**30  # the position of a place in a cache that holds nothing: after every query


class Cache(NamedTuple):
    """Keys and values [L, B, G, C, H] in C places: prompts fill the first, then new tokens the others, in turn.

    All rows fill the same place, and the first after the prompts comes after the last: so a row may begin at any time.
    keys, values: with parameters of `unrolled` a tuple of L arrays [B, G, C, H] each.
    positions: int32 [B, C], where in its text each is. slot: int32 [], the place that is filled next.
    """

    keys: Any
    values: Any
    positions: Array
    slot: Array
    prompts: Array  # int32 [], how many places prompts have


def unrolled(cfg: ModelConfig, params: Params, dtype: Any = jnp.float32) -> Params:
    """The parameters as a step of one token reads them fastest on CPU: a tuple of layers, matrices as [out, in].

    There a step takes as long as the weights take to be read: a layer that is cut out of a stack is copied first, and
    few columns are multiplied fastest from the right. For `hidden_cached` of one token; one device.
    """

    def turned(name: str, leaf: Array) -> Array:
        if name.endswith("_norm"):
            return leaf
        flat = flattened(name, leaf.astype(dtype))
        return flat.T if flat.ndim == 2 else flat

    stack = params["layers"]
    layers = [{name: turned(name, leaf[at]) for name, leaf in stack.items()} for at in range(cfg.layers)]
    return {**params, "layers": tuple(layers)}


def init_cache(
    cfg: ModelConfig,
    batch: int,
    capacity: int,
    dtype: Any = jnp.float32,
    *,
    layers: bool = False,
    rules: Rules = Rules(),
) -> Cache:
    """An empty cache of `capacity` places for `batch` rows. layers: for parameters of `unrolled`."""
    rows, heads = batch // rules.batch_shards, cfg.kv_heads // rules.model_shards

    def empty() -> Cache:
        shape = (rows, heads, capacity, cfg.head_dim)

        def zeros() -> Any:
            if layers:
                return tuple(jnp.zeros(shape, dtype) for _ in range(cfg.layers))
            return jnp.zeros((cfg.layers, *shape), dtype)

        return Cache(zeros(), zeros(), jnp.full((rows, capacity), EMPTY, jnp.int32), jnp.int32(0), jnp.int32(0))

    return rules.rowwise(empty, (), _cache_specs(rules))()


def move_cache(
    cfg: ModelConfig,
    cache: Cache | None,
    read: Cache,
    source: Int[Array, "R"],
    new_tokens: int,
    *,
    layers: bool = False,
    rules: Rules = Rules(),
) -> Cache:
    """The cache of R rows under way, where those with source >= 0 begin anew, on prompts out of `read`.

    cache: None = no row is under way. read: of P prompts, each with R / P answers that wait; source: which of these a
    row takes, counted on its own device; at most new_tokens may come after a prompt. layers: as in `init_cache`.
    Rows are copied one by one, in place.
    """
    width = read.positions.shape[1]
    if cache is None:
        cache = init_cache(cfg, source.shape[0], width + new_tokens, read.keys.dtype, layers=layers, rules=rules)

    def move(cache: Cache, read: Cache, source: Array) -> Cache:
        fresh = source >= 0
        rows, prompts = jnp.argsort(~fresh), source // (source.shape[0] // read.positions.shape[0])
        places = jnp.pad(read.positions, ((0, 0), (0, cache.positions.shape[1] - width)), constant_values=EMPTY)

        def put(old: Array, new: Array, row: Array, axis: int) -> Array:
            new = jax.lax.dynamic_index_in_dim(new, prompts[row], axis)
            return jax.lax.dynamic_update_slice(old, new, [row if at == axis else 0 for at in range(old.ndim)])

        def one(number: Array, cache: Cache) -> Cache:
            def both(old: Any, new: Array) -> Any:
                if isinstance(old, tuple):
                    return tuple(put(part, new[at], rows[number], 0) for at, part in enumerate(old))
                return put(old, new, rows[number], 1)

            keys, values = both(cache.keys, read.keys), both(cache.values, read.values)
            return cache._replace(keys=keys, values=values, positions=put(cache.positions, places, rows[number], 0))

        cache = cache._replace(slot=jnp.maximum(cache.slot, read.slot), prompts=read.slot)
        return jax.lax.fori_loop(0, jnp.sum(fresh), one, cache)

    specs = _cache_specs(rules)
    return rules.rowwise(move, (specs, specs, rules.batch_spec(1)), specs)(cache, read, source)


def hidden_cached(
    cfg: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: Cache,
    *,
    rules: Rules = Rules(),
    compute_dtype: Any = jnp.float32,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Hidden states of tokens that come after those in the cache, and the cache with them added.

    T > 1: rows from their first token on, into an empty cache. T = 1: the next token of every row. A query sees what is
    at positions <= its own. So padding on the right of a prompt is never seen: what is at or after the position of a
    new token is forgotten. Nothing is kept for a gradient.
    """
    if tokens.shape[1] == 1:
        return _step(cfg, params, tokens, positions, cache, rules, compute_dtype)
    alone = jnp.ones_like(tokens)
    x, (keys, values) = trunk(cfg, params, tokens, alone, positions, rules, compute_dtype, None)

    def fill(keys: Array, values: Array, positions: Array, cache: Cache) -> Cache:
        def put(old: Array, new: Array, axis: int) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), 0, axis)

        keys, values = (
            put(old, new.transpose(0, 1, 3, 2, 4), 3) for old, new in ((cache.keys, keys), (cache.values, values))
        )
        width = jnp.int32(positions.shape[1])
        return Cache(keys, values, put(cache.positions, positions, 1), width, width)

    specs, row = _cache_specs(rules), P(None, *rules.heads_spec)
    return x, rules.rowwise(fill, (row, row, rules.batch_spec(2), specs), specs)(keys, values, positions, cache)


def _step(
    cfg: ModelConfig, params: Params, tokens: Array, positions: Array, cache: Cache, rules: Rules, compute_dtype: Any
) -> tuple[Array, Cache]:
    rope_of, kinds, slot = ropes(cfg, positions), kinds_of(cfg), cache.slot
    places = jnp.where(cache.positions >= positions, EMPTY, cache.positions)
    places = jax.lax.dynamic_update_slice_in_dim(places, positions, slot, 1)
    distance = positions - places
    both = (_cache_specs(rules).keys,) * 2
    specs = (*[rules.heads_spec] * 3, both, rules.batch_spec(2), P(), P()), (rules.heads_spec, both)
    mixer = rules.rowwise(functools.partial(_mix_into, cfg.attn_soft_cap), *specs)

    def layer(
        x: Array, caches: Pair, weights: Params, local: Array | None, number: Array | None, product: Product
    ) -> tuple[Array, Pair]:
        filled = []

        def mix(q: Array, k: Array, v: Array) -> Array:
            mixed, new = mixer(q, k, v, caches, in_reach(cfg, distance, local), slot, number)
            filled.append(new)
            return mixed

        x = attention_block(cfg, weights, x, rope_of(local), mix, rules, product)
        return feed_forward(cfg, weights, x, rules, product), filled[0]

    def scanned(carry: tuple[Array, Pair], inputs: tuple) -> tuple[tuple[Array, Pair], None]:
        weights, local, number = inputs
        return layer(*carry, at_use(weights, rules, compute_dtype), local, number, project), None

    x = embed(cfg, params, tokens, rules, compute_dtype)
    keys: Any
    values: Any
    if isinstance(params["layers"], tuple):
        filled = []  # a pair a layer
        for at, weights in enumerate(params["layers"]):
            local = None if kinds is None else kinds[at]
            x, new = layer(x, (cache.keys[at], cache.values[at]), weights, local, None, project_few)
            filled.append(new)
        keys, values = zip(*filled, strict=True)
    else:
        inputs = params["layers"], kinds, jnp.arange(cfg.layers)
        (x, (keys, values)), _ = jax.lax.scan(scanned, (x, (cache.keys, cache.values)), inputs)
    x = rules.reshard(norm(cfg, x, params["final_norm"]), rules.batch_spec(3))
    after = jnp.where(slot + 1 == places.shape[1], cache.prompts, slot + 1)
    return x, Cache(keys, values, places, after, cache.prompts)


def _mix_into(
    soft_cap: float, q: Array, k: Array, v: Array, caches: Pair, seen: Array, slot: Array, number: Array | None
) -> tuple[Array, Pair]:
    """Attention over the keys that are seen [B, C], and the caches with k and v at `slot` of layer `number`.

    number: None if the caches are those of one layer. They are written in place; as a scanned input they would be
    copied whole for every token.
    """
    filled, own = [], []
    for old, new in zip(caches, (k, v), strict=True):
        new = new.transpose(0, 2, 1, 3).astype(old.dtype)
        if number is None:
            filled.append(jax.lax.dynamic_update_slice_in_dim(old, new, slot, 2))
            own.append(filled[-1])
        else:
            filled.append(jax.lax.dynamic_update_slice(old, new[None], (number, 0, 0, slot, 0)))
            own.append(jax.lax.dynamic_index_in_dim(filled[-1], number, keepdims=False))
    keys, values = (part.transpose(0, 2, 1, 3).astype(q.dtype) for part in own)
    return attend(q, keys, values, seen[:, None], soft_cap=soft_cap), (filled[0], filled[1])


def _cache_specs(rules: Rules) -> Any:
    """How a cache is split over the devices: rows as everywhere, heads with tensor parallelism."""
    batch, _, heads, width = rules.heads_spec
    whole: Any = P(None, batch, heads, None, width)
    row: Any = rules.batch_spec(2)
    one: Any = P()
    return Cache(whole, whole, row, one, one)
