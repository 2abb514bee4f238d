"""Meshes, logical axes and what each preset does with them.

Every array is declared with logical axes ("embed", "heads", "vocab", ...). Mesh axes have fixed names:
  replica  the batch is split over it, parameters are repeated: slices that are joined by a slow network
  data     the batch is split over it, and with fsdp the parameters at rest
  model    with tensor parallelism: heads, the inner width of the MLP and the vocabulary, at rest and at their use
Without tensor parallelism `model` is one more axis of data, so that a teacher and a student of different presets can
share a mesh. What fsdp splits is gathered where it is used (per layer, inside the scan); what tensor parallelism splits
stays split, and partial sums are added up. Meshes have Explicit axes: shardings are part of the types, so a missing or
doubtful one is an error at trace time and not a silent copy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import config, registry
from kdjax.types import Array, Head

REPLICA, DATA, MODEL = AXES = ("replica", "data", "model")
FSDP_AXES = ("embed", "vocab", "mlp", "heads")  # the first of a parameter's axes that is here and divides is split
TENSOR_AXES = ("vocab", "mlp", "heads", "kv_heads")

Side = tuple[Array, Head]  # hidden [B, T, D] and the head


@dataclasses.dataclass(frozen=True)
class Preset:
    """fsdp: parameters, gradients and optimiser are split over data. tensor: the work of a row is split over model."""

    fsdp: bool = False
    tensor: bool = False
    one_device: bool = False


PRESETS: dict[str, Preset] = {
    "single": Preset(one_device=True),
    "dp": Preset(),
    "fsdp": Preset(fsdp=True),
    "tp": Preset(tensor=True),
    "fsdp_tp": Preset(fsdp=True, tensor=True),
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """How logical axes map to the mesh. With `mesh=None` (single-device code, tests) every method is the identity.

    kernels: the implementation of all vocabulary kernels, attention: that of attention; None = the default of the
    platform (`kdjax.kernels`). sequence: with tensor parallelism, activations between blocks are split along T.
    """

    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None
    preset: Preset = PRESETS["single"]
    kernels: str | None = None
    attention: str | None = None
    sequence: bool = False

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The mesh axes over which rows are split, outermost first."""
        if self.mesh is None:
            return ()
        return tuple(name for name in self.mesh.axis_names if not (name == MODEL and self.preset.tensor))

    @property
    def batch_shards(self) -> int:
        """Into how many parts the batch axis is cut."""
        return self._size(self.batch_axes)

    @property
    def model_shards(self) -> int:
        """Into how many parts tensor parallelism cuts heads, MLP and vocabulary."""
        return self.mesh.shape[MODEL] if self.mesh is not None and self.preset.tensor else 1

    def of_preset(self, name: str) -> Rules:
        """The same mesh under another preset; "" = under this one."""
        if not name or self.mesh is None:
            return self
        return dataclasses.replace(self, preset=registry.lookup(PRESETS, name, "teacher.preset"))

    def storage_spec(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> P:
        """PartitionSpec of a parameter at rest. Raises ValueError if tensor parallelism does not divide it."""
        spec: list[Any] = [None] * len(axes)
        if self.mesh is None:
            return P(*spec)
        if self.preset.tensor:
            for at, (axis, size) in enumerate(zip(axes, shape, strict=True)):
                if axis in TENSOR_AXES:
                    self._check_divides(axis, size)
                    spec[at] = MODEL
                    break
        if self.preset.fsdp:
            split = tuple(name for name in self.batch_axes if name != REPLICA)
            for at, (axis, size) in enumerate(zip(axes, shape, strict=True)):
                if axis in FSDP_AXES and spec[at] is None and split and size % self._size(split) == 0:
                    spec[at] = _entry(split)
                    break
        return P(*spec)

    def storage(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, self.storage_spec(axes, shape))

    def gather(self, weight: Array) -> Array:
        """A stored matrix at the place of its use: whole but for what stays split over model.

        Its gradient goes back as it is stored. One mesh axis at a time, innermost first, and typed as `reduced`, so
        that the way back is a reduce-scatter over each: over 16 chips at once the TPU compiler makes it an all-reduce.
        """
        if self.mesh is None:
            return weight
        spec = [_names(entry) for entry in jax.typeof(weight).sharding.spec]
        split = [axis for axis in self.batch_axes if any(axis in names for names in spec)]
        summed = [axis for axis in self.batch_axes if axis not in split]  # over all axes of the batch in the end
        for name in reversed(split):
            summed.append(name)
            spec = [tuple(other for other in names if other != name) for names in spec]
            weight = self.reshard(weight, P(*map(_entry, spec), reduced=frozenset(summed)))
        return weight

    def reshard(self, array: Array, spec: P) -> Array:
        return array if self.mesh is None else jax.sharding.reshard(array, NamedSharding(self.mesh, spec))

    def batch_spec(self, ndim: int) -> P:
        """Batch-major activations and inputs: split along the first axis."""
        return P(_entry(self.batch_axes), *[None] * (ndim - 1))

    def batch(self, ndim: int) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, self.batch_spec(ndim))

    @property
    def residual(self) -> P:
        """Activations [B, T, D] between blocks."""
        along = MODEL if self.sequence and self.preset.tensor else None
        return P(_entry(self.batch_axes), along, None)

    @property
    def heads_spec(self) -> P:
        """Queries, keys and values [B, T, N, H]."""
        return P(_entry(self.batch_axes), None, MODEL if self.preset.tensor else None, None)

    @property
    def summed(self) -> NamedSharding | None:
        """Of a product [B, T, D] whose inner axis is split over model, so that parts are added up; else None."""
        if self.mesh is None or not self.preset.tensor:
            return None
        return NamedSharding(self.mesh, self.batch_spec(3))

    def embed(self, table: Array, tokens: Array, dtype: Any) -> Array:
        """The rows [B, T, D] of a stored table [V, D] at tokens [B, T], in `dtype`; ids outside of it give nan.

        Rows are cast after the look-up, so that their gradients are added up in the dtype of the table.
        """
        if self.mesh is None:
            return table.at[tokens].get(mode="fill", wrap_negative_indices=False).astype(dtype)
        spec = jax.typeof(table).sharding.spec
        vocab, width = (_names(entry) for entry in spec)
        tensor = self.preset.tensor and bool(vocab)
        # What moves is the smaller: the table to the tokens, or its rows at the tokens of all devices to their own.
        few = not tensor and tokens.size < table.shape[0]

        def local(part: Array, ids: Array) -> Array:
            part = _all_gather(part, width, 1)
            if not vocab or not (tensor or few):
                return _all_gather(part, vocab, 0).at[ids].get(mode="fill", wrap_negative_indices=False).astype(dtype)
            every = ids if tensor else jax.lax.all_gather(ids, vocab, axis=0, tiled=True)
            own = every - jax.lax.axis_index(vocab) * part.shape[0]
            inside = (own >= 0) & (own < part.shape[0])
            rows = jnp.where(inside[:, :, None], part[jnp.where(inside, own, 0)].astype(dtype), 0)
            # All but one device of a sum have zeros: it is exact in any dtype.
            if tensor:
                rows = jax.lax.psum(rows, vocab)
            else:
                for name in vocab:  # one axis at a time, as in `gather`
                    rows = jax.lax.psum_scatter(rows, name, scatter_dimension=0, tiled=True)
            return jnp.where(((ids >= 0) & (ids < table.shape[0]))[:, :, None], rows, jnp.nan)

        found = self.rowwise(local, (spec, self.batch_spec(2)), self.batch_spec(3))(table, tokens)
        return self.reshard(found, self.residual)

    def rowwise(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`function` on each device's own rows (kernels see plain arrays); without a mesh the function itself."""
        if self.mesh is None:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def with_heads(self, sides: Sequence[Side], specs: Sequence[tuple[P, P]]) -> list[Side]:
        """Inside `rowwise`: the sides with heads as kernels take them, from this device's part of each.

        specs: (of the hidden states, of the head's weight as it is stored) per side. Columns that tensor parallelism
        splits stay so if all sides have the same ones on a device; all else is gathered, and gradients are
        reduce-scattered back.
        """
        columns = [(0 if head.vocab_major else 1) for _, head in sides]
        widths = {head.weight.shape[at] for (_, head), at in zip(sides, columns, strict=True)}
        split = (
            self.preset.tensor
            and len(widths) == 1
            and all(spec[at] == MODEL for (_, spec), at in zip(specs, columns, strict=True))
        )
        found = []
        for (hidden, head), (_, spec), at in zip(sides, specs, columns, strict=True):
            weight = head.weight
            for axis, names in enumerate(spec):
                if not (split and axis == at):
                    weight = _all_gather(weight, _names(names), axis)
            found.append((hidden, dataclasses.replace(head, weight=weight, vocab_axis=MODEL if split else None)))
        return found

    def all_rows(self, array: Array) -> Array:
        """Inside `rowwise`: the rows of all devices, from this device's."""
        return jax.lax.all_gather(array, self.batch_axes, axis=0, tiled=True) if self.batch_axes else array

    def own_rows(self, array: Array) -> Array:
        """Inside `rowwise`: this device's rows of all devices'."""
        if not self.batch_axes:
            return array
        size = array.shape[0] // self.batch_shards
        return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(self.batch_axes) * size, size)

    def sum_over_batch(self, tree: Any) -> Any:
        """Inside `rowwise`: sums of the devices' sums."""
        return jax.lax.psum(tree, self.batch_axes) if self.batch_axes else tree

    def _size(self, names: tuple[str, ...]) -> int:
        return 1 if self.mesh is None else math.prod(self.mesh.shape[name] for name in names)

    def _check_divides(self, axis: str, size: int) -> None:
        if size % self.model_shards:
            fitting = [str(n) for n in range(1, min(size, 64) + 1) if size % n == 0]
            raise ValueError(
                f"mesh.shape must have a model axis that divides the {size} of {axis!r}, got model:"
                f"{self.model_shards}; tensor parallelism gives each device the same share. Set model to one of "
                f"{', '.join(fitting)}."
            )


