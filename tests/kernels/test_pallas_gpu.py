"""The Mosaic GPU kernels against the float64 oracle, in JAX's interpreter for them; their schedule; what they decline.

They read bfloat16 and widths of a multiple of 64 alone, and a run takes seconds, hence few cases of their own.
"""

import dataclasses
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

from kdjax.kernels import _gpu, _gpu_block_sizes
from kdjax.kernels._dispatch import Target
from kdjax.kernels.linear_divergence import Term, linear_divergence
from kdjax.kernels.linear_divergence import pallas_gpu as divergence_gpu
from kdjax.kernels.linear_stats import linear_pair_stats, linear_stats
from kdjax.kernels.linear_stats import pallas_gpu as stats_gpu
from kdjax.types import Head
from tests.kernels import oracle
from tests.kernels.gpu_interpreter import interpreted
from tests.kernels.problems import Shape, make_problem
from tests.kernels.test_linear_divergence import CONFIDENCE, FORWARD, MIXTURE, NUMPY, SURPRISE, compare, expected
from tests.kernels.test_linear_stats import compare as compare_stats

one = jax.jit(stats_gpu.linear_stats, static_argnames="top_k")
two = jax.jit(stats_gpu.linear_pair_stats, static_argnames="top_k")


@pytest.fixture
def gpu(monkeypatch):
    """Two blocks of columns and more, in a few parts."""
    monkeypatch.setattr(_gpu_block_sizes, "COLUMNS", 64)
    monkeypatch.setattr(_gpu_block_sizes, "PROCESSORS", 2)
    with interpreted(monkeypatch):
        yield


@pytest.fixture
def one_slice(monkeypatch, gpu):
    """Tiles in one piece, which halves the time; several are in `summed` and the statistics."""
    monkeypatch.setattr(divergence_gpu, "SLICE", 64)
    monkeypatch.setattr(_gpu, "SLICE", 64)


def logits_of(p):
    hidden, teacher_hidden = p.hidden.astype(jnp.float32), p.teacher_hidden.astype(jnp.float32)
    return p.oracle.logits(hidden), p.teacher_oracle.logits(teacher_hidden)


def check_pair(p):
    pair = two(p.hidden, p.head, p.teacher_hidden, p.teacher_head, p.labels)
    logits, teacher_logits = logits_of(p)
    compare_stats(pair.student, logits, p.labels)
    compare_stats(pair.teacher, teacher_logits, p.labels)
    np.testing.assert_allclose(pair.kl, oracle.kl(teacher_logits, logits), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pair.reverse_kl, oracle.kl(logits, teacher_logits), rtol=1e-5, atol=1e-6)


# Ragged rows and columns, more chunks of the width than a ring has stages, heads of two orders (two rings).
PAIRS = {
    "tied": Shape(70, 301, width=320, padding=3, vocab_major=True, teacher_width=64, teacher_padding=19),
    "untied_capped": Shape(150, 130, 64, 62, teacher_width=128, teacher_padding=6, logit_scale=0.5, soft_cap=3.0),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pair_stats(gpu, name):
    check_pair(make_problem(PAIRS[name], jnp.bfloat16))


def test_races(monkeypatch, gpu):
    """Copies, barriers and shared memory under a happens-before detector; both sides in one ring."""
    with interpreted(monkeypatch, detect_races=True):
        p = make_problem(Shape(70, 192, width=192, teacher_width=128, vocab_major=True), jnp.bfloat16)
        own = dataclasses.replace(p, head=Head(p.head.weight.T, 192), oracle=dataclasses.replace(p.oracle))
        pair = stats_gpu.linear_pair_stats(own.hidden, own.head, p.teacher_hidden, p.teacher_head, p.labels)
        jax.block_until_ready(pair)
        assert not get_races().races_found
    compare_stats(pair.student, logits_of(p)[0], p.labels)
    compare_stats(pair.teacher, logits_of(p)[1], p.labels)


def test_top_k_and_empty(gpu):
    p = make_problem(Shape(3, 13, width=64, padding=3, vocab_major=True), jnp.bfloat16)
    stats = one(p.hidden, p.head, p.labels, top_k=2)
    logits, _ = logits_of(p)
    np.testing.assert_array_equal(stats.top.ids, np.argsort(-logits, -1, kind="stable")[:, :2])
    nothing = linear_stats(p.hidden[:0], p.head, p.labels[:0], implementation="xla")
    got = jax.tree.leaves(one(p.hidden[:0], p.head, p.labels[:0]))
    assert [(leaf.shape, leaf.dtype) for leaf in got] == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(nothing)]


