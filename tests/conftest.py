"""One environment for all tests: CPU with 8 devices, no network, warnings are errors, shapes checked by beartype."""

import os

# Before anything imports jax or transformers; child processes of tests inherit it.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import jax
import jaxtyping
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
