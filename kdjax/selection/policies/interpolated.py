"""Any policy, which besides says how far TAID's target has come (Shing et al., arXiv 2501.16937)."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kdjax.config import Loss
from kdjax.selection.policies.base import Context, Policy
from kdjax.types import LossOutput, Selection

DECAY = 0.99  # of the running mean of the loss's relative fall


@flax.struct.dataclass
class Walk:
    """inner: the policy's own state. share: how far the target had come at the last micro-batch.

    trend: running mean of the relative fall of the loss. before: the loss of the last micro-batch; negative before
    there is one.
    """

    inner: Any
    share: Any  # an array
    trend: Any  # an array
    before: Any  # an array


def interpolated(policy: Policy, loss: Loss, steps: int) -> Policy:
    """The policy; every slot is given t, the teacher's share in the target of the loss `taid`.

    paced L11. At update s of S: t = max(t0 + (1 - t0) s / S, t + dt), at most 1, t0 = loss.taid_start, J the mean of
    the loss over the slots: m = 0.99 m + 0.01 (J_before - J) / J_before, dt = loss.taid_rate sigmoid(m) (1 - t), after
    each micro-batch but the first. taid_rate = 0 leaves the line. The released code lags one update behind the line.
    """

    def share_at(state: Walk, step: Int[Array, ""]) -> Array:
        line = loss.taid_start + (1.0 - loss.taid_start) * step / steps
        return jnp.clip(line, state.share, 1.0)

    def select(
        score: Float[Array, "B T"], eligible: Bool[Array, "B T"], state: Walk, context: Context
    ) -> tuple[Selection, Walk]:
        selection, inner = policy.select(score, eligible, state.inner, context)
        given = jnp.broadcast_to(share_at(state, context.step), selection.weight.shape)
        return dataclasses.replace(selection, given=given), dataclasses.replace(state, inner=inner)

    def observe(state: Walk, output: LossOutput, step: Int[Array, ""]) -> Walk:
        total, count = output.metrics["taid"]
        now, share = total / jnp.maximum(count, 1.0), share_at(state, step)
        trend = DECAY * state.trend + (1.0 - DECAY) * (state.before - now) / (state.before + 1e-15)
        further = jnp.minimum(1.0, share + loss.taid_rate * jax.nn.sigmoid(trend) * (1.0 - share))
        moves, seen = (count > 0) & (state.before >= 0), count > 0
        return Walk(
            inner=policy.observe(state.inner, output, step),
            share=jnp.where(moves, further, state.share),
            trend=jnp.where(moves, trend, state.trend),
            before=jnp.where(seen, now, state.before),
        )

    def init() -> Walk:
        return Walk(policy.init(), jnp.float32(loss.taid_start), jnp.zeros(()), -jnp.ones(()))

    return dataclasses.replace(policy, select=select, observe=observe, init=init, gives="teacher_share")