def make_rules(mesh: config.Mesh, devices: Sequence[Any] | None = None) -> Rules:
    """The mesh and rules of mesh.preset and mesh.shape; single takes one device and no mesh.

    devices: of which the mesh is made, compile-only ones too; None = the first that JAX sees. Raises ValueError for a
    shape that does not fit preset or devices; it names the number to change.
    """
    preset = registry.lookup(PRESETS, mesh.preset, "mesh.preset")
    kernels, attention = (None if name == "auto" else name for name in (mesh.kernels, mesh.attention))
    if preset.one_device:
        if mesh.shape:
            raise ValueError(
                f"mesh.shape must be '' with mesh.preset='single', got {mesh.shape!r}. Set another preset."
            )
        return Rules(kernels=kernels, attention=attention)
    available = list(jax.devices() if devices is None else devices)
    sizes = _sizes(mesh, preset, available)
    count = math.prod(sizes.values())
    if count > len(available) or (devices is not None and count != len(available)):
        raise ValueError(
            f"mesh.shape must be made of the {len(available)} devices that are there, got {mesh.shape!r} with {count}. "
            "Change one of its sizes; -1 takes what is left."
        )
    if jax.process_count() > 1 and count != len(available):
        raise ValueError(
            f"mesh.shape must take all {len(available)} devices of the {jax.process_count()} processes, got "
            f"{mesh.shape!r} with {count}; a process without a part would have nothing to do. Change one of its sizes."
        )
    return Rules(_grid(sizes, available[:count]), preset, kernels, attention, mesh.sequence)


