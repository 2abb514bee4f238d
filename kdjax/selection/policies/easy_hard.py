"""AT-KD's split of a batch into easy and hard positions (Zhong et al., arXiv 2402.11890); for the loss `at_kd`."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kdjax.config import Selection as SelectionConfig
from kdjax.selection.policies.base import Context, Policy, budgets, eligible_count, sortable, top_of_batch
from kdjax.types import Selection


def easy_hard(config: SelectionConfig) -> Policy:
    """All positions; of the batch's, max(1, ceil(f n)) with the highest scores are hard.

    sekd 6.2, as it was run: loss = (w sum_easy + (1 - w) sum_hard) / n, w = easy_weight, f = fraction (0.2 and 0.5).
    """
    return _split(config, by_kind=False)


def easy_hard_means(config: SelectionConfig) -> Policy:
    """The same split; loss = w mean_easy + (1 - w) mean_hard. At f = 0.5 it is twice the other."""
    return _split(config, by_kind=True)


def _split(config: SelectionConfig, by_kind: bool) -> Policy:
    def select(
        score: Float[Array, "B T"], eligible: Bool[Array, "B T"], state: tuple, context: Context
    ) -> tuple[Selection, tuple]:
        everything = context.all_rows(eligible)
        n = jnp.sum(everything, dtype=jnp.int32)
        count = budgets(config.fraction, n[None], everything.size)[0]
        hard = eligible & top_of_batch(sortable(score, eligible), count, context)
        weight = jnp.where(hard, 1.0 - config.easy_weight, config.easy_weight)
        if by_kind:
            weight = weight * n / jnp.maximum(jnp.where(hard, count, n - count), 1)
        weight = jnp.where(eligible, weight, 0.0).astype(jnp.float32)
        index = jnp.broadcast_to(jnp.arange(score.shape[1], dtype=jnp.int32)[None], score.shape)
        mass = eligible_count(eligible).astype(jnp.float32)
        return Selection(index, weight, mass, hard.astype(jnp.float32)), state

    return Policy(slots=lambda positions: positions, select=select, gives="hardness")
