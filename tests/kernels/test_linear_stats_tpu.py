"""What is special to the Mosaic kernel of linear_stats: many blocks, simulated memory, the compiled programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kdjax import aot
from kdjax.kernels import _tpu
from kdjax.kernels._dispatch import Target
from kdjax.kernels.linear_stats import block_sizes, linear_pair_stats, linear_stats, pallas_tpu
from kdjax.kernels.topk import topk
from kdjax.types import Head
from tests.kernels import oracle
from tests.kernels.problems import Shape, make_problem
from tests.kernels.test_linear_stats import compare

one = functools.partial(linear_stats, implementation="pallas_tpu")
two = functools.partial(linear_pair_stats, implementation="pallas_tpu")


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 32 rows and 128 columns."""
    monkeypatch.setattr(block_sizes, "choose", lambda *_: (32, 128))


def check_pair(p):
    pair = jax.jit(two)(p.hidden, p.head, p.teacher_hidden, p.teacher_head, p.labels)
    logits, teacher_logits = p.oracle.logits(p.hidden), p.teacher_oracle.logits(p.teacher_hidden)
    compare(pair.student, logits, p.labels)
    compare(pair.teacher, teacher_logits, p.labels)
    np.testing.assert_allclose(pair.kl, oracle.kl(teacher_logits, logits), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pair.reverse_kl, oracle.kl(logits, teacher_logits), rtol=1e-5, atol=1e-6)


RAGGED = {
    "tied": Shape(70, 300, width=6, padding=5, vocab_major=True, logit_scale=0.5),
    "untied_capped": Shape(45, 260, width=9, soft_cap=3.0, teacher_padding=200),
}


@pytest.mark.parametrize("name", RAGGED)
def test_many_blocks(small_blocks, name):
    check_pair(make_problem(RAGGED[name]))


@pytest.mark.parametrize("name", RAGGED)
def test_simulated(simulated, small_blocks, name):
    """Ragged rows and columns: what lies behind the end is NaN, and every copy is watched."""
    check_pair(make_problem(RAGGED[name]))


