"""AdaKD's selection (Xie et al., arXiv 2510.11615): a share that follows the loss, and a temperature per position."""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kdjax.config import Selection as SelectionConfig
from kdjax.selection.policies.base import Context, Policy, sortable, top_of_batch
from kdjax.types import LossOutput, Selection

DECAY = 0.99  # of the running mean of the loss
TOLERANCE = 0.1  # the loss has moved if it left the reference by more than this share of it
STEP = 0.1  # by which the share of the positions grows or shrinks then


@flax.struct.dataclass
class Focus:
    """share: of the positions that are kept. average: running mean of the loss, of `seen` of them.

    reference: what the average was when the share last moved; negative before there is one.
    """

    share: Any  # an array
    average: Any  # an array
    seen: Any  # an array
    reference: Any  # an array


def adaptive(config: SelectionConfig) -> Policy:
    """The highest scores of the batch, max(1, floor(r n)) of n positions; r starts at 1, and falls as the loss does.

    sekd 6.3; published with the signal hellinger, fraction 0.1, temperature_scale 0.5 or 0.6. Whenever the running mean
    of the loss (of each micro-batch, with all its terms) has risen by 10 % from the reference, r grows by a tenth, at
    most to 1; if it has fallen by 10 %, r shrinks by a tenth, at least to `fraction`; only then does the reference
    move. Each position is given exp(-temperature_scale tanh(ln(s / m))), m the (lower) median score of the kept: hard
    ones are colder. Slots are all positions, as r may be 1: what is not kept is computed and does not count.
    """

    def select(
        score: Float[Array, "B T"], eligible: Bool[Array, "B T"], state: Focus, context: Context
    ) -> tuple[Selection, Focus]:
        order = sortable(score, eligible)
        n = jnp.sum(context.all_rows(eligible), dtype=jnp.int32)
        count = jnp.minimum(n, jnp.maximum(1, jnp.floor(state.share * n).astype(jnp.int32)))
        kept = eligible & top_of_batch(order, count, context)
        median = jnp.sort(context.all_rows(order).reshape(-1), descending=True)[count // 2]
        relative = jnp.where(median > 0, order / jnp.where(median > 0, median, 1.0), 1.0)
        given = jnp.exp(-config.temperature_scale * jnp.tanh(jnp.log(jnp.clip(relative, 1e-8, 1e8))))
        index = jnp.broadcast_to(jnp.arange(score.shape[1], dtype=jnp.int32)[None], score.shape)
        return Selection(index, kept.astype(jnp.float32), given=given), state

    def observe(state: Focus, output: LossOutput, step: Int[Array, ""]) -> Focus:
        loss = output.total / jnp.maximum(output.count, 1e-30)
        average = jnp.where(state.seen > 0, DECAY * state.average + (1.0 - DECAY) * loss, loss)
        there, moved = state.reference >= 0, average - state.reference
        rose, fell = (there & (move > TOLERANCE * state.reference) for move in (moved, -moved))
        share = jnp.where(rose, jnp.minimum(state.share * (1.0 + STEP), 1.0), state.share)
        share = jnp.where(fell, jnp.maximum(share * (1.0 - STEP), config.fraction), share)
        begins = ~there & (step >= config.adapt_after)
        reference = jnp.where(rose | fell | begins, average, state.reference)
        new = Focus(share, average, state.seen + 1, reference)
        return Focus(*(jnp.where(output.count > 0, new_, old) for new_, old in zip(_of(new), _of(state), strict=True)))

    def init() -> Focus:
        return Focus(jnp.ones(()), jnp.zeros(()), jnp.zeros((), jnp.int32), -jnp.ones(()))

    return Policy(lambda positions: positions, select, init=init, gives="temperature", observe=observe)


def _of(state: Focus) -> tuple[Array, Array, Array, Array]:
    return state.share, state.average, state.seen, state.reference
