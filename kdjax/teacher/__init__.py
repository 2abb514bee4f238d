"""The teacher's side of the step: what the student is compared with at the selected slots."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax

from kdjax.teacher.classes import ClassSampler
from kdjax.types import Array, Batch, CachedTeacher, DenseTargets, Head, SparseTargets, gather_slots


def live_targets(hidden: Array, head: Head, index: Array) -> DenseTargets:
    """A live teacher: hidden states [B, T, D] of its trunk at the slots [B, S], and its head; under stop-gradient.

    The trunk runs on all positions, the head (by the loss kernel) only where the student is to learn.
    """
    return lax.stop_gradient(DenseTargets(gather_slots(hidden, index), head))


def drawn_entries(
    sampler: ClassSampler,
    live: DenseTargets,
    index: Array,
    batch: Batch,
    tau: Array | float,
    implementation: str | None,
) -> tuple[Array, Array, Array]:
    """ids [B, S, K], codes [B, S, K] and the entropy [B, S] of a live teacher at the slots: what a cache keeps."""
    slots = index.shape
    rows, epochs = (jnp.broadcast_to(a[:, None], slots).reshape(-1) for a in (batch.row_id, batch.epoch))
    hidden = live.hidden.reshape(-1, live.hidden.shape[-1])
    drawn = sampler.draw(hidden, live.head, rows, epochs, index.reshape(-1), tau, implementation=implementation)
    ids, codes, entropy = (a.reshape(*slots, *a.shape[1:]) for a in (drawn.ids, drawn.codes, drawn.entropy))
    return ids, codes, entropy


def drawn_targets(
    sampler: ClassSampler,
    live: DenseTargets,
    index: Array,
    batch: Batch,
    tau: Array | float,
    implementation: str | None,
) -> SparseTargets:
    """Entries of a live teacher at the slots [B, S]; in the first epoch those that a cache holds."""
    return lax.stop_gradient(sampler.targets(*drawn_entries(sampler, live, index, batch, tau, implementation)))


def cached_targets(sampler: ClassSampler, cached: CachedTeacher, index: Array) -> SparseTargets:
    """What a cache holds of the teacher at the slots [B, S]."""
    ids, codes = (jnp.take_along_axis(a, index[:, :, None], axis=1) for a in (cached.ids, cached.codes))
    entropy = None if cached.entropy is None else gather_slots(cached.entropy, index)
    return sampler.targets(ids, codes, entropy)


def cached_stats(cached: Any, needs: tuple[str, ...]) -> Mapping[str, Array]:
    """The statistics [B, T] among `needs` that the cache knows."""
    if not isinstance(cached, CachedTeacher):
        return {}
    known = {"teacher_entropy": cached.entropy, "teacher_ce": None if cached.label_logp is None else -cached.label_logp}
    return {name: value for name, value in known.items() if value is not None and name in needs}
