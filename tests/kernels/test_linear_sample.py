"""linear_sample: every implementation against float64 cumulative sums, and its map from uniform numbers to ids."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kdjax.kernels import linear_sample as op
from kdjax.kernels.linear_sample import linear_sample, xla
from kdjax.types import Head
from tests.kernels import oracle
from tests.kernels.problems import SHAPES, make_problem

every_implementation = pytest.mark.parametrize("implementation", op.IMPLEMENTATIONS)
SMALL = "xla, small tiles"  # of 64 rows, blocks of 16 columns, groups of 4: the last of each ragged
with_small_tiles = pytest.mark.parametrize("implementation", [*op.IMPLEMENTATIONS, SMALL])
LAST = 1 - 2.0**-24  # the largest float32 below 1
# How far float32 may move an edge of the cumulative distribution. A logit's rounding e moves it by e / 2 at most:
# logits up to 20 out of sums of 9 products, hence e ~ 20 * 9 * 2^-24 = 1.1e-5 in the worst case and a tenth of it as a
# rule; the sums themselves add some 2^-24.
EDGE = 4e-6


@functools.partial(jax.jit, static_argnames=("power", "implementation"))
def run(hidden, head, uniforms, implementation, tau=1.0, power=1.0):
    return linear_sample(hidden, head, uniforms, tau, power, implementation=implementation.partition(",")[0])


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    """The name is part of the program's key in `run`, so that no program with other tiles is taken for it."""
    if "implementation" in request.fixturenames and request.getfixturevalue("implementation") == SMALL:
        for name, size in (("ROWS", 64), ("COLUMNS", 16), ("GROUP", 4)):
            monkeypatch.setattr(xla, name, size)


def numbers(rows, count, seed=0):
    """[rows, count] float32 in [0, 1), with both ends."""
    drawn = np.random.default_rng(seed).random(size=(rows, count), dtype=np.float32)
    drawn[:, 0], drawn[:, 1] = 0.0, LAST
    return jnp.asarray(drawn)


def check(got, logits, uniforms, tau=1.0, power=1.0, edge=EDGE):
    """Of each draw, the interval of its id holds the uniform number, up to `edge`; statistics are the oracle's."""
    logp = oracle.log_softmax(oracle.f64(logits) / tau)
    mass = np.exp(oracle.log_softmax(power * logp))
    upper = np.cumsum(mass, -1)
    ids, uniforms = np.asarray(got.ids), oracle.f64(uniforms)
    assert (got.ids.dtype, got.logp.dtype) == (jnp.int32, jnp.float32)
    assert ids.shape == got.logp.shape == uniforms.shape
    assert ((ids >= 0) & (ids < logp.shape[1])).all()
    high = np.take_along_axis(upper, ids, 1)
    low = high - np.take_along_axis(mass, ids, 1)
    assert (uniforms >= low - edge).all()
    assert (uniforms < high + edge).all()
    np.testing.assert_allclose(got.logp, np.take_along_axis(logp, ids, 1), rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(got.entropy, -(np.exp(logp) * logp).sum(-1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.max_logp, logp.max(-1, initial=-np.inf), rtol=1e-5, atol=2e-5)
    log_power_sum = np.log(np.exp(power * logp).sum(-1)) if power != 1 else np.zeros(len(logp))
    np.testing.assert_allclose(got.log_power_sum, log_power_sum, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "dtype"), [*((shape, jnp.float32) for shape in SHAPES), ("tied_padded_capped", jnp.bfloat16)]
)
@with_small_tiles
def test_oracle(implementation, shape, dtype):
    """At other temperatures, which come after the soft cap, and powers; padding, which is most likely, is not drawn."""
    problem = make_problem(SHAPES[shape], dtype)
    logits = problem.oracle.logits(problem.hidden.astype(jnp.float32))
    uniforms = numbers(len(logits), 6)
    tau, power = (1.7, 0.6) if dtype == jnp.float32 else (0.8, 1.0)
    got = run(problem.hidden, problem.head, uniforms, implementation, tau, power)
    check(got, logits, uniforms, tau, power)


@pytest.mark.parametrize(("vocab", "tau", "power"), [(5, 1.0, 1.0), (100, 2.0, 1.0), (100, 0.5, 1.3)])
@with_small_tiles
def test_the_measure_of_an_id_is_its_probability(implementation, vocab, tau, power):
    """The midpoints of 2^15 equal intervals: an interval of length p holds p 2^15 of them, up to one."""
    grid = 2**15
    logits = np.asarray([2.0, 1, 0, -1, -2]) if vocab == 5 else np.random.default_rng(1).normal(size=vocab) * 2
    uniforms = jnp.asarray((np.arange(grid) + 0.5)[None, :] / grid, jnp.float32)
    head = Head(jnp.eye(vocab), vocab)
    got = run(jnp.asarray(logits[None, :], jnp.float32), head, uniforms, implementation, tau, power)
    p = np.exp(oracle.log_softmax(power * logits[None, :] / tau))[0]
    share = np.bincount(got.ids[0], minlength=vocab) / grid
    np.testing.assert_allclose(share, p, rtol=0, atol=1 / grid + 2 * EDGE)
    assert (np.diff(got.ids[0]) >= 0).all()


@pytest.mark.parametrize("power", [1.0, 0.8])
@every_implementation
def test_monotone_and_right_at_the_edges(implementation, power):
    """Several blocks. Uniform numbers at float64's edges and next to them, where float32 sums may say either side."""
    vocab = 3000
    logits = np.random.default_rng(2).normal(size=(3, vocab)) * np.asarray([0.1, 2.0, 6.0])[:, None]
    logits = logits.astype(np.float32)
    edges = np.cumsum(np.exp(oracle.log_softmax(power * oracle.f64(logits))), -1)[:, :-1].astype(np.float32)
    near = [edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(1))]
    uniforms = np.sort(np.clip(np.concatenate(near, 1), 0, LAST).astype(np.float32), 1)
    got = run(jnp.asarray(logits), Head(jnp.eye(vocab), vocab), jnp.asarray(uniforms), implementation, power=power)
    assert (np.diff(got.ids, axis=1) >= 0).all()
    check(got, logits, uniforms, power=power)


