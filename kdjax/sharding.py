"""Meshes, logical axes and what each preset does with them.

Every array is declared with logical axes ("embed", "heads", "vocab", ...). A preset says on which mesh axis each of
them is *stored*. Computation follows one rule in all presets so far: weights are gathered where they are used (per
layer, inside the scan), activations are split along the batch. Meshes have Explicit axes: shardings are part of the
types, so a missing or doubtful one is an error at trace time and not a silent copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import registry
from kdjax.types import Array, Head

DATA = "data"  # the one mesh axis of these presets


@dataclasses.dataclass(frozen=True)
class Preset:
    """store: logical axis -> mesh axis for parameters (and with them gradients and optimiser state)."""

    store: dict[str, str]
    one_device: bool = False


PRESETS: dict[str, Preset] = {
    "single": Preset({}, one_device=True),
    "dp": Preset({}),
    # The first axis of a parameter that is listed and divides evenly is split; the rest stays whole.
    "fsdp": Preset({"embed": DATA, "vocab": DATA, "mlp": DATA, "heads": DATA}),
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """How logical axes map to the mesh. With `mesh=None` (single-device code, tests) every method is the identity.

    kernels: the implementation of all vocabulary kernels; None = the default of the platform (`kdjax.kernels`).
    """

    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None
    preset: Preset = PRESETS["single"]
    kernels: str | None = None

    def storage_spec(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> P:
        """PartitionSpec of a parameter at rest: its first listed axis whose size the mesh axis divides."""
        spec: list[str | None] = [None] * len(axes)
        if self.mesh is not None:
            for at, (axis, size) in enumerate(zip(axes, shape, strict=True)):
                target = self.preset.store.get(axis) if axis else None
                if target and size % self.mesh.shape[target] == 0:
                    spec[at] = target
                    break
        return P(*spec)

    def storage(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, self.storage_spec(axes, shape))

    def gather(self, weight: Array) -> Array:
        """The whole of a stored weight, at the place of its use; its gradient goes back as it is stored."""
        return weight if self.mesh is None else jax.sharding.reshard(weight, NamedSharding(self.mesh, P()))

    def batch_spec(self, ndim: int) -> P:
        """Batch-major activations and inputs: split along the first axis."""
        return P(DATA, *[None] * (ndim - 1))

    def batch(self, ndim: int) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, self.batch_spec(ndim))

    @property
    def batch_shards(self) -> int:
        """Into how many parts the batch axis is cut."""
        return 1 if self.mesh is None else self.mesh.shape[DATA]

    def rowwise(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`function` on each device's own rows (kernels see plain arrays); without a mesh the function itself."""
        if self.mesh is None:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def gather_head(self, head: Head, spec: P) -> Head:
        """Inside `rowwise`: the whole head from this device's part of it; its gradient is reduce-scattered back."""
        for axis, name in enumerate(spec):
            if name is not None:
                head = dataclasses.replace(head, weight=jax.lax.all_gather(head.weight, name, axis=axis, tiled=True))
        return head

    def all_rows(self, array: Array) -> Array:
        """Inside `rowwise`: the rows of all devices, from this device's."""
        return array if self.mesh is None else jax.lax.all_gather(array, DATA, axis=0, tiled=True)

    def own_rows(self, array: Array) -> Array:
        """Inside `rowwise`: this device's rows of all devices'."""
        if self.mesh is None:
            return array
        size = array.shape[0] // self.batch_shards
        return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(DATA) * size, size)

    def sum_over_batch(self, tree: Any) -> Any:
        """Inside `rowwise`: sums of the devices' sums."""
        return tree if self.mesh is None else jax.lax.psum(tree, DATA)


def make_rules(preset: str, devices: int = 0, kernels: str = "auto") -> Rules:
    """The mesh and rules of a preset over the first `devices` devices (0 = all); single takes one and no mesh."""
    implementation = None if kernels == "auto" else kernels
    entry = registry.lookup(PRESETS, preset, "mesh.preset")
    if entry.one_device:
        return Rules(kernels=implementation)
    available = jax.device_count()
    if devices > available:
        raise ValueError(
            f"mesh.devices must be at most the {available} that JAX sees, got {devices}. Set it to 0 for all."
        )
    count = devices or available
    mesh = jax.make_mesh((count,), (DATA,), axis_types=(AxisType.Explicit,), devices=jax.devices()[:count])
    return Rules(mesh, entry, implementation)