def test_hard_rows(gpu):
    """Logits of +-1e4, ties, underflow; a row of NaN and a label outside the vocabulary, which spoil no other.

    And no gradient.
    """
    rows = np.zeros((9, 64), np.float32)
    rows[0, :2] = 1e4, -1e4
    rows[1] = 1e4
    rows[2, [5, 40, 60]] = 3.0  # ties: the lowest wins
    rows[3] = -1e4
    rows[3, 63] = 1e4
    rows[4, :5] = -88, -90, 104, 9, 0
    rows[5, 7], rows[5, 9] = 104.0, -104.0
    rows[6], rows[8] = np.nan, np.arange(64) / 8
    hidden, eye = jnp.asarray(rows, jnp.bfloat16), Head(jnp.eye(64, dtype=jnp.bfloat16), 64)
    labels = jnp.array([1, 5, 40, 63, 2, 9, 0, 10**6, 63])

    def total(hidden):
        stats = linear_stats(hidden, eye, labels, implementation="pallas_gpu")
        return jnp.sum(stats.entropy), stats

    (_, stats), gradient = jax.value_and_grad(total, has_aux=True)(hidden)
    assert not gradient.any()
    good = [0, 1, 2, 3, 4, 5, 8]
    kept = jax.tree.map(lambda leaf: leaf[np.array(good)], stats)
    compare_stats(kept, np.asarray(hidden.astype(jnp.float32))[good], labels[np.array(good)])
    assert np.isnan(stats.entropy[6])
    np.testing.assert_allclose(stats.entropy[7], np.log(64), rtol=1e-6)
    assert np.isnan(stats.label_logp[7])


def test_vmap_and_a_split_head(gpu):
    """Two devices of a vocabulary axis, each with a part of the columns, for two problems at once."""
    parts = [make_problem(Shape(5, 123, width=64, padding=5), jnp.bfloat16, seed) for seed in range(2)]
    hidden, labels, weight = (
        jnp.stack(arrays) for arrays in zip(*((p.hidden, p.labels, p.head.weight) for p in parts), strict=True)
    )
    halves = jnp.stack(jnp.split(weight, 2, -1))  # [device, problem, D, V / 2]

    def on_device(hidden, weight, labels):
        return linear_stats(hidden, Head(weight, 123, vocab_axis="v"), labels, implementation="pallas_gpu")

    run = jax.vmap(jax.vmap(on_device, (None, 0, None), axis_name="v"), (0, 1, 0))
    stats = jax.jit(run)(hidden, halves, labels)  # [problem, device, N]
    for at, p in enumerate(parts):
        for device in range(2):
            compare_stats(jax.tree.map(lambda leaf, i=at, j=device: leaf[i, j], stats), logits_of(p)[0], p.labels)


# A term that asks for numbers of the row, exp(-entropy of the teacher) and 2: the first weighs, the second scales.
ROWWISE = Term(
    lambda pair: pair.row[:, 0:1] * pair.row[:, 1:2] * jnp.log1p(pair.q * pair.q),
    row_scalars=lambda pair, total: jnp.concatenate(
        [jnp.exp(total(pair.p * pair.logp)), jnp.full_like(pair.logp[:, :1], 2.0)], 1
    ),
)
NUMPY[ROWWISE] = lambda logp, logq, is_label: (
    2 * np.exp((np.exp(logp) * logp).sum(-1)) * np.log1p(np.exp(2 * logq)).sum(-1)
)


def differentiated(p, mixture, tau):
    """(total, values, d_hidden, d_weight) of the kernel."""

    def total(hidden, head):
        sides = (hidden, head, p.teacher_hidden, p.teacher_head)
        rest = (p.labels, p.weight, tuple(mixture), list(mixture.values()), tau)
        return linear_divergence(*sides, *rest, implementation="pallas_gpu")

    (value, values), (d_hidden, d_head) = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(p.hidden, p.head)
    return value, values, d_hidden, d_head.weight


