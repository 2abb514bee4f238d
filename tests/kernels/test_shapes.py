"""What the bench and the tests of compiled programs start from: every op enrolled, like compared with like, counts."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import kernels
from kdjax.kernels import naive, shapes
from kdjax.kernels.shapes import Shape, Side

TINY = Shape(40, 300, Side(24, padding=5), Side(12, tied=False, soft_cap=3.0), entries=4)


def test_every_op_is_enrolled():
    folders = {path.parent.name for path in pathlib.Path(kernels.__path__[0]).glob("*/reference.py")}
    folders.remove("attention")  # over keys: its shapes are in tests/aot/test_attention.py
    assert {case.module.__name__.rpartition(".")[2] for case in shapes.CASES.values()} == folders
    assert {op.partition("+")[0] for op in shapes.CASES} == set(naive.NAIVE)
    for op, case in shapes.CASES.items():
        assert case.gradient == op.endswith("+grad")
        assert {"reference", "xla"} <= set(case.implementations)


@pytest.mark.parametrize("op", shapes.CASES)
def test_the_naive_path_computes_what_the_kernels_do(op):
    arguments = shapes.random_arguments(op, TINY)
    fast, obvious = (jax.jit(function)(arguments) for function in (shapes.CASES[op].build("xla"), naive.build(op)))
    assert jax.tree.structure(fast) == jax.tree.structure(obvious)
    for ours, theirs in zip(jax.tree.leaves(fast), jax.tree.leaves(obvious), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", shapes.CASES)
def test_abstract_arguments_are_those_of_the_random_ones(op, dtype):
    shape = dataclasses.replace(TINY, dtype=dtype)
    arrays, abstract = shapes.random_arguments(op, shape), shapes.abstract_arguments(op, shape)
    assert jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays) == abstract
    assert abstract.hidden.dtype == dtype
    assert abstract.head.weight.shape == (305, 24)
    if abstract.teacher_head is not None:
        assert abstract.teacher_head.weight.shape == (12, 300)
        assert abstract.teacher_head.soft_cap == 3.0


def test_random_arguments_are_well_formed():
    arguments = shapes.random_arguments("sparse_divergence", TINY)
    assert jnp.all(jnp.diff(arguments.ids, axis=1) > 0)  # ascending, no id twice
    assert 0 <= jnp.min(arguments.ids) < jnp.max(arguments.ids) < 300
    np.testing.assert_allclose(jnp.sum(arguments.probs, 1), 1.0, rtol=1e-5)
    logits = naive.logits(arguments.hidden, arguments.head)
    assert logits.shape == (40, 300)
    assert 0.5 < jnp.std(logits) < 2
    again = shapes.random_arguments("sparse_divergence", TINY, seed=1)
    assert not np.array_equal(arguments.hidden, again.hidden)


def test_flops_by_hand():
    # smollm2: 2 x 1024 x 49152 x 576 = 57,982,058,496 a product
    assert shapes.flops("linear_stats", shapes.SHAPES["smollm2"]) == 57_982_058_496
    assert shapes.flops("topk", shapes.SHAPES["smollm2"]) == 57_982_058_496
    assert shapes.flops("linear_pair_stats", shapes.SHAPES["smollm2"]) == 2 * 57_982_058_496
    assert shapes.flops("linear_divergence+grad", shapes.SHAPES["smollm2"]) == 4 * 57_982_058_496
    assert shapes.flops("sparse_divergence+grad", shapes.SHAPES["smollm2"]) == 3 * 57_982_058_496
    # llama3: 2 x 2048 x 128256 = 525,336,576 a column of width; 2048 of the student, 4096 of the teacher
    assert shapes.flops("linear_divergence", shapes.SHAPES["llama3"]) == 525_336_576 * (2048 + 4096)
    assert shapes.flops("linear_divergence+grad", shapes.SHAPES["llama3"]) == 525_336_576 * (3 * 2048 + 4096)
    recomputed = shapes.implementation_flops("linear_divergence+grad", "pallas_tpu", shapes.SHAPES["llama3"])
    assert recomputed == 525_336_576 * (5 * 2048 + 3 * 4096)
    assert shapes.implementation_flops("topk", "pallas_tpu", TINY) == shapes.flops("topk", TINY)


def test_least_bytes_by_hand():
    # hidden 40 x 24, head 305 x 24, teacher 40 x 12 and 12 x 300, labels and weight: read once;
    # total, values 1 x 40, d_hidden 40 x 24, d_weight 305 x 24: written once. 4 bytes each.
    read = 40 * 24 + 305 * 24 + 40 * 12 + 12 * 300 + 40 + 40
    written = 1 + 40 + 40 * 24 + 305 * 24
    assert shapes.least_bytes("linear_divergence+grad", TINY) == 4 * (read + written)


def test_an_unknown_op_is_refused():
    with pytest.raises(ValueError, match="kernel op must be .*got 'linear_stat'.*'linear_stats'"):
        shapes.random_arguments("linear_stat", TINY)
