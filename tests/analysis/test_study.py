"""What a study is: its checks, its protocols, its identity, and the experiment of each run."""

import dataclasses
import importlib.util
import math
import pathlib
import subprocess
import sys

import pytest

from kdjax.analysis import study as definition
from kdjax.analysis.study import Run, default_study, experiment, from_study_config
from kdjax.config import default_config, from_config_dict

ROOT = pathlib.Path(__file__).parents[2]
STUDIES = sorted((ROOT / "configs" / "studies").glob("[!_]*.py"))


def loaded(path):
    spec = importlib.util.spec_from_file_location(f"study_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config(**changes):
    """A study of three arms; changes by field, base__train__steps for a field of base."""
    made = default_study()
    made.base.teacher.path = "synthetic"
    made.base.student.init.kind = "cut"
    made.base.selection.policy = "all"
    made.base.train.steps = 100
    made.base.train.batch_size = 4
    made.arms = {
        "dense": {},
        "se_kd": {"selection.policy": "top_fraction"},
        "few": {"samples.fraction": 0.2, "classes.kind": "sampled", "teacher.source": "cache"},
    }
    for name, value in changes.items():
        *groups, last = name.split("__")
        node = made
        for group in groups:
            node = node[group]
        node[last] = value
    return made


def study(**changes):
    return from_study_config(config(**changes))


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, r"name must be letters, digits, _, - and \., got 'a/b'; it names a directory\."),
        ({"seeds": ()}, r"seeds must be whole numbers from 0 on, each once, got \(\)\."),
        ({"seeds": (0, 1, 0)}, r"seeds must be whole numbers from 0 on, each once, got \(0, 1, 0\)\."),
        ({"heldout_rows": -1}, r"heldout_rows must be a number of rows, 0 for all, got -1\."),
        ({"arms": {}}, r"arms must be a non-empty \{name: \{field: value\}\}, got \{\}\."),
        ({"arms": {"a@time": {}}}, r"arms must be named with letters, .*, got 'a@time'; they are directories\."),
        ({"arms": {"dense": 3}}, r"arms\['dense'\] must be \{field: value\}, got 3\."),
        ({"reference": "dens"}, r"reference must be one of the arms, got 'dens'\. Did you mean 'dense'\? Known: .*"),
        (
            {"arms": {"dense": {}, "x": {"selection.polcy": "all"}}},
            r"arms\['x'\]: config has no field 'selection\.polcy'\. Did you mean 'policy'\? Known: .*",
        ),
        (
            {"arms": {"dense": {}, "x": {"selction.policy": "all"}}},
            r"arms\['x'\]: config has no field 'selction\.policy'\. Did you mean 'selection'\? Known: .*",
        ),
        (
            {"arms": {"dense": {"selection": 1}}},
            r"arms\['dense'\]: selection must be one field, got a group of fields\. Name one of policy, .*",
        ),
        (
            {"arms": {"dense": {"selection.fraction": 20.0}}},
            r"arms\['dense'\]: selection\.fraction must be in \(0, 1\], got 20\.0; .*",
        ),
        (
            {"arms": {"dense": {"selection.fraction": "x"}}},
            r"arms\['dense'\]: selection\.fraction must be float, got 'x' \(str\)\.",
        ),
        (
            {"arms": {"dense": {"data.seq_len": 64}}},
            r"arms\['dense'\] must not set data\.seq_len; all arms cover the same rows .*\. Set it in base\.",
        ),
        (
            {"arms": {"dense": {"train.steps": 64}}},
            r"arms\['dense'\] must not set train\.steps; it follows from the tokens .*\. Set it in base\.",
        ),
        (
            {"seed_fields": ("train.seed", "data.seed")},
            r"seed_fields must not have data\.seed; it decides which documents are held out, .*\. Leave it to base\.",
        ),
        (
            {"seed_fields": ("train.sed",)},
            r"seed_fields must be seeds of the experiment, got 'train\.sed'\. Did you mean 'train\.seed'\? .*",
        ),
        ({"base__train__steps": 0}, r"base: train\.steps must be at least 1, got 0; it is a count\."),
    ],
)
def test_a_bad_study_is_refused_by_its_field(changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        study(**changes)


def test_another_config_is_no_study():
    with pytest.raises(ValueError, match=r"^a study has no field 'answers'\. Did you mean 'base'\? Known: arms, "):
        from_study_config(default_config())
    with pytest.raises(
        ValueError, match=r"^get_config\(\) must return a study as default_study\(\) makes it, got dict"
    ):
        from_study_config({"arms": {}})


# --- the experiment of a run


def test_an_arm_is_base_with_its_fields_and_the_seed():
    made = study(base__optim__warmup=10, base__data__seed=7, base__eval__every=25)
    found = experiment(made, Run("few", 2), steps=20)
    wanted = dataclasses.replace(
        made.base,
        name="study/few/2",
        samples=dataclasses.replace(made.base.samples, fraction=0.2, seed=2),
        classes=dataclasses.replace(made.base.classes, kind="sampled", seed=2),
        teacher=dataclasses.replace(made.base.teacher, source="cache"),
        train=dataclasses.replace(made.base.train, steps=20, seed=2),
        optim=dataclasses.replace(made.base.optim, warmup=2),  # its share of the steps stays
        eval=dataclasses.replace(made.base.eval, every=5),
    )
    assert found == wanted
    assert found.data == made.base.data, "the split is the same for every seed"
    assert experiment(made, Run("dense", 0, timed=True), 300).optim.warmup == 30
    assert experiment(study(), Run("dense", 0), 50).eval.every == 0
    assert experiment(study(), Run("dense", 0), 1).optim.warmup == 0, "a rate that never peaks is refused"


def test_the_config_file_gives_the_same_experiment(tmp_path):
    changes = {"base__loss__terms": (("jsd", 0.9), ("cross_entropy", ("linear", 0.0, 1.0, 9.0)))}
    made = experiment(study(**changes, base__student__init__keep=(0, 2)), Run("se_kd", 1), 50)
    path = tmp_path / "made.py"
    path.write_text(definition.config_file(made, "python -m launch.train"))
    assert from_config_dict(loaded(path).get_config()) == made


def test_phases():
    made = study()
    assert definition.phases(experiment(made, Run("dense", 0), 1)) == ("train", "evaluate")
    every = ("curate", "cache_teacher", "train", "evaluate")
    assert definition.phases(experiment(made, Run("few", 0), 1)) == every
    few = experiment(made, Run("few", 0), 1)
    own = dataclasses.replace(few, on_policy=dataclasses.replace(few.on_policy, fraction=1.0))
    assert definition.phases(own) == every[1:], "own answers are chosen in training"


# --- which runs, how many steps


def test_runs_go_seed_by_seed_and_those_under_equal_time_last():
    names = [run.place for run in definition.runs(study(seeds=(0, 5)))]
    plain = ["dense/0", "se_kd/0", "few/0", "dense/5", "se_kd/5", "few/5"]
    assert names == [*plain, "se_kd@time/0", "few@time/0", "se_kd@time/5", "few@time/5"]
    assert [run.place for run in definition.runs(study(seeds=(0, 5), equal_time=False))] == plain
    chosen = definition.runs(study(seeds=(0, 5)), ["dense", "few@time"], [5])
    assert [run.place for run in chosen] == ["dense/5", "few@time/5"]


def test_runs_that_the_study_does_not_have():
    with pytest.raises(ValueError, match=r"^--arm must name arms of the study, got 'se_kdd'\. Did you mean 'se_kd'\?"):
        definition.runs(study(), ["se_kdd"])
    with pytest.raises(ValueError, match=r"^--arm must name arms of the study, got 'dense@time'\. "):
        definition.runs(study(), ["dense@time"])
    with pytest.raises(ValueError, match=r"^--seed must be of the study's 0, 1, 2, got 3\.$"):
        definition.runs(study(), [], [3])


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({}, 100),
        ({"samples.fraction": 0.2}, 20),
        ({"samples.fraction": 0.07}, 7),  # 7.000000000000001 in floats
        ({"samples.fraction": 0.011}, 2),  # 4.4 rows are 5, in steps of 4
        ({"train.batch_size": 8}, 50),
        ({"train.batch_size": 16, "samples.fraction": 0.2}, 5),
        ({"samples.fraction": 0.001}, 1),
    ],
)
def test_steps_for_equal_tokens(fields, steps):
    assert definition.steps_for_tokens(study(arms={"dense": {}, "x": fields}), "x") == steps


