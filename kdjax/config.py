"""The schema of an experiment: frozen dataclasses, and the two-way bridge to `ml_collections.ConfigDict`.

`configs/*.py` start from `default_config()`, change fields and return a locked ConfigDict; command-line flags override
them (`--config.train.steps=200`); `from_config_dict` checks everything once and gives the frozen form that the code
uses. This module imports no component: names are resolved in `build.py`. Fractions are in (0, 1]; sizes are in tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable
from typing import Any

import ml_collections

from kdjax.registry import did_you_mean

ScheduleSpec = float | tuple  # a number, or (name, *arguments); see schedules.py


@dataclasses.dataclass(frozen=True)
class StudentInit:
    """Where the student's weights come from."""

    kind: str = "own"  # own: the weights at student.path | cut: layers of the teacher | random: student.path's shapes
    keep: tuple[int, ...] = ()  # cut: the teacher layers to keep, ascending; () = the default spread of `layers`
    layers: int = 6  # cut: how many, when `keep` is ()


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The model that is distilled."""

    path: str = ""  # HF directory, *.gguf, hub id, or "smollm2-135m" | "synthetic"
    dtype: str = "float32"  # of the weights in memory


@dataclasses.dataclass(frozen=True)
class Student:
    """The model that is trained."""

    path: str = ""  # as teacher.path; "" with init.kind "cut" = cut from the teacher
    init: StudentInit = StudentInit()
    compute_dtype: str = "float32"  # masters are always float32
    remat: str = "none"  # none | full | dots: what the backward pass recomputes


@dataclasses.dataclass(frozen=True)
class Data:
    """The text, its split, and how it becomes rows."""

    path: str = "factbook"  # factbook | topics | *.txt | *.jsonl | directory of these
    tokenizer: str = ""  # "" = the teacher's
    seq_len: int = 128
    packing: str = "pack"  # pack: documents share rows | row: one example per row
    heldout_fraction: float = 0.05  # of the documents
    seed: int = 0  # of the split and the shuffle
    max_train_tokens: int = 0  # 0 = all; else whole rows are kept until this many tokens
    chat_template: bool = True  # prompt/response and messages go through the tokenizer's template
    system_prompt: str = ""  # "" = whatever the template does by default


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which positions are supervised (`kdjax/selection`)."""

    policy: str = "top_fraction"  # all | top_fraction | random_fraction | ...: see kdjax/selection/policies
    signal: str = "student_entropy"
    fraction: float = 0.2
    weighting: str = "uniform"  # uniform | signal: a selected position counts by its (positive) score
    quota: str = "row"  # top_fraction, random_fraction: row: of its own length | batch: of the batch's mean length
    queue: int = 30000  # threshold: scores of the last positions, over all rows, that the threshold is a quantile of
    slack: float = 2.0  # threshold: room for this many times the fraction; what exceeds it in a row is dropped
    curriculum_steps: int = 4000  # curriculum: from the easiest positions to the hardest
    upper: float = 0.8  # bucket: upper end of the band of quantiles; its width is `fraction`
    corrected: bool = True  # sampled: importance weights, so that the mean over all positions is estimated
    reserve: float = 0.5  # reserve_mix: share of the budget that is drawn at random


@dataclasses.dataclass(frozen=True)
class Loss:
    """What is minimised at the selected positions (`kdjax/losses`)."""

    terms: tuple = (("forward_kl", 1.0),)  # ((name, weight or schedule), ...)
    tau: ScheduleSpec = 1.0  # temperature of the divergences, which are multiplied by tau^2; cross_entropy is at 1
    beta: float = 0.5  # jsd: weight of the teacher in the mixture, in (0, 1)
    skew: float = 0.1  # skew_kl, skew_reverse_kl: share of the teacher (student) in the mixture, in [0, 1)
    todi_scale: float = 1.0  # todi: how sharply an entry turns from forward to reverse KL
    akl_mu: float = 0.5  # akl: the probability mass that the head holds at most, in (0, 1)
    dkd_beta: float = 8.0  # dkd: weight of the divergence among the entries other than the label
    reduction: str = "token"  # token: mean over slots | sample: mean over rows of the row means


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW, its learning-rate schedule and clipping."""

    learning_rate: float = 4e-4
    schedule: str = "cosine"  # constant | linear | cosine, after the warm-up
    warmup: int = 10
    final_fraction: float = 0.1  # of the peak, at the last step
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices only
    clip: float = 1.0  # global gradient norm; 0 = off


@dataclasses.dataclass(frozen=True)
class Train:
    """How long, and how much per step."""

    steps: int = 100
    batch_size: int = 8  # rows per optimiser step, over all devices
    accumulate: int = 1  # micro-batches per step
    seed: int = 0
    log_every: int = 5


@dataclasses.dataclass(frozen=True)
class Eval:
    """The held-out figures and completions."""

    every: int = 0  # steps; 0 = only before the first and after the last step
    rows: int = 32  # held-out rows; 0 = all
    batch_size: int = 4
    completions: int = 3
    new_tokens: int = 40


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When to save and what to keep."""

    every: int = 100  # steps; the last step is always saved
    keep: int = 2  # newest ones
    keep_best: int = 1  # by held-out KL, among steps that were evaluated; 0 = none


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Over which devices, and how (`kdjax/sharding.py`)."""

    preset: str = "single"  # single | dp | fsdp
    devices: int = 0  # 0 = all that JAX sees (single: 1)
    kernels: str = "auto"  # auto | xla | pallas_tpu | pallas_gpu | reference: who computes over the vocabulary


@dataclasses.dataclass(frozen=True)
class Log:
    """Where figures go besides metrics.jsonl."""

    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "kdjax"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment, whole."""

    name: str = "experiment"
    teacher: Teacher = Teacher()
    student: Student = Student()
    data: Data = Data()
    selection: Selection = Selection()
    loss: Loss = Loss()
    optim: Optim = Optim()
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    mesh: Mesh = Mesh()
    log: Log = Log()


