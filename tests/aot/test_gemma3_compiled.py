"""Layers of two kinds in one scan, compiled for a TPU that is not here: one kernel of each kind."""

import re

import jax
import jax.numpy as jnp
import pytest

from kdjax import aot, models

CHIP, LENGTH, WINDOW = "v5e", 1024, 512
KERNEL = 'custom_call_target="tpu_custom_call"'


def compiled():
    """The gradient of a trunk with heads of the 1B's size, in bfloat16; two layers of either kind."""
    cfg = models.config_from_hf(
        {
            "model_type": "gemma3_text", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512,
            "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256,
            "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2,
        }
    )  # fmt: skip

    def gradient(params, *inputs):
        def scalar(params):
            hidden = models.hidden(cfg, params, *inputs, compute_dtype=jnp.bfloat16, remat="dots")
            return jnp.sum(hidden.astype(jnp.float32))

        return jax.grad(scalar)(params)

    inputs = [jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)] * 3
    return aot.compile_on(CHIP, gradient, models.abstract_params(cfg), *inputs)


def test_each_kind_of_layer_has_its_kernel_and_no_score_is_kept():
    reason = aot.unavailable(CHIP)
    if reason is not None:
        pytest.skip(reason)
    program = compiled().as_text()
    # Forward, and backward for q and for k with v; a window and none. The forward kernel is not run again.
    assert program.count(KERNEL) == 2 * 3
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"\w+\[([\d,]+)\]", program)}
    assert (2, LENGTH, 256) in shapes
    assert not {shape for shape in shapes if shape.count(LENGTH) > 1}