DIVERGENCES = {
    # c is a constant of all terms: values and gradient from one pass. Three chunks of rows.
    "constant": (
        Shape(300, 70, width=64, padding=58, teacher_width=64, teacher_padding=2),
        {FORWARD: 0.7, SURPRISE: 1.3},
    ),
    # c is not, and one term asks for row scalars.
    "summed": (
        Shape(70, 70, 64, 2, True, 128, 58, logit_scale=0.5, soft_cap=4.0),
        {**MIXTURE, ROWWISE: 1.5},
    ),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence(gpu, monkeypatch, request, name):
    if name != "summed":
        request.getfixturevalue("one_slice")
    monkeypatch.setattr(divergence_gpu, "CHUNK_BYTES", 2 * 128 * 128)
    shape, mixture = DIVERGENCES[name]
    p = make_problem(shape, jnp.bfloat16)
    got = differentiated(p, mixture, 1.7)
    assert [array.dtype for array in got] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16]
    compare(got, expected(p, mixture, 1.7), 1e-5, 1e-2)  # gradients have 8 bits
    padding = got[3][shape.vocab :] if shape.vocab_major else got[3][:, shape.vocab :]
    assert not padding.any()


def test_divergence_without_differentiation(one_slice):
    p = make_problem(Shape(5, 70, width=64, padding=2, vocab_major=True), jnp.bfloat16)
    terms, scales = (SURPRISE, CONFIDENCE), [1.0, 0.5]
    got = linear_divergence(
        p.hidden, p.head, None, None, p.labels, p.weight, terms, scales, 1.7, implementation="pallas_gpu"
    )
    compare(got, expected(p, dict(zip(terms, scales, strict=True)), 1.7)[:2], 1e-5, 0)


def test_divergence_rows_of_weight_0(one_slice):
    """They add nothing, whatever they hold."""
    p = make_problem(Shape(30, 70, 64, 2, True, teacher_width=64, teacher_padding=58), jnp.bfloat16)
    empty = np.asarray(p.weight == 0)
    hidden, teacher = (jnp.where(empty[:, None], jnp.nan, h) for h in (p.hidden, p.teacher_hidden))
    total, values, d_hidden, d_weight = differentiated(
        dataclasses.replace(p, hidden=hidden, teacher_hidden=teacher), {FORWARD: 1.0}, 1.0
    )
    want = expected(p, {FORWARD: 1.0}, 1.0)
    compare((total, values[:, ~empty]), (want[0], want[1][:, ~empty]), 1e-5, 0)
    assert not d_hidden[empty].any()
    np.testing.assert_allclose(oracle.f64(d_weight), want[3], atol=1e-2 * np.abs(want[3]).max())


def test_divergence_of_a_split_head(one_slice, monkeypatch):
    """Values, and what each device says of the gradients, as xla.py has them; tests/sharded say whether it is so."""
    # XLA's CPU has no batched product of bfloat16, which vmap makes of them; in float32 it is the same.
    product = divergence_gpu._product
    monkeypatch.setattr(
        divergence_gpu, "_product", lambda *args: product(*(a.astype(jnp.float32) for a in args[:2]), *args[2:])
    )
    p = make_problem(Shape(5, 123, width=64, padding=5, teacher_width=64, teacher_padding=5), jnp.bfloat16)
    own = jnp.stack(jnp.split(p.head.weight, 2, 1))
    teacher = jnp.stack(jnp.split(p.teacher_head.weight, 2))

    def differentiated(implementation, *arrays):
        def mean(hidden, weight, teacher_hidden, teacher_weight):
            def on_device(hidden, weight, teacher_weight):
                heads = Head(weight, 123, vocab_axis="v"), Head(teacher_weight, 123, True, vocab_axis="v")
                rest = p.labels, p.weight, (FORWARD, CONFIDENCE), [0.7, 1.0]
                sides = hidden, heads[0], teacher_hidden, heads[1]
                return linear_divergence(*sides, *rest, implementation=implementation)

            totals, values = jax.vmap(on_device, axis_name="v")(hidden, weight, teacher_weight)
            return jnp.mean(totals), values[0]

        return jax.jit(jax.value_and_grad(mean, (0, 1), has_aux=True))(*arrays)

    arrays = jnp.stack([p.hidden, p.hidden]), own, p.teacher_hidden, teacher
    want = differentiated("xla", *(a.astype(jnp.float32) for a in arrays))
    got = differentiated("pallas_gpu", *arrays)
    compare((*got[0], *got[1]), (*want[0], *map(oracle.f64, want[1])), 1e-5, 1e-2)


@pytest.mark.parametrize("name", ["log1p", "expm1"])
def test_replaced_functions(name):
    x = np.concatenate([np.linspace(-0.999, 5, 500), np.logspace(-30, 4, 200), -np.logspace(-30, -1, 200), [0]])
    x = x.astype(np.float32)[x < (80 if name == "expm1" else np.inf)]
    got = jax.jit(_gpu.lowerable(getattr(jnp, name)))(x)
    np.testing.assert_allclose(got, getattr(np, name)(x.astype(np.float64)), rtol=2e-6)
    names = {eqn.primitive.name for eqn in jax.make_jaxpr(_gpu.lowerable(getattr(jnp, name)))(x).eqns}
    assert name not in names


