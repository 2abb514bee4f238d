"""Dense distillation: every eligible position, S = T."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kdjax.config import Selection as SelectionConfig
from kdjax.selection.policies.base import Context, Policy
from kdjax.types import Selection


def all_positions(config: SelectionConfig) -> Policy:
    """The baseline; reads no score and no fraction."""

    def select(
        score: Float[Array, "B T"], eligible: Bool[Array, "B T"], state: tuple, context: Context
    ) -> tuple[Selection, tuple]:
        index = jnp.broadcast_to(jnp.arange(eligible.shape[1], dtype=jnp.int32)[None], eligible.shape)
        return Selection(index, eligible.astype(jnp.float32)), state

    return Policy(slots=lambda positions: positions, select=select, uses_signal=False)
