"""What the kernel tests share besides the plain modules `oracle.py` and `problems.py`."""

import sys

import pytest

from kdjax.kernels import linear_divergence, linear_stats


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 64 rows in every implementation that has tiles of rows: 300 rows are several, the last one ragged."""
    for op in (linear_divergence, linear_stats):
        for implementation in op.IMPLEMENTATIONS.values():
            module = sys.modules[implementation.__module__]
            if hasattr(module, "ROWS"):
                monkeypatch.setattr(module, "ROWS", 64)
