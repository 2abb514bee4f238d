"""The train step: a pure function (state, teacher_params, batch) -> (state, report).

student hidden -> statistics in one vocabulary pass without gradient -> signal -> policy -> gather slots -> targets at
the slots -> loss at the slots -> optax. Sums and counts are added over micro-batches and devices and divided once, so
accumulation, packing, uneven rows and data parallelism do not change the objective.

Trunks run on batch-sharded arrays. Everything behind them is local to a row and runs in one `shard_map` over the batch:
selection and kernels see plain arrays, the head is gathered once, only sums leave.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from kdjax import metrics as metric
from kdjax.losses.objective import Objective
from kdjax.schedules import Schedule
from kdjax.selection.choose import Chooser
from kdjax.selection.stats import NEEDS_TEACHER, token_stats
from kdjax.sharding import Rules
from kdjax.teacher import cached_stats, cached_targets, drawn_targets, live_targets
from kdjax.teacher.classes import ClassSampler
from kdjax.types import (
    Array,
    Batch,
    CachedTeacher,
    DenseTargets,
    Head,
    LossOutput,
    Metrics,
    Params,
    Selection,
    SparseTargets,
    TeacherHidden,
    TeacherText,
    TrainState,
    gather_slots,
    targets_of,
)

Side = tuple[Array, Head]  # hidden [B, T, D] and the head
Supervised = tuple[LossOutput, Any, Array]  # loss, policy state, finite rows [B]


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model cut in two, as the step uses it.

    hidden(params, batch) -> [B, T, D] after the final norm. head(params) -> Head with its weight as it is stored;
    head_spec: how that weight is stored on the mesh. feed: what a batch goes through before a compiled function that
    runs this model; a teacher on devices of its own does its work there.
    shared(params, tokens, segment_ids, positions, question=, answers=, tap=) -> hidden [B, T, D] and tapped states
    [B, T, F] of rows of one question and many answers, see models/shared_prefix.py; None = the model has no such rows.
    """

    hidden: Callable[[Params, Batch], Array]
    head: Callable[[Params], Head]
    head_spec: P = P()
    feed: Callable[[Batch], Batch] = lambda batch: batch
    shared: Callable[..., tuple[Array, Array]] | None = None


def side_specs(model: LanguageModel, rules: Rules) -> tuple[P, P]:
    """How (hidden states, weight of the head) of a model enter `rules.rowwise`."""
    return rules.batch_spec(3), model.head_spec


def feed_of(model: LanguageModel | None) -> Callable[[Batch], Batch]:
    """What a batch goes through before a function that runs `model`, or none."""
    return (lambda batch: batch) if model is None else model.feed


@dataclasses.dataclass(frozen=True)
class StepParts:
    """All that `make_train_step` composes; built in kdjax/build.

    classes: None = the student sees the teacher's whole distribution. cached: it is in `batch.teacher`, and there is no
    teacher; signals may read what of it the cache knows.
    """

    student: LanguageModel
    teacher: LanguageModel | None
    chooser: Chooser
    objective: Objective
    optimiser: optax.GradientTransformation
    learning_rate: Schedule
    rules: Rules
    accumulate: int = 1
    classes: ClassSampler | None = None
    cached: bool = False


@flax.struct.dataclass
class StepReport:
    """metrics: name -> (sum, count). finite_rows: bool [A, B], False where a row's hidden states are not finite."""

    metrics: Metrics
    finite_rows: Array


def init_state(parts: StepParts, params: Params, seed: int) -> TrainState:
    """The state before the first step; jit-able, shardings follow the parameters."""
    key = jax.random.key(seed)
    return TrainState(jnp.zeros((), jnp.int32), params, parts.optimiser.init(params), parts.chooser.policy.init(), key)


def feed_step(parts: StepParts) -> Callable[[Batch], Batch]:
    """What batches, also as micro-batches [A, B, ...], go through before the train step."""
    return feed_of(parts.teacher if _needs_teacher(parts) else None)


