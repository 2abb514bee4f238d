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


# Mosaic kernels have their memory read off programs for their own chips, in tests/aot.
@pytest.mark.parametrize("op", [divergence, stats])
def test_nothing_of_n_by_v(op):
    program = compiled(op, "xla", N, V)
    elements, shape = oracle.largest_shape(program.as_text())
    assert elements <= N * V // 10, shape  # a tile of logits
    assert program.memory_analysis().temp_size_in_bytes < N * V * 4 / 4  # two of them


LARGE = 151936  # Qwen's vocabulary
# Temporary bytes beside arrays of N rows, of which there may be TILED [N, D] in other orders: two tiles of 128 MiB of
# logits, or none, and chunks of 1024 columns.
LIMITS = {divergence: 272 * 2**20, stats: 32 * 2**20}
TILED = 6


@pytest.mark.parametrize("op", LIMITS)
@pytest.mark.parametrize(("n", "width"), [(512, 64), (4096, 64), (32768, 64), (512, 896)])
def test_memory_does_not_grow_with_n(op, n, width):
    """One bound for 512 rows and for 32768; the logits of 512 rows alone would be 297 MiB a side."""
    program = compiled(op, "xla", n, LARGE, width)
    temp = program.memory_analysis().temp_size_in_bytes
    assert temp < LIMITS[op] + TILED * 4 * n * width, f"{temp / 2**20:.0f} MiB"
    if width < n:  # else the head itself is as large
        elements, shape = oracle.largest_shape(program.as_text())
        assert elements < n * LARGE, shape


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
