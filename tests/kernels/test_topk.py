"""topk: every implementation against numpy's stable sort in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import aot
from kdjax.kernels import topk
from kdjax.kernels.tiles import MASKED
from kdjax.kernels.topk.block_sizes import CANDIDATES, LARGEST_K, blocks_for, vmem_needed
from kdjax.kernels.topk.xla import tile_top_k
from kdjax.types import Head
from tests.kernels import oracle
from tests.kernels.problems import SHAPES, make_problem

# pallas_gpu takes none of these small float32 shapes and has its own in test_topk_gpu.py.
HERE = [name for name in topk.IMPLEMENTATIONS if name != "pallas_gpu"]
every_implementation = pytest.mark.parametrize("implementation", HERE)
TILED = [name for name in HERE if name != "reference"]
TPUS = [chip for chip, entry in aot.CHIPS.items() if entry.platform == "tpu"]


@functools.partial(jax.jit, static_argnames=("k", "implementation"))
def run(hidden, head, k, implementation):
    return topk.topk(hidden, head, k, implementation=implementation)


def expected(logits, k):
    """ids and log-probabilities [N, K] of the k largest, the first of equals first."""
    ids = np.argsort(-oracle.f64(logits), axis=-1, kind="stable")[:, :k]
    return ids, np.take_along_axis(oracle.log_softmax(logits), ids, -1)


def check(got, logits, k, exact=False, atol=2e-5):
    """Equal to the oracle. Not exact: the ids where float32 cannot have confused two of them (nearly all rows)."""
    ids, logp = expected(logits, k)
    assert (got.ids.dtype, got.logp.dtype) == (jnp.int32, jnp.float32)
    assert got.ids.shape == got.logp.shape == (len(logits), k)
    np.testing.assert_allclose(got.logp, logp, rtol=1e-5, atol=atol)
    gaps = -np.diff(np.sort(-oracle.f64(logits), -1)[:, : k + 1], axis=-1)
    sure = np.full(len(logits), True) if exact else (np.abs(gaps) > 1e-5).all(-1)
    assert sure.sum() >= 0.9 * len(sure)
    np.testing.assert_array_equal(np.asarray(got.ids)[sure], ids[sure])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@every_implementation
def test_oracle(implementation, shape, dtype):
    """Of some and of all entries; padding columns, which are the largest, are never among them."""
    problem = make_problem(SHAPES[shape], dtype)
    logits = problem.oracle.logits(problem.hidden.astype(jnp.float32))
    some = min(5, SHAPES[shape].vocab)
    for k in {some, SHAPES[shape].vocab if dtype == jnp.float32 else some}:
        check(run(problem.hidden, problem.head, k, implementation), logits, k)


@pytest.mark.parametrize("k", [1, 7, 40, 700])
@every_implementation
def test_ties(implementation, k):
    """Small integers: exact logits with hundreds of equals, within a block of columns and across; lower id first."""
    numbers = np.random.default_rng(3)
    hidden, weight = numbers.integers(-1, 2, size=(20, 4)), numbers.integers(-2, 3, size=(4, 700))
    hidden[0] = 0  # all equal
    got = run(jnp.asarray(hidden, jnp.float32), Head(jnp.asarray(weight, jnp.float32), 700), k, implementation)
    check(got, hidden @ weight, k, exact=True)


@pytest.mark.parametrize("width", [40, 700])
def test_both_zeros_are_equal(width):
    logits = np.where(np.arange(width) % 3 == 0, 0.0, -0.0)[None, :]
    values, ids = tile_top_k(jnp.asarray(logits, jnp.float32), Head(jnp.zeros((1, width)), width), 9)
    np.testing.assert_array_equal(ids[0], np.arange(9))
    np.testing.assert_array_equal(values, 0.0)


@every_implementation
def test_extreme_logits(implementation):
    """+-1e4 and what underflows; ascending rows, where every block of columns brings only better entries."""
    logits = np.zeros((6, 700))
    logits[0, [3, 699]] = 1e4, -1e4
    logits[1] = 1e4
    logits[2, 5:] = -1e4
    logits[3] = np.linspace(-1e4, 1e4, 700)
    logits[4] = np.linspace(0, 700, 700)
    logits[5] = -logits[4]
    logits = logits.astype(np.float32)
    got = run(jnp.asarray(logits), Head(jnp.eye(700), 700), 16, implementation)
    check(got, logits, 16, exact=True, atol=2e-4)


@every_implementation
def test_vmap(implementation):
    problem = make_problem(SHAPES["tied_padded_capped"])
    rows = jnp.stack([problem.hidden, 2 * problem.hidden[::-1]])
    got = jax.vmap(lambda hidden: run(hidden, problem.head, 3, implementation))(rows)
    for at in range(2):
        check(jax.tree.map(lambda a, at=at: a[at], got), problem.oracle.logits(rows[at]), 3)


@every_implementation
def test_one_bad_row(implementation):
    """NaN stays in its row, whose ids are vocabulary all the same."""
    problem = make_problem(SHAPES["untied_padded"])
    got = run(problem.hidden.at[2].set(jnp.nan), problem.head, 4, implementation)
    assert ((got.ids >= 0) & (got.ids < problem.head.vocab_size)).all()
    keep = np.arange(7) != 2
    check(jax.tree.map(lambda a: a[keep], got), problem.oracle.logits(problem.hidden)[keep], 4)


@every_implementation
def test_no_gradient(implementation):
    problem = make_problem(SHAPES["tied"])

    def total(hidden, weight):
        head = Head(weight, problem.head.vocab_size, problem.head.vocab_major)
        return jnp.sum(run(hidden, head, 3, implementation).logp)

    for gradient in jax.grad(total, (0, 1))(problem.hidden, problem.head.weight):
        assert not gradient.any()


@pytest.mark.parametrize("k", [0, -1, 14])
def test_k_must_fit(k):
    problem = make_problem(SHAPES["tied"])
    with pytest.raises(ValueError, match=f"k must be between 1 and the 13 entries of the vocabulary, got {k}"):
        topk.topk(problem.hidden, problem.head, k)


def test_simulated(simulated):
    """Races, and what is read before it is written: ragged rows and columns, two blocks of each."""
    numbers = np.random.default_rng(4)
    hidden, weight = numbers.normal(size=(260, 3)), numbers.normal(size=(3, 601))
    got = run(jnp.asarray(hidden, jnp.float32), Head(jnp.asarray(weight, jnp.float32), 600), 6, "pallas_tpu")
    check(got, hidden.astype(np.float32).astype(float) @ weight.astype(np.float32)[:, :600], 6)


# --- a vocabulary that is split over devices


def split(mesh, vocab, k, implementation, vocab_major=False):
    """(hidden [N, D] over 'data', weight over 'vocab') -> TopK over 'data'."""

    def local(hidden, weight):
        head = Head(weight, vocab, vocab_major, soft_cap=9.0, vocab_axis="vocab")
        return topk.topk(hidden, head, k, implementation=implementation)

    by_vocab = P("vocab", None) if vocab_major else P(None, "vocab")
    return jax.shard_map(
        local, mesh=mesh, in_specs=(P("data", None), by_vocab), out_specs=P("data", None), check_vma=False
    )


@pytest.mark.parametrize(("vocab", "k"), [(37, 1), (37, 37), (13, 12), (2000, 9)])
@every_implementation
def test_split_vocabulary(implementation, vocab, k):
    """2 x 4 devices; k up to more than a device has; a last device with padding, or with nothing but padding."""
    mesh = jax.make_mesh((2, 4), ("data", "vocab"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    numbers, width = np.random.default_rng(vocab), -(-vocab // 4) + 1
    for ties in (False, True):
        hidden, weight = numbers.normal(size=(10, 5)), numbers.normal(size=(5, 4 * width))
        if ties:  # equal integers stay equal under the cap
            hidden, weight = hidden.round(), weight.round()
        hidden, weight = hidden.astype(np.float32), weight.astype(np.float32)
        weight[:, vocab:] = 50.0
        got = jax.jit(split(mesh, vocab, k, implementation))(hidden, weight)
        logits = oracle.HeadOracle(weight, vocab, False, soft_cap=9.0).logits(hidden)
        assert (np.asarray(got.logp) > MASKED / 2).all()
        check(got, logits, k, exact=ties)


@pytest.mark.parametrize("implementation", TILED)
def test_only_candidates_are_gathered(implementation, compiled):
    """No collective as large as a row of the vocabulary, let alone N rows of it."""
    if aot.unavailable("v4"):
        pytest.skip(aot.unavailable("v4"))
    mesh, vocab, k = aot.mesh("v4", (2, 4), ("data", "vocab")), 50257, 16
    specs = {(64, 128): P("data", None), (50432, 128): P("vocab", None)}
    args = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec)) for shape, spec in specs.items()
    ]
    with jax.set_mesh(mesh):
        text = jax.jit(split(mesh, vocab, k, implementation, vocab_major=True)).lower(*args).compile().as_text()
    collective = r"(?:all-\w+|reduce-scatter|collective-permute)(?:-start)?\("
    lines = [line for line in text.splitlines() if re.search(collective, line)]
    assert any("all-gather" in line for line in lines)
    assert max(oracle.largest_shape(line)[0] for line in lines) <= 32 * 4 * k  # rows x devices x k


# --- compiled programs


def test_nothing_is_rows_by_vocabulary(compiled):
    rows, vocab = 1024, 5000
    args = jax.ShapeDtypeStruct((rows, 8), jnp.float32), Head(jax.ShapeDtypeStruct((8, vocab), jnp.float32), vocab)
    text = run.lower(*args, k=16, implementation="xla").compile().as_text()
    assert oracle.largest_shape(text)[0] < rows * vocab / 8


LARGE = [
    (49152, 576, True, jnp.bfloat16, 16),
    (50257, 576, False, jnp.float32, 100),
    (128256, 4096, True, jnp.bfloat16, 1),
    (151936, 896, True, jnp.float32, 64),
]
# Every shape where there is least room, and each chip with one of them.
PLACES = [("v4", *shape) for shape in LARGE] + [
    (chip, *LARGE[index % 4]) for index, chip in enumerate(TPUS) if chip != "v4"
]


@pytest.mark.parametrize(("chip", "vocab", "width", "vocab_major", "dtype", "k"), PLACES)
def test_compiles_without_a_copy_of_the_head(chip, vocab, width, vocab_major, dtype, k, compiled):
    if aot.unavailable(chip):
        pytest.skip(aot.unavailable(chip))
    rows = 512
    program = aot.compile_on(
        chip,
        lambda hidden, weight: topk.topk(hidden, Head(weight, vocab, vocab_major), k),
        jax.ShapeDtypeStruct((rows, width), dtype),
        jax.ShapeDtypeStruct((vocab, width) if vocab_major else (width, vocab), dtype),
    )
    assert "tpu_custom_call" in program.as_text()  # the default there is the kernel
    # Hidden states, and 128 lanes of values, ids, maxima and sums a row.
    assert program.memory_analysis().temp_size_in_bytes <= rows * (2 * width + 8 * 128) * 4


def test_too_many_entries_are_left_to_xla():
    problem = make_problem(SHAPES["tiles"])
    reason = topk.DECLINES["pallas_tpu"](topk._dispatch.target(), problem.hidden, problem.head, LARGEST_K + 1)
    assert reason == f"it keeps at most {LARGEST_K} entries a row in VMEM, not {LARGEST_K + 1}."
    wide = jnp.zeros((8, 2**20))
    reason = topk.DECLINES["pallas_tpu"](topk._dispatch.target(), wide, Head(wide, 8, True), 1)
    assert "no block of rows and columns of width 1048576 fits" in reason


def test_block_sizes_fit():
    for megabytes in (16, 64, 128):
        for width, itemsize, k in ((576, 2, 16), (896, 4, 100), (4096, 2, 100), (4096, 4, 1), (2048, 4, LARGEST_K)):
            blocks = blocks_for(megabytes * 2**20, width, itemsize, k)
            assert blocks in CANDIDATES
            assert vmem_needed(blocks, width, itemsize, k) < megabytes * 2**20
