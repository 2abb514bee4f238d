"""The only file where names become objects: from an `Experiment` to models, data and the parts of the step."""

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdjax import config as schema
from kdjax import models, registry
from kdjax.config import Experiment
from kdjax.curation import Basis, basis, kept_rows
from kdjax.data import LoadedData, Rows, ids_in, load_data
from kdjax.losses import LOSSES
from kdjax.losses.objective import Objective
from kdjax.models import ModelConfig, flax_models, prune
from kdjax.models import tokenizer as tokenizers
from kdjax.models.io import LoadedModel, fingerprint, load_config, load_model
from kdjax.optim import make_optimiser
from kdjax.schedules import Schedule, make_schedule
from kdjax.selection import POLICIES, SIGNALS, Chooser
from kdjax.selection.stats import NEEDS_TEACHER
from kdjax.sharding import Rules, make_rules
from kdjax.step import LanguageModel, StepParts
from kdjax.teacher.cache import CacheReader, open_cache
from kdjax.teacher.classes import CLASSES, make_class_sampler
from kdjax.types import Array, Batch, Head, Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


@dataclasses.dataclass(frozen=True)
class Built:
    """Everything a run needs.

    teacher: None if there is none, or if a cache speaks for it. student_params: the initial float32 masters;
    student_source: what they are. train: the rows to train on, those of data.train that the sample axis keeps. cache:
    what teacher.source = "cache" reads. vocab_size: the columns that student and teacher have in common.
    """

    experiment: Experiment
    rules: Rules
    parts: StepParts
    teacher: LoadedModel | None
    student_cfg: ModelConfig
    student_params: Params
    student_source: str
    tokenizer: "PreTrainedTokenizerBase"
    data: LoadedData
    train: Rows
    vocab_size: int
    cache: CacheReader | None = None

    @property
    def teacher_params(self) -> Params:
        """() if there is no teacher: the step takes the argument all the same."""
        return () if self.teacher is None else self.teacher.params


def build(experiment: Experiment, workdir: Path | None = None, *, live_teacher: bool = False) -> Built:
    """Load models and data and compose the step. Raises ValueError that names the config path at fault.

    workdir: where the kept rows and the cache of this experiment are; without it all rows count and no cache is opened.
    live_teacher: load the teacher even where a cache speaks for it, to evaluate or to write that cache.
    What is quick comes first: a misspelt name or a damaged text is said before gigabytes of weights are read.
    """
    rules = make_rules(experiment.mesh)
    check_rows(experiment, rules)
    _check_paths(experiment)
    _named_parts(experiment)
    tokenizer = _load_tokenizer(experiment)
    data = load_data(experiment.data, tokenizer)
    cached = experiment.teacher.source == "cache" and not live_teacher
    teacher = None if cached else _load_teacher(experiment, rules.of_preset(experiment.teacher.preset))
    teacher_cfg = _teacher_config(experiment, teacher)
    cfg, params, source = _load_student(experiment, teacher, rules)
    _check_tokenizers(experiment, tokenizer, teacher_cfg, cfg)
    _check_ids(data, cfg, teacher_cfg)
    if experiment.data.packing == "pack":
        for name, side in (("student", cfg), ("teacher", None if cached else teacher_cfg)):
            flax_models.check_packing(side, f"{name}.path")
    parts = build_parts(experiment, cfg, teacher_cfg, rules, cached=cached)
    vocab = _vocabulary(cfg, teacher_cfg)
    built = Built(experiment, parts.rules, parts, teacher, cfg, params, source, tokenizer, data, data.train, vocab)
    if workdir is None:
        return built
    if experiment.samples.fraction < 1:
        built = dataclasses.replace(built, train=kept_rows(built.train, workdir, samples_basis(built)))
    if cached:
        built = dataclasses.replace(built, cache=open_cache(cache_path(experiment, workdir), cache_identity(built)))
    return built


def samples_basis(built: Built) -> Basis:
    """What the sample axis depends on in this experiment."""
    return basis(
        built.experiment.samples,
        built.student_params,
        None if built.teacher is None else built.teacher.fingerprint,
        tokenizers.fingerprint(built.tokenizer),
        built.data.fingerprint,
    )


def cache_path(experiment: Experiment, workdir: Path) -> str:
    """Where the teacher's cache is."""
    return experiment.cache.path or str(workdir / "cache")


def cache_identity(built: Built) -> dict[str, Any]:
    """The fields of a cache's header that this experiment needs as they are; without teacher.path, of any teacher."""
    e = built.experiment
    teacher = None
    if e.teacher.path:
        teacher = fingerprint(e.teacher.path) if built.teacher is None else built.teacher.fingerprint
    return ({} if teacher is None else {"teacher": teacher}) | {
        "tokenizer": tokenizers.fingerprint(built.tokenizer),
        "vocab_size": built.vocab_size,
        "kind": e.classes.kind,
        "entries": e.classes.entries,
        "power": e.classes.power,
        "seed": e.classes.seed,
        "tau": e.loss.tau,
        "dtype": e.teacher.dtype,
        "seq_len": e.data.seq_len,
        "superset": e.cache.superset,
    }


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
    chooser, objective, optimiser, rate = _named_parts(e)
    vocab = _vocabulary(student_cfg, teacher_cfg)
    compute = registry.lookup(DTYPES, e.student.compute_dtype, "student.compute_dtype")
    of_teacher = rules.of_preset(e.teacher.preset)
    # The finer cut of the rows is also one for the coarser: hidden states get there without communication.
    rows = of_teacher if rules.preset.tensor and teacher_cfg is not None and not cached else rules
    student = language_model(student_cfg, rules, vocab, compute, e.student.remat, rows=rows)
    teacher = None
    if teacher_cfg is not None and not cached:
        dtype = registry.lookup(DTYPES, e.teacher.dtype, "teacher.dtype")
        teacher = language_model(teacher_cfg, of_teacher, vocab, dtype, rows=rows)
    classes = None if e.classes.kind == "all" else make_class_sampler(e.classes, vocab)
    if cached:
        check_cached(e, chooser)
    return StepParts(
        student, teacher, chooser, objective, optimiser, rate, rows, e.train.accumulate, classes, cached=cached
    )