@pytest.mark.parametrize("order", ["rising", "falling", "far apart"])
def test_the_maximum_moves_from_block_to_block(small_blocks, order):
    """What was summed before is taken along, of both sides, even over 2e4 nats; the KL of equal sides stays 0."""
    ramp = np.linspace(-30, 30, 400)
    q = {"rising": ramp, "falling": ramp[::-1], "far apart": np.where(np.arange(400) == 399, 1e4, -1e4 + ramp)}[order]
    p = ramp[::-1] if order == "rising" else np.zeros(400)
    eye = Head(jnp.eye(400), 400)
    logits, others = jnp.asarray(np.stack([q, p]), jnp.float32), jnp.asarray(np.stack([p, p]), jnp.float32)
    labels = jnp.array([399, 130])
    pair = jax.jit(two)(logits, eye, others, eye, labels)
    compare(pair.student, logits, labels)
    compare(pair.teacher, others, labels)
    np.testing.assert_allclose(pair.kl, oracle.kl(others, logits), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(pair.reverse_kl, oracle.kl(logits, others), rtol=1e-5, atol=2e-6)


def test_the_lowest_of_equal_columns_over_lanes_and_blocks(small_blocks):
    """399 and 129 are in different lanes and blocks, 3 and 131 and 259 in one lane."""
    found = []
    for tied in ([129, 399], [3, 131, 259], [131, 132], [255, 256], [0, 399]):
        found.append(np.zeros(400))
        found[-1][tied] = 1.0
    stats = jax.jit(one)(jnp.asarray(np.stack(found), jnp.float32), Head(jnp.eye(400), 400), jnp.zeros(5, jnp.int32))
    assert stats.argmax.tolist() == [129, 3, 131, 255, 0]


def test_nearly_equal_sides():
    """KL 1e-4 to 1e-2 at entropies of 5: more exact than the roundings of two log-normalisers, 5e-7 each."""
    draw = np.random.default_rng(0)
    weight, hidden = draw.normal(size=(5000, 16)), 0.6 * draw.normal(size=(32, 16))
    other = hidden + np.linspace(0.005, 0.05, 32)[:, None] * draw.normal(size=hidden.shape)
    arrays = [jnp.asarray(a, jnp.float32) for a in (hidden, other, weight)]
    head = Head(arrays[2], 5000, True)
    pair = jax.jit(two)(arrays[0], head, arrays[1], head, jnp.zeros(32, jnp.int32))
    q, p = (oracle.f64(a) @ oracle.f64(arrays[2]).T for a in arrays[:2])
    np.testing.assert_allclose(pair.kl, oracle.kl(p, q), rtol=1e-5, atol=5e-8)
    np.testing.assert_allclose(pair.reverse_kl, oracle.kl(q, p), rtol=1e-5, atol=5e-8)


def test_split_vocabulary(small_blocks):
    """Four devices with 128 columns each: of 380 the third has 124 and the last none."""
    vocab_size = 380
    p = make_problem(Shape(40, vocab_size, padding=512 - vocab_size, teacher_padding=512 - vocab_size))
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])

    def body(hidden, weight, teacher_hidden, teacher_weight, labels):
        heads = Head(weight, vocab_size, vocab_axis="model"), Head(teacher_weight, vocab_size, True, vocab_axis="model")
        return two(hidden, heads[0], teacher_hidden, heads[1], labels)

    specs = (P(), P(None, "model"), P(), P("model", None), P())
    arrays = (p.hidden, p.head.weight, p.teacher_hidden, p.teacher_head.weight, p.labels)
    with jax.set_mesh(mesh):
        arrays = [jax.reshard(array, spec) for array, spec in zip(arrays, specs, strict=True)]
        split = jax.jit(jax.shard_map(body, in_specs=specs, out_specs=P(), check_vma=False))(*arrays)
    whole = jax.jit(two)(p.hidden, p.head, p.teacher_hidden, p.teacher_head, p.labels)
    assert jax.tree.structure(split) == jax.tree.structure(whole)
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)
    compare(split.student, p.oracle.logits(p.hidden), p.labels)


def test_top_k_is_that_of_topk():
    p = make_problem(RAGGED["tied"])
    got = jax.jit(functools.partial(two, top_k=3))(p.hidden, p.head, p.teacher_hidden, p.teacher_head, p.labels)
    for stats, hidden, head in ((got.student, p.hidden, p.head), (got.teacher, p.teacher_hidden, p.teacher_head)):
        np.testing.assert_array_equal(stats.top.ids, topk(hidden, head, 3).ids)


# Blocks and programs


@pytest.mark.parametrize(
    ("shape", "turned"),
    [((49152, 576), True), ((576, 49152), False), ((49152, 2048), False), ((2048, 50257), True), ((576, 50257), False)],
)
def test_the_order_of_a_head_is_the_one_with_less_padding(shape, turned):
    vocab_major = shape[0] > shape[1]

    def order(weight):
        weight, now_major = _tpu.in_memory_order(Head(weight, max(shape), vocab_major))
        assert now_major == (vocab_major != turned)
        return weight

    assert jax.eval_shape(order, jax.ShapeDtypeStruct(shape, jnp.float32)).shape == (shape[::-1] if turned else shape)


@pytest.mark.parametrize("kind", [*_tpu.VMEM, "cpu"])
def test_blocks_are_tiles_and_fit(kind):
    for itemsize in (2, 4):
        for widths in ((576,), (2048,), (4096,), (576, 960), (2048, 3584)):
            rows, columns = block_sizes.choose(kind, 4096, 50257, widths, itemsize)
            assert (rows % pallas_tpu.CHUNK, columns % 128) == (0, 0)
            assert block_sizes.needed(rows, columns, widths, itemsize) <= _tpu.vmem_bytes(kind)
    assert block_sizes.choose(kind, 5, 100, (8,), 4) == (32, 128)


def sides(rows, vocab, widths, dtype, tied):
    shape = jax.ShapeDtypeStruct
    for width in widths:
        yield shape((rows, width), dtype), shape((vocab, width) if tied else (width, vocab), dtype)


