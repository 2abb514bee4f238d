"""What is special about the Mosaic kernels of linear_divergence: blocks both ways, VMEM, races, split heads, chips.

Values and gradients of single blocks are in test_linear_divergence.py, the general matrix of chips in tests/aot.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import aot
from kdjax.config import Loss
from kdjax.kernels import _dispatch, _tpu
from kdjax.kernels.linear_divergence import block_sizes, linear_divergence, pallas_tpu
from kdjax.losses import LOSSES
from kdjax.types import Head
from tests.kernels import oracle
from tests.kernels.problems import Shape, make_problem
from tests.kernels.test_linear_divergence import MIXTURE, arguments, compare, expected

TERMS = {name: make(Loss()) for name, make in LOSSES.items()}
USUAL = [TERMS[name] for name in ("forward_kl", "reverse_kl", "cross_entropy")]


def with_gradients(p, mixture, tau=1.7, implementation="pallas_tpu"):
    """(total, values, d total / d hidden, d total / d head.weight), traced anew: block sizes are no argument."""

    def total(hidden, head, rest):
        inputs = (hidden, head, *rest, tuple(mixture), list(mixture.values()), tau)
        return linear_divergence(*inputs, given=rest[-1] + 0.5, implementation=implementation)

    differentiate = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (value, values), gradients = differentiate(p[0], p[1], p[2:])
    return value, values, gradients[0], gradients[1].weight


@pytest.fixture
def small_blocks(monkeypatch):
    """32 rows and 16 columns."""
    monkeypatch.setattr(block_sizes, "block_sizes", lambda *_: (32, 16))


# 3 blocks of rows (96 for 70), and 6 of columns: whole, cut by the padding, nothing but padding, cut by the end.
MANY = {
    "tied": Shape(70, 75, padding=16, vocab_major=True, teacher_padding=2),
    "untied_capped": Shape(70, 75, padding=3, logit_scale=0.5, soft_cap=3.0, teacher_padding=21),
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", MANY)
def test_many_blocks(name):
    p = make_problem(MANY[name])
    compare(with_gradients(arguments(p), MIXTURE), expected(p, MIXTURE, 1.7), 1e-5, 1e-4)


@pytest.mark.usefixtures("small_blocks", "simulated")
def test_no_races_and_no_memory_that_nobody_wrote():
    p = make_problem(Shape(40, 23, padding=20, vocab_major=True, teacher_padding=3))
    compare(with_gradients(arguments(p), MIXTURE), expected(p, MIXTURE, 1.7), 1e-5, 1e-4)


@pytest.mark.parametrize("rows", [384, 512])
def test_blocks_of_rows_in_parts(rows, monkeypatch):
    """Three of 128 and two of 256; the second block of rows is mostly padding."""
    monkeypatch.setattr(block_sizes, "block_sizes", lambda *_: (rows, 32))
    p = make_problem(Shape(2 * rows - 50, 20, padding=13))
    compare(with_gradients(arguments(p), MIXTURE), expected(p, MIXTURE, 1.7), 1e-5, 1e-4)


@pytest.mark.usefixtures("small_blocks")
def test_what_is_no_column_may_hold_anything():
    """Padding of NaN: 0 * NaN must not come back through the product with the head."""
    p = make_problem(Shape(20, 37, padding=6, vocab_major=True))
    spoiled = dataclasses.replace(p.head, weight=p.head.weight.at[37:].set(jnp.nan))
    got = with_gradients(arguments(dataclasses.replace(p, head=spoiled)), MIXTURE)
    compare(got, expected(p, MIXTURE, 1.7), 1e-5, 1e-4)


@pytest.mark.usefixtures("small_blocks")
def test_a_small_gradient_in_bfloat16():
    """Student and teacher nearly agree, on one entry above all: sum slope W - c sum q W would be rounding errors.

    The slope of reverse KL is q (log q - log p + 1), the gradient q (log q - log p - KL) a hundredth of it.
    """
    p = make_problem(Shape(40, 60, width=16, teacher_width=16), jnp.bfloat16, seed=5)
    draw = np.random.default_rng(5)
    weight = np.array(p.head.weight.astype(jnp.float32)).round(1)
    hidden = np.asarray(p.hidden.astype(jnp.float32)) + 0.4 * weight[:, 33]
    teacher = hidden + 0.01 * draw.normal(size=hidden.shape)
    hidden, teacher, weight = (jnp.asarray(array, jnp.bfloat16) for array in (hidden, teacher, weight))
    exact = dataclasses.replace(p.oracle, weight=np.asarray(weight.astype(jnp.float32)))
    heads = {"head": Head(weight, 60), "teacher_head": Head(weight, 60), "oracle": exact, "teacher_oracle": exact}
    p = dataclasses.replace(p, hidden=hidden, teacher_hidden=teacher, weight=jnp.ones(40), **heads)
    _, values, d_hidden, _ = with_gradients(arguments(p), {TERMS["reverse_kl"]: 1.0}, tau=1.0)
    logits = exact.logits(teacher.astype(jnp.float32))
    want = exact.gradients(hidden.astype(jnp.float32), lambda own: oracle.kl(own, logits), np.ones(40))[0]
    assert 1e-5 < values.mean() < 0.01
    error = np.linalg.norm(oracle.f64(d_hidden) - want, axis=1) / np.linalg.norm(want, axis=1)
    assert error.max() < 0.02


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("vocab", "soft_cap", "looking_at_rows"), [(85, 0.0, ["akl", "dkd", "adakd_reverse_kl"]), (60, 4.0, [])]
)
def test_a_split_head(vocab, soft_cap, looking_at_rows, monkeypatch):
    """4 devices with 25 columns each; at 85 the last has padding, at 60 it has nothing else."""
    monkeypatch.setattr("kdjax.kernels.linear_divergence.row_scalars.ROWS", 24)
    p = make_problem(Shape(40, vocab, padding=100 - vocab, vocab_major=True, soft_cap=soft_cap, logit_scale=1.5))
    p = dataclasses.replace(p, teacher_head=Head(jnp.ones((9, 100)).at[:, :vocab].set(p.teacher_head.weight), vocab))
    mixture = MIXTURE | {TERMS[name]: 0.5 for name in looking_at_rows}
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))

    def total(hidden, head, teacher_hidden, teacher_head, labels, weight):
        heads = (dataclasses.replace(own, vocab_axis="model") for own in (head, teacher_head))
        inputs = hidden, next(heads), teacher_hidden, next(heads), labels, weight
        rest = tuple(mixture), list(mixture.values()), 1.7
        return linear_divergence(*inputs, *rest, given=weight + 0.5, implementation="pallas_tpu")

    specs = (P(), P("model"), P(), P(None, "model"), P(), P())
    split = jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    inputs = arguments(p)
    differentiate = jax.jit(jax.value_and_grad(lambda *sides: split(*sides, *inputs[2:]), (0, 1), has_aux=True))
    (value, values), (d_hidden, d_head) = differentiate(*inputs[:2])
    want = with_gradients(inputs, mixture, implementation="reference")
    for ours, theirs in zip((value, values, d_hidden, d_head.weight), want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5 * np.abs(theirs).max())


# Block sizes


def test_the_arithmetic_of_the_docstring():
    sizes = block_sizes.Sizes(2048, 4096, 2, 2)
    assert block_sizes.vmem("gradient", sizes, 512, 256, 1) == (18 + 12 + 1 + 2.25 + 2) * 2**20


@pytest.mark.parametrize("kind", _tpu.VMEM)
@pytest.mark.parametrize("which", block_sizes.PASSES)
@pytest.mark.parametrize("sizes", [(576, 0, 2, 0), (576, 2048, 2, 2), (4096, 5120, 2, 2), (2048, 4096, 4, 4)])
def test_blocks_that_fit(kind, which, sizes):
    sizes = block_sizes.Sizes(*sizes)
    rows, columns = block_sizes.block_sizes(kind, which, sizes, 2)
    assert block_sizes.vmem(which, sizes, rows, columns, 2) < _tpu.VMEM[kind]
    assert rows % 16 == 0
    assert columns % 128 == 0


def test_declines():
    p = make_problem(Shape(2, 3, width=4096, teacher_width=5120))
    v4, v5e = (_dispatch.Target("tpu", kind) for kind in ("TPU v4", "TPU v5 lite"))
    assert pallas_tpu.declines(v5e, *arguments(p)[:4]) is None
    assert re.search("widths 4096 and 5120 do not fit into 16 MiB", pallas_tpu.declines(v4, *arguments(p)[:4]))
    half = make_problem(Shape(2, 3, width=4096, teacher_width=5120), jnp.bfloat16)
    assert pallas_tpu.declines(v4, *arguments(half)[:4]) is None
    assert pallas_tpu.declines(v4, p.hidden[:, :1024], Head(p.head.weight[:1024], 3), None, None) is None
    narrow, gpu = make_problem(Shape(2, 3), jnp.float16), _dispatch.Target("gpu", "NVIDIA H100")
    assert pallas_tpu.declines(v5e, *arguments(narrow)[:4]) == "it reads bfloat16 and float32, not float16."
    assert pallas_tpu.declines(gpu, *arguments(half)[:4]) == "Mosaic kernels are for TPUs."


# Chips that are not here: compiled, not run


@pytest.fixture
def quick(compiled, monkeypatch):
    """Blocks that no chip would choose, where only the program around them matters: less code, a third of the time."""
    monkeypatch.setattr(block_sizes, "block_sizes", lambda *_: (64, 128))


def abstract(n, v, d, e, vocab_major, dtype):
    """Arguments as shapes; the teacher's head is the other way round."""

    def of(shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    def head(width, vocab_major):
        return Head(of((v, width) if vocab_major else (width, v)), v, vocab_major)

    sides = (of((n, d)), head(d, vocab_major), of((n, e)), head(e, not vocab_major))
    return *sides, of((n,), jnp.int32), of((n,), jnp.float32)


def differentiated(terms):
    def function(hidden, head, *rest):
        def total(hidden, head):
            inputs = (hidden, head, *rest, tuple(terms), [1.0] * len(terms), 2.0)
            return linear_divergence(*inputs, given=rest[-1], implementation="pallas_tpu")[0]

        return jax.value_and_grad(total, (0, 1))(hidden, head)

    return function


def compile_on(chip, terms, *shape):
    if aot.unavailable(chip):
        pytest.skip(aot.unavailable(chip))
    return aot.compile_on(chip, differentiated(terms), *abstract(*shape))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_compiles(name):
    assert "tpu_custom_call" in compile_on("v4", [TERMS[name]], 1024, 49152, 576, 1024, True, jnp.bfloat16).as_text()


@pytest.mark.usefixtures("compiled")
def test_a_mixture_fits():
    """More terms than the blocks are sized for, wide, on the chip with the least VMEM."""
    terms = [TERMS[name] for name in ("forward_kl", "reverse_kl", "jsd", "tvd", "todi", "cross_entropy")]
    compile_on("v4", terms, 1024, 50257, 4096, 5120, True, jnp.bfloat16)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("chip", "v", "d", "tied", "dtype"),
    [
        ("v4", 151936, 2048, True, jnp.bfloat16),
        ("v5e", 49152, 576, True, jnp.float32),
        ("v5p", 151936, 576, False, jnp.bfloat16),
        ("v6e", 49152, 2048, True, jnp.bfloat16),
        ("tpu7x", 151936, 576, True, jnp.float32),
    ],
)
def test_no_copy_of_the_head(chip, v, d, tied, dtype):
    """Nothing but rows: hidden states, their gradient, and numbers per row in 128 lanes."""
    n, e = 2048, 1024
    program = compile_on(chip, [TERMS["forward_kl"]], n, v, d, e, tied, dtype)
    rows = n * (2 * (d + e) * jnp.dtype(dtype).itemsize + 6 * 128 * 4)
    assert program.memory_analysis().temp_size_in_bytes < rows < v * d * jnp.dtype(dtype).itemsize / 2


