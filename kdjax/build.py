"""The only file where names become objects: from an `Experiment` to models, data and the parts of the step."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdjax import config as schema
from kdjax import models, registry
from kdjax.config import Experiment
from kdjax.data import LoadedData, ids_in, load_data
from kdjax.losses import LOSSES
from kdjax.losses.objective import Objective
from kdjax.models import ModelConfig, prune
from kdjax.models import tokenizer as tokenizers
from kdjax.models.io import LoadedModel, load_config, load_model
from kdjax.optim import make_optimiser
from kdjax.schedules import Schedule, make_schedule
from kdjax.selection import POLICIES, SIGNALS, Chooser
from kdjax.sharding import Rules, make_rules
from kdjax.step import LanguageModel, StepParts
from kdjax.types import Array, Batch, Head, Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


@dataclasses.dataclass(frozen=True)
class Built:
    """Everything a run needs. `student_params` are the initial float32 masters; `student_source` says what they are."""

    experiment: Experiment
    rules: Rules
    parts: StepParts
    teacher: LoadedModel | None
    student_cfg: ModelConfig
    student_params: Params
    student_source: str
    tokenizer: "PreTrainedTokenizerBase"
    data: LoadedData

    @property
    def teacher_params(self) -> Params:
        """() if there is no teacher: the step takes the argument all the same."""
        return () if self.teacher is None else self.teacher.params


def build(experiment: Experiment) -> Built:
    """Load models and data and compose the step. Raises ValueError that names the config path at fault.

    What is quick comes first: a misspelt name or a damaged text is said before gigabytes of weights are read.
    """
    rules = make_rules(experiment.mesh.preset, experiment.mesh.devices, experiment.mesh.kernels)
    _check_rows(experiment, rules)
    _check_paths(experiment)
    _named_parts(experiment)
    tokenizer = _load_tokenizer(experiment)
    data = load_data(experiment.data, tokenizer)
    teacher = _load_teacher(experiment, rules)
    cfg, params, source = _load_student(experiment, teacher, rules)
    _check_tokenizers(experiment, tokenizer, teacher, cfg)
    _check_ids(data, cfg, teacher)
    parts = build_parts(experiment, cfg, None if teacher is None else teacher.cfg, rules)
    return Built(experiment, rules, parts, teacher, cfg, params, source, tokenizer, data)


def build_parts(
    experiment: Experiment, student_cfg: ModelConfig, teacher_cfg: ModelConfig | None, rules: Rules
) -> StepParts:
    """The step's parts from shapes alone: no weights, no data; enough to trace or compile a step for any mesh."""
    e = experiment
    for name, cfg in (("student", student_cfg), ("teacher", teacher_cfg)):
        if cfg is not None and e.data.seq_len > cfg.max_positions:
            raise ValueError(
                f"data.seq_len must be at most the {cfg.max_positions} positions that the {name} was made for, got "
                f"{e.data.seq_len}. Lower it."
            )
    chooser, objective, optimiser, rate = _named_parts(e)
    vocab = min(cfg.vocab_size for cfg in (student_cfg, teacher_cfg) if cfg is not None)
    compute = registry.lookup(DTYPES, e.student.compute_dtype, "student.compute_dtype")
    student = language_model(student_cfg, rules, vocab, compute, e.student.remat)
    teacher = None
    if teacher_cfg is not None:
        teacher = language_model(teacher_cfg, rules, vocab, registry.lookup(DTYPES, e.teacher.dtype, "teacher.dtype"))
    return StepParts(student, teacher, chooser, objective, optimiser, rate, rules, e.train.accumulate)


def _named_parts(e: Experiment) -> tuple[Chooser, Objective, optax.GradientTransformation, Schedule]:
    """What the step needs besides the models."""
    policy = registry.lookup(POLICIES, e.selection.policy, "selection.policy")(e.selection)
    signal = registry.lookup(SIGNALS, policy.signal or e.selection.signal, "selection.signal")
    by_score = e.selection.weighting == "signal"
    chooser = Chooser(signal if policy.uses_signal or by_score else None, policy, by_score)
    return chooser, build_objective(e.loss), *make_optimiser(e.optim, e.train.steps)


def build_objective(config: schema.Loss) -> Objective:
    """The mixture that `loss` describes; a term of constant weight 0 is left out, so that it costs nothing."""
    terms, weights = {}, {}
    for entry in config.terms:
        if not isinstance(entry, (tuple, list)) or len(entry) != 2:
            raise ValueError(f"loss.terms must hold (name, weight) pairs, got {entry!r}. Write (('forward_kl', 1.0),).")
        name, weight = entry
        if name in terms:
            raise ValueError(f"loss.terms must name each loss once, got {name!r} twice. Add up their weights.")
        term = registry.lookup(LOSSES, name, "loss.terms")(config)
        if weight != 0:
            terms[name] = term
            weights[name] = make_schedule(tuple(weight) if isinstance(weight, list) else weight, "loss.terms")
    if not terms:
        raise ValueError(
            f"loss.terms must have a weight that is not 0, got {config.terms!r}; nothing would be learned."
        )
    return Objective(terms, weights, make_schedule(config.tau, "loss.tau"), config.reduction)


