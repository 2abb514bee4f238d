"""sparse_divergence: every implementation x kind x shape against the float64 oracle; then what it must survive."""

import dataclasses
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.kernels.sparse_divergence import IMPLEMENTATIONS, KINDS, block_sizes, sparse_divergence, xla
from kdjax.types import Head
from tests.kernels import oracle
from tests.kernels.problems import SHAPES, Shape, make_problem
from tests.kernels.stored import (
    Stored,
    compare,
    expected,
    inputs,
    kinds_of,
    logits_problem,
    programs,
    run,
    stored_of,
    top,
    with_gradients,
)

# pallas_gpu takes none of these small float32 shapes and has its own in test_sparse_divergence_gpu.py.
HERE = sorted({*IMPLEMENTATIONS} - {"pallas_gpu"})
every_implementation = pytest.mark.parametrize("implementation", HERE)
in_tiles = pytest.mark.parametrize("implementation", sorted({*HERE} - {"reference"}))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 64 rows: 300 rows are several, the last one ragged."""
    monkeypatch.setattr(xla, "ROWS", 64)


@every_implementation
@pytest.mark.parametrize("name", SHAPES)
def test_against_the_oracle(implementation, name):
    """Entries in any order, one id twice, one entry empty; the teacher's tail as it is left by the entries."""
    p = make_problem(SHAPES[name])
    stored = stored_of(p, tau=1.7)
    got = with_gradients(implementation, p, stored, 1.7, tuple(KINDS) if name == "tied_padded_capped" else None)
    compare(got, expected(p, stored, 1.7))
    for arrays in got.values():
        assert [array.shape for array in arrays] == [(), (p.hidden.shape[0],), p.hidden.shape, p.head.weight.shape]
        assert {array.dtype for array in arrays} == {jnp.dtype("float32")}
        padding = arrays[3][SHAPES[name].vocab :] if p.head.vocab_major else arrays[3][:, SHAPES[name].vocab :]
        assert not padding.any()


@in_tiles
def test_without_differentiation(implementation):
    """Another path runs; it gives the same."""
    p = make_problem(SHAPES["tiles"])
    stored = stored_of(p, tau=1.7)
    want = with_gradients(implementation, p, stored, 1.7)
    compare(run(implementation, p, stored, 1.7), {kind: arrays[:2] for kind, arrays in want.items()}, values=1e-6)


@every_implementation
def test_bfloat16(implementation):
    """Inputs in bfloat16, statistics in float32: values as exact as ever, gradients to the 8 bits they are kept in."""
    p = make_problem(SHAPES["tiles_tied_padded_capped"], jnp.bfloat16)
    stored = stored_of(p)
    got = with_gradients(implementation, p, stored)
    for arrays in got.values():
        assert [array.dtype for array in arrays] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16]
    compare(got, expected(p, stored), 1e-2)


@in_tiles
def test_only_the_student_has_a_gradient(implementation):
    p = make_problem(SHAPES["tied"])
    stored = stored_of(p, tail=True)

    def total(weight, probs, tail, entropy, tau):
        rest = (stored.ids, probs, tail, entropy)
        got = programs(implementation, kinds_of(implementation))[0](p.hidden, p.head, weight, rest, tau)
        return sum(total + jnp.sum(values) for total, values in got.values())

    others = (p.weight, stored.probs, stored.tail, stored.teacher_entropy, jnp.float32(2.0))
    assert not any(leaf.any() for leaf in jax.tree.leaves(jax.grad(total, (0, 1, 2, 3, 4))(*others)))

    def values(hidden):
        got = run(implementation, dataclasses.replace(p, hidden=hidden), stored)
        return sum(jnp.sum(values) for _, values in got.values())

    assert not jax.grad(values)(p.hidden).any()


@in_tiles
def test_the_gradient_takes_the_cotangent(implementation):
    p = make_problem(SHAPES["tied"])
    stored = stored_of(p)
    got = with_gradients(implementation, p, stored)

    def squared(hidden, head):
        each = run(implementation, dataclasses.replace(p, hidden=hidden, head=head), stored)
        return sum(total**2 for total, _ in each.values())

    by_hidden, by_head = jax.jit(jax.grad(squared, (0, 1)))(p.hidden, p.head)
    for ours, at in ((by_hidden, 2), (by_head.weight, 3)):
        want = sum(2 * arrays[0] * arrays[at] for arrays in got.values())
        np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-5)


