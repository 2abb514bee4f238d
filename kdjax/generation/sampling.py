"""Which token comes next: temperature, top-k, top-p and min-p over the logits of one position a row."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

BLOCK = 256  # of the vocabulary: a token is drawn in two steps, its block and its place there


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; hashable. Every filter works on what those before it have left: top_k, top_p, min_p.

    temperature: the logits are divided by it; 0 takes the most likely token, the lower id on ties. top_k: the k most
    likely tokens, 0 = all. top_p: the fewest tokens, the likeliest first, that have at least this mass. min_p: tokens
    with at least this share of the largest probability. Tokens as likely as the last that a filter keeps are kept too.
    Raises ValueError for values without a meaning.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, right, wanted in (
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0; 0 takes the most likely token"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]; it is a probability mass. Set it to 1 for all tokens"),
            ("top_k", self.top_k >= 0, "at least 0; it is a number of tokens. Set it to 0 for all"),
            ("min_p", 0 <= self.min_p < 1, "in [0, 1); it is a share of the largest probability. Set it to 0 for all"),
        ):
            if not right:
                must, why = wanted.split("; ")
                raise ValueError(f"Sampling.{name} must be {must}, got {getattr(self, name)}; {why}.")


def next_tokens(
    logits: Float[Array, "R V"], keys: Key[Array, " R"], settings: Sampling
) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """(ids int32 [R], log-probabilities [R] of them in nats, under the model itself: temperature 1, no filter).

    Row r is drawn with keys[r] alone.
    """
    ids = jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
    shifted = logits - jnp.max(logits, -1, keepdims=True)
    if settings.temperature == 0:
        # The first that holds the maximum: two plain reductions are faster on CPU than one over (value, index) pairs.
        tokens = jnp.min(jnp.where(shifted == 0, ids, logits.shape[1] - 1), -1)
    else:
        tokens = _draw(keep(jnp.exp(shifted / settings.temperature), settings), keys)
    chosen = jnp.take_along_axis(shifted, tokens[:, None], 1)[:, 0]
    return tokens, chosen - jnp.log(jnp.sum(jnp.exp(shifted), -1))


def keep(weights: Float[Array, "R V"], settings: Sampling) -> Float[Array, "R V"]:
    """Unnormalised probabilities, the largest of a row 1, with 0 for the tokens that `settings` leave out."""
    if 0 < settings.top_k < weights.shape[1]:
        least = jax.lax.top_k(weights, settings.top_k)[0][:, -1:]
        weights = jnp.where(weights >= least, weights, 0)
    if settings.top_p < 1:
        weights = jnp.where(weights >= _nucleus(weights, settings.top_p), weights, 0)
    if settings.min_p > 0:
        weights = jnp.where(weights >= settings.min_p, weights, 0)
    return weights


def _nucleus(weights: Float[Array, "R V"], share: float) -> Float[Array, "R 1"]:
    """The largest t for which the weights >= t have at least this share of the sum.

    By halving over the bits of a float, whose order is that of the non-negative numbers: exact after 31 looks at all
    weights, many times faster on CPU than sorting them.
    """
    bits, goal = jax.lax.bitcast_convert_type(weights, jnp.int32), share * jnp.sum(weights, -1)

    def halve(_: Array, between: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = between
        middle = low + (high - low) // 2
        enough = jnp.sum(jnp.where(bits >= middle[:, None], weights, 0), -1) >= goal
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros(weights.shape[0], jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, jnp.max(bits, -1) + 1))
    return jax.lax.bitcast_convert_type(low, jnp.float32)[:, None]


def _draw(weights: Float[Array, "R V"], keys: Key[Array, " R"]) -> Int[Array, " R"]:
    """One id per row, in proportion to the weights: two uniform numbers, for the block and for the place in it."""
    rows, width = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -width % BLOCK))).reshape(rows, -1, BLOCK)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _invert(jnp.sum(blocks, -1), uniform[:, 0])
    own = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]
    return block * BLOCK + _invert(own, uniform[:, 1])


def _invert(weights: Float[Array, "R X"], uniform: Float[Array, " R"]) -> Int[Array, " R"]:
    """The first index whose cumulated weight is above uniform * total; never one of weight 0."""
    sums = jnp.cumsum(weights, -1)
    index = jnp.sum(sums <= uniform[:, None] * sums[:, -1:], -1, dtype=jnp.int32)
    places = jnp.arange(weights.shape[1], dtype=jnp.int32)[None]
    return jnp.minimum(index, jnp.max(jnp.where(weights > 0, places, 0), -1))  # rounding may lead past the last