def make_train_step(parts: StepParts) -> Callable[[TrainState, Params, Batch], tuple[TrainState, StepReport]]:
    """The step, to be jitted with the state donated. Batch arrays have a leading axis of micro-batches: [A, B, ...].

    A step whose loss or gradient is not finite leaves parameters, optimiser and policy as they were; the report says so
    and the loop stops. A batch without any slot, or of weight 0, has loss 0 and gradient 0: the optimiser rests.
    """
    supervise = make_supervise(parts)

    def micro(state: TrainState, policy_state: Any, teacher_params: Params, batch: Batch) -> tuple[Params, Supervised]:
        def total(params: Params) -> tuple[Array, Supervised]:
            supervised = supervise(params, teacher_params, batch, policy_state, state.key, state.step)
            return supervised[0].total, supervised

        (_, supervised), gradient = jax.value_and_grad(total, has_aux=True)(state.params)
        return gradient, supervised

    def train_step(state: TrainState, teacher_params: Params, batch: Batch) -> tuple[TrainState, StepReport]:
        first = jax.tree.map(lambda a: a[0], batch)
        gradient, (output, policy_state, finite) = micro(state, state.policy_state, teacher_params, first)
        finite_rows = finite[None]
        if parts.accumulate > 1:

            def add(
                carry: tuple[Params, LossOutput, Any], batch: Batch
            ) -> tuple[tuple[Params, LossOutput, Any], Array]:
                gradient, (output, policy_state, finite) = micro(state, carry[2], teacher_params, batch)
                return (*jax.tree.map(jnp.add, carry[:2], (gradient, output)), policy_state), finite

            rest = jax.tree.map(lambda a: a[1:], batch)
            (gradient, output, policy_state), finite = lax.scan(add, (gradient, output, policy_state), rest)
            finite_rows = jnp.concatenate([finite_rows, finite])
        new, metrics = _update(parts, state, gradient, output, policy_state)
        return new, StepReport(metrics=metrics, finite_rows=finite_rows)

    return train_step


def _update(
    parts: StepParts, state: TrainState, gradient: Params, output: LossOutput, policy_state: Any
) -> tuple[TrainState, Metrics]:
    """Divide once, update, and keep the old state if anything is not finite."""
    scale = jnp.where(output.count > 0, 1.0 / jnp.maximum(output.count, 1e-30), 0.0)
    gradient = jax.tree.map(lambda g: g * scale, gradient)
    norm = optax.tree.norm(gradient)
    updates, opt_state = parts.optimiser.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    finite = jnp.isfinite(output.total) & jnp.isfinite(norm)
    learns = finite & (norm > 0)  # without a gradient decay and moments must not act either
    new = TrainState(step=state.step, params=params, opt_state=opt_state, policy_state=policy_state, key=state.key)
    kept = jax.tree.map(lambda a, b: jnp.where(learns, a, b), new, state)
    policy_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new.policy_state, state.policy_state)
    one = jnp.ones((), jnp.float32)
    metrics = {
        **output.metrics,
        "loss": (output.total, output.count),
        "grad_norm": (norm, one),
        "learning_rate": (jnp.asarray(parts.learning_rate(state.step), jnp.float32), one),
    }
    return dataclasses.replace(kept, step=state.step + 1, policy_state=policy_state), metrics


def make_supervise(parts: StepParts) -> Callable[[Params, Params, Batch, Any, Array, Array], Supervised]:
    """(params, teacher_params, batch [B, ...], policy_state, key, step) -> (loss, policy state, finite rows [B]).

    Differentiable in `params`; the loss is a sum over the rows of all devices. Raises ValueError if there is no teacher
    but the loss or the signal needs one.
    """
    rules = parts.rules
    teacher_model = parts.teacher if _needs_teacher(parts) else None
    if _needs_teacher(parts) and teacher_model is None:
        raise ValueError("teacher.path must be set, got ''; the loss or the signal compares with a teacher. Name one.")

    def supervise(
        params: Params, teacher_params: Params, batch: Batch, policy_state: Any, key: Array, step: Array
    ) -> Supervised:
        student = parts.student.hidden(params, batch), parts.student.head(params)
        row = rules.batch_spec
        specs: list[Any] = [side_specs(parts.student, rules), None]
        teacher = None
        if teacher_model is not None:
            teacher = lax.stop_gradient(
                (teacher_model.hidden(teacher_params, batch), teacher_model.head(teacher_params))
            )
            specs[1] = side_specs(teacher_model, rules)
        if isinstance(batch.teacher, (TeacherHidden, TeacherText)):
            batch = dataclasses.replace(batch, teacher=None)
        batch_spec = jax.tree.map(lambda a: row(a.ndim), batch)
        local = rules.rowwise(
            functools.partial(_supervise_rows, parts),
            in_specs=(*specs, batch_spec, P(), P(), P()),
            out_specs=(P(), P(), row(1)),
        )
        supervised: Supervised = local(student, teacher, batch, policy_state, key, step)
        return supervised

    return supervise


