"""Compile for chips that are not here: programs, their memory and their collectives, for TPU generations and GPUs.

TPU targets need libtpu (`pip install "jax[tpu]"`); GPU targets the CUDA plugin wheels and a CUDA toolkit (ptxas). What
comes out proves lowering, alignment and that everything fits; it proves neither numbers nor speed.
"""

import dataclasses
import functools
import importlib.util
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
    """One kind of chip: how its compiler calls it, and the vendor's peak figures (bf16 FLOP/s, bytes/s, bytes)."""

    platform: str
    topology: str
    flops: float
    bandwidth: float
    memory: float
    options: tuple[tuple[str, Any], ...] = ()


ONE_HOST = (("chips_per_host_bounds", (1, 1, 1)),)
CHIPS = {
    "v4": Chip("tpu", "v4:2x2x1", 275e12, 1.2e12, 32e9),
    "v5e": Chip("tpu", "v5e:1x1", 197e12, 0.82e12, 16e9, ONE_HOST),
    "v5p": Chip("tpu", "v5p:2x2x1", 459e12, 2.77e12, 95e9),
    "v6e": Chip("tpu", "v6e:1x1", 918e12, 1.64e12, 32e9, ONE_HOST),
    "tpu7x": Chip("tpu", "tpu7x:2x2x1", 1154e12, 3.69e12, 96e9),
    "h100": Chip("gpu", "1x1x1", 989e12, 3.35e12, 80e9),
}

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


@functools.cache
def _devices(chip: str) -> tuple[Any, ...]:
    entry = CHIPS[chip]
    if entry.platform == "gpu":
        description = topologies.get_topology_desc("gpu", "cuda", target_config=_H100, topology=entry.topology)
    else:
        # libtpu reads these when it is first loaded: several processes may load it, no log, no metadata server.
        for name, value in {
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-16",
            "TPU_STDERR_LOG_LEVEL": "3",
            "TPU_MIN_LOG_LEVEL": "3",
        }.items():
            os.environ.setdefault(name, value)
        description = topologies.get_topology_desc(entry.topology, "tpu", **dict(entry.options))
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