def _grid(sizes: dict[str, int], devices: list[Any]) -> jax.sharding.Mesh:
    """The devices as a mesh; of several slices, the first axis goes over them, so that the others stay within one."""
    shape, types = tuple(sizes.values()), (AxisType.Explicit,) * len(sizes)
    slices = _slices(devices)
    if shape[0] % len(slices):
        name = next(iter(sizes))
        raise ValueError(
            f"mesh.shape must have a first axis that the {len(slices)} slices divide, got {name}:{shape[0]}; only its "
            f"traffic fits the network between them. Start it with 'replica:{len(slices)}'."
        )
    if len({len(one) for one in slices}) > 1:
        raise ValueError(
            f"mesh.shape must take as many devices of each slice, got {', '.join(str(len(one)) for one in slices)}; "
            "the first axis goes over whole slices. Change its sizes, or teacher.devices."
        )
    inner = (shape[0] // len(slices), *shape[1:])
    grid = np.concatenate([_placed(inner, one) for one in slices])
    return jax.sharding.Mesh(grid, tuple(sizes), axis_types=types)


def _slices(devices: list[Any]) -> list[list[Any]]:
    """The devices slice by slice."""
    found: dict[int, list[Any]] = {}
    for device in devices:
        found.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    return [found[index] for index in sorted(found)]


def _placed(shape: tuple[int, ...], devices: list[Any]) -> Any:
    """The devices of a slice as an array, neighbours of a torus along its axes; as they come if they fill no box."""
    if devices[0].platform == "tpu" and not _torus(devices):
        return np.array(devices, dtype=object).reshape(shape)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _torus(devices: list[Any]) -> tuple[int, ...]:
    """Sizes of the box that TPU chips, and the cores of one, fill, without those of 1; () if they fill none."""
    if devices[0].platform != "tpu":
        return ()
    places = [(*device.coords, device.core_on_chip) for device in devices]
    sizes = [max(along) - min(along) + 1 for along in zip(*places, strict=True)]
    return tuple(size for size in sizes if size > 1) if math.prod(sizes) == len(devices) else ()


def _default(preset: Preset, devices: list[Any]) -> dict[str, int]:
    """Axis -> size where mesh.shape is "": all devices along data, or along model with tp; but on TPUs

    - replica goes over the slices, which a slow network joins.
    - fsdp has two axes on a torus of 16 chips and more, or of three dimensions: over one axis that is a square or a
      cube of chips the compiler makes all-reduces, with twice the bytes, of the reduce-scatters of gradients. Each is
      made of whole dimensions, as even as they allow. (On 8 chips or fewer of a plane one axis is a ring.)
    """
    name = MODEL if preset.tensor else DATA
    if devices[0].platform != "tpu":
        return {name: len(devices)}
    slices = _slices(devices)
    outer = {REPLICA: len(slices)} if len(slices) > 1 else {}
    each, torus = len(devices) // len(slices), _torus(slices[0])
    if not preset.fsdp or len(torus) < 2 or (len(torus) == 2 and each <= 8):
        return outer | {name: each}
    cuts = [(math.prod(torus[:at]), math.prod(torus[at:])) for at in range(len(torus) - 1, 0, -1)]
    data, model = min(cuts, key=max)
    return outer | {DATA: data, MODEL: model}


def _sizes(mesh: config.Mesh, preset: Preset, devices: list[Any]) -> dict[str, int]:
    """Axis -> size, from "data:4,model:-1"; "" = `_default`."""
    available = len(devices)
    if not mesh.shape:
        if preset.tensor and preset.fsdp:
            raise ValueError(
                f"mesh.shape must be set with mesh.preset={mesh.preset!r}, got ''. Set for example "
                f"'data:{max(1, available // 2)},model:{min(2, available)}' on {available} devices."
            )
        return _default(preset, devices)
    sizes: dict[str, int] = {}
    for part in mesh.shape.split(","):
        name, _, size = part.strip().partition(":")
        if name not in AXES or name in sizes or not size.removeprefix("-").isdecimal() or int(size) < -1 or size == "0":
            raise ValueError(
                f"mesh.shape must be sizes of {', '.join(AXES)}, each once, such as 'data:4,model:4', got "
                f"{mesh.shape!r}; {part.strip()!r} is none."
            )
        sizes[name] = int(size)
    if preset.tensor and MODEL not in sizes:
        raise ValueError(
            f"mesh.shape must have a model axis with mesh.preset={mesh.preset!r}, got {mesh.shape!r}. Add 'model:2', "
            "or set mesh.preset='fsdp'."
        )
    given = math.prod(size for size in sizes.values() if size > 0)
    open_ = [name for name, size in sizes.items() if size < 0]
    if len(open_) > 1 or (open_ and available % given):
        raise ValueError(
            f"mesh.shape must have one -1 at most, and its other sizes must divide the {available} devices, got "
            f"{mesh.shape!r}. Change one of its sizes."
        )
    return {name: available // given if size < 0 else size for name, size in sizes.items() if name in AXES}


def _all_gather(part: Array, names: tuple[str, ...], axis: int) -> Array:
    """Within a `shard_map`, one mesh axis at a time, innermost first; see `Rules.gather`."""
    for name in reversed(names):
        part = jax.lax.all_gather(part, name, axis=axis, tiled=True)
    return part


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry of a PartitionSpec."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def _entry(names: tuple[str, ...]) -> Any:
    """The entry of a PartitionSpec for mesh axes: None, a name, or a tuple of them."""
    return None if not names else names[0] if len(names) == 1 else names