@pytest.mark.parametrize("power", [1.0, 0.5])
@with_small_tiles
def test_what_has_no_mass_is_never_drawn(implementation, power):
    """Neither at both ends nor at any edge: holes of -1e4, one column only, the first and the last impossible."""
    vocab = 700
    logits = np.full((7, vocab), -1e4)
    logits[0, 333] = 1e4
    logits[1, ::7] = 0.0
    logits[2, 100:105] = [3.0, -50.0, -1e4, 2.0, -1e4]
    logits[3, 31:34] = logits[3, 660] = 1.0
    logits[4] = np.linspace(-600, 0, vocab)
    logits[5] = logits[4, ::-1]
    # Below the smallest normal float32, which is 0 here; next to the 16th, the largest of its block, their sum is not.
    logits[6, 1:4], logits[6, 15], logits[6, 300] = -87.5, -87.0, 0.0
    logits = logits.astype(np.float32)
    log_mass = oracle.log_softmax(power * oracle.f64(logits))
    edges = np.cumsum(np.exp(log_mass), -1)
    near = [np.zeros((7, 1)), edges, np.nextafter(edges.astype(np.float32), np.float32(0)), numbers(7, 50)]
    uniforms = np.clip(np.concatenate(near, 1), 0, LAST).astype(np.float32)
    got = run(jnp.asarray(logits), Head(jnp.eye(vocab), vocab), jnp.asarray(uniforms), implementation, power=power)
    assert np.take_along_axis(log_mass, np.asarray(got.ids), 1).min() > np.log(2.0**-149)  # float32's smallest
    check(got, logits, uniforms, power=power)
    assert (got.ids[0] == 333).all()
    assert set(np.unique(got.ids[3])) == {31, 32, 33, 660}
    assert (got.ids[1, 0], got.ids[1, vocab]) == (0, 693)  # the numbers are 0 and, at the edge of the last, LAST


def test_sums_over_a_large_vocabulary_are_accurate():
    """150,001 equal columns: the id is floor(u V), and an edge is off by 2e-7 at most; naive sums lose 1e-4."""
    vocab, count = 150_001, 5_000
    uniforms = numbers(1, count, seed=3)
    got = run(jnp.ones((1, 1)), Head(jnp.ones((1, vocab)), vocab), uniforms, "xla")
    exact = oracle.f64(uniforms) * vocab
    assert (np.abs(np.asarray(got.ids) - exact + 0.5) <= 0.5 + 2e-7 * vocab).all()
    assert abs(float(got.entropy[0]) - np.log(vocab)) < 5e-6


@with_small_tiles
def test_a_row_does_not_depend_on_the_others(implementation):
    """Bitwise where only other rows change; with another number of rows, whose products may round otherwise, in all
    but draws within an edge's rounding of another id."""
    problem = make_problem(SHAPES["tiles"])
    uniforms = numbers(300, 8)
    got = run(problem.hidden, problem.head, uniforms, implementation)
    kept = np.arange(300) % 3 == 0
    others = run(
        jnp.where(kept[:, None], problem.hidden, 3 * problem.hidden[::-1]),
        problem.head,
        jnp.where(kept[:, None], uniforms, 0.5),
        implementation,
    )
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(others), strict=True):
        np.testing.assert_array_equal(one[kept], other[kept])
    assert not np.array_equal(got.ids[~kept], others.ids[~kept])
    few = run(problem.hidden[kept], problem.head, uniforms[kept], implementation)
    assert (np.asarray(few.ids) == got.ids[kept]).mean() > 0.995
    np.testing.assert_allclose(few.entropy, got.entropy[kept], rtol=1e-5)


@every_implementation
def test_no_draws(implementation):
    """The statistics alone."""
    problem = make_problem(SHAPES["tied_padded_capped"])
    got = run(problem.hidden, problem.head, numbers(7, 2)[:, :0], implementation, 1.3)
    check(got, problem.oracle.logits(problem.hidden), np.zeros((7, 0)), 1.3)


