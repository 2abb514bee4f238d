"""A study: arms x seeds of one experiment, under equal tokens and under equal time. What it is; nothing is run here.

A study file (configs/studies/*.py) has `get_config(full=False)`, which fills in `default_study()`:
  base         an experiment; base.train.steps passes of base.train.batch_size rows are what every arm covers
  arms         {name: {"selection.policy": "all", ...}}, in the order of the table
  reference    the arm that the others are compared with, seed by seed
  seeds        the repetitions; `seed_fields` are the fields of the experiment that each of them sets
  equal_time   also train every other arm for as long as the reference took
  prepare      {name: (script of launch/, *arguments)}, run once before all arms; what they make, the arms may share
Imports no JAX.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from kdjax.config import Experiment, default_config, from_config_dict
from kdjax.registry import did_you_mean

TIMED = "@time"  # ends the name of an arm that trains for the reference's time
PHASES = ("curate", "cache_teacher", "train", "evaluate")
PREPARING = ("generate", "curate", "train")
FREE = ("name", "log", "checkpoint")  # groups of base that change no figure
# Fields of the experiment that an arm may not set -> why.
SHARED = {
    "name": "it is made of study, arm and seed",
    "data": "all arms cover the same rows and are judged on the same held-out ones",
    "teacher.path": "all arms have one teacher",
    "teacher.dtype": "all arms have one teacher",
    "train.steps": "it follows from the tokens that the arm covers, or from its time",
    "train.seed": "the study's seeds set it",
    "eval": "all arms are judged alike",
}


@dataclasses.dataclass(frozen=True)
class Study:
    """A checked study. `experiments` are those of the first seed, in which the arms' overrides are already set."""

    name: str
    base: Experiment
    arms: Mapping[str, Mapping[str, Any]]
    reference: str
    seeds: tuple[int, ...]
    seed_fields: tuple[str, ...]
    equal_time: bool
    heldout_rows: int
    keep_checkpoints: bool
    prepare: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Run:
    """One arm with one seed. timed: for the reference's time, not for its tokens."""

    arm: str
    seed: int
    timed: bool = False

    @property
    def name(self) -> str:
        """The arm's name in tables and on disk."""
        return self.arm + (TIMED if self.timed else "")

    @property
    def place(self) -> str:
        """The run's directory under that of the study."""
        return f"{self.name}/{self.seed}"


def default_study() -> ml_collections.ConfigDict:
    """All fields of a study with their defaults, locked; `arms` stays a plain dict, which keeps its order."""
    fields = {
        "name": "study",
        "base": default_config(),
        "arms": {},
        "reference": "dense",
        "seeds": (0, 1, 2),
        "seed_fields": ("train.seed", "classes.seed", "samples.seed"),
        "equal_time": True,
        "heldout_rows": 0,  # on which every run is judged at its end; 0 = all
        "prepare": {},
        "keep_checkpoints": False,  # of runs that are done: about 12 bytes a parameter each
    }
    return ml_collections.ConfigDict(fields, convert_dict=False).lock()


def from_study_config(config: Any) -> Study:
    """The checked study. Raises ValueError that names the field of the study, or the arm and its field, at fault."""
    values = _fields(config)
    for field, kind in (("name", str), ("reference", str), ("equal_time", bool), ("keep_checkpoints", bool)):
        if not isinstance(values[field], kind):
            raise ValueError(
                f"{field} must be {kind.__name__}, got {values[field]!r} ({type(values[field]).__name__})."
            )
    if not re.fullmatch(r"\w[\w.-]*", values["name"]):
        raise ValueError(f"name must be letters, digits, _, - and ., got {values['name']!r}; it names a directory.")
    seeds, rows = tuple(values["seeds"]), values["heldout_rows"]
    if not seeds or len(set(seeds)) < len(seeds) or any(type(seed) is not int or seed < 0 for seed in seeds):
        raise ValueError(f"seeds must be whole numbers from 0 on, each once, got {seeds!r}.")
    if type(rows) is not int or rows < 0:
        raise ValueError(f"heldout_rows must be a number of rows, 0 for all, got {rows!r}.")
    if not isinstance(values["base"], ml_collections.ConfigDict):
        raise ValueError(
            f"base must be an experiment as default_config() makes it, got {type(values['base']).__name__}."
        )
    try:
        base = from_config_dict(values["base"])
    except ValueError as error:
        raise ValueError(f"base: {error}") from error
    study = Study(
        name=values["name"],
        base=base,
        arms=_checked_arms(values["arms"], values["reference"]),
        reference=values["reference"],
        seeds=seeds,
        seed_fields=_checked_seed_fields(values["seed_fields"], base),
        equal_time=values["equal_time"],
        heldout_rows=rows,
        keep_checkpoints=values["keep_checkpoints"],
        prepare=_checked_commands(values["prepare"]),
    )
    for arm in study.arms:
        experiment(study, Run(arm, seeds[0]), steps=1)
    return study