def _supervise_rows(
    parts: StepParts, student: Side, teacher: Side | None, batch: Batch, policy_state: Any, key: Array, step: Array
) -> Supervised:
    """Behind the trunks, for the rows of one device; the sums over all devices come out."""
    rules = parts.rules
    sides = [(student, parts.student)] + (
        [] if parts.teacher is None or teacher is None else [(teacher, parts.teacher)]
    )
    whole = rules.with_heads([side for side, _ in sides], [side_specs(model, rules) for _, model in sides])
    (hidden, head), teacher = whole[0], whole[1] if len(whole) > 1 else None
    labels, eligible = targets_of(batch)
    needs = parts.chooser.needs
    known = cached_stats(batch.teacher, needs)
    rest = [name for name in needs if name not in known]
    stats = token_stats(rest, (hidden, head), teacher, labels, implementation=rules.kernels)
    stats = dataclasses.replace(stats, **known)
    measured = {name: metric.mean(getattr(stats, name), eligible) for name in needs}
    rows = (rules.all_rows, rules.own_rows)
    selection, policy_state = parts.chooser(stats, batch, eligible, policy_state, key, step, *rows)
    metrics = {"selected_fraction": _selected_fraction(selection, eligible)}
    if isinstance(batch.teacher, CachedTeacher):
        chosen = selection.weight > 0
        held = gather_slots(batch.teacher.stored, selection.index)
        metrics["cache_misses"] = metric.mean(~held, chosen)
        selection = dataclasses.replace(selection, weight=jnp.where(held, selection.weight, 0.0))
    targets = _targets(parts, teacher, batch, selection.index, step)
    slots, slot_labels = gather_slots(hidden, selection.index), gather_slots(labels, selection.index)
    output = parts.objective(slots, head, targets, slot_labels, selection, batch.weight, step, rules.kernels)
    metrics = {**output.metrics, **measured, **metrics}
    output = rules.sum_over_batch(dataclasses.replace(output, metrics=metrics))
    policy_state = parts.chooser.policy.observe(policy_state, output, step)
    return output, policy_state, jnp.isfinite(jnp.sum(hidden.astype(jnp.float32), (1, 2)))


def _targets(
    parts: StepParts, teacher: Side | None, batch: Batch, index: Array, step: Array
) -> DenseTargets | SparseTargets | None:
    """What the objective compares with at the slots."""
    if not parts.objective.needs_teacher:
        return None
    if parts.cached and parts.classes is not None and isinstance(batch.teacher, CachedTeacher):
        return cached_targets(parts.classes, batch.teacher, index)
    if teacher is None:
        return None
    live = live_targets(*teacher, index)
    if parts.classes is None:
        return live
    return drawn_targets(parts.classes, live, index, batch, parts.objective.tau(step), parts.rules.kernels)


def _selected_fraction(selection: Selection, eligible: Array) -> tuple[Array, Array]:
    return jnp.sum(selection.weight > 0, dtype=jnp.float32), jnp.sum(eligible, dtype=jnp.float32)


def _needs_teacher(parts: StepParts) -> bool:
    """Whether a live teacher must run."""
    if parts.cached:
        return False
    return parts.objective.needs_teacher or any(name in NEEDS_TEACHER for name in parts.chooser.needs)
