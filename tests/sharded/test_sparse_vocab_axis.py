"""sparse_divergence with a head whose columns are split over devices: each entry is on one of them."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.kernels.sparse_divergence import IMPLEMENTATIONS
from tests.kernels.problems import Shape, make_problem
from tests.kernels.stored import compare, inputs, kinds_of, programs, stored_of, with_gradients


# pallas_gpu takes no float32 and is not interpreted here.
@pytest.mark.parametrize("implementation", sorted({*IMPLEMENTATIONS} - {"pallas_gpu"}))
def test_split_over_devices(implementation):
    """Four devices with a part of the columns each, two of them with padding only, do what one does; no logits move."""
    p = make_problem(Shape(130, 13, padding=19))
    stored = stored_of(p, tail=True)
    mesh = jax.make_mesh((4,), ("vocab",), devices=jax.devices()[:4])
    specs = (P(), dataclasses.replace(p.head, weight=P(None, "vocab"), vocab_axis="vocab"), P(), P(), P())
    kinds = kinds_of(implementation)
    part = jax.shard_map(programs(implementation, kinds)[0], mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)

    def total(kind, hidden, weight):
        head = dataclasses.replace(p.head, weight=weight, vocab_axis="vocab")
        return part(hidden, head, *inputs(p, stored, jnp.float32(1.4))[2:])[kind]

    def every(hidden, weight):
        return {kind: jax.value_and_grad(total, (1, 2), has_aux=True)(kind, hidden, weight) for kind in kinds}

    weight = jax.device_put(p.head.weight, NamedSharding(mesh, P(None, "vocab")))
    with pltpu.force_tpu_interpret_mode(True):
        program = jax.jit(every).lower(p.hidden, weight).compile()
        want = with_gradients(implementation, p, stored, 1.4)
    got = {kind: (*values, *gradients) for kind, (values, gradients) in program(p.hidden, weight).items()}
    compare(got, want, 1e-5)
    assert ("all-gather" in program.as_text()) == (implementation == "reference")
