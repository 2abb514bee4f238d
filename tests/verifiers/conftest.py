"""Packages that the verifiers ask, replaced by a file of our own; their processes end with the test."""

import pytest

from kdjax.verifiers import worker


@pytest.fixture
def package(tmp_path, monkeypatch):
    """package(name, source): from now on it is what `import name` finds, here and in the processes that check."""

    def make(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.syspath_prepend(tmp_path)
        worker.stop_all()  # they imported another

    yield make
    worker.stop_all()


@pytest.fixture
def absent(monkeypatch):
    """As on a machine where these packages are not installed."""
    monkeypatch.setattr(worker, "installed", lambda name: False)