@every_implementation
def test_vmap(implementation):
    problem = make_problem(SHAPES["tied_padded_capped"])
    rows = jnp.stack([problem.hidden, 2 * problem.hidden[::-1]])
    uniforms = jnp.stack([numbers(7, 4), numbers(7, 4, seed=1)])
    got = jax.vmap(lambda hidden, uniforms: run(hidden, problem.head, uniforms, implementation))(rows, uniforms)
    for at in range(2):
        check(jax.tree.map(lambda a, at=at: a[at], got), problem.oracle.logits(rows[at]), uniforms[at])


@every_implementation
def test_one_bad_row(implementation):
    """NaN stays in its row, whose ids are vocabulary all the same."""
    problem, uniforms = make_problem(SHAPES["untied_padded"]), numbers(7, 4)
    got = run(problem.hidden.at[2].set(jnp.nan), problem.head, uniforms, implementation)
    assert ((got.ids >= 0) & (got.ids < problem.head.vocab_size)).all()
    assert np.isnan(got.entropy[2])
    keep = np.arange(7) != 2
    check(jax.tree.map(lambda a: a[keep], got), problem.oracle.logits(problem.hidden)[keep], uniforms[keep])


@every_implementation
def test_no_gradient(implementation):
    problem = make_problem(SHAPES["tied"])

    def total(hidden, weight, tau):
        head = Head(weight, problem.head.vocab_size, problem.head.vocab_major)
        got = run(hidden, head, numbers(7, 3), implementation, tau, 0.5)
        return jnp.sum(got.logp) + jnp.sum(got.entropy + got.log_power_sum + got.max_logp)

    for gradient in jax.grad(total, (0, 1, 2))(problem.hidden, problem.head.weight, 1.5):
        assert not gradient.any()


@pytest.mark.parametrize(("name", "value"), [("tau", 0.0), ("tau", -1.0), ("tau", float("nan")), ("power", 0.0)])
def test_what_must_be_positive(name, value):
    problem = make_problem(SHAPES["tied"])
    with pytest.raises(ValueError, match=f"^{name} must be positive, got {value}; .* Set it to 1 for"):
        linear_sample(problem.hidden, problem.head, numbers(7, 3), **{name: value})


# --- a vocabulary that is split over devices


def split(mesh, vocab, implementation, power=1.0):
    """(hidden [N, D] and uniforms [N, K] over 'data', weight over 'vocab') -> Sample over 'data'."""

    def local(hidden, uniforms, weight):
        head = Head(weight, vocab, soft_cap=9.0, vocab_axis="vocab")
        return linear_sample(hidden, head, uniforms, 1.2, power, implementation=implementation)

    rows = P("data", None)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(rows, rows, P(None, "vocab")), out_specs=P("data"), check_vma=False
    )


def vocab_mesh():
    return jax.make_mesh((2, 4), ("data", "vocab"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize(("vocab", "power"), [(37, 1.0), (13, 0.6), (2000, 1.0)])
@every_implementation
def test_split_vocabulary(implementation, vocab, power):
    """2 x 4 devices; a last device with padding, or with nothing but padding; the same draws on all."""
    draw, width = np.random.default_rng(vocab), -(-vocab // 4) + 1
    hidden = draw.normal(size=(10, 5)).astype(np.float32)
    weight = draw.normal(size=(5, 4 * width)).astype(np.float32)
    weight[:, vocab:] = 50.0
    uniforms = numbers(10, 400, seed=vocab)
    got = jax.jit(split(vocab_mesh(), vocab, implementation, power))(hidden, uniforms, weight)
    logits = oracle.HeadOracle(weight, vocab, False, soft_cap=9.0).logits(hidden)
    check(got, logits, uniforms, 1.2, power)
    owners = np.unique(np.asarray(got.ids) // width)
    np.testing.assert_array_equal(owners, np.arange(-(-vocab // width)))  # every device that has columns drew some


def test_only_masses_are_gathered():
    """No collective as large as a row of the vocabulary."""
    vocab, rows, draws = 4096, 16, 8
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, 8), (rows, draws), (8, vocab))]
    text = jax.jit(split(vocab_mesh(), vocab, "xla")).lower(*arguments).compile().as_text()
    lines = [line for line in text.splitlines() if re.search(r"(?:all-\w+|reduce-scatter|permute)(?:-start)?\(", line)]
    assert any("all-gather" in line for line in lines)
    assert max(oracle.largest_shape(line)[0] for line in lines) <= rows * draws


# --- compiled programs


def test_nothing_is_rows_by_vocabulary():
    rows, vocab, draws = 4096, 50257, 50
    arguments = jax.ShapeDtypeStruct((rows, 8), jnp.float32), Head(jax.ShapeDtypeStruct((8, vocab), jnp.float32), vocab)
    uniforms = jax.ShapeDtypeStruct((rows, draws), jnp.float32)
    program = run.lower(*arguments, uniforms, "xla").compile()
    elements, shape = oracle.largest_shape(program.as_text())
    assert elements <= xla.TILE * 1.1, shape  # the logits of a tile, in whole blocks
    assert program.memory_analysis().temp_size_in_bytes < 2 * 4 * xla.TILE
