"""What the kernel tests share besides the plain modules `oracle.py` and `problems.py`."""

import sys

import pytest
from jax.experimental.pallas import tpu as pltpu

from kdjax.kernels import linear_divergence, linear_stats


@pytest.fixture(autouse=True)
def interpreted():
    """TPU kernels run on the CPU here: the grid as a plain loop, which is the quickest way.

    What it does not see (races, reads of memory that nobody wrote) the tests of one kernel ask for with `simulated`.
    """
    with pltpu.force_tpu_interpret_mode(True):
        yield


@pytest.fixture
def simulated(interpreted, capsys):
    """The memories and copies of a TPU of two cores: memory that nobody wrote is NaN, a race is an error."""
    with pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(
            detect_races=True, uninitialized_memory="nan", dma_execution_mode="eager", num_cores_or_threads=2
        )
    ):
        yield
    assert "RACE DETECTED" not in capsys.readouterr().out  # all that the simulator says about it


@pytest.fixture
def compiled(interpreted):
    """Kernels are compiled after all, for chips that are not here: for tests with `kdjax.aot`."""
    with pltpu.force_tpu_interpret_mode(None):
        yield


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 64 rows and chunks of 16 columns in every implementation that has them, the last ones ragged."""
    for op in (linear_divergence, linear_stats):
        for implementation in op.IMPLEMENTATIONS.values():
            module = sys.modules[implementation.__module__]
            for name, size in (("ROWS", 64), ("COLUMNS", 16)):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, size)
