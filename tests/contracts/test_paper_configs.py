"""Every row of configs/paper: it builds, and its step type-checks at the real models' shapes on its mesh."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from kdjax import models
from kdjax.build import build_parts
from kdjax.config import from_config_dict
from kdjax.data import abstract_batch
from kdjax.models.known_configs import KNOWN
from kdjax.sharding import DATA, PRESETS, Rules
from kdjax.step import init_state, make_train_step

FOLDER = pathlib.Path(__file__).parents[2] / "configs/paper"
DEVICES = 16


def module(path):
    spec = importlib.util.spec_from_file_location(f"paper_{path.stem}", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


ROWS = [(path, row) for path in sorted(FOLDER.rglob("[!_]*.py")) for row in module(path).ROWS]


def test_the_tables_are_there():
    assert len(ROWS) >= 36


@pytest.mark.parametrize(("path", "row"), ROWS, ids=[f"{path.stem}-{row}" for path, row in ROWS])
def test_the_step_of_a_row_type_checks_on_its_mesh(path, row):
    experiment = from_config_dict(module(path).get_config(row))
    mesh = AbstractMesh((DEVICES,), (DATA,), axis_types=(AxisType.Explicit,))
    rules = Rules(mesh, PRESETS[experiment.mesh.preset])
    student_cfg, teacher_cfg = KNOWN[experiment.student.path], KNOWN[experiment.teacher.path]
    parts = build_parts(experiment, student_cfg, teacher_cfg, rules)
    teacher = () if parts.teacher is None else models.abstract_params(teacher_cfg, rules, dtype=jnp.bfloat16)
    assert (parts.teacher is None) == (experiment.teacher.source == "cache")
    params = models.abstract_params(student_cfg, rules)
    state = jax.eval_shape(lambda p: init_state(parts, p, 0), params)
    batch = abstract_batch(experiment, rules, student_cfg.vocab_size)
    after, metrics = jax.eval_shape(
        lambda *arguments: (lambda done: (done[0], done[1].metrics))(make_train_step(parts)(*arguments)),
        state,
        teacher,
        batch,
    )
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert ("cache_misses" in metrics) == (experiment.teacher.source == "cache")
