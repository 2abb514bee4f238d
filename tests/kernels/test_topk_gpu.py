"""topk's Mosaic GPU kernel against numpy's stable sort, in JAX's interpreter for such kernels.

It reads bfloat16 and widths of a multiple of 64 alone, and a run takes seconds, hence few cases of their own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

from kdjax.kernels import _gpu_block_sizes
from kdjax.kernels.topk import pallas_gpu, topk
from kdjax.types import Head
from tests.kernels.gpu_interpreter import interpreted
from tests.kernels.problems import Shape, make_problem
from tests.kernels.test_topk import check


@pytest.fixture
def gpu(monkeypatch):
    """Two blocks of columns and more, in a few parts; two slices a block; 128 rows at a time."""
    monkeypatch.setattr(_gpu_block_sizes, "COLUMNS", 64)
    monkeypatch.setattr(_gpu_block_sizes, "PROCESSORS", 2)
    monkeypatch.setattr(pallas_gpu, "CHUNK_BYTES", 1)
    with interpreted(monkeypatch):
        yield


@functools.partial(jax.jit, static_argnames="k")
def run(hidden, head, k):
    return topk(hidden, head, k, implementation="pallas_gpu")


def logits_of(p):
    return p.oracle.logits(p.hidden.astype(jnp.float32))


# Ragged rows and columns, more chunks of the width than a ring has stages, both orders of a head.
SHAPES = {
    "tied": Shape(70, 301, width=320, padding=3, vocab_major=True),
    "untied_capped": Shape(150, 230, 64, 90, logit_scale=0.5, soft_cap=3.0),
}


@pytest.mark.parametrize("k", [1, 3, 40])  # of the slices' maxima; of all entries; 10 slices are too few for that
@pytest.mark.parametrize("name", SHAPES)
def test_oracle(gpu, name, k):
    p = make_problem(SHAPES[name], jnp.bfloat16)
    check(run(p.hidden, p.head, k), logits_of(p), k)


@pytest.mark.parametrize("k", [1, 7, 700])
def test_ties(gpu, k):
    """Small integers: exact logits with hundreds of equals, within a slice, a part and across; lower id first."""
    numbers = np.random.default_rng(3)
    hidden, weight = numbers.integers(-1, 2, size=(20, 64)), numbers.integers(-2, 3, size=(64, 704))
    hidden[:, 4:] = 0
    hidden[0] = 0  # all equal
    weight[:, 700:] = 50
    got = run(jnp.asarray(hidden, jnp.bfloat16), Head(jnp.asarray(weight, jnp.bfloat16), 700), k)
    check(got, hidden @ weight[:, :700], k, exact=True)


def test_hard_rows(gpu):
    """+-1e4, what underflows, ascending rows; rows that are not numbers, of either sign, which spoil no other."""
    rows = np.zeros((7, 320))
    rows[0, [3, 299]] = 1e4, -1e4
    rows[1] = 1e4
    rows[2, 5:] = -1e4
    rows[3] = np.linspace(-1e4, 1e4, 320)
    rows[4] = np.linspace(0, 300, 320)
    rows[5], rows[6] = np.nan, -np.nan
    hidden = jnp.asarray(rows, jnp.bfloat16)
    for k in (4, 16):
        got = run(hidden, Head(jnp.eye(320, dtype=jnp.bfloat16), 300), k)
        assert ((got.ids >= 0) & (got.ids < 300)).all()
        numbers = np.asarray(hidden.astype(jnp.float32))[:5, :300]
        check(jax.tree.map(lambda a: a[:5], got), numbers, k, exact=True, atol=2e-4)


@pytest.mark.parametrize(("vocab", "k"), [(135, 9), (230, 200), (100, 100)])
def test_vmap_and_a_split_head(gpu, vocab, k):
    """Two devices of a vocabulary axis, for two problems at once; fewer entries on one of them, or on each, than k."""
    parts = [make_problem(Shape(5, vocab, width=64, padding=256 - vocab), jnp.bfloat16, seed) for seed in range(2)]
    hidden, weight = jnp.stack([p.hidden for p in parts]), jnp.stack([p.head.weight for p in parts])
    halves = jnp.stack(jnp.split(weight, 2, -1))  # [device, problem, D, V / 2]

    def on_device(hidden, weight):
        return topk(hidden, Head(weight, vocab, vocab_axis="v"), k, implementation="pallas_gpu")

    run = jax.vmap(jax.vmap(on_device, (None, 0), axis_name="v"), (0, 1))
    found = jax.jit(run)(hidden, halves)  # [problem, device, N, K]
    for at, p in enumerate(parts):
        for device in range(2):
            check(jax.tree.map(lambda leaf, i=at, j=device: leaf[i, j], found), logits_of(p), k)


def test_races(monkeypatch, gpu):
    """Copies, barriers and shared memory under a happens-before detector."""
    with interpreted(monkeypatch, detect_races=True):
        p = make_problem(Shape(70, 192, width=128, vocab_major=True), jnp.bfloat16)
        got = topk(p.hidden, p.head, 2, implementation="pallas_gpu")
        jax.block_until_ready(got)
        assert not get_races().races_found
    check(got, logits_of(p), 2)


def test_empty_and_no_gradient(gpu):
    p = make_problem(Shape(3, 13, width=64, padding=3, vocab_major=True), jnp.bfloat16)
    nothing = run(p.hidden[:0], p.head, 2)
    assert [(a.shape, a.dtype) for a in (nothing.ids, nothing.logp)] == [((0, 2), jnp.int32), ((0, 2), jnp.float32)]

    def total(hidden, weight):
        return jnp.sum(run(hidden, Head(weight, 13, True), 3).logp)

    for gradient in jax.grad(total, (0, 1))(p.hidden, p.head.weight):
        assert not gradient.any()


def test_declined_by_name():
    p = make_problem(Shape(3, 8, width=64, vocab_major=True))
    with pytest.raises(ValueError, match="got 'pallas_gpu' for cpu; it reads bfloat16, not float32"):
        topk(p.hidden, p.head, 2, implementation="pallas_gpu")