def test_row_numbers():
    row = _gpu.RowNumbers([jnp.zeros(3), jnp.ones(3)])
    assert row[:, 1:2][0] == row[..., 1:][0] == 1
    for index in ((slice(None), 1), (slice(None), slice(0, 2)), (slice(1), slice(0, 1))):
        with pytest.raises(TypeError, match=r"must be read as pair.row\[:, k : k \+ 1\]"):
            row[index]


@hypothesis.given(st.integers(1, 600), st.integers(1, 2100))
def test_parts_cover_the_columns(row_blocks, column_blocks):
    """All of them busy, none of them empty, and where there is work for all processors most are."""
    parts = _gpu_block_sizes.parts(row_blocks, column_blocks)
    each = -(-column_blocks // parts)
    assert 1 <= parts <= column_blocks
    assert (parts - 1) * each < column_blocks <= parts * each
    waves = -(-row_blocks * parts // _gpu_block_sizes.PROCESSORS)
    if column_blocks >= 4 * _gpu_block_sizes.PROCESSORS:
        assert row_blocks * column_blocks >= 0.75 * waves * each * _gpu_block_sizes.PROCESSORS


@hypothesis.given(st.integers(1, 10**5), st.integers(1, 3 * 10**5), st.integers(1, 2**28), st.sampled_from([2, 4]))
def test_chunks_cover_the_rows(rows, width, at_most, stored):
    count, size = _gpu_block_sizes.chunks(rows, width, at_most, stored)
    assert size % _gpu_block_sizes.ROWS == 0
    assert (count - 1) * size < rows <= count * size
    assert stored * width * size <= max(at_most, stored * width * _gpu_block_sizes.ROWS)


@pytest.mark.parametrize("rings", [1, 2])
@pytest.mark.parametrize("stored", [0, 2, 4])
def test_shared_memory(rings, stored):
    columns, stages = _gpu_block_sizes.choose(rings, stored)
    used = rings * stages * 128 * (128 + columns) + stored * 128 * columns
    assert stages >= 2
    assert used <= 227 * 1024 - 8 * 1024


H100 = Target("gpu", "NVIDIA H100 80GB HBM3")


def side(dtype=jnp.bfloat16, width=64, columns=64, vocab_major=False):
    shape = (columns, width) if vocab_major else (width, columns)
    return jnp.zeros((2, width), dtype), Head(jnp.zeros(shape, dtype), columns, vocab_major)


@pytest.mark.parametrize(
    ("target", "arguments", "reason"),
    [
        (H100, side(), None),
        (H100, (*side(columns=8, vocab_major=True), *side()), None),
        (H100, (*side(), None, None), None),
        (Target("gpu", "NVIDIA GH200 480GB"), side(), None),
        (Target("cpu", "cpu"), side(), None),
        (Target("gpu", "NVIDIA A100-SXM4-80GB"), side(), "^it multiplies with wgmma, which only Hopper has"),
        (Target("gpu", "NVIDIA B200"), side(), "only Hopper has"),
        (Target("gpu", "AMD Instinct MI300X"), side(), "only Hopper has"),
        (Target("tpu", "TPU v5 lite"), side(), "^Mosaic GPU kernels are for NVIDIA GPUs"),
        (H100, side(jnp.float32), "^it reads bfloat16, not float32"),
        (H100, side(width=96), "^it copies hidden states in chunks of 64, and their width is 96"),
        (H100, side(columns=96), "^it copies columns of the head in tiles of 64, and there are 96: pad the weight"),
        (H100, side(columns=9, vocab_major=True), "^it copies rows of the head in tiles of 8, and there are 9: pad"),
        (H100, (*side(), *side(jnp.float32)), "^it reads bfloat16, not float32"),
    ],
)
def test_declines(target, arguments, reason):
    got = _gpu.declines(target, *arguments)
    if reason is None:
        assert got is None
    else:
        assert re.search(reason, got), got


def test_explicit_names_do_not_fall_back():
    hidden, head = side(jnp.float32)
    labels = jnp.zeros(2, jnp.int32)
    for call in (
        lambda: linear_stats(hidden, head, labels, implementation="pallas_gpu"),
        lambda: linear_pair_stats(hidden, head, hidden, head, labels, implementation="pallas_gpu"),
    ):
        with pytest.raises(ValueError, match="got 'pallas_gpu' for cpu; it reads bfloat16, not float32"):
            call()
