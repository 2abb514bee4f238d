"""Compile for chips that are not here: programs, their memory and their collectives, for TPU generations and GPUs.

TPU targets need libtpu (`pip install "jax[tpu]"`); GPU targets the CUDA plugin wheels and a CUDA toolkit (ptxas). What
comes out proves lowering, alignment and that everything fits; it proves neither numbers nor speed.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip: how its compiler calls it, and the vendor's peak figures (bf16 FLOP/s, bytes/s, bytes).

    All figures are of one JAX device: of tpu7x, whose chips are two devices, half the chip's.
    interconnect: bytes/s that leave it over all its links (ICI, NVLink), half of a published two-way figure.
    network: bytes/s that leave it for another slice; None = no figure of the vendor is known here.
    dimensions: of a slice's shape; 1 = a plain count. host: chips of one host. devices: JAX devices of one chip.
    """

    platform: str
    topology: str
    flops: float
    bandwidth: float
    memory: float
    interconnect: float
    network: float | None
    dimensions: int
    host: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()
    devices: int = 1


ONE_HOST = (("chips_per_host_bounds", (1, 1, 1)),)
# Interconnect, one way: 2400, 1600, 4800, 3200, 4800 Gbit/s a chip, NVLink 450 GB/s. Network: 25, 50, 100, 100 Gbit/s a
# chip of v5e (6.4 Tbit/s a pod of 256), v5p, v6e (25.6 Tbit/s a pod), tpu7x, by the vendor's pages; of v4 they say
# nothing. 400 Gbit/s a GPU is what a DGX H100 has; other machines differ.
CHIPS = {
    "v4": Chip("tpu", "v4:2x2x1", 275e12, 1.2e12, 32e9, 300e9, None, 3, (2, 2, 1)),
    "v5e": Chip("tpu", "v5e:1x1", 197e12, 0.82e12, 16e9, 200e9, 3.1e9, 2, (2, 2, 1), ONE_HOST),
    "v5p": Chip("tpu", "v5p:2x2x1", 459e12, 2.77e12, 95e9, 600e9, 6.25e9, 3, (2, 2, 1)),
    "v6e": Chip("tpu", "v6e:1x1", 918e12, 1.64e12, 32e9, 400e9, 12.5e9, 2, (2, 2, 1), ONE_HOST),
    "tpu7x": Chip("tpu", "tpu7x:2x2x1", 1154e12, 3.69e12, 96e9, 300e9, 6.25e9, 3, (2, 2, 1), devices=2),
    "h100": Chip("gpu", "1x1x1", 989e12, 3.35e12, 80e9, 450e9, 50e9, 1, (8,)),
}
SHAPES = "v5e:4x4, v6e:2x4, v4:2x2x2, v5p:4x4x4, tpu7x:2x2x1, h100:8; two slices: v5e:4x4:2"

# From public specifications; the compiler wants limits, not estimates.
_H100 = (
    "gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048"
    " shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448"
    " core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535"
    " block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800"
    " device_memory_size: 84942979072 registers_per_core_limit: 65536 registers_per_block_limit: 65536"
    ' cuda_compute_capability { major: 9 minor: 0 } } platform_name: "CUDA"'
    ' dnn_version_info { major: 9 minor: 8 } device_description_str: "NVIDIA H100 80GB HBM3"'
)


