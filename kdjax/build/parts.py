"""The parts of the step from an `Experiment` and shapes alone."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax

from kdjax import config as schema
from kdjax import models, registry
from kdjax.build.checks import check_cached, check_fresh
from kdjax.config import Experiment
from kdjax.losses import LOSSES
from kdjax.losses.objective import Objective
from kdjax.models import ModelConfig
from kdjax.optim import make_optimiser
from kdjax.schedules import Schedule, make_schedule, own_steps
from kdjax.selection import POLICIES, SIGNALS, Chooser
from kdjax.selection.policies.interpolated import interpolated
from kdjax.sharding import Rules
from kdjax.step import LanguageModel, StepParts
from kdjax.teacher.classes import CLASSES, make_class_sampler
from kdjax.types import Array, Batch, Head, Params, TeacherHidden, TeacherText, gather_slots

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def build_parts(
    experiment: Experiment,
    student_cfg: ModelConfig,
    teacher_cfg: ModelConfig | None,
    rules: Rules,
    *,
    cached: bool | None = None,
) -> StepParts:
    """The step's parts from shapes alone: no weights, no data; enough to trace or compile a step for any mesh.

    cached: whether batches bring the teacher along; None = as teacher.source says.
    """
    e = experiment
    cached = e.teacher.source == "cache" if cached is None else cached
    for name, cfg in (("student", student_cfg), ("teacher", teacher_cfg)):
        if cfg is not None and e.data.seq_len > cfg.max_positions:
            raise ValueError(
                f"data.seq_len must be at most the {cfg.max_positions} positions that the {name} was made for, got "
                f"{e.data.seq_len}. Lower it."
            )
    chooser, objective, optimiser, rate = named_parts(e)
    vocab = shared_vocabulary(student_cfg, teacher_cfg)
    compute = registry.lookup(DTYPES, e.student.compute_dtype, "student.compute_dtype")
    of_teacher = rules.of_preset(e.teacher.preset)
    # The finer cut of the rows is also one for the coarser: hidden states get there without communication.
    rows = of_teacher if rules.preset.tensor and teacher_cfg is not None and not cached else rules
    teacher = None
    if teacher_cfg is not None and not cached:
        dtype = registry.lookup(DTYPES, e.teacher.dtype, "teacher.dtype")
        if e.teacher.devices:
            of_teacher = rows = rules
        teacher = reads_its_own(language_model(teacher_cfg, of_teacher, vocab, dtype, rows=rows), rows)
        if e.teacher.devices:
            teacher = dataclasses.replace(teacher, hidden=_hidden_of_batch)
    student = language_model(student_cfg, rules, vocab, compute, e.student.remat, rows=rows)
    classes = None if e.classes.kind == "all" else make_class_sampler(e.classes, vocab)
    if cached:
        check_cached(e, chooser)
    return StepParts(
        student, teacher, chooser, objective, optimiser, rate, rows, e.train.accumulate, classes, cached=cached
    )


def named_parts(e: Experiment) -> tuple[Chooser, Objective, optax.GradientTransformation, Schedule]:
    """What the step needs besides the models."""
    chooser, objective = build_chooser(e.selection), _by_origin(e)
    if any(term.given == "teacher_share" for term in objective.terms.values()):
        chooser = dataclasses.replace(chooser, policy=interpolated(chooser.policy, e.loss, e.train.steps))
    objective = objective.for_policy(e.selection.policy, chooser.policy.gives)
    if e.classes.kind != "all":
        registry.lookup(CLASSES, e.classes.kind, "classes.kind")
        objective = objective.for_sparse_targets(e.classes.kind)
    return chooser, objective, *make_optimiser(e.optim, e.train.steps)


def build_chooser(config: schema.Selection) -> Chooser:
    """How positions are chosen."""
    policy = registry.lookup(POLICIES, config.policy, "selection.policy")(config)
    signal = registry.lookup(SIGNALS, policy.signal or config.signal, "selection.signal")
    by_score = config.weighting == "signal"
    return Chooser(signal if policy.uses_signal or by_score else None, policy, by_score)


def _by_origin(e: Experiment) -> Objective:
    """The mixture of `loss.terms`, and at the steps on own answers that of `on_policy.terms`, if there are any."""
    steps, terms = e.train.steps, e.on_policy.terms
    objective = build_objective(e.loss, steps)
    if not terms:
        check_fresh(e, [name for name, term in objective.terms.items() if term.sampled], "loss.terms")
        return objective
    if e.on_policy.fraction == 0:
        raise ValueError(
            f"on_policy.terms must be () with on_policy.fraction=0, got {terms!r}; no step is on own answers. Set "
            "on_policy.fraction, or loss.terms."
        )
    on_own = build_objective(dataclasses.replace(e.loss, terms=terms), steps, "on_policy.terms")
    for one, where in ((objective, "loss.terms"), (on_own, "on_policy.terms")):
        check_fresh(e, [name for name, term in one.terms.items() if term.sampled], where)
    own = own_steps(e.on_policy.fraction, steps, e.train.seed)
    nothing = make_schedule(0.0, "loss.terms")

    def weight(name: str) -> Schedule:
        here, there = (one.weights.get(name, nothing) for one in (on_own, objective))
        return lambda update: jnp.where(jnp.asarray(own)[update], here(update), there(update))

    every = {**objective.terms, **on_own.terms}
    return dataclasses.replace(objective, terms=every, weights={name: weight(name) for name in every})


def build_objective(config: schema.Loss, steps: int | None = None, where: str = "loss.terms") -> Objective:
    """The mixture that `loss` describes; a term of constant weight 0 is left out, so that it costs nothing.

    steps: of the run, for schedules that have shares of it. where: the config path of the terms, for errors.
    """
    terms, weights = {}, {}
    for entry in config.terms:
        if not isinstance(entry, (tuple, list)) or len(entry) != 2:
            raise ValueError(f"{where} must hold (name, weight) pairs, got {entry!r}. Write (('forward_kl', 1.0),).")
        name, weight = entry
        if name in terms:
            raise ValueError(f"{where} must name each loss once, got {name!r} twice. Add up their weights.")
        term = registry.lookup(LOSSES, name, where)(config)
        if weight != 0:
            terms[name] = term
            weights[name] = make_schedule(tuple(weight) if isinstance(weight, list) else weight, where, steps)
    if not terms:
        raise ValueError(f"{where} must have a weight that is not 0, got {config.terms!r}; nothing would be learned.")
    return Objective(terms, weights, make_schedule(config.tau, "loss.tau", steps), config.reduction)


def language_model(
    cfg: ModelConfig,
    rules: Rules,
    vocab: int,
    compute_dtype: Any,
    remat: str = "none",
    rows: Rules | None = None,
) -> LanguageModel:
    """One of our models as the step sees it, its head cut to the `vocab` columns that both sides have.

    rows: how the step splits rows, if that is another way than the model's own; hidden states are brought there.
    Raises ValueError if tensor parallelism does not divide the model.
    """
    split_rows = rules if rows is None else rows
    spec = models.param_specs(cfg)["embed" if cfg.tied else "head"]
    models.abstract_params(cfg, rules)  # says what does not divide

    def hidden(params: Params, batch: Batch) -> Array:
        inputs = [rules.reshard(a, rules.batch_spec(2)) for a in (batch.tokens, batch.segment_ids, batch.positions)]
        found = models.hidden(cfg, params, *inputs, rules=rules, compute_dtype=compute_dtype, remat=remat)
        return split_rows.reshard(found, split_rows.batch_spec(3))

    def head(params: Params) -> Head:
        return dataclasses.replace(models.head(cfg, params, compute_dtype=compute_dtype), vocab_size=vocab)

    def shared(params: Params, *row: Array, **parts: Any) -> tuple[Array, Array]:
        inputs = [rules.reshard(a, rules.batch_spec(2)) for a in row]
        run = models.hidden_and_states
        found, states = run(cfg, params, *inputs, rules=rules, compute_dtype=compute_dtype, **parts)
        if split_rows.batch_axes != rules.batch_axes:
            found, states = (split_rows.reshard(a, split_rows.batch_spec(3)) for a in (found, states))
        return found, states

    storage = rules.storage_spec(spec.axes, spec.shape)
    return LanguageModel(hidden, head, storage, shared=shared if models.shares_prefixes(cfg) else None)


def reads_its_own(model: LanguageModel, rows: Rules) -> LanguageModel:
    """The model, which reads `batch.teacher` in place of the batch where that is a `TeacherText`."""

    def hidden(params: Params, batch: Batch) -> Array:
        text = batch.teacher
        if not isinstance(text, TeacherText):
            return model.hidden(params, batch)
        own = dataclasses.replace(
            batch, tokens=text.tokens, segment_ids=text.segment_ids, positions=text.positions, teacher=None
        )
        pick = rows.rowwise(gather_slots, (rows.batch_spec(3), rows.batch_spec(2)), rows.batch_spec(3))
        found: Array = pick(model.hidden(params, own), text.index)
        return found

    return dataclasses.replace(model, hidden=hidden)


def _hidden_of_batch(params: Params, batch: Batch) -> Array:
    """Of a teacher on devices of its own."""
    if not isinstance(batch.teacher, TeacherHidden):
        raise ValueError(
            "batch.teacher must hold the teacher's hidden states. Let the batch go through its feed first."
        )
    return batch.teacher.hidden


def shared_vocabulary(student_cfg: ModelConfig, teacher_cfg: ModelConfig | None) -> int:
    """The columns that both heads have."""
    return min(cfg.vocab_size for cfg in (student_cfg, teacher_cfg) if cfg is not None)
