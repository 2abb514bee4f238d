"""Which implementation of an op runs: an explicit one or an error; the default in a stated order."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from kdjax import registry

Result = TypeVar("Result")


def choose(
    table: Mapping[str, Callable[..., Result]], name: str | None, default: str, op: str
) -> Callable[..., Result]:
    """The implementation called `name`, never another one; with None the op's `default` for this platform."""
    return registry.lookup(table, default if name is None else name, f"implementation of {op}")
