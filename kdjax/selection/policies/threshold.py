"""Global-level selection: one threshold for all rows, from a queue of recent scores (Wang et al., ACL 2021)."""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kdjax.config import Selection as SelectionConfig
from kdjax.selection.policies.base import Context, Policy, budget, budgets, eligible_count, sortable, take
from kdjax.types import Selection


@flax.struct.dataclass
class Queue:
    """A ring of the last scores of eligible positions: scores [Q], where the next goes, how many there are."""

    scores: Any  # an array
    next: Any  # an array
    filled: Any  # an array


def threshold(config: SelectionConfig) -> Policy:
    """Positions whose score is at least the (1 - f) quantile of the queue, taken before this batch enters it.

    sekd 3.3. A row or a batch may select nothing; a row at most slack * f of its positions, the largest. While the
    queue is empty, each row's own top fraction. The queue is the same on all devices and lives in the checkpoint.
    """

    def slots(positions: int) -> int:
        return budget(min(1.0, config.slack * config.fraction), positions)

    def select(
        score: Float[Array, "B T"], eligible: Bool[Array, "B T"], state: Queue, context: Context
    ) -> tuple[Selection, Queue]:
        positions = score.shape[1]
        order = sortable(score, eligible)
        above = jnp.sum(eligible & (order >= quantile(state, 1.0 - config.fraction)), 1, dtype=jnp.int32)
        first = budgets(config.fraction, eligible_count(eligible), positions)
        count = jnp.where(state.filled > 0, jnp.minimum(above, slots(positions)), first)
        known = eligible & jnp.isfinite(score)
        return take(order, count, slots(positions)), push(state, context.all_rows(score), context.all_rows(known))

    def init() -> Queue:
        return Queue(jnp.zeros(config.queue, jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    return Policy(slots=slots, select=select, init=init)


def quantile(queue: Queue, level: float) -> Float[Array, ""]:
    """Of what the queue holds, with linear interpolation; inf while it is empty."""
    size = queue.scores.shape[0]
    ordered = jnp.sort(jnp.where(jnp.arange(size) < queue.filled, queue.scores, jnp.inf))
    place = level * jnp.maximum(queue.filled - 1, 0).astype(jnp.float32)
    low = jnp.floor(place).astype(jnp.int32)
    high = jnp.minimum(low + 1, jnp.maximum(queue.filled - 1, 0))
    share = place - low.astype(jnp.float32)
    left, right = ordered[low], ordered[high]
    return jnp.where(share > 0, left + share * (right - left), left)


def push(queue: Queue, scores: Float[Array, "R T"], known: Bool[Array, "R T"]) -> Queue:
    """All known scores into the ring, row by row, over the oldest; of more than it holds the last."""
    size = queue.scores.shape[0]
    flat, here = scores.reshape(-1), known.reshape(-1)
    number = jnp.cumsum(here.astype(jnp.int32)) - 1
    total = jnp.sum(here, dtype=jnp.int32)
    kept = here & (number >= total - size)
    place = jnp.where(kept, (queue.next + number) % size, size)
    return Queue(
        scores=queue.scores.at[place].set(flat, mode="drop"),
        next=(queue.next + total) % size,
        filled=jnp.minimum(queue.filled + total, size),
    )
