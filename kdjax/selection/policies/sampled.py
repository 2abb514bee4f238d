"""Positions drawn in proportion to their score, with replacement (SE-KD's positional RS-KD)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kdjax.config import Selection as SelectionConfig
from kdjax.selection.policies.base import Context, Policy, budget, budgets, eligible_count, sortable, take
from kdjax.types import Selection


def sampled(config: SelectionConfig) -> Policy:
    """K = max(1, ceil(f n)) draws per row with probability pi_t = score_t / sum score over its n eligible positions.

    sekd 3.3. A position counts as often as it was drawn; corrected: each draw counts 1 / (n pi_t), so that the
    expectation of the loss is the plain mean over all n positions. Negative scores count as 0; a row whose scores are
    all 0 draws uniformly. With replacement, hence fraction 1 is not dense.
    """

    def slots(positions: int) -> int:
        return budget(config.fraction, positions)

    def select(
        score: Float[Array, "B T"], eligible: Bool[Array, "B T"], state: tuple, context: Context
    ) -> tuple[Selection, tuple]:
        count = eligible_count(eligible)
        draws = budgets(config.fraction, count, score.shape[1])
        proposal = probabilities(score, eligible)
        times = _draw(proposal, context.noise, draws, slots(score.shape[1]))
        chosen = take(
            jnp.where(times > 0, 0.0, -jnp.inf), jnp.sum(times > 0, 1, dtype=jnp.int32), slots(score.shape[1])
        )
        weight = times
        if config.corrected:
            weight = times / jnp.maximum(count[:, None].astype(jnp.float32) * proposal, 1e-30)
        weight = jnp.where(chosen.weight > 0, jnp.take_along_axis(weight, chosen.index, 1), 0.0)
        return Selection(chosen.index, weight, draws.astype(jnp.float32)), state

    return Policy(slots=slots, select=select, noisy=True)


def probabilities(score: Float[Array, "B T"], eligible: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """score / sum of scores over the eligible positions; uniform over them if all are 0, and 0 without any."""
    order = jnp.minimum(sortable(score, eligible), 1e30)  # whose reciprocal is no denormal
    top = jnp.max(order, 1, keepdims=True)
    positive = jnp.where(eligible & (order > 0), order / jnp.where(top > 0, top, 1.0), 0.0)
    total = jnp.sum(positive, 1, keepdims=True)
    even = eligible / jnp.maximum(jnp.sum(eligible, 1, keepdims=True), 1)
    return jnp.where(total > 0, positive / jnp.where(total > 0, total, 1.0), even).astype(jnp.float32)


def _draw(
    proposal: Float[Array, "B T"], noise: Float[Array, "B T"], draws: Int[Array, "B"], size: int
) -> Float[Array, "B T"]:
    """How often each position comes up in each row's draws."""
    edges = jnp.cumsum(proposal, 1)
    point = noise[:, :size] * edges[:, -1:]
    # The first position whose cumulative probability exceeds the point: one of probability 0 is never that, except by
    # rounding at the end, hence the last that has any.
    place = jax.vmap(lambda edge, at: jnp.searchsorted(edge, at, side="right"))(edges, point)
    place = jnp.minimum(place, proposal.shape[1] - 1 - jnp.argmax(proposal[:, ::-1] > 0, 1)[:, None])
    used = (jnp.arange(size)[None, :] < draws[:, None]).astype(jnp.float32)
    rows = jnp.arange(proposal.shape[0])[:, None]
    return jnp.zeros(proposal.shape, jnp.float32).at[rows, place].add(used)
