"""Launch scripts one after the other in one process, which may be one of several: process_worker.py SCRIPTS FLAG..."""

import importlib.util
import json
import pathlib
import sys
import time
import warnings

from absl import flags

ROOT = pathlib.Path(__file__).parents[2]


def run_script(script, *arguments):
    """Its main() in this process, with these flags."""
    before, sys.argv = sys.argv, [f"launch/{script}.py", *map(str, arguments)]
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
        return module.main()
    finally:
        sys.argv = before
        for name in made:  # the scripts share flag names; what the libraries define in main stays
            delattr(flags.FLAGS, name)


if __name__ == "__main__":
    for number, (script, *arguments) in enumerate(json.loads(sys.argv[1])):
        if script == "sleep":  # until somebody ends it
            time.sleep(600)
        run_script(script, *arguments, *sys.argv[2:])
        print(f"{script} {number} is done", flush=True)