@in_tiles
def test_vmap(implementation):
    parts = [make_problem(Shape(70, 9, padding=2), seed=seed) for seed in range(3)]
    entries = [stored_of(p, seed=seed) for seed, p in enumerate(parts)]
    each = [inputs(p, stored)[:4] for p, stored in zip(parts, entries, strict=True)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    one = programs(implementation, kinds_of(implementation))[1]
    batched = jax.jit(jax.vmap(lambda rows: one(*rows, 1.5)))(stacked)
    for at, (p, stored) in enumerate(zip(parts, entries, strict=True)):
        compare(jax.tree.map(lambda leaf, at=at: leaf[at], batched), expected(p, stored, 1.5))


LOUD = np.array(
    [
        [1e4, -1e4, 0, 0, 0],
        [-1e4, 1e4, 1e4, -1e4, 1e4],
        [1e4, 1e4, 1e4, 1e4, 1e4],
        [0, 0, 0, 0, -1e4],
        [-88, -90, 0, 9, 104],
    ]
)


@every_implementation
@pytest.mark.parametrize(("soft_cap", "k"), [(0.0, 2), (0.0, 5), (30.0, 3)])
def test_extreme_logits(implementation, soft_cap, k):
    """Logits of +-1e4, stored numbers and masses that underflow on either side or both: finite and still right."""
    pairs = np.array(list(itertools.product(range(5), range(5))))
    p, stored = logits_problem(LOUD[pairs[:, 0]], soft_cap), top(LOUD[pairs[:, 1]], k, tail=True)
    got = with_gradients(implementation, p, stored)
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(got))
    compare(
        {kind: arrays[:3] for kind, arrays in got.items()},
        {kind: arrays[:3] for kind, arrays in expected(p, stored).items()},
    )


@every_implementation
@pytest.mark.parametrize("soft_cap", [0.0, 3.0])
def test_rows_of_weight_0_add_nothing(implementation, soft_cap):
    """Whatever they hold: 0 * nan would be enough to lose the gradient of the whole head."""
    p = make_problem(Shape(150, 9, soft_cap=soft_cap))
    stored, empty = stored_of(p, tail=True), np.asarray(p.weight == 0)
    assert 10 < empty.sum() < 50
    clean = with_gradients(implementation, p, stored)
    for junk in (np.nan, np.inf, 3e38):
        spoiled = Stored(
            jnp.where(empty[:, None], 10**9, stored.ids),
            jnp.where(empty[:, None], junk, stored.probs),
            *(jnp.where(empty, junk, array) for array in (stored.tail, stored.teacher_entropy)),
        )
        hidden = jnp.where(empty[:, None], junk, p.hidden)
        dirty = with_gradients(implementation, dataclasses.replace(p, hidden=hidden), spoiled)
        for kind in clean:
            for at in (0, 2, 3):
                np.testing.assert_array_equal(clean[kind][at], dirty[kind][at])
            np.testing.assert_array_equal(clean[kind][1][~empty], dirty[kind][1][~empty])
    assert not any(arrays[2][empty].any() for arrays in clean.values())


@every_implementation
def test_what_is_wrong_is_not_hidden(implementation):
    """NaN in a row that counts, or an id that is none, reaches its value, total and gradient, and no other row's."""
    p = make_problem(SHAPES["tied"])
    stored, at = stored_of(p), (0, 1)
    stored = dataclasses.replace(stored, probs=stored.probs.at[at].set(0.01))
    clean = run(implementation, p, stored)
    spoiled = [dataclasses.replace(stored, ids=stored.ids.at[at].set(junk)) for junk in (13, -1, 2**20)]
    spoiled.append(dataclasses.replace(stored, probs=stored.probs.at[at].set(jnp.nan)))
    for bad in spoiled:
        for kind, (total, values, d_hidden, d_weight) in with_gradients(implementation, p, bad).items():
            assert np.isnan([total, values[0]]).all()
            assert np.isnan(d_hidden[0]).all()
            assert np.isnan(d_weight).any()
            np.testing.assert_allclose(values[1:], clean[kind][1][1:], rtol=1e-6)


@in_tiles
@hypothesis.given(st.integers(0, 1000))
@hypothesis.settings(max_examples=3)
def test_entries_are_a_set(implementation, seed):
    """Their order, an id split into parts and the ids of empty entries do not matter."""
    p, draw = make_problem(Shape(4, 13)), np.random.default_rng(seed)
    ids = np.stack([draw.permutation(13)[:3] for _ in range(4)])
    probs, share = draw.dirichlet(np.ones(4), size=4)[:, :3], draw.uniform(size=(4, 3))
    parts = [np.concatenate([ids, ids, draw.integers(-5, 20, (4, 3))], 1)]
    parts.append(np.concatenate([probs * share, probs * (1 - share), probs * 0], 1))
    order = draw.permuted(np.tile(np.arange(9), (4, 1)), axis=1)
    spread = [np.take_along_axis(array, order, 1) for array in parts]
    rest = (jnp.asarray(1 - probs.sum(1), jnp.float32), jnp.ones(4))
    whole, split = (
        with_gradients(implementation, p, Stored(jnp.asarray(i, jnp.int32), jnp.asarray(w, jnp.float32), *rest))
        for i, w in ((ids, probs), spread)
    )
    compare(whole, split, 1e-5)


