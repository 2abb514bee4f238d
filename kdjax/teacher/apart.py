"""A teacher on devices of its own: it reads the next batch while the student learns from this one.

The rows go to it, a few bytes a token, and hidden states come back, never logits; what a position needs of the
vocabulary is multiplied out where the student is, by the teacher's head, of which a copy lives there.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from kdjax.config import Experiment
from kdjax.sharding import Rules, make_rules
from kdjax.types import Array, Batch, Params, TeacherHidden


def share_devices(e: Experiment, devices: Sequence[Any] | None = None) -> tuple[Rules, Rules]:
    """The rules of (student, teacher): on one mesh, or with teacher.devices each on its own.

    devices: all that there are, compile-only ones too; None = those that JAX sees. Raises ValueError for shapes that do
    not fit, for too few devices, and with several processes: arrays cannot go from one mesh to the other then.
    """
    if not e.teacher.devices:
        rules = make_rules(e.mesh, devices)
        return rules, rules.of_preset(e.teacher.preset)
    every = list(jax.devices() if devices is None else devices)
    if len(every) <= e.teacher.devices:
        raise ValueError(
            f"teacher.devices must be fewer than the {len(every)} devices that are there, got {e.teacher.devices}; the "
            "student needs some. Lower it."
        )
    if jax.process_count() > 1:
        raise ValueError(
            f"teacher.devices must be 0 with {jax.process_count()} processes, got {e.teacher.devices}; hidden states "
            "go from one set of devices to the other within a process only. Set teacher.preset instead."
        )
    own = len(every) - e.teacher.devices
    one = e.mesh.preset == "single"
    student = make_rules(e.mesh, every[:1] if one else every[:own])
    preset = e.teacher.preset or ("dp" if one else e.mesh.preset)
    mesh = dataclasses.replace(e.mesh, preset=preset, shape=e.teacher.shape)
    try:
        teacher = make_rules(mesh, every[own:])
    except ValueError as error:
        raise ValueError(str(error).replace("mesh.", "teacher.", 2)) from error
    if teacher.mesh is None:
        raise ValueError("teacher.preset must not be 'single' with teacher.devices, got 'single'. Set it to 'dp'.")
    return student, teacher


def make_feed(
    hidden: Callable[[Params, Batch], Array], params: Params, teacher: Rules, student: Rules
) -> Callable[[Batch], Batch]:
    """feed(batch) -> the same batch with the teacher's hidden states, on the student's devices.

    hidden(params, batch [B, T]) -> [B, T, D], on the teacher's. Batches may have a leading axis of micro-batches. It
    returns at once: the teacher's devices work behind the call, beside whatever the student's have still to do.
    """

    @jax.jit
    def read(params: Params, batch: Batch) -> Array:
        if batch.tokens.ndim == 2:
            return hidden(params, batch)
        return jax.lax.map(lambda micro: hidden(params, micro), batch)

    def feed(batch: Batch) -> Batch:
        sent = jax.tree.map(lambda a: jax.device_put(a, _rows(teacher, a, batch.tokens.ndim)), batch)
        found = read(params, sent)
        return dataclasses.replace(
            batch, teacher=TeacherHidden(jax.device_put(found, _rows(student, found, batch.tokens.ndim)))
        )

    return feed


def copy_of_head(weight: Array, axes: tuple[str | None, ...], student: Rules) -> Array:
    """The weight of the teacher's head as the student's mesh stores it."""
    return jax.device_put(weight, student.storage(axes, weight.shape) or _first())


def _rows(rules: Rules, array: Array, token_axes: int) -> NamedSharding | SingleDeviceSharding:
    """Rows are split over the devices; with micro-batches (token_axes = 3) they are the second axis."""
    if rules.mesh is None:
        return _first()
    leading = (None,) * (token_axes - 2)
    return NamedSharding(rules.mesh, P(*leading, *rules.batch_spec(array.ndim - len(leading))))


def _first() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[0])
