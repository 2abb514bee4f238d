"""An experiment as frozen dataclasses, and the two-way bridge to `ml_collections.ConfigDict`.

`configs/*.py` start from `default_config()`, change fields and return a locked ConfigDict; command-line flags override
them (`--config.train.steps=200`); `from_config_dict` checks everything once and gives the frozen form that the code
uses. This package imports no component: names are resolved in `kdjax/build`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from typing import Any

import ml_collections

from kdjax.config.rules import RULES, check
from kdjax.config.schema import (
    Answers,
    Cache,
    Checkpoint,
    Classes,
    Data,
    Eval,
    Experiment,
    Generation,
    Log,
    Loss,
    Mesh,
    OnPolicy,
    Optim,
    PassRates,
    Prompts,
    Samples,
    ScheduleSpec,
    Selection,
    Served,
    Student,
    StudentInit,
    Teacher,
    Train,
)
from kdjax.registry import did_you_mean

RELEASED_SYSTEM = "You are a helpful assistant."  # of the code of arXiv 2605.26872

__all__ = [
    "RELEASED_SYSTEM",
    "RULES",
    "Answers",
    "Cache",
    "Checkpoint",
    "Classes",
    "Data",
    "Eval",
    "Experiment",
    "Generation",
    "Log",
    "Loss",
    "Mesh",
    "OnPolicy",
    "Optim",
    "PassRates",
    "Prompts",
    "Samples",
    "ScheduleSpec",
    "Selection",
    "Served",
    "Student",
    "StudentInit",
    "Teacher",
    "Train",
    "default_config",
    "fingerprint",
    "from_config_dict",
    "trajectory",
]


def default_config() -> ml_collections.ConfigDict:
    """All fields of `Experiment` with their defaults, as a locked ConfigDict for configs/ and the command line."""
    config = ml_collections.ConfigDict(dataclasses.asdict(Experiment()), convert_dict=True)
    # A ConfigDict holds every field to the type of its default, but a schedule is a number or a tuple.
    for group, name in ((config.loss, "tau"), (config.on_policy, "fraction")):
        value = group[name]
        del group[name]
        group[name] = ml_collections.FieldReference(value, field_type=object)
    return config.lock()


def from_config_dict(config: ml_collections.ConfigDict) -> Experiment:
    """The frozen, checked experiment. Raises ValueError that names the config path, what it is and what it must be.

    With answers.official chats without a system text begin with that of the released code, RELEASED_SYSTEM.
    """
    experiment = _build(Experiment, config.to_dict(), "")
    check(experiment)
    data = experiment.data
    if experiment.answers.official and data.chat_template and not data.system_prompt:
        return dataclasses.replace(experiment, data=dataclasses.replace(data, system_prompt=RELEASED_SYSTEM))
    return experiment


def trajectory(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config, as nested dicts, shapes the training trajectory.

    Left out: name, log, eval, checkpoint cadence, the mesh and the teacher's place on it, where and how a cache is
    kept, and whose share of the answers is reported, so that a run can be resumed on other hardware and with a cache
    that was moved.
    """
    free = ("name", "log", "eval", "checkpoint", "mesh", "served")
    kept = {name: value for name, value in config.items() if name not in free}
    place = ("preset", "devices", "shape")
    teacher = {name: value for name, value in kept.get("teacher", {}).items() if name not in place}
    answers = {name: value for name, value in kept.get("answers", {}).items() if name != "families"}
    return kept | {"teacher": teacher, "answers": answers, "cache": {"superset": kept.get("cache", {}).get("superset")}}


def fingerprint(experiment: Experiment) -> str:
    """16 hex digits over everything that shapes the training trajectory."""
    kept = trajectory(dataclasses.asdict(experiment))
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
