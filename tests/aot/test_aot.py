"""Compiling for absent chips: what is there, what is refused, what a program says of itself; the pinned compilers."""

import importlib.metadata
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from packaging.requirements import Requirement

from kdjax import aot
from kdjax.kernels import _dispatch
from launch import processes

ROOT = pathlib.Path(__file__).parents[2]
KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
X = jax.ShapeDtypeStruct((256, 384), jnp.float32)


def needs(chip):
    reason = aot.unavailable(chip)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("chip", aot.CHIPS)
def test_a_program_is_compiled_for_the_chip_and_sees_it_as_its_target(chip):
    needs(chip)
    seen = []

    def function(tree):
        seen.append(_dispatch.target())
        return {"sum": jnp.sum(jnp.exp(tree["x"] @ tree["x"].T))}

    program = aot.compile_on(chip, function, {"x": X})
    assert {target.platform for target in seen} == {aot.CHIPS[chip].platform}
    assert {target.kind for target in seen} == {KINDS.get(chip, "NVIDIA H100 80GB HBM3")}
    assert program.memory_analysis().argument_size_in_bytes >= 256 * 384 * 4
    assert _dispatch.target().platform == "cpu"  # nothing is left behind


def test_vmem_is_what_the_kernel_holds():
    needs("v5e")

    def double(x):
        def body(x_ref, o_ref):
            o_ref[...] = 2 * x_ref[...]

        return pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    def in_blocks(x):
        def body(x_ref, o_ref):
            o_ref[...] = 2 * x_ref[...]

        rows = pl.BlockSpec((8, 384), lambda i: (i, 0))
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(body, grid=(32,), in_specs=[rows], out_specs=rows, out_shape=shape)(x)

    blocks = aot.vmem_bytes(aot.compile_on("v5e", in_blocks, X))
    assert 2 * 8 * 384 * 4 <= blocks < 256 * 384 * 4  # one in, one out, twice for the pipeline; not the whole
    assert aot.vmem_bytes(aot.compile_on("v5e", lambda x: double(in_blocks(x)), X)) >= blocks  # the largest
    assert aot.vmem_bytes(aot.compile_on("v5e", lambda x: 2 * x, X)) is None


def test_shared_memory_is_what_the_kernel_declares():
    needs("h100")

    def copy(x, rows):
        def body(x_ref, o_ref, smem, barrier):
            plgpu.copy_gmem_to_smem(x_ref.at[:rows], smem, barrier)
            plgpu.barrier_wait(barrier)
            plgpu.copy_smem_to_gmem(smem, o_ref.at[:rows])
            plgpu.wait_smem_to_gmem(0)

        scratch = [plgpu.SMEM((rows, 128), jnp.float32), plgpu.Barrier()]
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return plgpu.kernel(body, out_type=out, scratch_types=scratch)(x)

    narrow = jax.ShapeDtypeStruct((256, 128), jnp.float32)
    one = aot.trace_on("h100", lambda x: copy(x, 64), narrow)
    assert aot.shared_bytes(one) == 64 * 128 * 4 + 8
    assert aot.shared_bytes(aot.trace_on("h100", lambda x: copy(copy(x, 32), 16), narrow)) == 32 * 128 * 4 + 8
    assert aot.shared_bytes(aot.trace_on("h100", jnp.sin, narrow)) is None


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    assert aot.unavailable("v5e") == 'libtpu is not installed (pip install "jax[tpu]")'
    assert aot.unavailable("h100").startswith("the CUDA plugin is not installed")
    message = r"^chip must be one that can be compiled for here, got 'v6e'; libtpu is not installed"
    with pytest.raises(ValueError, match=message):
        aot.compile_on("v6e", jnp.sin, X)
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(aot.shutil, "which", lambda name: None)
    monkeypatch.setattr(aot.os.path, "exists", lambda path: False)
    assert aot.unavailable("h100") == "no CUDA toolkit with ptxas is on this machine"
    assert aot.unavailable("v5e") is None


def test_a_mesh_larger_than_the_topology_is_refused():
    needs("v5e")
    with pytest.raises(ValueError, match=r"^shape must have at most the 1 devices of v5e, got \(2, 2\)\.$"):
        aot.mesh("v5e", (2, 2), ("data", "model"))


# --- what requirements-dev.txt installs


def test_libtpu_is_the_one_that_jax_asks_for():
    """By the pins of every Python; the newest libtpu is no match for an older jax."""
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    pythons, pinned = {"3.11", "3.12", "3.13", here}, {}
    for file in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / file).read_text().splitlines():
            name = line.split("==")[0]
            if name in ("jax", "libtpu"):
                requirement = Requirement(line)
                for python in pythons:
                    linux = {"python_version": python, "sys_platform": "linux", "platform_machine": "x86_64"}
                    if requirement.marker.evaluate(linux):
                        pinned[python, name] = str(requirement.specifier).removeprefix("==")
                    assert name == "jax" or not requirement.marker.evaluate(linux | {"sys_platform": "darwin"})
    # jax 0.10.2 asks for libtpu 0.0.42.*, jax 0.12.0.1 for 0.0.50.*
    matches = {"0.10.2": "0.0.42.", "0.12.0.1": "0.0.50."}
    for python in pythons:
        assert pinned[python, "libtpu"].startswith(matches[pinned[python, "jax"]])

    wanted = [Requirement(text) for text in importlib.metadata.requires("jax")]
    (libtpu,) = [r for r in wanted if r.name == "libtpu" and r.marker.evaluate({"extra": "tpu"})]
    assert pinned[here, "jax"] == importlib.metadata.version("jax")
    assert pinned[here, "libtpu"] in libtpu.specifier


COMPILERS = "import jax; jax.devices(); print(jax.default_backend())"


def quiet(code, **changed):
    """Output of Python with warnings as errors, in an environment with these changes; None takes a variable away."""
    environment = {name: value for name, value in (os.environ | changed).items() if value is not None}
    typed = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(typed, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_compilers_that_are_installed_say_nothing_on_a_cpu():
    done = quiet(COMPILERS, JAX_PLATFORMS="cpu")
    assert (done.stdout, done.stderr, done.returncode) == ("cpu\n", "", 0)


def test_scripts_do_not_complain_of_accelerators_that_are_not_there():
    """`make quickstart` after `.ci/run`: libtpu and the CUDA plugin are there, and nobody says JAX_PLATFORMS=cpu."""
    needs("v5e")
    tpu = ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "TPU_SKIP_MDS_QUERY")
    unset = dict.fromkeys(("JAX_PLATFORMS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK", *tpu))
    noisy = quiet(COMPILERS, **unset)
    if noisy.stdout != "cpu\n" or processes.nvidia_gpus():
        pytest.skip(f"a machine with an accelerator: {noisy.stdout}")
    assert "TPU" in noisy.stderr
    done = quiet("import launch.app; " + COMPILERS, **unset)
    assert (done.stdout, done.stderr, done.returncode) == ("cpu\n", "", 0)
