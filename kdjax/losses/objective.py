"""From a config to the training objective: a weighted, scheduled mixture of terms, summed over the slots."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.kernels.linear_divergence import Term, linear_divergence
from kdjax.kernels.sparse_divergence import sparse_divergence
from kdjax.schedules import Schedule
from kdjax.types import DenseTargets, Head, LossOutput, Selection, SparseTargets


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
        targets: DenseTargets | SparseTargets | None,
        labels: Int[Array, "B S"],
        selection: Selection,
        row_weight: Float[Array, "B"],
        step: Any,
        implementation: str | None = None,
    ) -> LossOutput:
        """The sum over the slots and the count it is to be divided by.

        token: sum_slots w_row w_slot loss, count = sum_rows mass. sample: the slot weights of a row are first divided
        by its mass, count = rows with a mass (SE-KD eq. 3-5). Metrics: each term's mean value at the slots, and that of
        what a policy says of them for a term.
        With sparse targets the terms that read the teacher are the divergence of their kind; see `for_sparse_targets`.
        """
        slots = selection.weight
        mass = jnp.sum(slots, 1) if selection.mass is None else selection.mass
        if self.reduction == "sample":
            slots = slots / jnp.maximum(mass, 1e-30)[:, None]  # a row without slots stays at 0
            count = jnp.sum(mass > 0, dtype=jnp.float32)
        else:
            count = jnp.sum(mass)
        weight = (slots * row_weight[:, None]).reshape(-1)
        rows = hidden.reshape(-1, hidden.shape[-1])
        given = None if selection.given is None else selection.given.reshape(-1)
        rest = (labels.reshape(-1), weight, step, implementation, given)
        if isinstance(targets, SparseTargets):
            total, values = self._sparse(rows, head, targets, *rest)
        else:
            total, values = self._dense(rows, head, targets, *rest)
        filled = selection.weight.reshape(-1) > 0
        n = jnp.sum(filled, dtype=jnp.float32)
        if given is not None:
            values |= {term.given: given for term in self.terms.values() if term.given}
        metrics = {name: (jnp.sum(jnp.where(filled, value, 0.0)), n) for name, value in values.items()}
        return LossOutput(total, count, metrics)

    def for_sparse_targets(self, kind: str) -> "Objective":
        """This objective. Raises ValueError unless its gradient is unbiased where the teacher is `kind` of entries.

        Only what is linear in the teacher's probabilities is: the forward KL. Other divergences need the teacher
        wherever the student has mass (RS-KD, arXiv 2503.16870).
        """
        biased = [name for name, term in self.terms.items() if term.teacher and not term.linear]
        if biased:
            raise ValueError(
                f"loss.terms must be 'forward_kl' (and 'cross_entropy') with classes.kind={kind!r}, got {biased[0]!r}; "
                "it needs the teacher wherever the student has mass, a few entries would bias value and gradient. "
                "Set classes.kind='all' with a live teacher, or another loss."
            )
        return self

    def for_policy(self, name: str, gives: str) -> "Objective":
        """This objective. Raises ValueError unless the policy `name` says of each slot what the terms read of it."""
        given = {term.given: loss for loss, term in self.terms.items() if term.given}
        if len(given) > 1:
            raise ValueError(
                f"loss.terms must hold one of {' and '.join(map(repr, given.values()))}, got both; they read different "
                "numbers of a position, and a policy says one. Leave one out."
            )
        for loss, term in self.terms.items():
            if term.given and term.given != gives:
                raise ValueError(
                    f"selection.policy must say the {term.given} of each position, which the loss {loss!r} reads, got "
                    f"{name!r}. Set 'easy_hard' or 'easy_hard_means' for a hardness, 'adaptive' for a temperature."
                )
        return self

    def _dense(
        self,
        hidden: Array,
        head: Head,
        targets: DenseTargets | None,
        labels: Array,
        weight: Array,
        step: Any,
        implementation: str | None,
        given: Array | None,
    ) -> tuple[Array, dict[str, Array]]:
        """(total [], {term: values [B*S]}) against the teacher's head, or without a teacher."""
        total, values = linear_divergence(
            hidden,
            head,
            None if targets is None else targets.hidden.reshape(len(hidden), -1),
            None if targets is None else targets.head,
            labels,
            weight,
            list(self.terms.values()),
            [self.weights[name](step) for name in self.terms],
            self.tau(step),
            given=given,
            implementation=implementation,
        )
        return total, dict(zip(self.terms, values, strict=True))

    def _sparse(
        self,
        hidden: Array,
        head: Head,
        targets: SparseTargets,
        labels: Array,
        weight: Array,
        step: Any,
        implementation: str | None,
        given: Array | None,
    ) -> tuple[Array, dict[str, Array]]:
        """As `_dense`, against stored or drawn entries of the teacher; its own terms in a pass of theirs."""
        compared = {name: term for name, term in self.terms.items() if term.teacher}
        alone = {name: term for name, term in self.terms.items() if not term.teacher}
        total, values = jnp.zeros(()), dict[str, Array]()
        if alone:
            rest = dataclasses.replace(self, terms=alone)
            total, values = rest._dense(hidden, head, None, labels, weight, step, implementation, given)
        if compared:
            flat = jax.tree.map(lambda a: a.reshape(len(hidden), *a.shape[2:]), targets)
            part, value = sparse_divergence(
                hidden,
                head,
                flat.ids,
                flat.probs,
                weight,
                targets.kind,
                self.tau(step),
                tail=flat.tail,
                teacher_entropy=flat.entropy,
                implementation=implementation,
            )
            total = total + part * sum(self.weights[name](step) for name in compared)
            values |= dict.fromkeys(compared, value)
        return total, values