@pytest.mark.parametrize(
    ("budget", "before", "pace", "steps"),
    [(100.0, 0.0, 2.0, 50), (100.0, 25.0, 2.0, 37), (0.3, 0.0, 0.1, 3), (100.0, 200.0, 2.0, 0), (1.0, 0.0, 5.0, 0)],
)
def test_steps_for_equal_time(budget, before, pace, steps):
    assert definition.steps_for_time(budget, before, pace) == steps


def test_steps_need_a_pace():
    with pytest.raises(ValueError, match=r"^seconds_per_step must be positive, got 0\.0\.$"):
        definition.steps_for_time(1.0, 0.0, 0.0)


def test_the_pace_is_the_median_without_the_first_line():
    lines = [{"step": 5 * k, "tokens_per_second": rate} for k, rate in enumerate((10.0, 400.0, 100.0, 200.0), 1)]
    lines.insert(0, {"step": 1, "kept_overlap": 0.5})  # another kind of line
    assert definition.seconds_per_step(lines, 512) == 512 / 200
    assert definition.seconds_per_step(lines[:4], 512) == 512 / 250
    assert math.isnan(definition.seconds_per_step(lines[:2], 512))


# --- the same study or another one


def test_a_changed_study_is_named_field_by_field():
    old = definition.identity(study())
    free = study(seeds=(8, 9), base__checkpoint__every=3, base__name="x")
    assert definition.difference(old, definition.identity(free)) == []
    arms = dict(config().arms) | {"se_kd": {"selection.policy": "top_fraction", "selection.fraction": 0.3}, "new": {}}
    new = definition.identity(study(arms=arms, base__data__seq_len=64))
    assert definition.difference(old, new) == [
        "base.data.seq_len was 128 and is 64",
        "arms.se_kd.selection.fraction was 'not set' and is 0.3",
    ]


