"""sparse_divergence's Mosaic GPU kernels against the float64 oracle, in JAX's interpreter for them.

They read bfloat16 and widths of a multiple of 64 alone, and a run takes seconds, hence few cases of their own.
"""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

from kdjax.kernels import _gpu_block_sizes
from kdjax.kernels.sparse_divergence import KINDS, pallas_gpu, sparse_divergence
from kdjax.types import Head
from tests.kernels import oracle
from tests.kernels.gpu_interpreter import interpreted
from tests.kernels.problems import Shape, make_problem
from tests.kernels.stored import Stored, compare, expected, inputs, programs, run, stored_of, top, with_gradients

GPU = "pallas_gpu"
BITS = 1e-2  # gradients have 8


@pytest.fixture
def gpu(monkeypatch):
    """Two blocks of columns and more, in a few parts."""
    monkeypatch.setattr(_gpu_block_sizes, "COLUMNS", 64)
    monkeypatch.setattr(_gpu_block_sizes, "PROCESSORS", 2)
    with interpreted(monkeypatch):
        yield


@pytest.fixture
def exact(monkeypatch):
    """Products of the gradient in float32: under vmap they are batched, and XLA's CPU has none of bfloat16."""
    product = pallas_gpu.tile_gradients

    def run(gradient, logits, hidden, head):
        wide = dataclasses.replace(head, weight=head.weight.astype(jnp.float32))
        return product(gradient, logits, hidden.astype(jnp.float32), wide)

    monkeypatch.setattr(pallas_gpu, "tile_gradients", run)


