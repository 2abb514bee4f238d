"""What every script shares: flags, one clear line for bad input, no slow import before the flags are read."""

import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

FLAGS = flags.FLAGS


def define_config() -> None:
    """--config=configs/<name>.py with overrides (--config.train.steps=200), and --workdir."""
    config_flags.DEFINE_config_file("config", None, "The experiment: a file of configs/.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Where the run is kept: checkpoints, logs, report.")


def run(main: Callable[[], int | None]) -> None:
    """Parse the flags and call `main`; bad input (ValueError, OSError) ends with its message and exit code 2."""

    def guarded(arguments: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax narrates every step
        if len(arguments) > 1:
            sys.exit(f"error: unknown argument {arguments[1]!r}; options start with -- (see --help)")
        try:
            code = main()
        except (ValueError, OSError, FloatingPointError) as error:
            sys.exit(_told(error))
        sys.exit(code or 0)

    app.run(guarded)


def _told(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 3 if isinstance(error, FloatingPointError) else 2


def require(name: str) -> str:
    """The value of a flag that must be given."""
    value = FLAGS[name].value
    if value is None:
        raise ValueError(f"--{name} must be set, got nothing. See --help.")
    return value
