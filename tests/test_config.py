"""The schema: what it takes, what it refuses and how it says so, and the command line on top of it."""

import dataclasses
import importlib.util
import pathlib
import re
import sys
import types
import typing

import ml_collections
import pytest
from absl import flags
from ml_collections import config_flags

from kdjax import config as schema
from kdjax.config import Experiment, default_config, fingerprint, from_config_dict
from kdjax.schedules import make_schedule

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")


def made(**changes):
    """The experiment with some fields set, named by path with __ for the dot."""
    config = default_config()
    for path, value in changes.items():
        *groups, field = path.split("__")
        target = config
        for group in groups:
            target = target[group]
        target[field] = value
    return from_config_dict(config)


def leaves(node=Experiment, path=""):
    for name, hint in typing.get_type_hints(node).items():
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{path}{name}.")
        else:
            yield path + name, hint


def field(experiment, path):
    for part in path.split("."):
        experiment = getattr(experiment, part)
    return experiment


# --- round trip


def test_defaults_survive_the_round_trip():
    assert from_config_dict(default_config()) == Experiment()


def test_an_empty_config_is_the_default():
    assert from_config_dict(ml_collections.ConfigDict()) == Experiment()


def test_the_whole_experiment_is_frozen_and_hashable():
    experiment = made(student__init__keep=[0, 1], loss__terms=[["jsd", 1]], loss__tau=["linear", 2, 1, 10])
    assert isinstance(hash(experiment), int)
    with pytest.raises(dataclasses.FrozenInstanceError):
        experiment.train.steps = 3


def test_lists_become_tuples_and_whole_numbers_floats():
    experiment = made(student__init__keep=[0, 3, 5], loss__terms=[["jsd", 1], ["cross_entropy", ["linear", 0, 1, 9]]])
    assert experiment.student.init.keep == (0, 3, 5)
    assert all(type(layer) is int for layer in experiment.student.init.keep)
    assert experiment.loss.terms == (("jsd", 1.0), ("cross_entropy", ("linear", 0.0, 1.0, 9.0)))
    weight = made(optim__learning_rate=1).optim.learning_rate
    assert (weight, type(weight)) == (1.0, float)


def test_tau_takes_a_number_or_a_schedule():
    assert made(loss__tau=2).loss.tau == 2.0
    experiment = made(loss__tau=("hold_linear", 2.0, 1.0, 4, 8))
    assert experiment.loss.tau == ("hold_linear", 2.0, 1.0, 4.0, 8.0)
    assert float(make_schedule(experiment.loss.tau, "loss.tau")(6)) == 1.5


def test_the_config_dict_is_locked_and_typed():
    config = default_config()
    with pytest.raises(AttributeError, match='Did you mean "steps"'):
        config.train.stepz = 3
    with pytest.raises(TypeError, match="steps"):
        config.train.steps = 2.5


# --- what is refused


def test_unknown_fields_are_named_with_a_suggestion():
    with pytest.raises(ValueError, match=r"^config has no field 'trian'\. Did you mean 'train'\? Known: "):
        from_config_dict(ml_collections.ConfigDict({"trian": {"steps": 1}}))
    with pytest.raises(ValueError, match=r"^config has no field 'student\.init\.kep'\. Did you mean 'keep'\?"):
        from_config_dict(ml_collections.ConfigDict({"student": {"init": {"kep": (1,)}}}))


def wrong_for(hint):
    """A value of another type than the field's."""
    if hint in (int, float, bool):
        return "many"
    return 7 if hint is str else {"a": 1} if isinstance(hint, types.UnionType) else 5


@pytest.mark.parametrize(("path", "hint"), list(leaves()), ids=lambda item: item if isinstance(item, str) else "")
def test_every_field_refuses_another_type(path, hint):
    for value in (wrong_for(hint), None):
        nested = value
        for part in reversed(path.split(".")):
            nested = {part: nested}
        with pytest.raises(ValueError, match=f"^{re.escape(path)} must be .*, got ") as caught:
            from_config_dict(ml_collections.ConfigDict(nested, type_safe=False))
        assert type(value).__name__ in str(caught.value)


