"""Which implementation of an op runs: an explicit one or an error; else the first of its platform's order that can."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from kdjax import registry

Result = TypeVar("Result")
Declines = Callable[..., str | None]

# Per platform, best first; an op without an entry of that name goes on to the next. "reference" is never a default.
ORDER = {"cpu": ("xla",), "tpu": ("pallas_tpu", "xla"), "gpu": ("pallas_gpu", "cudnn", "xla")}

_warned: set[str] = set()


@dataclasses.dataclass(frozen=True)
class Target:
    """What a program is traced for. platform: cpu, gpu, tpu. kind: such as 'TPU v5 lite', 'NVIDIA H100 80GB HBM3'."""

    platform: str
    kind: str


def target() -> Target:
    """Of the mesh that is in force (compile-only devices too), else the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return Target({"cuda": "gpu"}.get(device.platform, device.platform), device.device_kind)
    first = jax.devices()[0]
    return Target({"cuda": "gpu"}.get(first.platform, first.platform), first.device_kind)


def or_default(table: Mapping[str, Any], name: str | None) -> str | None:
    """What a setting for several ops names, for one of them; None where the kernel is known and this table lacks it.

    An unknown name stays, and `choose` refuses it.
    """
    known = {each for order in ORDER.values() for each in order}
    return None if name in known and name not in table else name


def choose(
    op: str,
    table: Mapping[str, Callable[..., Result]],
    declines: Mapping[str, Declines],
    name: str | None,
    *args: Any,
) -> Callable[..., Result]:
    """The implementation called `name`, or with None the first in the platform's order that does not decline.

    declines[name](target, *args) says in one sentence why it cannot take these arguments there, or None. An explicit
    implementation that declines is a ValueError; a default that is passed over is one UserWarning per reason.
    """
    where = target()
    if name is not None:
        chosen = registry.lookup(table, name, f"implementation of {op}")
        reason = declines[name](where, *args) if name in declines else None
        if reason is not None:
            raise ValueError(
                f"implementation of {op} must be one that runs here, got {name!r} for {where.kind}; {reason} "
                "Set it to 'xla', or leave it out."
            )
        return chosen
    for candidate in ORDER.get(where.platform, ("xla",)):
        if candidate not in table:
            continue
        reason = declines[candidate](where, *args) if candidate in declines else None
        if reason is None:
            return table[candidate]
        message = (
            f"{op}: {candidate} is passed over on {where.kind}; {reason} The next of {ORDER[where.platform]} runs."
        )
        if message not in _warned:
            _warned.add(message)
            warnings.warn(message, stacklevel=3)
    return table["xla"]
