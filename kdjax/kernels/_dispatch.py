"""Which implementation of an op runs: an explicit one or an error; the default in a stated order."""

from collections.abc import Callable, Mapping

from kdjax import registry

Implementation = Callable[..., object]


def choose(table: Mapping[str, Implementation], name: str | None, default: str, op: str) -> Implementation:
    """The implementation called `name`, never another one; with None the op's `default` for this platform."""
    return registry.lookup(table, default if name is None else name, f"implementation of {op}")
