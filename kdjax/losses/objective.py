"""From a config to the training objective: a weighted, scheduled mixture of terms, summed over the slots."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.kernels.linear_divergence import Term, linear_divergence
from kdjax.schedules import Schedule
from kdjax.types import DenseTargets, Head, LossOutput, Selection


@dataclasses.dataclass(frozen=True)
class Objective:
    """terms: name -> term; weights: name -> schedule; tau: schedule; reduction: 'token' or 'sample'."""

    terms: Mapping[str, Term]
    weights: Mapping[str, Schedule]
    tau: Schedule
    reduction: str

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with the teacher."""
        return any(term.teacher for term in self.terms.values())

    def __call__(
        self,
        hidden: Float[Array, "B S D"],
        head: Head,
        targets: DenseTargets | None,
        labels: Int[Array, "B S"],
        selection: Selection,
        row_weight: Float[Array, "B"],
        step: Any,
        implementation: str | None = None,
    ) -> LossOutput:
        """The sum over the slots and the count it is to be divided by.

        token: sum_slots w_row w_slot loss, count = sum_rows mass. sample: the slot weights of a row are first divided
        by its mass, count = rows with a mass (SE-KD eq. 3-5). Metrics: each term's mean value at the slots.
        """
        slots = selection.weight
        mass = jnp.sum(slots, 1) if selection.mass is None else selection.mass
        if self.reduction == "sample":
            slots = slots / jnp.maximum(mass, 1e-30)[:, None]  # a row without slots stays at 0
            count = jnp.sum(mass > 0, dtype=jnp.float32)
        else:
            count = jnp.sum(mass)
        weight = (slots * row_weight[:, None]).reshape(-1)
        rows = hidden.shape[0] * hidden.shape[1]
        total, values = linear_divergence(
            hidden.reshape(rows, -1),
            head,
            None if targets is None else targets.hidden.reshape(rows, -1),
            None if targets is None else targets.head,
            labels.reshape(rows),
            weight,
            list(self.terms.values()),
            [self.weights[name](step) for name in self.terms],
            self.tau(step),
            implementation=implementation,
        )
        filled = selection.weight.reshape(-1) > 0
        n = jnp.sum(filled, dtype=jnp.float32)
        sums = jnp.sum(jnp.where(filled[None, :], values, 0.0), 1)
        metrics = {name: (value, n) for name, value in zip(self.terms, sums, strict=True)}
        return LossOutput(total, count, metrics)