@in_tiles
@pytest.mark.parametrize("k", [0, 3])
def test_no_entry(implementation, k):
    """A row that has none, or a cache of none: 0."""
    none = Stored(jnp.zeros((7, k), jnp.int32), jnp.zeros((7, k)), None, jnp.ones(7))
    for array in jax.tree.leaves(with_gradients(implementation, make_problem(SHAPES["tied"]), none)):
        np.testing.assert_allclose(array, 0, atol=1e-6)


@every_implementation
def test_large_ids(implementation):
    """None is folded onto another: 17 bits are not enough for today's vocabularies."""
    ids = np.array([[131071, 131072, 140000, 262143], [151935, 0, 1, 200000]])
    head, probs = Head(jnp.zeros((1, 262144)), 262144), jnp.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    p = dataclasses.replace(make_problem(Shape(2, 5)), hidden=jnp.ones((2, 1)), head=head, weight=jnp.ones(2))
    got = with_gradients(implementation, p, Stored(jnp.asarray(ids, jnp.int32), probs, None, None))
    want = np.full(262144, 2 / 262144)
    want[ids] -= probs
    for total, values, _, d_weight in got.values():
        np.testing.assert_allclose(values, np.log(262144) + (probs * jnp.log(probs)).sum(1), rtol=1e-5)
        np.testing.assert_allclose(total, values.sum(), rtol=1e-6)
        np.testing.assert_allclose(d_weight[0], want, rtol=1e-4)


@in_tiles
@pytest.mark.parametrize("vocab_major", [False, True])
def test_blocks_of_columns(implementation, vocab_major, monkeypatch):
    """Several, the last one ragged; entries in each of them and, of some rows, all in one."""
    monkeypatch.setattr(block_sizes, "SMALL", ((48, 128),))
    p = make_problem(Shape(70, 300, padding=90, vocab_major=vocab_major, logit_scale=0.5, soft_cap=5.0))
    stored = stored_of(p, k=9)
    stored = dataclasses.replace(stored, ids=stored.ids.at[::2].set(stored.ids[::2] % 2 * 127 + stored.ids[::2] // 127))
    compare(with_gradients(implementation, p, stored), expected(p, stored))


def test_races_and_unwritten_memory(simulated, monkeypatch):
    """The TPU kernels with the chip's memories simulated: ragged blocks of rows and columns, and a cast at the end."""
    monkeypatch.setattr(block_sizes, "SMALL", ((32, 128),))
    p = make_problem(Shape(40, 150, width=5), jnp.bfloat16)
    stored = stored_of(p)
    compare(with_gradients("pallas_tpu", p, stored), expected(p, stored), 1e-2)


def test_nothing_of_n_by_v(monkeypatch):
    """Read off the compiled programs, with the tiles that are in use."""
    monkeypatch.undo()  # of small_tiles

    def compiled(implementation, n, v, k=16):
        def total(hidden, head, ids, probs, weight):
            return sparse_divergence(hidden, head, ids, probs, weight, "ghost_tail", implementation=implementation)[0]

        rows = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((n, 8), (v, 8), (n, k), (n,))]
        ids, head = jax.ShapeDtypeStruct((n, k), jnp.int32), Head(rows[1], v, vocab_major=True)
        return jax.jit(jax.value_and_grad(total, (0, 1))).lower(rows[0], head, ids, *rows[2:]).compile()

    n, v = 4096, 50257
    program, half = (compiled("xla", rows, v) for rows in (n, n // 2))
    elements, shape = oracle.largest_shape(program.as_text())
    assert elements <= 2**24, shape  # a tile
    assert program.memory_analysis().temp_size_in_bytes < n * v * 4 / 2  # a few tiles
    growth = program.memory_analysis().temp_size_in_bytes - half.memory_analysis().temp_size_in_bytes
    assert growth < n // 2 * v * 4 / 20  # even tiles are not all of one size; it is of rows, not of their logits
    assert oracle.largest_shape(compiled("reference", 96, 1000).as_text())[0] >= 96 * 1000  # the scan sees it there


def test_errors(monkeypatch):
    p = make_problem(SHAPES["tied"])
    entries = inputs(p, stored_of(p))[3][:2]
    with pytest.raises(ValueError, match="^kind must be .*'sample'.* Did you mean 'sampled'"):
        sparse_divergence(p.hidden, p.head, *entries, p.weight, "sample")
    with pytest.raises(ValueError, match="^implementation of sparse_divergence must be .*'xal'.* Did you mean 'xla'"):
        sparse_divergence(p.hidden, p.head, *entries, p.weight, "sampled", implementation="xal")

    def ran(*rows):
        raise RuntimeError("xla ran")

    monkeypatch.setitem(IMPLEMENTATIONS, "xla", ran)
    with pytest.raises(RuntimeError, match="xla ran"):  # by default
        sparse_divergence(p.hidden, p.head, *entries, p.weight, "sampled")
