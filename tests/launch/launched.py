"""Scripts of launch/ in this process: their flags are defined for as long as a test needs them."""

import contextlib
import importlib.util
import pathlib
import sys
import warnings
from unittest import mock

from absl import flags

ROOT = pathlib.Path(__file__).parents[2]


@contextlib.contextmanager
def loaded(script, *arguments):
    """The module launch/<script>.py, with its flags as these arguments say.

    At the end its flags go, for the scripts share names; what libraries define meanwhile stays.
    """
    name, known, made = f"launched_{script}", set(flags.FLAGS), set()
    spec = importlib.util.spec_from_file_location(name, ROOT / "launch" / f"{script}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses looks there
    with mock.patch.object(sys, "argv", [f"launch/{script}.py", *map(str, arguments)]):
        try:
            try:
                spec.loader.exec_module(module)
                with warnings.catch_warnings():  # ml_collections loads the config file in an outdated way
                    warnings.filterwarnings("ignore", r"the load_module\(\) method is deprecated", DeprecationWarning)
                    flags.FLAGS(sys.argv)
            finally:
                made = set(flags.FLAGS) - known
            yield module
        finally:
            del sys.modules[name]
            for flag in made:
                delattr(flags.FLAGS, flag)


def run(script, *arguments):
    """What its main() returns, called with these flags."""
    with loaded(script, *arguments) as module:
        return module.main()