def _named_parts(e: Experiment) -> tuple[Chooser, Objective, optax.GradientTransformation, Schedule]:
    """What the step needs besides the models."""
    chooser = build_chooser(e.selection)
    objective = build_objective(e.loss).for_policy(e.selection.policy, chooser.policy.gives)
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


def _vocabulary(student_cfg: ModelConfig, teacher_cfg: ModelConfig | None) -> int:
    return min(cfg.vocab_size for cfg in (student_cfg, teacher_cfg) if cfg is not None)


def _teacher_config(experiment: Experiment, teacher: LoadedModel | None) -> ModelConfig | None:
    """The teacher's shapes: of the one in memory, else of the one that the cache is of, if its path is set."""
    if teacher is not None:
        return teacher.cfg
    return load_config(experiment.teacher.path) if experiment.teacher.path else None


def _load_student(experiment: Experiment, teacher: LoadedModel | None, rules: Rules) -> tuple[ModelConfig, Params, str]:
    """(config, float32 parameters, what they are in words)."""
    config = experiment.student
    flax_models.refuse_init(config.init.kind, config.path if config.init.kind == "random" else experiment.teacher.path)
    if config.init.kind == "cut":
        layers = (load_config(experiment.teacher.path) if teacher is None else teacher.cfg).layers
        keep = config.init.keep or prune.default_keep(layers, config.init.layers)
        source = f"layers {', '.join(map(str, keep))} of the teacher's {layers}"
        if teacher is None:  # no more of it is read than these layers; rounded as the teacher in memory would be
            dtype = registry.lookup(DTYPES, experiment.teacher.dtype, "teacher.dtype")
            part = load_model(experiment.teacher.path, dtype=dtype, rules=rules, keep=keep)
            cfg, params = part.cfg, part.params
        else:
            cfg, params = prune.cut(teacher.cfg, teacher.params, keep)
        masters = jax.tree.map(lambda a: jnp.array(a, jnp.float32, copy=True), params)
        if rules.mesh is not None:  # the teacher may be spread in another way
            masters = jax.tree.map(
                lambda a, like: jax.device_put(a, like.sharding), masters, models.abstract_params(cfg, rules)
            )
        return cfg, masters, source
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
    experiment: Experiment,
    tokenizer: "PreTrainedTokenizerBase",
    teacher_cfg: ModelConfig | None,
    student_cfg: ModelConfig,
) -> None:
    """The ids of the data mean to every model what they meant when it was trained; random weights know none."""
    e = experiment
    source = e.data.tokenizer or e.teacher.path or e.student.path
    sides = {} if teacher_cfg is None else {"teacher": (e.teacher.path, teacher_cfg.vocab_size)}
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


def _check_ids(data: LoadedData, student_cfg: ModelConfig, teacher_cfg: ModelConfig | None) -> None:
    widths = ({} if teacher_cfg is None else {"teacher": teacher_cfg.vocab_size}) | {"student": student_cfg.vocab_size}
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


def check_cached(e: Experiment, chooser: Chooser) -> None:
    """A cache can serve this experiment. Raises ValueError that says what it cannot know."""
    if e.classes.kind == "all":
        raise ValueError(
            "classes.kind must be 'sampled' or a top-k kind with teacher.source='cache', got 'all'; a cache holds a "
            "few entries per position. Set classes.kind='sampled'."
        )
    if not isinstance(e.loss.tau, float):
        raise ValueError(
            f"loss.tau must be a number with teacher.source='cache', got {e.loss.tau!r}; the entries were drawn at one "
            "temperature. Set a number."
        )
    held = {"teacher_entropy": e.cache.entropy and e.loss.tau == 1, "teacher_ce": e.cache.label_logp}
    for name in chooser.needs:
        if name in NEEDS_TEACHER and not held.get(name, False):
            how = {
                "teacher_entropy": "Set cache.entropy=True and loss.tau=1.0",
                "teacher_ce": "Set cache.label_logp=True",
            }
            raise ValueError(
                f"selection.signal must not need {name!r} of the teacher with this cache, got {e.selection.signal!r}; "
                f"the cache does not hold it. {how.get(name, 'Set another signal')} or teacher.source='live'."
            )


def check_rows(experiment: Experiment, rules: Rules) -> None:
    """Raises ValueError if the rows of a micro-batch cannot be shared out evenly."""
    rows = experiment.train.batch_size // experiment.train.accumulate
    shards = math.lcm(rules.batch_shards, rules.of_preset(experiment.teacher.preset).batch_shards)
    if rows % shards:
        raise ValueError(
            f"train.batch_size / train.accumulate must be a multiple of the {shards} parts that the mesh cuts a batch "
            f"into, got {rows}; each takes the same number of rows. Change train.batch_size or mesh.shape."
        )
