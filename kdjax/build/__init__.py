"""The only room where names become objects: from an `Experiment` to models, data and the parts of the step."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from kdjax import config as schema
from kdjax import models, registry
from kdjax.build.asked import Asked, TrainingText, check_student, reselected, training_text
from kdjax.build.checks import (
    check_cached,
    check_ids,
    check_paths,
    check_rows,
    check_tokenizers,
    is_served,
    keeps_rows,
    scores_text,
)
from kdjax.build.parts import (
    DTYPES,
    build_chooser,
    build_objective,
    build_parts,
    language_model,
    named_parts,
    reads_its_own,
    shared_vocabulary,
)
from kdjax.config import Experiment
from kdjax.curation import Basis, basis, kept_rows
from kdjax.data import LoadedData, Rows, load_data
from kdjax.generation.batching import Speaker, speaker
from kdjax.models import ModelConfig, flax_models, prune
from kdjax.models import tokenizer as tokenizers
from kdjax.models.io import LoadedModel, fingerprint, load_config, load_model
from kdjax.sharding import Rules
from kdjax.step import StepParts
from kdjax.teacher.apart import copy_of_head, make_feed, share_devices
from kdjax.teacher.cache import CacheReader, open_cache
from kdjax.types import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DTYPES",
    "Asked",
    "Built",
    "TrainingText",
    "build",
    "build_chooser",
    "build_objective",
    "build_parts",
    "cache_identity",
    "cache_path",
    "check_cached",
    "check_rows",
    "keeps_rows",
    "language_model",
    "load_experiment",
    "reselected",
    "samples_basis",
    "scores_text",
    "student_speaker",
]


@dataclasses.dataclass(frozen=True)
class Built:
    """Everything a run needs.

    teacher: None if there is none, or if a cache speaks for it. student_params: the initial float32 masters;
    student_source: what they are. train: the rows to train on, those of data.train that the sample axis keeps. cache:
    what teacher.source = "cache" reads. vocab_size: the columns that student and teacher have in common. teacher_head:
    what the step sees of a teacher on devices of its own. text: what `data.train` is made of.
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
    teacher_head: Params | None = None
    text: TrainingText | None = None

    @property
    def asked(self) -> Asked | None:
        """The prompts, if answers to them are trained on."""
        return None if self.text is None else self.text.asked

    @property
    def teacher_params(self) -> Params:
        """() if there is no teacher: the step takes the argument all the same."""
        if self.teacher_head is not None:
            return self.teacher_head
        return () if self.teacher is None else self.teacher.params


def build(
    experiment: Experiment, workdir: Path | None = None, *, live_teacher: bool = False, choosing: bool = False
) -> Built:
    """Load models and data and compose the step. Raises ValueError that names the config path at fault.

    workdir: where the kept rows and the cache of this experiment are; without it all rows count and no cache is opened.
    live_teacher: load the teacher even where a cache speaks for it, to evaluate or to write that cache; a served one
    is not to be had. choosing: rows are still to be chosen; of the workdir the selected answers alone are read.
    What is quick comes first: a misspelt name or a damaged text is said before gigabytes of weights are read.
    """
    e = experiment
    rules, of_teacher = share_devices(experiment)
    check_rows(experiment, rules, of_teacher)
    check_paths(experiment)
    named_parts(experiment)
    tokenizer = _load_tokenizer(experiment)
    text = training_text(e, load_data(experiment.data, tokenizer), tokenizer, workdir)
    data = text.data
    cached = experiment.teacher.source == "cache" and not live_teacher
    teacher = None if cached or is_served(e) else _load_teacher(experiment, of_teacher)
    teacher_cfg = None if is_served(e) else _teacher_config(experiment, teacher)
    cfg, params, source = _load_student(experiment, teacher, rules)
    if text.asked is not None:
        check_student(experiment, text.asked, params, workdir)
    check_tokenizers(experiment, tokenizer, teacher_cfg, cfg)
    check_ids(data, cfg, teacher_cfg)
    if experiment.data.packing == "pack":
        for name, side in (("student", cfg), ("teacher", None if cached else teacher_cfg)):
            flax_models.check_packing(side, f"{name}.path")
    parts = build_parts(experiment, cfg, teacher_cfg, rules, cached=cached)
    vocab = shared_vocabulary(cfg, teacher_cfg)
    built = Built(experiment, parts.rules, parts, teacher, cfg, params, source, tokenizer, data, data.train, vocab)
    if experiment.teacher.devices and teacher is not None:
        built = _teacher_apart(built, teacher, of_teacher)
    built = dataclasses.replace(built, text=text)
    if workdir is None or choosing:
        return built
    if keeps_rows(experiment):
        built = dataclasses.replace(built, train=kept_rows(built.train, workdir, samples_basis(built)))
    if cached:
        built = dataclasses.replace(built, cache=open_cache(cache_path(experiment, workdir), cache_identity(built)))
    return built


