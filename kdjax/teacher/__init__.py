"""The teacher's side of the step: what the student is compared with at the selected slots."""

from jax import lax

from kdjax.types import Array, DenseTargets, Head, gather_slots


def live_targets(hidden: Array, head: Head, index: Array) -> DenseTargets:
    """A live teacher: hidden states [B, T, D] of its trunk at the slots [B, S], and its head; under stop-gradient.

    The trunk runs on all positions, the head (by the loss kernel) only where the student is to learn.
    """
    return lax.stop_gradient(DenseTargets(gather_slots(hidden, index), head))