@pytest.mark.parametrize(
    ("nested", "message"),
    [
        ({"train": 5}, "train must be a group of fields, got 5 (int)."),
        ({"student": {"init": "cut"}}, "student.init must be a group of fields, got 'cut' (str)."),
        ({"train": {"steps": True}}, "train.steps must be int, got True (bool)."),
        ({"train": {"steps": 2.0}}, "train.steps must be int, got 2.0 (float)."),
        ({"optim": {"clip": False}}, "optim.clip must be float, got False (bool)."),
        ({"log": {"wandb": 1}}, "log.wandb must be bool, got 1 (int)."),
        ({"loss": {"tau": "linear"}}, "loss.tau must be float or tuple, got 'linear' (str)."),
        ({"student": {"init": {"keep": (0, "1")}}}, "student.init.keep[1] must be int, got '1' (str)."),
        ({"optim": {"learning_rate": float("inf")}}, "optim.learning_rate must be finite, got inf."),
        ({"selection": {"fraction": float("nan")}}, "selection.fraction must be finite, got nan."),
    ],
)
def test_type_errors(nested, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_config_dict(ml_collections.ConfigDict(nested))


DTYPE = "must be 'float32' or 'bfloat16'"
COUNT = "must be at least 1"
NOT_NEGATIVE = "must be at least 0"
RULES = [
    ("teacher.dtype", "float16", DTYPE, ["bfloat16"]),
    ("student.compute_dtype", "f32", DTYPE, ["bfloat16"]),
    ("student.remat", "some", "must be 'none' or 'full' or 'dots'", ["full", "dots"]),
    ("student.init.kind", "pruned", "must be 'own' or 'cut' or 'random'", ["cut", "random"]),
    ("student.init.layers", 0, COUNT, [1]),
    ("student.init.keep", (2, 1), "must be layer numbers of the teacher, each once, ascending", [(0, 29)]),
    ("student.init.keep", (1, 1), "must be layer numbers of the teacher, each once, ascending", [(1,)]),
    ("student.init.keep", (-1, 1), "must be layer numbers of the teacher, each once, ascending", [()]),
    ("data.seq_len", 1, "must be at least 2", [2]),
    ("data.packing", "packed", "must be 'pack' or 'row'", ["row"]),
    ("data.heldout_fraction", 0.0, "must be in (0, 1)", [0.5]),
    ("data.heldout_fraction", 1.0, "must be in (0, 1)", [0.999]),
    ("data.max_train_tokens", -1, NOT_NEGATIVE, [0]),
    ("selection.fraction", 0.0, "must be in (0, 1]", [1e-6]),
    ("selection.fraction", 20.0, "must be in (0, 1], got 20.0; it is a fraction, 0.2 means 20 %.", [1.0]),
    ("selection.weighting", "score", "must be 'uniform' or 'signal'", ["signal"]),
    ("selection.quota", "rows", "must be 'row' or 'batch'", ["batch"]),
    ("selection.queue", 0, COUNT, [1]),
    ("selection.slack", 0.9, "must be at least 1, got 0.9; less would drop positions of an average row.", [1.0]),
    ("selection.curriculum_steps", 0, COUNT, [1]),
    ("selection.upper", 0.0, "must be in (0, 1]", [1.0]),
    ("selection.reserve", 1.5, "must be in [0, 1]", [0.0, 1.0]),
    ("selection.easy_weight", 1.1, "must be in [0, 1], got 1.1; hard positions have the rest of 1.", [0.0, 1.0]),
    ("selection.temperature_scale", 1.1, "must be in [-1, 1]", [-1.0, 0.0, 1.0]),
    ("selection.adapt_after", -1, NOT_NEGATIVE, [0]),
    ("teacher.source", "disk", "must be 'live' or 'cache'", ["cache"]),
    ("classes.entries", 0, COUNT, [1]),
    ("classes.power", 0.0, "must be in (0, 2], got 0.0; 1 draws from the teacher itself.", [0.5, 2.0]),
    ("samples.fraction", 0.0, "must be in (0, 1]", [1.0]),
    ("samples.fraction", 20.0, "must be in (0, 1], got 20.0; it is a fraction, 0.2 means 20 %.", [0.2]),
    ("samples.positions", 0.0, "must be in (0, 1]", [1.0]),
    ("samples.rescore_every", -1, NOT_NEGATIVE, [0]),
    ("prompts.size", -1, NOT_NEGATIVE, [0]),
    ("prompts.heldout_fraction", 1.0, "must be in [0, 1)", [0.0]),
    ("generation.samples", 0, COUNT, [1]),
    ("generation.new_tokens", 0, COUNT, [1]),
    ("generation.temperature", -0.5, NOT_NEGATIVE, [0.0]),
    ("generation.top_p", 0.0, "must be in (0, 1]", [1.0]),
    ("generation.top_k", -1, NOT_NEGATIVE, [0]),
    ("generation.min_p", 1.0, "must be in [0, 1)", [0.0]),
    ("generation.stop", ("\n", ""), "must be texts that are not empty", [(), ("\n",)]),
    ("generation.batch_size", 0, COUNT, [1]),
    ("eval.prompts", -1, NOT_NEGATIVE, [0]),
    ("pass_rates.every", -1, NOT_NEGATIVE, [0]),
    ("pass_rates.discount", 1.1, "must be in [0, 1]", [0.0, 1.0]),
    ("pass_rates.fallback", "all", "must be 'error' or 'uniform'", ["error", "uniform"]),
    ("pass_rates.prior", 0.0, "must be positive", [0.5]),
    ("served.prompt_logprobs", -1, NOT_NEGATIVE, [0]),
    ("on_policy.fraction", 1.5, "must be in [0, 1] or (name, *arguments)", [0.0]),
    ("on_policy.fraction", ("linear", 0.0, 3.0, 100), "with values there, got ('linear', 0.0, 3.0, 100.0)", [0.0]),
    ("on_policy.fraction", ("constant", -0.5), "must be in [0, 1]", []),
    ("on_policy.terms", (("jsd",),), "must be a tuple of (name, weight or schedule)", [(), (("jsd", 1.0),)]),
    ("on_policy.block", 0, COUNT, [1]),
    ("on_policy.reuse", 0, COUNT, [1]),
    ("on_policy.truncated", "cut", "must be 'keep' or 'drop'", ["drop"]),
    ("on_policy.alarms", "loud", "must be 'warn' or 'stop' or 'off'", ["off"]),
    ("answers.question_share", 1.5, "must be in [0, 1]", [0.0, 1.0]),
    ("answers.groups", 0, COUNT, [1]),
    ("answers.group", 0, COUNT, [5]),
    ("answers.teacher_questions", 1, "must be at least 2", [2]),
    ("answers.small_pool", "drop", "must be 'nearest' or 'official'", ["nearest", "official"]),
    ("answers.alignment", "next", "must be 'token' or 'predictor'", ["token", "predictor"]),
    ("answers.trailing", "cut", "must be 'drop' or 'keep'", ["drop", "keep"]),
    ("answers.duplicates", "last", "must be 'first' or 'all'", ["first", "all"]),
    ("answers.identical", "last", "must be 'first' or 'all'", ["first", "all"]),
    ("answers.loops", 0.0, "must be in (0, 1]", [1.0]),
    ("answers.truncated", "cut", "must be 'drop' or 'keep'", ["drop", "keep"]),
    ("answers.candidates", -1, NOT_NEGATIVE, [0]),
    ("answers.rescore_every", -1, NOT_NEGATIVE, [0]),
    ("answers.restart", "all", "must be '' or 'optimiser' or 'weights'", [""]),
    ("pass_rates.alpha", -1.0, NOT_NEGATIVE, [0.0]),
    ("pass_rates.beta", -1.0, NOT_NEGATIVE, [0.0]),
    ("pass_rates.normalise", "mean", "must be 'none' or 'dataset_mean'", ["none", "sample"]),
    ("served.concurrency", 0, COUNT, [1]),
    ("served.timeout", 0.0, "must be positive", [0.5]),
    ("served.retries", -1, NOT_NEGATIVE, [0]),
    ("served.top_logprobs", -1, NOT_NEGATIVE, [0]),
    ("teacher.devices", -1, NOT_NEGATIVE, [0]),
    ("cache.superset", 1.1, "must be in [0, 1]", [0.0, 1.0]),
    ("cache.rows_per_shard", 0, COUNT, [1]),
    ("loss.terms", (), "must be a non-empty tuple of (name, weight or schedule)", [(("jsd", 0.5),)]),
    (
        "loss.terms",
        ("forward_kl", 1.0),
        "one term is written ((name, weight),).",
        [(("jsd", ("linear", 1.0, 0.0, 9)),)],
    ),
    ("loss.terms", (("forward_kl",),), "must be a non-empty tuple", [(("jsd", 1.0), ("tvd", 1.0))]),
    ("loss.terms", (("forward_kl", "1"),), "must be a non-empty tuple", [(("jsd", 1),)]),
    ("loss.tau", (), "must be a positive number or (name, *arguments)", [1.0]),
    ("loss.tau", (2.0, 1.0), "must be a positive number or (name, *arguments)", [("constant", 1.0)]),
    ("loss.tau", 0.0, "must be a positive number or (name, *arguments)", [0.5]),
    ("loss.beta", 0.0, "must be in (0, 1)", [0.1]),
    ("loss.beta", 1.0, "must be in (0, 1)", [0.9]),
    ("loss.skew", 1.0, "must be in [0, 1)", [0.0]),
    ("loss.todi_scale", -0.5, NOT_NEGATIVE, [0.0]),
    ("loss.taid_start", 1.5, "in [0, 1], got 1.5; it is the teacher's share; 1 is forward KL.", [0.0, 1.0]),
    ("loss.taid_rate", -0.1, "in [0, 1], got -0.1; it is a share of the way that is left.", [0.0]),
    ("loss.akl_mu", 0.0, "must be in (0, 1)", [0.1]),
    ("loss.akl_mu", 1.0, "must be in (0, 1)", [0.9]),
    ("loss.dkd_beta", -1.0, NOT_NEGATIVE, [0.0]),
    ("loss.reduction", "mean", "must be 'token' or 'sample'", ["sample"]),
    ("optim.learning_rate", 0.0, "must be positive", [1e-9]),
    ("optim.warmup", -1, NOT_NEGATIVE, [0]),
    ("optim.final_fraction", 1.5, "must be in [0, 1]", [0.0, 1.0]),
    ("optim.b1", 1.0, "must be in [0, 1)", [0.0]),
    ("optim.b2", -0.1, "must be in [0, 1)", [0.999]),
    ("optim.eps", 0.0, "must be positive", [1e-12]),
    ("optim.weight_decay", -0.1, NOT_NEGATIVE, [0.1]),
    ("optim.clip", -1.0, NOT_NEGATIVE, [0.0]),
    ("train.steps", 0, COUNT, [1]),
    ("train.batch_size", 0, COUNT, [1]),
    ("train.accumulate", 0, COUNT, [2]),
    ("train.log_every", 0, COUNT, [1]),
    ("eval.every", -1, NOT_NEGATIVE, [0]),
    ("eval.rows", -1, NOT_NEGATIVE, [0]),
    ("eval.batch_size", 0, COUNT, [1]),
    ("eval.completions", -1, NOT_NEGATIVE, [0]),
    ("eval.new_tokens", 0, COUNT, [1]),
    ("checkpoint.every", 0, COUNT, [1]),
    ("checkpoint.keep", 0, "must be at least 1, got 0; the newest checkpoint is what a run resumes from.", [1]),
    ("checkpoint.keep_best", -1, NOT_NEGATIVE, [0]),
    ("mesh.kernels", "cuda", "'reference', got 'cuda'; see kdjax/kernels.", ["xla", "pallas_tpu"]),
    ("mesh.attention", "flash", "'reference', got 'flash'; see kdjax/kernels/attention.", ["xla", "cudnn"]),
]


@pytest.mark.parametrize(("path", "bad", "message", "good"), RULES)
def test_every_rule(path, bad, message, good):
    key = path.replace(".", "__")
    with pytest.raises(ValueError, match=f"^{re.escape(path)} must be .*{re.escape(message.removeprefix('must be '))}"):
        made(**{key: bad})
    for value in good:
        assert field(made(**{key: value}), path) == schema._freeze(value)


def test_no_rule_goes_untested():
    assert {path for path, *_ in RULES} == set(schema.RULES)


def test_micro_batches_are_even():
    assert made(train__batch_size=6, train__accumulate=3).train.accumulate == 3
    with pytest.raises(ValueError, match="^train.batch_size must be a multiple of train.accumulate, got 6 and 4; "):
        made(train__batch_size=6, train__accumulate=4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"on_policy__fraction": 0.5, "prompts__path": ""},
            "prompts.path must name prompts, got ''; on_policy.fraction",
        ),
        ({"eval__prompts": 9, "prompts__path": ""}, "prompts.path must name prompts, got ''; eval.prompts"),
        ({"prompts__answers": "gold", "prompts__path": ""}, "prompts.path must name prompts, got ''; prompts.answers"),
        (
            {"teacher__privileged": "{answer}", "prompts__path": ""},
            "prompts.path must name prompts, got ''; teacher.priv",
        ),
        (
            {"pass_rates__weight": "paced", "prompts__path": ""},
            "prompts.path must name prompts, got ''; pass_rates.weight is set",
        ),
        ({"on_policy__fraction": 0.5, "teacher__source": "cache"}, "teacher.source must be 'live' with on_policy.frac"),
        (
            {"teacher__privileged": "{answer}", "teacher__source": "cache"},
            "teacher.source must be 'live' with teacher.",
        ),
        ({"teacher__privileged": "Think of {question}"}, "teacher.privileged must hold {answer}, got 'Think of"),
        (
            {"pass_rates__every": 2, "on_policy__fraction": 1.0, "pass_rates__weight": "paced"},
            "pass_rates.every must be 0 but with own answers, weights by them and an estimator over rounds, got 2 with",
        ),
        *(
            (
                {"pass_rates__every": 2, "on_policy__fraction": 1.0, "pass_rates__weight": weight} | other,
                f"pass_rates.every must be 0 with pass_rates.weight={weight!r}, got 2; ",
            )
            for weight, other in [
                ("curriculum", {"pass_rates__estimator": "discounted"}),
                ("hard_filter", {"pass_rates__estimator": "discounted"}),
                ("bayes", {}),
            ]
        ),
        (
            {"pass_rates__weight": "curriculum", "pass_rates__normalise": "sample"},
            "pass_rates.normalise must not be 'sample' with pass_rates.weight='curriculum', got 'sample'; both say",
        ),
        (
            {"pass_rates__weight": "bayes", "pass_rates__estimator": "laplace"},
            "pass_rates.estimator must be 'raw' with pass_rates.weight='bayes', got 'laplace'; the prior would count",
        ),
        ({"cache__superset": 0.5}, "cache.superset must keep its default with prompts.path, got 0.5; a cache of answ"),
        (
            {"samples__fraction": 0.5, "pass_rates__weight": "paced"},
            "pass_rates.weight must be 'uniform' with samples.fraction below 1, got 'paced'; they are two policies of "
            "one axis: both say what a prompt is worth. Set it so, or samples.fraction to 1.",
        ),
        (
            {"samples__fraction": 0.5, "pass_rates__normalise": "sample"},
            "pass_rates.normalise must be 'dataset_mean' with samples.fraction below 1, got 'sample'; they are two",
        ),
        (
            {"samples__fraction": 0.5, "samples__rescore_every": 3, "on_policy__fraction": 1.0},
            "samples.rescore_every must be 0 with on_policy.fraction=1, got 3; each block of own answers is scored by",
        ),
    ],
)
def test_prompts_and_what_needs_them(fields, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        made(**({"prompts__path": "arith"} | fields))
    stages = made(
        prompts__path="arith", on_policy__fraction=("step", 0, 1, 5), teacher__privileged="{question}{answer}"
    )
    assert stages.on_policy.fraction == ("step", 0.0, 1.0, 5.0)
    assert made(prompts__path="arith", on_policy__fraction=("mine:schedule", 9)).on_policy.fraction[1] == 9
    both = made(prompts__path="arith", on_policy__fraction=0.5, samples__fraction=0.2, samples__rescore_every=3)
    assert both.samples.fraction == 0.2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answers__group": 6}, "answers.group must be at most answers.groups=5, got 6."),
        ({"answers__pool": ()}, "answers.pool must name files of answers with prompts.answers='pool', got ();"),
        (
            {"answers__policy": "best_teacher", "answers__candidates": 3},
            "answers.candidates must be 0 with answers.policy='best_teacher', got 3;",
        ),
        ({"answers__policy": "teacher"}, "answers.teacher must be set with answers.policy='teacher', got ''."),
        (
            {"answers__rescore_every": 5, "answers__policy": "random"},
            "answers.rescore_every must be 0 unless answers are chosen from a pool by their score, got 5 with",
        ),
        (
            {"answers__rescore_every": 5, "teacher__source": "cache"},
            "answers.rescore_every must be 0 with teacher.source='cache', got 5;",
        ),
        (
            {"answers__rescore_every": 5, "samples__fraction": 0.5},
            "answers.rescore_every must be 0 with samples.fraction below 1, got 5; they are two policies of one axis",
        ),
        ({"answers__restart": "weights"}, "answers.restart must be '' without answers.rescore_every, got 'weights';"),
        ({"prompts__path": ""}, "prompts.path must name prompts, got ''; prompts.answers is set"),
    ],
)
def test_answers_are_chosen_from_a_pool(fields, message):
    pool = {"prompts__path": "arith", "prompts__answers": "pool", "answers__pool": ("a.jsonl",)}
    assert made(**pool, answers__rescore_every=5, answers__restart="weights").answers.pool == ("a.jsonl",)
    assert made(**pool, answers__rescore_every=5, answers__policy="best_teacher").answers.candidates == 0
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        made(**(pool | fields))