def default_config() -> ml_collections.ConfigDict:
    """All fields of `Experiment` with their defaults, as a locked ConfigDict for configs/ and the command line."""
    config = ml_collections.ConfigDict(dataclasses.asdict(Experiment()), convert_dict=True)
    # A ConfigDict holds every field to the type of its default, but a schedule is a number or a tuple.
    tau = config.loss.tau
    del config.loss.tau
    config.loss.tau = ml_collections.FieldReference(tau, field_type=object)
    return config.lock()


def from_config_dict(config: ml_collections.ConfigDict) -> Experiment:
    """The frozen, checked experiment. Raises ValueError that names the config path, what it is and what it must be."""
    experiment = _build(Experiment, config.to_dict(), "")
    _check(experiment)
    return experiment


def fingerprint(experiment: Experiment) -> str:
    """16 hex digits over everything that shapes the training trajectory.

    Left out: name, log, eval, checkpoint cadence and the mesh, so that a run can be resumed on other hardware.
    """
    free = ("name", "log", "eval", "checkpoint", "mesh")
    kept = {key: value for key, value in dataclasses.asdict(experiment).items() if key not in free}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _build(schema: Any, values: Any, path: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{path.rstrip('.')} must be a group of fields, got {values!r} ({type(values).__name__}).")
    hints = typing.get_type_hints(schema)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"config has no field {path + unknown[0]!r}." + did_you_mean(unknown[0], hints))
    made = {}
    for name, value in values.items():
        want, where = hints[name], path + name
        made[name] = _build(want, value, where + ".") if dataclasses.is_dataclass(want) else _coerce(want, value, where)
    return schema(**made)


def _coerce(want: Any, value: Any, where: str) -> Any:
    choices = typing.get_args(want) if isinstance(want, types.UnionType) else (want,)
    plain = tuple(typing.get_origin(choice) or choice for choice in choices)
    if isinstance(value, (list, tuple)) and tuple in plain:
        if typing.get_origin(want) is tuple:  # tuple[X, ...]
            item_type = typing.get_args(want)[0]
            return tuple(_coerce(item_type, item, f"{where}[{i}]") for i, item in enumerate(value))
        return _freeze(value)
    if float in plain and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain):
        kinds = " or ".join(choice.__name__ for choice in plain)
        raise ValueError(f"{where} must be {kinds}, got {value!r} ({type(value).__name__}).")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be finite, got {value!r}.")
    return value


def _freeze(value: Any) -> Any:
    """Tuples for lists and floats for ints, all the way down: equal settings give equal objects and fingerprints."""
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(item) for item in value)
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _is_schedule(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, tuple) and value[:1] != () and isinstance(value[0], str))


def _is_term(term: Any) -> bool:
    return isinstance(term, tuple) and len(term) == 2 and isinstance(term[0], str) and _is_schedule(term[1])


def _at_least(low: int) -> tuple[Callable[[Any], bool], str]:
    return lambda v: v >= low, f"at least {low}"


def _one_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
    return lambda v: v in choices, " or ".join(map(repr, choices))


_COUNT = (*_at_least(1), "it is a count")
_OR_OFF = (*_at_least(0), "0 switches it off")
_DTYPE = (*_one_of("float32", "bfloat16"), "other types lose too much or are not supported")