# --- the studies that are there


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
@pytest.mark.parametrize("full", [False, True])
def test_the_studies_of_configs_are_valid(path, full):
    made = from_study_config(loaded(path).get_config(full=full))
    assert made.name.startswith(path.stem.removesuffix("_small"))
    assert len(made.seeds) >= 3
    if made.base.prompts.path:  # not of the corpus
        return
    for arm in made.arms:  # one epoch of the text: what is covered is what there is
        covered = made.base.train.steps * made.base.train.batch_size * made.base.data.seq_len
        assert covered == made.base.data.max_train_tokens
        kept = float(made.arms[arm].get("samples.fraction", 1.0)) * covered
        assert definition.steps_for_tokens(made, arm) * made.base.train.batch_size * made.base.data.seq_len == kept


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_header_of_a_study_says_how_to_run_it(path):
    text = path.read_text()
    assert f"python -m launch.compare --config=configs/studies/{path.name}" in text
    for name in ("Command:", "Hardware:", "Time:", "Result:"):
        assert f"\n{name} " in text


def test_a_study_loads_nothing_heavy():
    code = (
        "import sys, importlib.util as u; s = u.spec_from_file_location('s', sys.argv[1]); m = u.module_from_spec(s);"
        "s.loader.exec_module(m); m.get_config(); import kdjax.analysis.study_page, kdjax.analysis.study_results;"
        "sys.exit(bool({'jax', 'numpy.linalg', 'transformers', 'orbax', 'grain'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, STUDIES[0]], cwd=ROOT, check=False).returncode == 0
