"""Decoding with a key/value cache: prompts are read in one pass, then one token a step, all in one compiled program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from kdjax.kernels.linear_stats import linear_stats
from kdjax.models import ModelConfig, head, hidden_cached, init_cache
from kdjax.types import Array, Head, Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
PROMPT_BLOCK = 32  # prompts are padded to a multiple of this, so that few lengths compile


@functools.partial(
    jax.jit, static_argnames=("cfg", "new_tokens", "eos_ids", "vocab_size", "compute_dtype", "implementation")
)
def greedy(
    cfg: ModelConfig,
    params: Params,
    prompts: Array,
    lengths: Array,
    *,
    new_tokens: int,
    eos_ids: tuple[int, ...] = (),
    vocab_size: int | None = None,
    compute_dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """The most likely token at every step, the lower id on ties: (tokens int32 [B, new_tokens], how many of them [B]).

    prompts: int32 [B, P], padded on the right; lengths: int32 [B], at least 1. A row stops at a token of `eos_ids`,
    which is not counted; what follows it in the row says nothing. Padding is never seen: the keys that it left in the
    cache lie after the query until the row's own tokens overwrite them. vocab_size: only ids below it are generated.
    """
    rows, width = prompts.shape
    last = head(cfg, params, compute_dtype=compute_dtype)
    last = dataclasses.replace(last, vocab_size=min(last.vocab_size, vocab_size or last.vocab_size))
    cache = init_cache(cfg, rows, width + new_tokens, compute_dtype)
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), prompts.shape)
    hidden, cache = hidden_cached(cfg, params, prompts, positions, cache, compute_dtype=compute_dtype)
    hidden = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    stop = jnp.asarray(eos_ids, jnp.int32)

    def record(made: Array, hidden: Array, counts: Array, out: Array) -> tuple:
        """Token number `made` of the rows that were still going on then, i.e. that have `made` tokens."""
        token = _most_likely(hidden[:, 0], last, implementation)
        goes_on = (counts == made) & ~jnp.isin(token, stop)
        return made + 1, token, counts + goes_on, out.at[:, made].set(token)

    def unfinished(state: tuple) -> Array:
        made, _, counts, _, _ = state
        return (made < new_tokens) & jnp.any(counts == made)

    def step(state: tuple) -> tuple:
        made, token, counts, out, cache = state
        at = (lengths + made - 1)[:, None]
        hidden, cache = hidden_cached(cfg, params, token[:, None], at, cache, compute_dtype=compute_dtype)
        return *record(made, hidden, counts, out), cache

    empty = jnp.zeros(rows, jnp.int32), jnp.zeros((rows, new_tokens), jnp.int32)
    *_, counts, out, _ = jax.lax.while_loop(unfinished, step, (*record(jnp.int32(0), hidden, *empty), cache))
    return out, counts


def complete(
    cfg: ModelConfig,
    params: Params,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[Message]],
    new_tokens: int,
    *,
    compute_dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> list[str]:
    """Greedy completions, without their prompts and special tokens.

    A prompt is a text to go on with, or a list of chat messages, which goes through the tokenizer's template and is
    answered. Padding columns of the vocabulary, which the tokenizer does not know, are never generated. Runs on one
    device: `params` are brought there if they are split over several; with several processes all have to call. Raises
    ValueError for a prompt without tokens or one that with its completion is longer than the model's context.
    """
    if not prompts:
        return []
    ids = [_encode(tokenizer, prompt) for prompt in prompts]
    for number, row in enumerate(ids):
        if not row:
            raise ValueError(f"prompts[{number}] must have at least one token, got {prompts[number]!r}. Add some text.")
        if len(row) + new_tokens > cfg.max_positions:
            raise ValueError(
                f"prompts[{number}] must leave room for the completion, got {len(row)} tokens + {new_tokens} new ones; "
                f"the model's context is {cfg.max_positions}. Shorten the prompt or lower new_tokens."
            )
    lengths = np.array([len(row) for row in ids], np.int32)
    width = -(-int(lengths.max()) // PROMPT_BLOCK) * PROMPT_BLOCK
    padded = np.array([row + [0] * (width - len(row)) for row in ids], np.int32)
    ends = set(cfg.eos_ids) | ({tokenizer.eos_token_id} - {None})
    params = _on_one_device(params)
    with jax.set_mesh(None):  # a mesh that the caller may have set is none of this program's business
        tokens, counts = greedy(
            cfg,
            params,
            padded,
            lengths,
            new_tokens=new_tokens,
            eos_ids=tuple(sorted(ends)),
            vocab_size=max(tokenizer.get_vocab().values()) + 1,
            compute_dtype=compute_dtype,
            implementation=implementation,
        )
    made = [row[:count].tolist() for row, count in zip(np.asarray(tokens), np.asarray(counts), strict=True)]
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in made]


def _most_likely(hidden: Array, last: Head, implementation: str | None) -> Array:
    """argmax over the vocabulary of hidden [B, D]; no label is asked about."""
    labels = jnp.zeros(hidden.shape[0], jnp.int32)
    return linear_stats(hidden, last, labels, implementation=implementation).argmax.astype(jnp.int32)


def _on_one_device(params: Params) -> Params:
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(params)):
        from jax.experimental import multihost_utils

        params = multihost_utils.process_allgather(params, tiled=True)
    # With a bare device instead of a sharding the arrays would keep the mesh in their type.
    return jax.device_put(params, SingleDeviceSharding(jax.local_devices()[0]))


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message]) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    chat = [dict(message) for message in prompt]
    ids: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    return list(ids)
