"""Every file of configs/, discovered: what its header promises, and that its step type-checks without any device.

That each is locked, accepted and named after its file is in tests/test_config.py, that it loads no JAX in the
architecture test.
"""

import ast
import importlib.util
import math
import pathlib
import re

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from kdjax import models
from kdjax.build import build_parts
from kdjax.config import from_config_dict
from kdjax.data import abstract_batch
from kdjax.models import ModelConfig
from kdjax.sharding import DATA, PRESETS, Rules
from kdjax.step import init_state, make_train_step

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("[!_]*.py"))
HEADER = ("Command", "Hardware", "Time", "Result")
# The teacher has another width, depth and head than the student, and rows of padding.
TEACHER = ModelConfig("llama", 104, 40, 3, 4, 2, 12, 64, tied=False)
STUDENT = ModelConfig("llama", 96, 32, 2, 4, 2, 8, 48, tied=True)


def get_config(path):
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def field(config, path):
    for part in path.split("."):
        config = config[part]
    return config


def test_there_are_configs():
    assert {"quickstart", "se_kd"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_header_says_how_to_run_it_on_what_how_long_and_what_comes_out(path):
    lines = ast.get_docstring(ast.parse(path.read_text())).splitlines()
    assert re.search(r"\w", lines[0])
    found = [line.partition(":") for line in lines]
    assert [name for name, _, said in found if name in HEADER and said.strip()] == list(HEADER)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_header_overrides_fields_that_exist_and_are_no_groups(path):
    config = get_config(path)
    for name in re.findall(r"--config\.([\w.]+)=", ast.get_docstring(ast.parse(path.read_text()))):
        assert not isinstance(field(config, name), ConfigDict)


def form(leaf):
    return leaf.shape, str(leaf.dtype), None if leaf.sharding is None else leaf.sharding.spec


@pytest.mark.parametrize("preset", ["single", "dp", "fsdp"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_step_type_checks_on_every_mesh(path, preset):
    experiment = from_config_dict(get_config(path))
    rows = experiment.train.batch_size // experiment.train.accumulate
    devices = math.gcd(rows, 8)
    mesh = AbstractMesh((devices,), (DATA,), axis_types=(AxisType.Explicit,)) if preset != "single" else None
    rules = Rules(mesh, PRESETS[preset])
    parts = build_parts(experiment, STUDENT, TEACHER, rules)
    params, teacher = (models.abstract_params(cfg, rules) for cfg in (STUDENT, TEACHER))
    state = jax.eval_shape(lambda p: init_state(parts, p, 0), params)
    step = make_train_step(parts)

    def plain(*arguments):
        state, report = step(*arguments)
        return state, report.metrics, report.finite_rows

    after, metrics, finite_rows = jax.eval_shape(
        plain, state, () if parts.teacher is None else teacher, abstract_batch(experiment, rules, STUDENT.vocab_size)
    )

    # What goes in comes out in the same form and place: else step 2 compiles again, or a weight is left whole.
    assert jax.tree.map(form, after) == jax.tree.map(form, state)
    assert finite_rows.shape == (experiment.train.accumulate, rows)
    assert {"loss", "grad_norm", "learning_rate", "selected_fraction"} <= set(metrics)
    assert {(a.shape, a.dtype.name) for pair in metrics.values() for a in pair} == {((), "float32")}
    if preset == "fsdp":
        assert DATA in after.params["layers"]["w_up"].sharding.spec
