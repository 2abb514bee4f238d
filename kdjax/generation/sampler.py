"""Sampling with a key/value cache: prompts are read in one pass and shared by their samples, then a token a step.

`sample` is one compiled program. `begin`, `refill` and `advance` are its parts, for callers who look at the text in
between and let answers that wait take the rows of finished ones.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax.generation.sampling import Sampling, next_tokens
from kdjax.kernels.tiles import tile_logits
from kdjax.models import ModelConfig, family_of, head, hidden_cached, init_cache
from kdjax.sharding import Rules
from kdjax.types import Array, Params


class Sampled(NamedTuple):
    """n answers to each of P prompts.

    tokens: int32 [P, n, new_tokens], 0 after the end. logp: float32, the same shape: log-probabilities in nats under
    the model itself, at temperature 1 and without filters, over the ids below vocab_size. counts: int32 [P, n], tokens
    before the end token. stopped: bool [P, n]; where it is true, tokens[..., counts] is the end token, with its logp.
    """

    tokens: Array
    logp: Array
    counts: Array
    stopped: Array


class Rows(NamedTuple):
    """One row per answer. keys, lengths (of the prompts), token (the newest), counts, alive, stopped: [R];

    tokens, logp: [R, new_tokens]. A row that is alive has `counts` tokens and goes on.
    """

    keys: Array
    lengths: Array
    token: Array
    counts: Array
    alive: Array
    stopped: Array
    tokens: Array
    logp: Array


class State(NamedTuple):
    """Answers under way; or R = P * n that wait, with their first tokens, and a cache of their P prompts alone."""

    rows: Rows
    cache: Any


@dataclasses.dataclass(frozen=True)
class How:
    """What a program is compiled for, besides shapes; see `sample`."""

    settings: Sampling
    new_tokens: int
    eos_ids: tuple[int, ...] = ()
    vocab_size: int | None = None
    compute_dtype: Any = jnp.float32
    rules: Rules = Rules()

    def __post_init__(self) -> None:
        # The axis along which `sequence` splits activations has length 1 here.
        object.__setattr__(self, "rules", dataclasses.replace(self.rules, sequence=False))


def sample(
    cfg: ModelConfig,
    params: Params,
    prompts: ArrayLike,
    lengths: ArrayLike,
    keys: Array,
    *,
    settings: Sampling,
    new_tokens: int,
    eos_ids: tuple[int, ...] = (),
    vocab_size: int | None = None,
    compute_dtype: Any = jnp.float32,
    rules: Rules = Rules(),
) -> Sampled:
    """n answers to each of P prompts, in one compiled program.

    prompts: int32 [P, W], padded on the right with any ids; lengths: int32 [P], at least 1; keys: typed keys [P, n]. On
    a mesh all are split along P as `rules` says, and params are stored by it. A row depends on its prompt and its key
    only: token number t is drawn with fold_in(key, t). It ends at a token of `eos_ids`, or with new_tokens.
    vocab_size: only ids below it are generated.
    Raises ValueError for a number of prompts that the devices do not divide.
    """
    how = How(settings, new_tokens, eos_ids, vocab_size, compute_dtype, rules)
    return _sample(cfg, how, params, prompts, lengths, keys)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sample(cfg: ModelConfig, how: How, params: Params, prompts: Array, lengths: Array, keys: Array) -> Sampled:
    wanted = jnp.ones_like(keys, bool)
    waiting = _begin(cfg, how, params, prompts, lengths, keys, wanted)
    one = how.rules.batch_spec(1)
    own = how.rules.rowwise(lambda row: jnp.arange(row.size, dtype=jnp.int32), (one,), one)(waiting.rows.token)
    state = _refill(cfg, how, None, waiting, own)
    fast, none = _fast(cfg, how.rules, how.compute_dtype, params), jnp.int32(0)
    rows = _advance(cfg, how, fast, state, jnp.int32(how.new_tokens), none).rows

    def by_prompt(part: Array) -> Array:
        return part.reshape(-1, keys.shape[1], *part.shape[1:])

    def split(rows: Rows) -> Sampled:
        return Sampled(*(by_prompt(part) for part in (rows.tokens, rows.logp, rows.counts, rows.stopped)))

    two: Any = how.rules.batch_spec(2)
    three: Any = how.rules.batch_spec(3)
    specs = Sampled(three, three, two, two)
    return how.rules.rowwise(split, (_row_specs(how.rules),), specs)(rows)


def _begin(
    cfg: ModelConfig, how: How, params: Params, prompts: Array, lengths: Array, keys: Array, wanted: Array
) -> State:
    """The prompts read, and the first token of each of their answers, which wait. wanted: bool [P, n]."""
    rules, (count, width), samples = how.rules, prompts.shape, keys.shape[1]
    if count % rules.batch_shards:
        raise ValueError(
            f"prompts must be a multiple of {rules.batch_shards} rows, got {count}; every device takes as many. Pad "
            "them with rows to be thrown away."
        )

    def places(prompts: Array) -> Array:
        return jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], prompts.shape)

    row, rows_of = rules.batch_spec(2), _row_specs(rules)
    positions = rules.rowwise(places, (row,), row)(prompts)
    cache = init_cache(cfg, count, width, how.compute_dtype, rules=rules)
    hidden, cache = hidden_cached(cfg, params, prompts, positions, cache, rules=rules, compute_dtype=how.compute_dtype)

    def spread(hidden: Array, lengths: Array, keys: Array, wanted: Array) -> tuple[Array, Rows]:
        hidden = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], 1)
        keys = keys.reshape(-1)
        zeros = jnp.zeros(keys.shape, jnp.int32)
        lengths, alive = jnp.repeat(lengths, samples), wanted.reshape(-1)
        made = jnp.zeros((keys.shape[0], how.new_tokens), jnp.int32)
        rows = Rows(keys, lengths, zeros, zeros, alive, jnp.zeros_like(alive), made, made.astype(jnp.float32))
        return jnp.repeat(hidden, samples, 0), rows

    specs = (rules.batch_spec(3), rules.batch_spec(1), row, row)
    hidden, rows = rules.rowwise(spread, specs, (rules.batch_spec(3), rows_of))(hidden, lengths, keys, wanted)
    return State(_record(cfg, how, params, hidden, rows), cache)


def _refill(cfg: ModelConfig, how: How, state: State | None, waiting: State, source: Array) -> State:
    """`state`, None for the first, where row r goes on with row source[r] of `waiting`, and as it is if that is < 0.

    Both have as many rows; source: int32 [R], counted among the rows on the same device.
    """
    rules, rows_of = how.rules, _row_specs(how.rules)
    cache = family_of(cfg).move_cache(
        cfg,
        None if state is None else state.cache,
        waiting.cache,
        source,
        how.new_tokens,
        layers=unrolls(rules),
        rules=rules,
    )

    def own(rows: Rows, waiting: Rows, source: Array) -> Rows:
        def pick(old: Array, new: Array) -> Array:
            return jnp.where((source >= 0).reshape(-1, *[1] * (old.ndim - 1)), new[jnp.maximum(source, 0)], old)

        return jax.tree.map(pick, rows, waiting)

    rows = waiting.rows._replace(alive=jnp.zeros_like(waiting.rows.alive)) if state is None else state.rows
    specs = (rows_of, rows_of, rules.batch_spec(1))
    return State(rules.rowwise(own, specs, rows_of)(rows, waiting.rows, source), cache)


def _advance(cfg: ModelConfig, how: How, fast: Params, state: State, steps: Array, enough: Array) -> State:
    """Token after token, at most `steps`, until no more than `enough` rows are alive. fast: of `fast_params`."""

    def unfinished(carry: tuple[Array, State]) -> Array:
        made, (rows, _) = carry
        return (made < steps) & (jnp.sum(rows.alive) > enough)

    def step(carry: tuple[Array, State]) -> tuple[Array, State]:
        made, (rows, cache) = carry
        at = (rows.lengths + rows.counts - 1)[:, None]
        hidden, cache = hidden_cached(
            cfg, fast, rows.token[:, None], at, cache, rules=how.rules, compute_dtype=how.compute_dtype
        )
        return made + 1, State(_record(cfg, how, fast, hidden, rows), cache)

    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1]


def _record(cfg: ModelConfig, how: How, params: Params, hidden: Array, rows: Rows) -> Rows:
    """The rows with one more token, drawn from the head's logits at hidden [R, 1, D]."""
    rules, last = how.rules, head(cfg, params, compute_dtype=how.compute_dtype)
    last = dataclasses.replace(last, vocab_size=min(last.vocab_size, how.vocab_size or last.vocab_size))
    sides = (rules.batch_spec(3), jax.typeof(last.weight).sharding.spec)

    def own(hidden: Array, weight: Array, rows: Rows) -> Rows:
        ((hidden, whole),) = rules.with_heads([(hidden, dataclasses.replace(last, weight=weight))], [sides])
        logits = tile_logits(hidden[:, 0], whole)
        if whole.vocab_axis:
            logits = jax.lax.all_gather(logits, whole.vocab_axis, axis=1, tiled=True)
        keys = jax.vmap(jax.random.fold_in)(rows.keys, rows.counts)
        token, logp = next_tokens(logits, keys, how.settings)
        ends = rows.alive & jnp.isin(token, jnp.asarray(how.eos_ids, jnp.int32))
        counts = rows.counts + (rows.alive & ~ends)
        here = rows.alive[:, None] & (jnp.arange(how.new_tokens)[None] == rows.counts[:, None])

        def put(old: Array, new: Array) -> Array:
            return jnp.where(here, new[:, None], old)

        return rows._replace(
            token=token,
            counts=counts,
            alive=rows.alive & ~ends & (counts < how.new_tokens),
            stopped=rows.stopped | ends,
            tokens=put(rows.tokens, token),
            logp=put(rows.logp, logp),
        )

    specs = _row_specs(rules)
    return rules.rowwise(own, (*sides, specs), specs)(hidden, last.weight, rows)


