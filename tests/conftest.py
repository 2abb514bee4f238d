"""One environment for all tests: CPU with 8 devices, no network, warnings are errors, shapes checked by beartype."""

import os

# Before anything imports jax or transformers; child processes of tests inherit it.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests compile much and compute little: LLVM optimises nothing, and XLA's older emitters make the loops, which are
# smaller. A step takes an eighth of the time. XLA_FLAGS= (empty) gives the suite with the compiler as users have it.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)

import gc
import pathlib

import hypothesis
import jax
import jaxtyping
import pytest
from absl import flags

jax.config.update("jax_num_cpu_devices", 8)
# [B, T] + [T] must be written with its new axis: a forgotten one is the usual way to mix up rows and positions.
jax.config.update("jax_numpy_rank_promotion", "raise")
if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # grain's readers ask absl for flags

# The containers of types.py may hold anything that a tree may hold (shardings, specs, None), so they are imported
# before the hook; every function and frozen config of the rest is checked against its annotations.
import kdjax.types  # noqa: E402, F401

# An int does where a float is asked for, as mypy sees it.
jaxtyping.install_import_hook("kdjax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# The same examples in every run, and no deadline: the first example of a shape compiles.
hypothesis.settings.register_profile("kdjax", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("kdjax")


@pytest.fixture(autouse=True, scope="module")
def programs_let_go():
    """Linux gives a process 65530 memory maps and every compiled program takes some; a compiler that gets none crashes.

    So the programs of the files before are let go long before that.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()
        gc.collect()
