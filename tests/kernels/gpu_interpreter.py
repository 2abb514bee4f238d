"""Mosaic GPU kernels on the CPU: JAX's own interpreter, which simulates warpgroups, barriers, copies and shared memory.

Three things are added to it. It knows no transposed operand of a wgmma, as heads stored [V, D] are read; nor layouts of
registers or loads that name one, which mean nothing here; and it compiles a kernel anew for every block of the grid and
every warpgroup, which takes seconds where once is enough.
"""

import contextlib
import threading

import jax
import numpy as np
from jax._src.interpreters import mlir
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.core import layout_cast_p
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode
from jax._src.state.types import TransposeTransform
from jax.experimental.pallas import mosaic_gpu

mlir.register_lowering(layout_cast_p, lambda ctx, value, *, new_layout: [value], platform="cpu")


@contextlib.contextmanager
def interpreted(monkeypatch, **params):
    """Kernels traced here are interpreted. Unwritten memory is NaN, and so is what lies behind the end of an array."""
    monkeypatch.setattr(gpu_callbacks, "wgmma", _wgmma)
    monkeypatch.setattr(mosaic_gpu, "load", lambda ref, at, **_: ref[at])
    monkeypatch.setattr(thread_map, "_run_jaxpr", _run_compiled)
    with force_gpu_interpret_mode(InterpretGPUParams(out_of_bounds_reads="uninitialized", **params)):
        try:
            yield
        finally:
            interpreter.reset_gpu_interpret_mode_state()


def _wgmma(*, token, acc_allocation_key_as_array, a_allocation_key_as_array, b_allocation_key_as_array, **rest):
    where = {name: rest[name] for name in ("device_id", "grid_point_coords", "thread_id", "source_info")}

    def read(key, transforms):
        plain = [t for t in transforms if not isinstance(t, TransposeTransform)]
        whole = gpu_callbacks._get(
            token, allocation_key_as_array=key, transforms=jax.tree.map(int, tuple(plain)), **where
        )[1]
        whole = np.asarray(whole).astype(np.float32)
        return whole if len(plain) == len(transforms) else whole.T

    a = read(a_allocation_key_as_array, rest["a_transforms"])
    b = read(b_allocation_key_as_array, rest["b_transforms"])
    total = read(acc_allocation_key_as_array, rest["acc_transforms"]) + a @ b
    gpu_callbacks._swap(
        token, allocation_key_as_array=acc_allocation_key_as_array, transforms=(), val=total, mask=None, **where
    )
    return token


lock, programs = threading.Lock(), {}


def _run_compiled(jaxpr, consts, *args):
    with lock:
        if id(jaxpr) not in programs:
            traced = jax.jit(jax.core.eval_jaxpr, static_argnums=0).trace(jaxpr, consts, *args)
            programs[id(jaxpr)] = jaxpr, traced.lower().compile()  # with the jaxpr, so that no other gets its id
    programs[id(jaxpr)][1](consts, *args)