def _fields(config: Any) -> dict[str, Any]:
    known = default_study()
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(f"get_config() must return a study as default_study() makes it, got {type(config).__name__}.")
    values = {name: config[name] for name in config}
    for name in values:
        if name not in known:
            raise ValueError(f"a study has no field {name!r}." + did_you_mean(name, known))
    missing = sorted(set(known) - set(values))
    if missing:
        raise ValueError(f"a study must have the field {missing[0]!r}, got none. Start from default_study().")
    return values


def _checked_arms(arms: Any, reference: str) -> dict[str, dict[str, Any]]:
    if not isinstance(arms, Mapping) or not arms:
        raise ValueError(f"arms must be a non-empty {{name: {{field: value}}}}, got {arms!r:.80}.")
    for name, overrides in arms.items():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(
                f"arms must be named with letters, digits, _, - and ., got {name!r}; they are directories."
            )
        if not isinstance(overrides, Mapping):
            raise ValueError(f"arms[{name!r}] must be {{field: value}}, got {overrides!r:.80}.")
        for field in overrides:
            for shared, why in SHARED.items():
                if field == shared or str(field).startswith(shared + "."):
                    raise ValueError(f"arms[{name!r}] must not set {field}; {why}. Set it in base.")
    if reference not in arms:
        raise ValueError(f"reference must be one of the arms, got {reference!r}." + did_you_mean(reference, arms))
    return {name: dict(overrides) for name, overrides in arms.items()}


def _checked_commands(commands: Any) -> dict[str, tuple[str, ...]]:
    for name, command in dict(commands).items():
        good = isinstance(command, tuple) and command and all(isinstance(word, str) for word in command)
        if not good or not re.fullmatch(r"\w[\w.-]*", str(name)) or command[0] not in PREPARING:
            raise ValueError(
                f"prepare[{name!r}] must be (script, *arguments) with a script of {', '.join(PREPARING)}, got "
                f"{command!r:.80}."
            )
    return dict(commands)


def _checked_seed_fields(names: Any, base: Experiment) -> tuple[str, ...]:
    flat = flatten(dataclasses.asdict(base))
    for name in names:
        if type(flat.get(name)) is not int or not str(name).endswith("seed"):
            known = [field for field in flat if field.endswith("seed")]
            raise ValueError(f"seed_fields must be seeds of the experiment, got {name!r}." + did_you_mean(name, known))
        if name == "data.seed":
            raise ValueError(
                "seed_fields must not have data.seed; it decides which documents are held out, and all runs are judged "
                "on the same ones. Leave it to base."
            )
    return tuple(names)


def experiment(study: Study, run: Run, steps: int, **changes: Any) -> Experiment:
    """The experiment of a run that takes `steps` steps. Raises ValueError that names the arm and its field.

    The warm-up keeps its share of the steps, and so do the evaluations on the way. changes: further fields, written
    with __ for the dot.
    """
    base = study.base
    warmup, every = (math.ceil(n * steps / base.train.steps) for n in (base.optim.warmup, base.eval.every))
    fields = {
        "train.steps": steps,
        "optim.warmup": min(warmup, steps - 1),
        "eval.every": every,
        "name": f"{study.name}/{run.place}",
    }
    fields |= dict(study.arms[run.arm]) | dict.fromkeys(study.seed_fields, run.seed)
    fields |= {name.replace("__", "."): value for name, value in changes.items()}
    values = dataclasses.asdict(base)
    try:
        for field, value in fields.items():
            _set(values, field, value)
        return from_config_dict(ml_collections.ConfigDict(values))
    except ValueError as error:
        raise ValueError(f"arms[{run.arm!r}]: {error}") from error


def _set(values: dict[str, Any], field: str, value: Any) -> None:
    *groups, last = str(field).split(".")
    node = values
    for part in groups:
        if not isinstance(node.get(part), dict):
            raise ValueError(f"config has no field {field!r}." + did_you_mean(part, node))
        node = node[part]
    if last not in node:
        raise ValueError(f"config has no field {field!r}." + did_you_mean(last, node))
    if isinstance(node[last], dict):
        raise ValueError(f"{field} must be one field, got a group of fields. Name one of {', '.join(node[last])}.")
    node[last] = value


def config_file(made: Experiment, command: str) -> str:
    """The text of a config file that gives this experiment, for `--config`."""
    default = flatten(dataclasses.asdict(Experiment()))
    changed = {name: value for name, value in flatten(dataclasses.asdict(made)).items() if value != default[name]}
    lines = "".join(f"    config.{name} = {value!r}\n" for name, value in changed.items())
    return (
        f'"""Written by launch.compare.\n\nCommand:   {command}\n"""\n\n'
        "from ml_collections import ConfigDict\n\nfrom kdjax.config import default_config\n\n\n"
        f'def get_config() -> ConfigDict:\n    """{made.name}"""\n    config = default_config()\n'
        f"{lines}    return config\n"
    )


