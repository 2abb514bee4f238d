"""What every script shares: flags, one clear line for bad input, no slow import before the flags are read."""

import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from launch import processes

# transformers announces at import that torch is absent; here it always may be.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# libtpu, which requirements-dev.txt has as a compiler, complains where it finds no TPU and no names for one.
if not processes.tpu_chips():
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

# The CUDA plugin, a compiler like it, complains where CUDA libraries are missing; without a GPU nothing needs them.
if not processes.nvidia_gpus():
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

FLAGS = flags.FLAGS
OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")  # --config.train.steps=3, --noconfig.log.tensorboard

flags.disclaim_key_flags()  # what is defined here belongs to the script, and to its --help


def define_config() -> None:
    """--config=configs/<name>.py with overrides (--config.train.steps=200), and --workdir."""
    config_flags.DEFINE_config_file("config", None, "The experiment: a file of configs/.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Where the run is kept: checkpoints, logs, report.")


def run(main: Callable[[], int | None]) -> None:
    """Parse the flags and call `main`; bad input (ValueError, OSError) ends with its message and exit code 2.

    One of several processes that fails, however, leaves the others at once.
    """

    def guarded(arguments: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax narrates every step
        try:
            code = main()
        except (ValueError, OSError, FloatingPointError) as error:
            code = _told(error)
            if processes.several():
                processes.leave(code)
        except BaseException:
            if processes.several():
                traceback.print_exc()
                processes.leave(1)
            raise
        sys.exit(code or 0)

    app.run(guarded, flags_parser=_parse)


def _told(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 3 if isinstance(error, FloatingPointError) else 2


def require(name: str) -> Any:
    """The value of a flag that must be given."""
    value = FLAGS[name].value
    if value is None:
        raise ValueError(f"--{name} must be set, got nothing. See --help.")
    if name == "workdir" and "://" in str(value):
        raise ValueError(
            f"--workdir must be a directory, got {value!r}; a bucket has to be mounted to hold a run. Mount it, and "
            "give the directory."
        )
    return value


def _parse(arguments: list[str]) -> list[str]:
    """absl's parser, but what is wrong is one line of the form of our other errors, with exit code 2."""
    try:
        if "config" in FLAGS:
            _check_config(FLAGS.read_flags_from_files(arguments, force_gnu=False))
        rest = FLAGS(arguments)
        if len(rest) > 1:
            raise ValueError(f"options must start with --, got {rest[1]!r}. See --help.")
    except SystemExit:  # --help was given; absl ends it with 1
        sys.exit(0)
    except flags.Error as error:
        sys.exit(_told(ValueError(_explained(str(error)))))
    except ValueError as error:
        sys.exit(_told(error))
    return rest


def _check_config(arguments: list[str]) -> None:
    """The config file is there and before its overrides, and these name fields; the parser fails on it otherwise."""
    from kdjax.registry import did_you_mean

    given = False
    for at, argument in enumerate(arguments):
        override = OVERRIDE.match(argument)
        if argument.split("=")[0] in ("-config", "--config"):
            given = True
            _, assigned, value = argument.partition("=")
            file = (value if assigned else "".join(arguments[at + 1 : at + 2])).split(":")[0]
            if not Path(file).is_file():
                known = [path.as_posix() for path in Path("configs").glob("*.py")]
                hint = did_you_mean(file, known) if known else ""
                raise ValueError(f"--config must be a file of configs/, got {file!r}; there is no such file.{hint}")
        elif override and not given:
            raise ValueError(f"--config must come before what overrides it, got {argument} first. See --help.")
        elif override:
            _field(override[1])


def _field(path: str) -> Any:
    """The default of a config field. Raises ValueError if there is no such field."""
    from kdjax.config import default_config
    from kdjax.registry import did_you_mean

    node: Any = default_config()
    for part in path.split("."):
        if not isinstance(node, ConfigDict):
            raise ValueError(f"config has no field {path!r}; {path.removesuffix('.' + part)} is one value.")
        if part not in node:
            raise ValueError(f"config has no field {path!r}." + did_you_mean(part, node))
        node = node[part]
    return node


def _explained(message: str) -> str:
    """absl's message about a value of another type in the form of our own; the others as they are.

    Of a config file that refuses its argument (configs/x.py:row) what it says; mistakes in it keep their traceback.
    """
    refusal = r"whilst parsing config file:.*\nValueError: ([^\n]* must be [^\n]*, got [^\n]*)"
    refused = re.search(refusal, message, re.DOTALL)
    if refused is not None:
        return refused[1]
    found = re.match(r"flag --config\.([\w.]+)=(.*?): ", message, re.DOTALL)
    if found is None:
        return message.replace(" ?", "?") + ("" if message.endswith("?") else ".") + " See --help."
    default = _field(found[1])
    wanted = "a group of fields" if isinstance(default, ConfigDict) else type(default).__name__
    return f"{found[1]} must be {wanted}, got {found[2]!r}."