def test_a_teacher_has_its_own_devices_only_where_it_runs():
    assert made(teacher__devices=2, teacher__shape="data:2").teacher.devices == 2
    with pytest.raises(ValueError, match="^teacher.devices must be 0 with teacher.source='cache', got 2; "):
        made(teacher__devices=2, teacher__source="cache")
    with pytest.raises(ValueError, match="^teacher.shape must be '' without teacher.devices, got 'data:2'; "):
        made(teacher__shape="data:2")


# --- fingerprint


def test_the_fingerprint_is_stable():
    assert re.fullmatch("[0-9a-f]{16}", fingerprint(Experiment()))
    assert fingerprint(made(loss__terms=[["jsd", 1]])) == fingerprint(made(loss__terms=(("jsd", 1.0),)))
    assert fingerprint(made(optim__clip=1)) == fingerprint(Experiment())


def other(value):
    """A different value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return value + "x" if isinstance(value, str) else (*value, 7)


@pytest.mark.parametrize("path", [path for path, _ in leaves()])
def test_the_fingerprint_sees_what_shapes_the_run_and_nothing_else(path):
    def replaced(node, parts):
        first, *rest = parts
        value = getattr(node, first)
        changed = replaced(value, rest) if rest else ("x",) if first in ("stop", "pool", "families") else other(value)
        return dataclasses.replace(node, **{first: changed})

    same = fingerprint(replaced(Experiment(), path.split("."))) == fingerprint(Experiment())
    free = path.split(".")[0] in ("name", "log", "eval", "checkpoint", "mesh", "cache", "served")
    place = ("teacher.preset", "teacher.devices", "teacher.shape", "answers.families")
    assert same == ((free and path != "cache.superset") or path in place)


# --- the command line


def from_flags(monkeypatch, *arguments):
    """What a launch script sees; config_flags itself reads sys.argv."""
    monkeypatch.setattr(sys, "argv", ["launch", *arguments])
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_dict("config", default_config(), flag_values=values)
    values(sys.argv)
    return from_config_dict(holder.value)


@pytest.mark.parametrize(
    ("argument", "path", "value"),
    [
        ("train.steps=200", "train.steps", 200),
        ("optim.learning_rate=1", "optim.learning_rate", 1.0),
        ("optim.learning_rate=3e-4", "optim.learning_rate", 3e-4),
        ("log.tensorboard=false", "log.tensorboard", False),
        ("student.init.keep=(0,1,2)", "student.init.keep", (0, 1, 2)),
        ("student.init.keep=0, 1, 2", "student.init.keep", (0, 1, 2)),
        ("student.init.keep=5", "student.init.keep", (5,)),
        ("student.init.keep=()", "student.init.keep", ()),
        ("loss.terms=(('jsd',0.5),('cross_entropy',0.5))", "loss.terms", (("jsd", 0.5), ("cross_entropy", 0.5))),
        ("loss.terms=(('jsd',('linear',0,1,10)),)", "loss.terms", (("jsd", ("linear", 0.0, 1.0, 10.0)),)),
        ("loss.tau=2", "loss.tau", 2.0),
        ("loss.tau=('linear',2,1,100)", "loss.tau", ("linear", 2.0, 1.0, 100.0)),
    ],
)
def test_overrides(monkeypatch, argument, path, value):
    got = field(from_flags(monkeypatch, f"--config.{argument}"), path)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ("train.stepz=3", AttributeError, 'Did you mean "steps"'),
        ("train.steps=2.5", flags.IllegalFlagValueError, "invalid literal for int"),
        ("selection.fraction=20", ValueError, "selection.fraction must be in (0, 1], got 20.0"),
        ("loss.terms=jsd", ValueError, "one term is written ((name, weight),)"),
        ("loss.tau=warm", ValueError, "loss.tau must be float or tuple, got 'warm' (str)."),
        ("student.init.keep=(2,1)", ValueError, "student.init.keep must be layer numbers"),
    ],
)
def test_bad_overrides(monkeypatch, argument, error, message):
    with pytest.raises(error, match=re.escape(message)):
        from_flags(monkeypatch, f"--config.{argument}")


# --- configs/*.py


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_valid_and_locked(name):
    spec = importlib.util.spec_from_file_location(f"configs_{name}", ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    assert config.is_locked
    assert from_config_dict(config).name == name
