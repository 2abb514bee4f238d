"""Rows of one question and many answers to it: the question is computed once, and no answer sees another.

A row is [question, right-aligned in Q places][answer 1, left-aligned in A places] ... [answer M], T = Q + M A. What is
done position by position runs on it as it is. Attention alone is over rows of one answer each, [question][answer m]:
there the two are next to each other, so windows, segments and every implementation mean what they mean elsewhere.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax import registry
from kdjax.models import decoder
from kdjax.models.layers import project
from kdjax.models.params import ModelConfig
from kdjax.sharding import Rules
from kdjax.types import Params


def _up(cfg: ModelConfig, weights: Params, middle: Array, x: Array, rules: Rules) -> Array:
    return project(_up_input(cfg, weights, middle, x, rules), weights["w_up"])


def _up_input(cfg: ModelConfig, weights: Params, middle: Array, x: Array, rules: Rules) -> Array:
    return rules.reshard(decoder.norm(cfg, middle, weights["mlp_norm"]), rules.batch_spec(3))


def _block_output(cfg: ModelConfig, weights: Params, middle: Array, x: Array, rules: Rules) -> Array:
    return rules.reshard(x, rules.batch_spec(3))


# The same for all of models.FAMILIES: dense layers with a gated MLP. There are no mixtures of experts, no adapters, and
# no family whose up-projection is part of a wider matrix; one that is added needs its own line.
# (cfg, weights of the last block, the residual stream in it after attention, and after it, rules) -> [B, T, F or D]
TAPS: dict[str, Callable[[ModelConfig, Params, Array, Array, Rules], Array]] = {
    "up": _up,  # of the last block: what its up-projection gives, before the gate
    "up_input": _up_input,  # what the up-projection is given
    "block_output": _block_output,  # the residual stream after the last block, before the final norm
}
DEFAULT = "up"


def hidden_and_states(
    cfg: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    *,
    question: int,
    answers: int,
    tap: str = "",
    rules: Rules = Rules(),
    compute_dtype: Any = jnp.float32,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T F"]]:
    """(hidden states after the final norm, tapped states) of rows of `question` places and `answers` equal parts.

    Segment 1 is the question and all its answers, 0 padding; an answer's positions go on after the question's last.
    tap: a key of TAPS, "" = DEFAULT. The states come from what the last layer leaves: one matrix product more, and no
    array of theirs is carried through the layers. Nothing is kept for a gradient. Raises ValueError for parts that do
    not fill the row, and for an unknown tap.
    """
    length = tokens.shape[1] - question
    if question < 1 or answers < 1 or length < answers or length % answers:
        raise ValueError(
            f"answers must divide what the question leaves of the row, got {answers} for {length} of {tokens.shape[1]} "
            "places. Give every answer the same number of places."
        )
    tapped = registry.lookup(TAPS, tap or DEFAULT, "answers.tap")

    def over(mixer: decoder.Mixer) -> decoder.Mixer:
        return mixer if answers == 1 else _answer_by_answer(mixer, question, answers)

    hidden, (middle, x) = decoder.trunk(
        cfg, params, tokens, segment_ids, positions, rules, compute_dtype, None, over, last=True
    )
    stored = {name: jax.lax.index_in_dim(params["layers"][name], -1, keepdims=False) for name in ("mlp_norm", "w_up")}
    return hidden, tapped(cfg, decoder.at_use(stored, rules, compute_dtype), middle, x, rules)


def _answer_by_answer(mixer: decoder.Mixer, question: int, answers: int) -> decoder.Mixer:
    """`mixer` over the question by itself, then over a row for each answer: its queries, the question's keys before."""

    def parts(x: Array) -> Array:
        b, t, *rest = x.shape
        return x[:, question:].reshape(b * answers, (t - question) // answers, *rest)

    def as_rows(x: Array) -> Array:
        return jnp.concatenate([jnp.repeat(x[:, :question], answers, 0), parts(x)], 1)

    def mix(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
        asked = mixer(*(x[:, :question] for x in (q, k, v, segment_ids)))
        mixed = mixer(parts(q), *(as_rows(x) for x in (k, v, segment_ids)))
        return jnp.concatenate([asked, mixed.reshape(len(q), -1, *q.shape[2:])], 1)

    return mix
