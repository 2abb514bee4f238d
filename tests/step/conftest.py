"""The tiny step of `step_bench` as fixtures."""

import dataclasses

import jax
import pytest

from kdjax import models
from kdjax.build import build_parts
from kdjax.models import ModelConfig
from kdjax.sharding import Rules
from kdjax.types import Batch
from tests.step.step_bench import STUDENT, TEACHER, Bench, experiment, ragged_batch


@pytest.fixture
def bench():
    """bench(rules=..., student=..., teacher=..., **config overrides) -> Bench."""

    def make(
        rules: Rules = Rules(), student: ModelConfig = STUDENT, teacher: ModelConfig = TEACHER, **overrides
    ) -> Bench:
        parts = build_parts(experiment(**overrides), student, teacher, rules)
        params, teacher_params = (
            models.init_params(dataclasses.replace(cfg, initializer_range=0.3), jax.random.key(seed), rules)
            for seed, cfg in enumerate((student, teacher))
        )
        return Bench(parts, params, teacher_params)

    return make


@pytest.fixture
def student_cfg() -> ModelConfig:
    return STUDENT


@pytest.fixture
def batch() -> Batch:
    return ragged_batch()
