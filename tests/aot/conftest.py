"""launch.plan as a module, for tests that compile what it plans."""

import jax
import pytest

from tests.launch import launched


@pytest.fixture(scope="module")
def plan():
    with launched.loaded("plan") as module:
        yield module


@pytest.fixture(scope="module")
def little_effort():
    """The compiler optimises as little as it can: the same collectives in half the time."""
    before = jax.config.jax_exec_time_optimization_effort
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    yield
    jax.config.update("jax_exec_time_optimization_effort", before)