def _row_specs(rules: Rules) -> Any:
    """The PartitionSpecs of `Rows`."""
    one: Any = rules.batch_spec(1)
    two: Any = rules.batch_spec(2)
    return Rows(one, one, one, one, one, one, two, two)


def unrolls(rules: Rules) -> bool:
    """Whether steps run layer by layer, on parameters made for that: on one device that is a CPU."""
    return rules.mesh is None and jax.default_backend() == "cpu"


def _fast(cfg: ModelConfig, rules: Rules, compute_dtype: Any, params: Params) -> Params:
    """The parameters as `advance` wants them."""
    return family_of(cfg).unrolled(cfg, params, compute_dtype) if unrolls(rules) else params


fast_params = jax.jit(_fast, static_argnums=(0, 1, 2))
begin = jax.jit(_begin, static_argnums=(0, 1))
refill = jax.jit(_refill, static_argnums=(0, 1), donate_argnums=2)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def advance(
    cfg: ModelConfig, how: How, fast: Params, state: State, steps: Array, enough: Array, halted: Array
) -> State:
    """`state`, which is used up, with at most `steps` more tokens, until no more than `enough` rows are unfinished.

    halted: bool [R], rows that are not gone on with.
    """
    rows = state.rows._replace(alive=state.rows.alive & ~halted)
    return _advance(cfg, how, fast, state._replace(rows=rows), steps, enough)