@pytest.mark.usefixtures("quick")
def test_memory_does_not_grow_with_the_logits():
    """N = 512, 4096, 32768 at V = 151936: bytes per row, not per row and column."""
    temporary = {
        n: compile_on("tpu7x", [TERMS["forward_kl"]], n, 151936, 576, 1024, True, jnp.bfloat16)
        .memory_analysis()
        .temp_size_in_bytes
        for n in (512, 4096, 32768)
    }
    assert temporary[32768] < 32768 * (2 * (576 + 1024) * 2 + 6 * 128 * 4)
    assert temporary[4096] < 4096 * (2 * (576 + 1024) * 2 + 6 * 128 * 4)
    assert temporary[512] < temporary[4096]


@pytest.mark.usefixtures("quick")
def test_a_split_head_shares_numbers_of_rows_only():
    """4 devices of one v4 host: no all-gather, and no sum over anything of size V."""
    if aot.unavailable("v4"):
        pytest.skip(aot.unavailable("v4"))
    n, v, d, e = 1024, 50304, 576, 1024
    mesh = aot.mesh("v4", (4,), ("model",))
    inputs = abstract(n, v, d, e, True, jnp.bfloat16)
    own = [dataclasses.replace(a, vocab_axis="model", vocab_size=50257) if isinstance(a, Head) else a for a in inputs]
    specs = (P(), P("model"), P(), P(None, "model"), P(), P())
    total = jax.shard_map(
        lambda *a: linear_divergence(*a, tuple(USUAL), [1.0] * 3, 2.0, implementation="pallas_tpu")[0],
        mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False,
    )  # fmt: skip
    placed = [
        jax.tree.map(lambda a, s=s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, s)), a)
        for a, s in zip(own, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        program = jax.jit(lambda *a: jax.value_and_grad(total, (0, 1))(*a)).lower(*placed).compile()
    lines = [
        line for line in program.as_text().splitlines() if re.search(r"\b(all-|reduce-scatter|collective-)\S*\(", line)
    ]
    assert lines
    for line in lines:
        assert "all-reduce" in line, line
        assert oracle.largest_shape(line)[0] <= n * d, line


@pytest.mark.usefixtures("quick")
def test_vmap_compiles():
    if aot.unavailable("v5e"):
        pytest.skip(aot.unavailable("v5e"))
    inputs = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((2, *a.shape), a.dtype), abstract(256, 1000, 256, 128, True, jnp.bfloat16)
    )
    program = aot.compile_on("v5e", jax.vmap(differentiated(USUAL)), *inputs)
    assert "tpu_custom_call" in program.as_text()
