"""Launch scripts called in this process."""

import importlib.util
import pathlib
import sys
import warnings

import pytest
from absl import flags

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def call(monkeypatch, capsys):
    """call(script, *arguments): its main() in this process with these flags; what it printed."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"launch/{script}.py", *map(str, arguments)])
        known = set(flags.FLAGS)
        spec = importlib.util.spec_from_file_location(f"launched_{script}", ROOT / "launch" / f"{script}.py")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            with warnings.catch_warnings():  # ml_collections loads the config file in an outdated way
                warnings.filterwarnings("ignore", r"the load_module\(\) method is deprecated", DeprecationWarning)
                flags.FLAGS(sys.argv)
        finally:
            made = set(flags.FLAGS) - known
        try:
            module.main()
        finally:
            for name in made:  # the scripts share flag names; what the libraries define in main stays
                delattr(flags.FLAGS, name)
        return capsys.readouterr().out

    return run