# (chip, V, widths, dtype, tied): each vocabulary, each width, both orders and both kinds at least once.
PROGRAMS = [
    ("v4", 49152, (576,), jnp.float32, True),
    ("v4", 50257, (2048, 3584), jnp.bfloat16, False),
    ("v5e", 151936, (960,), jnp.float32, True),
    ("v5e", 49152, (576, 960), jnp.bfloat16, True),
    ("v5p", 262144, (2048,), jnp.bfloat16, True),
    ("v5p", 50257, (576,), jnp.bfloat16, True),
    ("v6e", 151936, (3584,), jnp.bfloat16, False),
    ("tpu7x", 262144, (960, 2048), jnp.bfloat16, True),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: f"{p[0]}-{p[1]}-{p[2]}-{p[3].__name__}-{p[4]}")
def test_compiled_without_a_copy_of_the_head(compiled, program):
    chip, vocab, widths, dtype, tied = program
    if aot.unavailable(chip):
        pytest.skip(aot.unavailable(chip))

    def run(labels, *arrays):
        heads = [Head(weight, vocab, tied) for _, weight in arrays]
        hidden = [hidden for hidden, _ in arrays]
        if len(arrays) == 1:
            return one(hidden[0], heads[0], labels)
        return two(hidden[0], heads[0], hidden[1], heads[1], labels)

    arrays = list(sides(1000, vocab, widths, dtype, tied))
    memory = aot.compile_on(chip, run, jax.ShapeDtypeStruct((1000,), jnp.int32), *arrays).memory_analysis()
    head_bytes = min(weight.size for _, weight in arrays) * jnp.dtype(dtype).itemsize
    assert memory.temp_size_in_bytes < head_bytes / 6  # two of hidden, packed results; v5p also 1 MiB of its own
    assert memory.temp_size_in_bytes < 10 * 2**20


def test_compiled_with_a_split_vocabulary_and_vmap(compiled):
    """Nothing of the size of the vocabulary is gathered; a batch is one more dimension of the grid."""
    if aot.unavailable("v5p"):
        pytest.skip(aot.unavailable("v5p"))
    mesh = aot.mesh("v5p", (2,), ("model",))

    def body(hidden, weight, labels):
        return jax.vmap(lambda h, y: one(h, Head(weight, 50257, True, vocab_axis="model"), y))(hidden, labels)

    def arg(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, P(*spec)))

    split = jax.shard_map(body, mesh=mesh, in_specs=(P(), P("model"), P()), out_specs=P(), check_vma=False)
    args = arg((3, 200, 576), jnp.bfloat16), arg((50304, 576), jnp.bfloat16, "model"), arg((3, 200), jnp.int32)
    with jax.set_mesh(mesh):
        program = jax.jit(split).lower(*args).compile()
    text = program.as_text()
    assert "linear_stats" in text
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert program.memory_analysis().temp_size_in_bytes < 8 * 2**20


def test_declines():
    rows, head = jnp.zeros((4, 8)), Head(jnp.zeros((8, 300)), 300)
    v4, half = Target("tpu", "TPU v4"), jnp.zeros((4, 8), jnp.float16)
    assert pallas_tpu.declines(v4, rows, head) is None
    assert pallas_tpu.declines(Target("cpu", "cpu"), rows, head, rows, head) is None
    assert pallas_tpu.declines(Target("gpu", "NVIDIA H100 80GB HBM3"), rows, head) == "Mosaic kernels are for TPUs."
    assert "float16" in pallas_tpu.declines(v4, half, head)
    wide = jnp.zeros((4, 8192)), Head(jnp.zeros((8192, 300)), 300)
    assert pallas_tpu.declines(v4, *wide) == "blocks of width 8192 do not fit into 16 MiB of VMEM."
    assert pallas_tpu.declines(Target("tpu", "TPU v6 lite"), *wide) is None
    with pytest.raises(ValueError, match="^implementation of linear_stats must be one that runs here.*float16"):
        one(half, head, jnp.zeros(4, jnp.int32))
