"""launch.plan as a module, for tests that compile what it plans."""

import importlib.util
import pathlib

import jax
import pytest
from absl import flags

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plan():
    known = set(flags.FLAGS)
    spec = importlib.util.spec_from_file_location("planned_for_topologies", ROOT / "launch" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = set(flags.FLAGS) - known
    yield module
    for name in made:
        delattr(flags.FLAGS, name)


@pytest.fixture(scope="module")
def little_effort():
    """The compiler optimises as little as it can: the same collectives in half the time."""
    before = jax.config.jax_exec_time_optimization_effort
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    yield
    jax.config.update("jax_exec_time_optimization_effort", before)