def unavailable(chip: str) -> str | None:
    """Why nothing can be compiled for `chip` on this machine, or None."""
    if CHIPS[chip].platform == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            return 'libtpu is not installed (pip install "jax[tpu]")'
        return None
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return "the CUDA plugin is not installed (pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt)"
    if shutil.which("ptxas") is None and not os.path.exists("/usr/local/cuda/bin/ptxas"):
        return "no CUDA toolkit with ptxas is on this machine"
    return None


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of one shape, of one kind of chip."""

    chip: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def device_count(self) -> int:
        """JAX devices of all slices."""
        return self.chips * CHIPS[self.chip].devices

    def __str__(self) -> str:
        """As it is typed."""
        return f"{self.chip}:{'x'.join(map(str, self.shape))}" + (f":{self.slices}" if self.slices > 1 else "")


def parse_topology(text: str) -> Topology:
    """'v5e:4x4', 'v5p:2x2x2', 'h100:8'; 'v5e:4x4:2' is two slices. ValueError that says what is possible."""

    def must(what: str) -> ValueError:
        return ValueError(f"--topology {what}, got {text!r}. Such as {SHAPES}.")

    name, *rest = text.split(":")
    if name not in CHIPS:
        raise must(f"must begin with one of {', '.join(CHIPS)}")
    chip = CHIPS[name]
    sizes, slices = (rest[0] if rest else "").split("x"), rest[1] if len(rest) > 1 else "1"
    if not all(size.isdecimal() and int(size) for size in sizes) or len(sizes) != chip.dimensions:
        axes = {1: "a number of GPUs", 2: "two sizes", 3: "three sizes"}[chip.dimensions]
        raise must(f"of {name} must have {axes} behind the colon")
    if len(rest) > 2 or not (slices.isdecimal() and int(slices)):
        raise must("may end with a colon and a number of slices")
    shape = tuple(map(int, sizes))
    # A slice is made of whole hosts, or is one chip; a host's GPUs may be used in part.
    whole = all(size % host == 0 for size, host in zip(shape, chip.host, strict=False))
    part = math.prod(shape) == 1 or (chip.dimensions == 1 and shape < chip.host)
    if not whole and not part:
        hosts = "x".join(map(str, chip.host[: chip.dimensions]))
        raise must(f"of {name} must be made of whole hosts of {hosts} chips, or be one chip")
    return Topology(name, shape, int(slices))


@functools.cache
def topology_devices(topology: Topology) -> tuple[Any, ...]:
    """The compile-only devices of a topology, slice after slice. ValueError if nothing can be compiled for it here."""
    reason = unavailable(topology.chip)
    if reason is not None:
        raise ValueError(f"--topology must be one that can be compiled for here, got '{topology}'; {reason}.")
    chip = CHIPS[topology.chip]
    if chip.platform == "gpu":
        hosts, each = max(1, topology.chips // chip.host[0]), min(topology.chips, chip.host[0])
        return _described("gpu", f"1x{hosts}x{each}")
    bounds = (1, 1, 1) if math.prod(topology.shape) == 1 else chip.host
    name = f"{topology.chip}:{'x'.join(map(str, topology.shape))}"
    # v4 would be two devices a chip; its users see one, as v5p's do.
    whole = (("chip_config_name", "megacore"),) if topology.chip == "v4" else ()
    slices = (("num_slices", topology.slices),) if topology.slices > 1 else ()
    return _described("tpu", name, (("chips_per_host_bounds", bounds), *whole, *slices))


@functools.cache
def _devices(chip: str) -> tuple[Any, ...]:
    return _described(CHIPS[chip].platform, CHIPS[chip].topology, CHIPS[chip].options)


def _described(platform: str, name: str, options: tuple[tuple[str, Any], ...] = ()) -> tuple[Any, ...]:
    if platform == "gpu":
        description = topologies.get_topology_desc("gpu", "cuda", target_config=_H100, topology=name)
    else:
        # libtpu reads these when it is first loaded: several processes may load it, no log, no metadata server.
        for variable, value in {
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-16",
            "TPU_STDERR_LOG_LEVEL": "3",
            "TPU_MIN_LOG_LEVEL": "3",
        }.items():
            os.environ.setdefault(variable, value)
        description = topologies.get_topology_desc(name, "tpu", **dict(options))
    return tuple(description.devices)


def mesh(chip: str, shape: tuple[int, ...] = (1,), axes: tuple[str, ...] = ("data",)) -> Mesh:
    """A mesh of compile-only devices. ValueError if the chip's topology has too few, or nothing can be compiled."""
    reason = unavailable(chip)
    if reason is not None:
        raise ValueError(f"chip must be one that can be compiled for here, got {chip!r}; {reason}.")
    devices, count = _devices(chip), int(np.prod(shape))
    if count > len(devices):
        raise ValueError(f"shape must have at most the {len(devices)} devices of {chip}, got {shape}.")
    return Mesh(np.array(devices[:count]).reshape(shape), axes, axis_types=(AxisType.Explicit,) * len(axes))


def trace_on(chip: str, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a shard_map, traced for one device of `chip`, so that it sees that chip as its target.

    args: trees of ShapeDtypeStruct. What comes back is the stage that has `.jaxpr`.
    """
    grid = mesh(chip)
    whole = jax.shard_map(function, mesh=grid, in_specs=P(), out_specs=P(), check_vma=False)
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(grid, P())), args)
    with jax.set_mesh(grid):
        return jax.jit(whole).trace(*placed)


def compile_on(chip: str, function: Callable[..., Any], *args: Any) -> Any:
    """The same, compiled: has `.as_text()` and `.memory_analysis()`."""
    traced = trace_on(chip, function, *args)
    with jax.set_mesh(mesh(chip)):
        return traced.lower().compile()


def vmem_bytes(compiled: Any) -> int | None:
    """VMEM that the hungriest Mosaic kernel of a TPU program takes, as the compiler states it in the program.

    None if there is no such kernel; XLA's own fusions do not count.
    """
    kernels = [line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    stated = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"')
    return max((int(size) for line in kernels for size in stated.findall(line)), default=None)


def shared_bytes(traced: Any) -> int | None:
    """Shared memory of a block of the hungriest Mosaic GPU kernel: the buffers that it declares, without padding.

    traced: of `trace_on`; the compiled program does not say. None if there is no such kernel.
    """
    return _declared(traced.jaxpr.jaxpr) or None


def _declared(jaxpr: Any) -> int:
    """Bytes in shared memory that are alive at once: scopes within one another add up, others take turns."""
    most = 0
    for equation in jaxpr.eqns:
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns")):
            inner: Any = getattr(part, "jaxpr", part)  # a closed one has it inside
            if hasattr(inner, "eqns"):
                scope = inner.invars if equation.primitive.name == "run_scoped" else ()
                most = max(most, sum(_in_shared(variable.aval) for variable in scope) + _declared(inner))
    return most


def _in_shared(aval: Any) -> int:
    if str(getattr(aval, "memory_space", "")).lower() != "smem":
        return 0
    return int(np.prod(aval.shape)) * getattr(aval.dtype, "itemsize", 8)  # a barrier has no such size, and 8 bytes
