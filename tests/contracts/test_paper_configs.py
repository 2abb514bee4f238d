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
from kdjax.models import ModelConfig
from kdjax.sharding import DATA, PRESETS, Rules
from kdjax.step import init_state, make_train_step

FOLDER = pathlib.Path(__file__).parents[2] / "configs/paper"
QWEN3 = {"family": "qwen3", "vocab_size": 151936, "kv_heads": 8, "head_dim": 128, "rope_theta": 1e6, "norm_eps": 1e-6}
QWEN3_8B = ModelConfig(**QWEN3, width=4096, layers=36, heads=32, mlp=12288, max_positions=40960, tied=False)
QWEN3_1_7B = ModelConfig(**QWEN3, width=2048, layers=28, heads=16, mlp=6144, max_positions=40960, tied=True)
DEVICES = 16


def module(path):
    spec = importlib.util.spec_from_file_location(f"paper_{path.stem}", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


ROWS = [(path, row) for path in sorted(FOLDER.rglob("[!_]*.py")) for row in module(path).ROWS]


def test_the_tables_are_there():
    assert len(ROWS) >= 24


@pytest.mark.parametrize(("path", "row"), ROWS, ids=[f"{path.stem}-{row}" for path, row in ROWS])
def test_the_step_of_a_row_type_checks_on_its_mesh(path, row):
    experiment = from_config_dict(module(path).get_config(row))
    mesh = AbstractMesh((DEVICES,), (DATA,), axis_types=(AxisType.Explicit,))
    rules = Rules(mesh, PRESETS[experiment.mesh.preset])
    parts = build_parts(experiment, QWEN3_1_7B, QWEN3_8B, rules)
    teacher = () if parts.teacher is None else models.abstract_params(QWEN3_8B, rules, dtype=jnp.bfloat16)
    assert (parts.teacher is None) == (experiment.teacher.source == "cache")
    params = models.abstract_params(QWEN3_1_7B, rules)
    state = jax.eval_shape(lambda p: init_state(parts, p, 0), params)
    batch = abstract_batch(experiment, rules, QWEN3_1_7B.vocab_size)
    after, metrics = jax.eval_shape(
        lambda *arguments: (lambda done: (done[0], done[1].metrics))(make_train_step(parts)(*arguments)),
        state,
        teacher,
        batch,
    )
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert ("cache_misses" in metrics) == (experiment.teacher.source == "cache")