def student_speaker(built: Built, params: Params) -> Speaker:
    """The student with these parameters, as `generation.rollouts` takes it; by its own rules, not those of the rows."""
    e = built.experiment
    dtype = registry.lookup(DTYPES, e.student.compute_dtype, "student.compute_dtype")
    return speaker(built.student_cfg, params, built.tokenizer, rules=share_devices(e)[0], compute_dtype=dtype)


def samples_basis(built: Built) -> Basis:
    """What the sample axis depends on in this experiment."""
    teacher, shown = None if built.teacher is None else built.teacher.fingerprint, built.experiment.teacher.privileged
    if teacher is not None and shown:
        teacher = hashlib.sha256(f"{teacher} {shown}".encode()).hexdigest()
    return basis(
        built.experiment.samples,
        built.student_params,
        teacher,
        tokenizers.fingerprint(built.tokenizer),
        built.data.fingerprint,
    )


def cache_path(experiment: Experiment, workdir: Path) -> str:
    """Where the teacher's cache is."""
    return experiment.cache.path or str(workdir / "cache")


def cache_identity(built: Built) -> dict[str, Any]:
    """The fields of a cache's header that this experiment needs as they are; without teacher.path, of any teacher."""
    e = built.experiment
    teacher = None if built.text is None else built.text.speaker
    if e.teacher.path and teacher is None:
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
        "superset": 1.0 if is_served(e) else e.cache.superset,
    }


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


def _teacher_apart(built: Built, teacher: LoadedModel, of_teacher: Rules) -> Built:
    """The teacher runs on its own devices before the step, which gets its hidden states and has a copy of its head."""
    parts = built.parts
    if parts.teacher is None:
        return built
    dtype = registry.lookup(DTYPES, built.experiment.teacher.dtype, "teacher.dtype")
    trunk = reads_its_own(language_model(teacher.cfg, of_teacher, built.vocab_size, dtype), of_teacher)
    feed = make_feed(trunk.hidden, teacher.params, of_teacher, built.rules)
    name = "embed" if teacher.cfg.tied else "head"
    head = {name: copy_of_head(teacher.params[name], models.param_specs(teacher.cfg)[name].axes, built.rules)}
    parts = dataclasses.replace(parts, teacher=dataclasses.replace(parts.teacher, feed=feed))
    return dataclasses.replace(built, parts=parts, teacher_head=head)


def _load_teacher(experiment: Experiment, rules: Rules) -> LoadedModel | None:
    if not experiment.teacher.path:
        return None
    dtype = registry.lookup(DTYPES, experiment.teacher.dtype, "teacher.dtype")
    return load_model(experiment.teacher.path, dtype=dtype, rules=rules)


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
        if rules.mesh is not None or experiment.teacher.devices:  # the teacher may be spread in another way
            alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            masters = jax.tree.map(
                lambda a, like: jax.device_put(a, like.sharding or alone), masters, models.abstract_params(cfg, rules)
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
