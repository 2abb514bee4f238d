"""Nothing of shape [N, V]: read off the compiled programs at N = 4096, V = 50257, with the tiles that are in use."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from kdjax.config import Loss
from kdjax.kernels import linear_divergence, linear_stats
from kdjax.losses import LOSSES
from kdjax.types import Head
from tests.kernels import oracle

N, V = 4096, 50257
TERMS = [LOSSES[name](Loss()) for name in ("forward_kl", "cross_entropy")]


def divergence(hidden, teacher_hidden, head, teacher_head, labels, weight, implementation):
    """Value and gradient of a usual objective."""

    def total(hidden, head):
        inputs = (hidden, head, teacher_hidden, teacher_head, labels, weight, TERMS, [0.9, 0.1], 2.0)
        return linear_divergence.linear_divergence(*inputs, implementation=implementation)[0]

    return jax.value_and_grad(total, (0, 1))(hidden, head)


def stats(hidden, teacher_hidden, head, teacher_head, labels, weight, implementation):
    """Statistics of both sides, called inside a function that is differentiated, as the step does."""

    def total(hidden, weight):
        own = dataclasses.replace(head, weight=weight)
        one = linear_stats.linear_stats(hidden, own, labels, implementation=implementation)
        two = linear_stats.linear_pair_stats(
            hidden, own, teacher_hidden, teacher_head, labels, implementation=implementation
        )
        return jnp.sum(hidden) * jnp.sum(weight), (one, two)

    return jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, head.weight)


def compiled(op, implementation, n, v, width=8):
    def abstract(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    heads = Head(abstract((v, width)), v, vocab_major=True), Head(abstract((width, v)), v)
    rows = abstract((n, width)), abstract((n, width)), *heads, abstract((n,), jnp.int32), abstract((n,))
    return jax.jit(op, static_argnums=6).lower(*rows, implementation).compile()


@pytest.mark.parametrize(
    ("op", "implementation"),
    [
        (op, name)
        for op, table in ((divergence, linear_divergence.IMPLEMENTATIONS), (stats, linear_stats.IMPLEMENTATIONS))
        for name in sorted(set(table) - {"reference"})
    ],
)
def test_nothing_of_n_by_v(op, implementation):
    program = compiled(op, implementation, N, V)
    elements, shape = oracle.largest_shape(program.as_text())
    assert elements <= N * V // 16, shape
    assert program.memory_analysis().temp_size_in_bytes < N * V * 4 / 2  # a few tiles
    half = compiled(op, implementation, N // 2, V)
    growth = program.memory_analysis().temp_size_in_bytes - half.memory_analysis().temp_size_in_bytes
    assert growth < N // 2 * V * 4 / 100  # of rows, not of their logits


@pytest.mark.parametrize("op", [divergence, stats])
def test_the_scan_sees_it_in_the_reference(op):
    elements, _ = oracle.largest_shape(compiled(op, "reference", 96, 1000).as_text())
    assert elements >= 96 * 1000


@pytest.mark.parametrize(
    ("text", "largest"),
    [
        ("%a = f32[8,16]{1,0} dot(bf16[8,4]{1,0} %b)", (128, "f32[8,16]")),
        ("(s32[], pred[3,5,7], f32[2]{0}) while", (105, "pred[3,5,7]")),
        ("tuple(f8e4m3fn[100], f32[], u32[9])", (100, "f8e4m3fn[100]")),
        ("c64[2,3] fft(bf16[7])", (7, "bf16[7]")),
    ],
)
def test_the_scan(text, largest):
    assert oracle.largest_shape(text) == largest