# config path -> (does the value do, what it must be, why)
_RULES: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "teacher.dtype": _DTYPE,
    "student.compute_dtype": _DTYPE,
    "student.remat": (*_one_of("none", "full", "dots"), "see Student"),
    "student.init.kind": (*_one_of("own", "cut", "random"), "see StudentInit"),
    "student.init.layers": _COUNT,
    "student.init.keep": (
        lambda v: all(layer >= 0 for layer in v) and list(v) == sorted(set(v)),
        "layer numbers of the teacher, each once, ascending",
        "the student has them in this order",
    ),
    "data.seq_len": (*_at_least(2), "a target needs a token before it"),
    "data.packing": (*_one_of("pack", "row"), "see Data"),
    "data.heldout_fraction": (lambda v: 0 < v < 1, "in (0, 1)", "both parts need documents"),
    "data.max_train_tokens": _OR_OFF,
    "selection.fraction": (lambda v: 0 < v <= 1, "in (0, 1]", "it is a fraction, 0.2 means 20 %"),
    "selection.weighting": (*_one_of("uniform", "signal"), "see Selection"),
    "selection.quota": (*_one_of("row", "batch"), "see Selection"),
    "selection.queue": _COUNT,
    "selection.slack": (*_at_least(1), "less would drop positions of an average row"),
    "selection.curriculum_steps": _COUNT,
    "selection.upper": (lambda v: 0 < v <= 1, "in (0, 1]", "it is a quantile"),
    "selection.reserve": (lambda v: 0 <= v <= 1, "in [0, 1]", "it is a share of the budget"),
    "loss.terms": (
        lambda v: len(v) > 0 and all(map(_is_term, v)),
        "a non-empty tuple of (name, weight or schedule)",
        "one term is written ((name, weight),)",
    ),
    "loss.tau": (
        lambda v: _is_schedule(v) and (isinstance(v, tuple) or v > 0),
        "a positive number or (name, *arguments)",
        "logits are divided by it; see kdjax/schedules.py",
    ),
    "loss.beta": (lambda v: 0 < v < 1, "in (0, 1)", "JSD is 0 at both ends; use forward_kl or reverse_kl there"),
    "loss.skew": (lambda v: 0 <= v < 1, "in [0, 1)", "at 1 both sides of the divergence are equal"),
    "loss.todi_scale": (*_at_least(0), "below 0 forward KL would act where reverse KL should"),
    "loss.akl_mu": (lambda v: 0 < v < 1, "in (0, 1)", "it is a share of the mass; use reverse_kl or forward_kl"),
    "loss.dkd_beta": (*_at_least(0), "0 leaves the label against the rest"),
    "loss.reduction": (*_one_of("token", "sample"), "see Loss"),
    "optim.learning_rate": (lambda v: v > 0, "positive", "nothing would be learned"),
    "optim.warmup": _OR_OFF,
    "optim.final_fraction": (lambda v: 0 <= v <= 1, "in [0, 1]", "it is a fraction of the peak"),
    "optim.b1": (lambda v: 0 <= v < 1, "in [0, 1)", "it is the decay of a running mean"),
    "optim.b2": (lambda v: 0 <= v < 1, "in [0, 1)", "it is the decay of a running mean"),
    "optim.eps": (lambda v: v > 0, "positive", "it keeps a division finite"),
    "optim.weight_decay": _OR_OFF,
    "optim.clip": _OR_OFF,
    "train.steps": _COUNT,
    "train.batch_size": _COUNT,
    "train.accumulate": _COUNT,
    "train.log_every": _COUNT,
    "eval.every": _OR_OFF,
    "eval.rows": (*_at_least(0), "0 means all"),
    "eval.batch_size": _COUNT,
    "eval.completions": _OR_OFF,
    "eval.new_tokens": _COUNT,
    "checkpoint.every": (*_at_least(1), "it is a number of steps"),
    "checkpoint.keep": (*_at_least(1), "the newest checkpoint is what a run resumes from"),
    "checkpoint.keep_best": _OR_OFF,
    "mesh.devices": (*_at_least(0), "0 means all"),
    "mesh.kernels": (*_one_of("auto", "xla", "pallas_tpu", "pallas_gpu", "reference"), "see kdjax/kernels"),
}


def _check(experiment: Experiment) -> None:
    for where, (good, rule, why) in _RULES.items():
        value = functools.reduce(getattr, where.split("."), experiment)
        if not good(value):
            raise ValueError(f"{where} must be {rule}, got {value!r}; {why}.")
    rows, parts = experiment.train.batch_size, experiment.train.accumulate
    if rows % parts:
        raise ValueError(
            f"train.batch_size must be a multiple of train.accumulate, got {rows} and {parts}; every micro-batch has "
            "the same number of rows. Change one of them."
        )