def language_model(
    cfg: ModelConfig, rules: Rules, vocab: int, compute_dtype: Any, remat: str = "none"
) -> LanguageModel:
    """One of our models as the step sees it, its head cut to the `vocab` columns that both sides have."""
    spec = models.param_specs(cfg)["embed" if cfg.tied else "head"]

    def hidden(params: Params, batch: Batch) -> Array:
        return models.hidden(
            cfg,
            params,
            batch.tokens,
            batch.segment_ids,
            batch.positions,
            rules=rules,
            compute_dtype=compute_dtype,
            remat=remat,
        )

    def head(params: Params) -> Head:
        return dataclasses.replace(models.head(cfg, params, compute_dtype=compute_dtype), vocab_size=vocab)

    return LanguageModel(hidden, head, rules.storage_spec(spec.axes, spec.shape))


def load_experiment(workdir: str | Path) -> Experiment:
    """The experiment that a run in `workdir` was started with, from its config.json."""
    import ml_collections

    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise ValueError(f"--workdir must be the directory of a run, got {str(workdir)!r}; it has no config.json.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be the config of a run, got a damaged file; {error}.") from error
    return schema.from_config_dict(ml_collections.ConfigDict(values))


def _load_teacher(experiment: Experiment, rules: Rules) -> LoadedModel | None:
    if not experiment.teacher.path:
        return None
    dtype = registry.lookup(DTYPES, experiment.teacher.dtype, "teacher.dtype")
    return load_model(experiment.teacher.path, dtype=dtype, rules=rules)


def _load_student(experiment: Experiment, teacher: LoadedModel | None, rules: Rules) -> tuple[ModelConfig, Params, str]:
    """(config, float32 parameters, what they are in words)."""
    config = experiment.student
    if config.init.kind == "cut" and teacher is not None:
        keep = config.init.keep or prune.default_keep(teacher.cfg.layers, config.init.layers)
        cfg, params = prune.cut(teacher.cfg, teacher.params, keep)
        params = jax.tree.map(lambda a: jnp.array(a, jnp.float32, copy=True), params)
        return cfg, params, f"layers {', '.join(map(str, keep))} of the teacher's {teacher.cfg.layers}"
    if config.init.kind == "random":
        cfg = load_config(config.path, where="student.path")
        params = models.init_params(cfg, jax.random.key(experiment.train.seed), rules)
        return cfg, params, f"random weights in the shape of {config.path}"
    loaded = load_model(config.path, dtype=jnp.float32, rules=rules, where="student.path")
    return loaded.cfg, loaded.params, loaded.source


def _load_tokenizer(experiment: Experiment) -> "PreTrainedTokenizerBase":
    """The tokenizer that cuts the data: data.tokenizer, else the teacher's, else the student's."""
    e = experiment
    choices = {"data.tokenizer": e.data.tokenizer, "teacher.path": e.teacher.path, "student.path": e.student.path}
    where = next(name for name, path in choices.items() if path)
    return tokenizers.load_tokenizer(choices[where], where=where)


def _check_tokenizers(
    experiment: Experiment, tokenizer: "PreTrainedTokenizerBase", teacher: LoadedModel | None, student_cfg: ModelConfig
) -> None:
    """The ids of the data mean to every model what they meant when it was trained; random weights know none."""
    e = experiment
    source = e.data.tokenizer or e.teacher.path or e.student.path
    sides = {} if teacher is None else {"teacher": (e.teacher.path, teacher.cfg.vocab_size)}
    if e.student.init.kind == "own":
        sides["student"] = (e.student.path, student_cfg.vocab_size)
    for name, (path, rows) in sides.items():
        where = f"{name}.path"
        # Where a model comes without a tokenizer, data.tokenizer is the user's word for it.
        if path == source or (e.data.tokenizer and not tokenizers.has_tokenizer(path, where=where)):
            continue
        other = tokenizers.load_tokenizer(path, where=where)
        first, first_rows = ("data", rows) if e.data.tokenizer else ("teacher", sides["teacher"][1])
        tokenizers.check_same_tokenizer(tokenizer, other, first_rows, rows, (first, name))


def _check_ids(data: LoadedData, student_cfg: ModelConfig, teacher: LoadedModel | None) -> None:
    widths = ({} if teacher is None else {"teacher": teacher.cfg.vocab_size}) | {"student": student_cfg.vocab_size}
    largest = int(np.max(np.concatenate([ids_in(data.train), ids_in(data.heldout)])))
    for name, width in widths.items():
        if largest >= width:
            raise ValueError(
                f"data.tokenizer must emit ids below the {name}'s vocabulary of {width}, got {largest}; it is not the "
                f"tokenizer of the {name}. Set data.tokenizer or {name}.path."
            )


def _check_paths(experiment: Experiment) -> None:
    kind = experiment.student.init.kind
    if kind == "cut" and not experiment.teacher.path:
        raise ValueError("teacher.path must be set, got ''; student.init.kind is 'cut' and cuts layers out of it.")
    if kind != "cut" and not experiment.student.path:
        raise ValueError(
            f"student.path must be set, got ''; student.init.kind is {kind!r}. Name a model, or set student.init.kind "
            "to 'cut' to cut the student from the teacher."
        )


def _check_rows(experiment: Experiment, rules: Rules) -> None:
    rows = experiment.train.batch_size // experiment.train.accumulate
    if rows % rules.batch_shards:
        raise ValueError(
            f"train.batch_size / train.accumulate must be a multiple of the mesh's {rules.batch_shards} devices, got "
            f"{rows}; each device takes the same number of rows. Change train.batch_size or mesh.devices."
        )