# Rows: more than a block, and three chunks. Columns: several tiles, the last one ragged. More chunks of the width than
# a ring has stages. Half of the rows have all entries in two tiles, others theirs in any.
CASES = {
    "tied_capped": (Shape(300, 203, 64, 5, True, logit_scale=0.5, soft_cap=4.0), 2 * 128 * 512, ["ghost_tail"]),
    "untied": (Shape(70, 130, 320, 62), 2**28, ["ghost_tail"]),
    "kinds": (Shape(5, 70, 64, 2, True), 2**28, list(KINDS)),
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(gpu, monkeypatch, name):
    shape, chunk, kinds = CASES[name]
    monkeypatch.setattr(pallas_gpu, "CHUNK_BYTES", chunk)
    p = make_problem(shape, jnp.bfloat16)
    stored = stored_of(p, k=9, tau=1.7, tail=name == "untied")
    stored = dataclasses.replace(stored, ids=stored.ids.at[::2].set(stored.ids[::2] % 2 * 63 + stored.ids[::2] // 63))
    got = with_gradients(GPU, p, stored, 1.7, tuple(kinds))
    compare(got, expected(p, stored, 1.7), BITS)
    for arrays in got.values():
        assert [array.dtype for array in arrays] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16]
        padding = arrays[3][shape.vocab :] if shape.vocab_major else arrays[3][:, shape.vocab :]
        assert not padding.any()


def test_without_differentiation(gpu, monkeypatch):
    """Two chunks of rows."""
    monkeypatch.setattr(pallas_gpu, "CHUNK_BYTES", 1)
    p = make_problem(Shape(130, 70, width=64, padding=2, vocab_major=True), jnp.bfloat16)
    stored = stored_of(p, tau=0.7)
    got = run(GPU, p, stored, 0.7, ("ghost_tail",))
    compare(got, {kind: arrays[:2] for kind, arrays in expected(p, stored, 0.7).items()})


def test_the_gradient_takes_the_cotangent_and_nobody_else_has_one(gpu):
    p = make_problem(Shape(5, 70, width=64, padding=2, vocab_major=True), jnp.bfloat16)
    stored = stored_of(p, tail=True)

    def squared(hidden, head, weight, rest, tau):
        total, values = programs(GPU, ("ghost_tail",))[0](hidden, head, weight, rest, tau)["ghost_tail"]
        return total**2 + jnp.sum(values)

    arrays = inputs(p, stored, jnp.float32(1.0))
    grads = jax.jit(jax.grad(squared, (0, 1, 2, 3, 4), allow_int=True))(*arrays)
    total, _, *want = expected(p, stored)["ghost_tail"]
    for ours, one in zip((grads[0], grads[1].weight), want, strict=True):
        scale = 2 * total * one
        np.testing.assert_allclose(oracle.f64(ours), scale, rtol=BITS, atol=BITS * np.abs(scale).max())
    others = [leaf for leaf in jax.tree.leaves(grads[2:]) if leaf.dtype != jax.dtypes.float0]
    assert len(others) == 5  # weight, probs, tail, teacher_entropy, tau
    assert not any(leaf.any() for leaf in others)


def test_vmap_and_a_split_head(gpu, exact):
    """Two devices of a vocabulary axis, two problems at once: values, and what each device says of the gradients.

    As xla.py has them; tests/sharded say whether that is right.
    """
    parts = [make_problem(Shape(7, 123, width=64, padding=5), jnp.bfloat16, seed) for seed in range(2)]
    entries = [stored_of(p, k=9, tail=True, seed=seed) for seed, p in enumerate(parts)]
    rows = [
        (jnp.stack([p.hidden] * 2), jnp.stack(jnp.split(p.head.weight, 2, 1)), p.weight, stored.ids, stored.probs)
        for p, stored in zip(parts, entries, strict=True)
    ]
    tails = jnp.stack([stored.tail for stored in entries])
    hidden, weight, *rest = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)

    def differentiated(implementation, hidden, weight, *rest):
        def mean(hidden, weight, row_weight, ids, probs, tail):
            def on_device(hidden, weight):
                head = Head(weight, 123, vocab_axis="v")
                stored = (ids, probs, row_weight, "ghost_tail", 1.4)
                return sparse_divergence(hidden, head, *stored, tail=tail, implementation=implementation)

            totals, values = jax.vmap(on_device, axis_name="v")(hidden, weight)
            return jnp.mean(totals), values[0]

        run = jax.jit(jax.vmap(jax.value_and_grad(mean, (0, 1), has_aux=True)))
        (total, values), gradients = run(hidden, weight, *rest, tails)
        return {"ghost_tail": (total, values, *gradients)}

    want = differentiated("xla", hidden.astype(jnp.float32), weight.astype(jnp.float32), *rest)
    compare(differentiated(GPU, hidden, weight, *rest), jax.tree.map(oracle.f64, want), BITS)


def test_races(monkeypatch, gpu):
    """Copies, barriers and memory under a happens-before detector: rows of two blocks, a column of several parts."""
    with interpreted(monkeypatch, detect_races=True):
        p = make_problem(Shape(130, 192, width=64, vocab_major=True), jnp.bfloat16)
        stored = stored_of(p, k=5)
        got = with_gradients(GPU, p, stored, kinds=("ghost_tail",))
        jax.block_until_ready(got)
        assert not get_races().races_found
    compare(got, expected(p, stored), BITS)


def eye_problem(logits):
    """A problem whose hidden states are the logits."""
    p = make_problem(Shape(len(logits), 64, width=64))
    return dataclasses.replace(
        p,
        hidden=jnp.asarray(logits, jnp.bfloat16),
        head=Head(jnp.eye(64, dtype=jnp.bfloat16), 64),
        oracle=oracle.HeadOracle(np.eye(64), 64, False),
        weight=jnp.ones(len(logits)),
    )


def test_saturated_masses(gpu):
    """Logits of +-1e4, and tails from 1 to e^-1000 on either side: the student's is a sum, never a difference."""
    depth = np.array([0, 5, 20, 69, 1e3])
    student, teacher = (np.zeros((26, 64)) for _ in range(2))
    student[:25, 2:], teacher[:25, 2:] = -np.repeat(depth, 5)[:, None], -np.tile(depth, 5)[:, None]
    student[:, 4] += 1  # within the tail, too, the student has preferences
    student[25, :4], teacher[25, 1:] = [1e4, -1e4, 1e4, -1e4], -1e4
    student = np.concatenate([student, -student])  # and all the mass in the tail
    p = eye_problem(student)
    stored = top(np.concatenate([teacher, teacher]), 2, tail=True)
    got = with_gradients(GPU, p, stored, kinds=("ghost_tail",))
    assert all(np.isfinite(oracle.f64(array)).all() for array in jax.tree.leaves(got))
    compare(got, expected(p, stored), BITS)


@pytest.mark.parametrize("k", [0, 8])
def test_no_entry_and_nothing_else(gpu, k):
    """Value and gradient 0 without entries; with the whole vocabulary stored there is no tail, and it is KL."""
    p = make_problem(Shape(7, 8, width=64, vocab_major=True), jnp.bfloat16)
    if k:
        stored = stored_of(p, k=8)
        want = expected(p, stored)
        compare(want | {"ghost_tail": want["zero_tail"]}, want)
    else:
        stored = Stored(jnp.zeros((7, 0), jnp.int32), jnp.zeros((7, 0)), jnp.zeros(7), jnp.ones(7))
        want = {"ghost_tail": [np.zeros(a.shape) for a in (p.weight[0], p.weight, p.hidden, p.head.weight)]}
    compare(with_gradients(GPU, p, stored, kinds=("ghost_tail",)), want, BITS)


def test_no_rows(gpu):
    p = make_problem(Shape(0, 8, width=64, vocab_major=True), jnp.bfloat16)
    total, values, d_hidden, d_weight = with_gradients(GPU, p, stored_of(p), kinds=("ghost_tail",))["ghost_tail"]
    assert (total, values.shape, d_hidden.shape, d_weight.shape) == (0, (0,), (0, 64), (8, 64))
    assert not d_weight.any()


def test_bad_rows(gpu):
    """Rows of weight 0 add nothing, whatever they hold; what is wrong in one that counts is seen, and in no other."""
    p = make_problem(Shape(30, 66, 64, 6, True), jnp.bfloat16)
    stored, empty = stored_of(p, tail=True), np.asarray(p.weight == 0)
    assert empty.sum() > 3
    spoiled = Stored(
        jnp.where(empty[:, None], 10**9, stored.ids),
        jnp.where(empty[:, None], jnp.nan, stored.probs),
        *(jnp.where(empty, jnp.nan, array) for array in (stored.tail, stored.teacher_entropy)),
    )
    dirty = dataclasses.replace(p, hidden=jnp.where(empty[:, None], jnp.nan, p.hidden))
    total, values, d_hidden, d_weight = with_gradients(GPU, dirty, spoiled, kinds=("ghost_tail",))["ghost_tail"]
    want = expected(p, stored)["ghost_tail"]
    assert not d_hidden[empty].any()
    got = (total, values[~empty], d_hidden, d_weight)
    compare({"ghost_tail": got}, {"ghost_tail": (want[0], want[1][~empty], *want[2:])}, BITS)

    stored = dataclasses.replace(spoiled, probs=spoiled.probs.at[0, 1].set(0.01))
    wrong = [dataclasses.replace(stored, ids=stored.ids.at[0, 1].set(junk)) for junk in (66, -1)]  # 66 is padding
    wrong.append(dataclasses.replace(stored, probs=stored.probs.at[0, 1].set(jnp.nan)))
    for bad in wrong:
        total, values, d_hidden, d_weight = with_gradients(GPU, dirty, bad, kinds=("ghost_tail",))["ghost_tail"]
        assert np.isnan([total, values[0]]).all()
        assert np.isnan(oracle.f64(d_hidden[0])).all()
        assert np.isnan(oracle.f64(d_weight)).any()
        np.testing.assert_allclose(values[1:][~empty[1:]], want[1][1:][~empty[1:]], rtol=1e-5)


@hypothesis.given(st.integers(0, 10**6), st.sampled_from([1, 5, 12]), st.sampled_from([8, 64]))
@hypothesis.settings(max_examples=20)
def test_rounds(seed, k, tile):
    """Each entry once, in a round of its tile, next to no other of its row; no tile has more than it needs."""
    draw = np.random.default_rng(seed)
    ids = np.sort([draw.permutation(60)[:k] for _ in range(128)], 1)
    here = draw.random(ids.shape) < 0.8
    ids[~here & (draw.random(ids.shape) < 0.5)] = 2**20
    rounds = jax.tree.map(np.asarray, rounds_of(jnp.asarray(ids, jnp.int32), jnp.asarray(here), 60, tile))
    starts, columns, place = rounds
    assert starts[:, -1].max() <= columns.shape[1]
    for block in range(2):
        for at in range(starts.shape[1] - 1):
            own = columns[block, starts[block, at] : starts[block, at + 1]]  # [rounds, 64]
            found = [sorted(row[row >= 0]) for row in own.T]
            rows = slice(64 * block, 64 * block + 64)
            want = [sorted(i[h & (i // tile == at)]) for i, h in zip(ids[rows], here[rows], strict=True)]
            assert found == want
            assert len(own) == max(map(len, want))
        assert (columns[block, starts[block, -1] :] == -1).all()
    row, entry = np.nonzero(here)
    np.testing.assert_array_equal(columns[row // 64, place[row, entry], row % 64], ids[row, entry])


rounds_of = jax.jit(pallas_gpu._rounds, static_argnums=(2, 3))


def test_explicit_names_do_not_fall_back():
    p = make_problem(Shape(2, 8, width=64, vocab_major=True))
    entries = jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1)), p.weight, "sampled"
    with pytest.raises(ValueError, match="got 'pallas_gpu' for cpu; it reads bfloat16, not float32"):
        sparse_divergence(p.hidden, p.head, *entries, implementation=GPU)
