"""Every loss is made of what Mosaic lowers, its slope too: the TPU kernels trace it into their tiles."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from kdjax import aot
from kdjax.config import Loss
from kdjax.kernels.linear_divergence import Pair
from kdjax.losses import LOSSES

ROWS, COLUMNS = 16, 256


def scalars_of(term):
    """How many numbers a row the term asks for."""
    tile = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)
    if term.row_scalars is None:
        return 0
    said = jax.ShapeDtypeStruct((ROWS, 1), jnp.float32) if term.given else None
    pair = Pair(tile, tile, tile, tile, jax.ShapeDtypeStruct(tile.shape, bool), said)
    return jax.eval_shape(lambda pair: term.row_scalars(pair, lambda v: jnp.sum(v, -1, keepdims=True)), pair).shape[1]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chip", ["v4", "tpu7x"])  # the oldest and the newest compiler target
def test_loss_lowers(chip, name):
    if aot.unavailable(chip):
        pytest.skip(aot.unavailable(chip))
    term = LOSSES[name](Loss())
    count = scalars_of(term)

    def kernel(teacher, student, label, row, value, slope):
        logp, logq = teacher[...], student[...]
        pair = Pair(logp, logq, jnp.exp(logp), jnp.exp(logq), label[...] == 1, row[...][:, :count])
        value[...], slope[...] = jax.jvp(
            lambda logq, q: term.value(pair._replace(logq=logq, q=q)), (logq, pair.q), (jnp.ones_like(logq), pair.q)
        )

    tile = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)
    call = pl.pallas_call(kernel, out_shape=[tile, tile])
    row = jax.ShapeDtypeStruct((ROWS, max(count, 1)), jnp.float32)
    program = aot.compile_on(chip, call, tile, tile, jax.ShapeDtypeStruct(tile.shape, jnp.int32), row)
    assert "tpu_custom_call" in program.as_text()