def phases(made: Experiment) -> tuple[str, ...]:
    """The scripts of launch/ that a run of this experiment takes, in order."""
    wanted = {
        "curate": (made.samples.fraction < 1 and made.on_policy.fraction != 1)  # own answers are chosen in training
        or made.prompts.answers == "pool"
        or (bool(made.prompts.path) and made.pass_rates.weight != "uniform"),
        "cache_teacher": made.teacher.source == "cache",
        "train": True,
        "evaluate": True,
    }
    return tuple(name for name in PHASES if wanted[name])


def runs(study: Study, arms: Iterable[str] = (), seeds: Iterable[int] = ()) -> list[Run]:
    """All runs in order, or those of some arms ("x" and "x@time" apart) and seeds.

    Seed by seed, so that what changes on the machine meanwhile meets all arms alike; those under equal tokens first.
    Raises ValueError for an arm or seed that the study does not have.
    """
    kinds = (False, True) if study.equal_time else (False,)
    every = [Run(arm, seed, timed) for timed in kinds for seed in study.seeds for arm in study.arms]
    every = [run for run in every if not (run.timed and run.arm == study.reference)]
    arms, seeds = list(arms), list(seeds)
    names = list(dict.fromkeys(run.name for run in every))
    for arm in arms:
        if arm not in names:
            raise ValueError(f"--arm must name arms of the study, got {arm!r}." + did_you_mean(arm, names))
    for seed in seeds:
        if seed not in study.seeds:
            raise ValueError(f"--seed must be of the study's {', '.join(map(str, study.seeds))}, got {seed}.")
    return [run for run in every if (not arms or run.name in arms) and (not seeds or run.seed in seeds)]


def steps_for_tokens(study: Study, arm: str) -> int:
    """Steps in which an arm covers the tokens that base covers.

    An arm covers a token when its row is trained on, or was scored and left out: with samples.fraction = l the arm
    trains on ceil(l R) of the R rows and goes through them as often as base goes through all, so it takes
    ceil(steps x batch_size x l / its own batch_size) steps.
    """
    fields = study.arms[arm]
    share = float(fields.get("samples.fraction", study.base.samples.fraction))
    batch = int(fields.get("train.batch_size", study.base.train.batch_size))
    # A fraction is meant as it is written: 0.2 of 10 rows are 2 and not 3.
    return max(1, math.ceil(round(study.base.train.steps * study.base.train.batch_size * share / batch, 9)))


def steps_for_time(budget: float, before: float, seconds_per_step: float) -> int:
    """Whole steps that fit into `budget` seconds after `before` seconds of scoring and caching; 0 if none does."""
    if not seconds_per_step > 0:
        raise ValueError(f"seconds_per_step must be positive, got {seconds_per_step}.")
    return max(0, math.floor((budget - before) / seconds_per_step + 1e-9))


def identity(study: Study) -> dict[str, Any]:
    """What runs of one study must agree on: base, fields that a seed sets, held-out rows, and every arm's overrides.

    Not the lists of arms and seeds: either may grow, and what is there still counts. Nor what is in FREE.
    """
    said = {
        "base": {name: value for name, value in dataclasses.asdict(study.base).items() if name not in FREE},
        "seed_fields": study.seed_fields,
        "heldout_rows": study.heldout_rows,
        "reference": study.reference,
        "arms": study.arms,
    }
    if study.prepare:
        said["prepare"] = study.prepare
    return dict(json.loads(json.dumps(said)))


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """'base.data.seq_len was 128 and is 256' for all that changed between two identities; arms may come and go."""
    both = [arm for arm in old["arms"] if arm in new["arms"]]
    sides = [flatten({**side, "arms": {arm: side["arms"][arm] for arm in both}}) for side in (old, new)]
    names = dict.fromkeys([*sides[0], *sides[1]])
    unset = "not set"
    return [
        f"{name} was {sides[0].get(name, unset)!r} and is {sides[1].get(name, unset)!r}"
        for name in names
        if sides[0].get(name, unset) != sides[1].get(name, unset)
    ]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of a nested {"a": {"b": value}}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def seconds_per_step(lines: Sequence[Mapping[str, Any]], tokens_per_step: float) -> float:
    """Median over the lines of metrics.jsonl, the first left out because it has the compilation in it; nan if none.

    Every line has the tokens per second since the line before, evaluation and checkpoints apart.
    """
    rates = [float(line["tokens_per_second"]) for line in lines if line.get("tokens_per_second")][1:]
    return tokens_per_step / statistics.median(rates) if rates else math.nan
