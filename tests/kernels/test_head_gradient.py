"""head_gradient: every implementation, and both forms of the tiled one, against float64 and against autodiff."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kdjax.kernels import head_gradient as op
from kdjax.kernels.head_gradient import answer_gradient, xla
from kdjax.types import Head
from tests.kernels import oracle
from tests.kernels.problems import SHAPES, make_problem

# The tiled implementation chooses its form, here often the second; so each also by name, in chunks of few columns
# and, the first, in tiles of few rows, the last of each ragged.
TILES = {
    "grams": {"_in_gram_form": lambda *sizes: True, "ROWS": 64, "COLUMNS": 16},
    "sums": {"_in_gram_form": lambda *sizes: False, "COLUMNS": 16},
}
every_implementation = pytest.mark.parametrize(
    "implementation", [*op.IMPLEMENTATIONS, *(f"xla, {how}" for how in TILES)]
)
in_use = pytest.mark.parametrize("implementation", op.IMPLEMENTATIONS)
# (questions, answers each, positions, positions of a question); 300 rows are more than a small tile, 60 a question.
SIZES = {0: (0, 1, 4, 2), 1: (1, 1, 1, 1), 3: (3, 1, 1, 2), 7: (1, 1, 7, 3), 300: (5, 4, 15, 9)}
ANSWER, QUESTION = ("norm", "share", "token_norm", "label_logp", "brier"), ("norm", "label_logp", "brier")


@functools.partial(jax.jit, static_argnames=("implementation", "rank"))
def run(hidden, head, labels, weights, question, implementation, rank=True):
    name = implementation.partition(",")[0]
    return answer_gradient(hidden, head, labels, weights, question=question, rank=rank, implementation=name)


@pytest.fixture(autouse=True)
def tiles(request, monkeypatch):
    """The name is part of the program's key in `run`, so that no program with other tiles is taken for it."""
    if "implementation" in request.fixturenames:
        how = request.getfixturevalue("implementation").partition(", ")[2]
        for name, value in TILES.get(how, {}).items():
            monkeypatch.setattr(xla, name, value)


@dataclasses.dataclass(frozen=True)
class Given:
    """What the op is called with, and the same head for the oracle."""

    hidden: jax.Array
    head: Head
    labels: jax.Array
    weights: jax.Array
    question: tuple
    oracle: oracle.HeadOracle

    @property
    def arguments(self):
        return self.hidden, self.head, self.labels, self.weights, self.question


def given(name, dtype=jnp.float32, seed=0):
    """A shape of problems.py as answers; weights of all kinds, 0 among them."""
    problem = make_problem(SHAPES[name], dtype, seed)
    questions, each, size, length = SIZES[len(problem.labels)]
    draw = np.random.default_rng(seed + 1)
    asked = (
        jnp.asarray(draw.normal(size=(questions, length, problem.hidden.shape[1])), dtype),
        jnp.asarray(draw.integers(problem.head.vocab_size, size=(questions, length)), jnp.int32),
        jnp.asarray(draw.uniform(0.1, 1, size=(questions, length)), jnp.float32),
    )
    hidden, labels, weights = (
        array.reshape(questions * each, size, *array.shape[1:])
        for array in (problem.hidden, problem.labels, problem.weight)
    )
    return Given(hidden, problem.head, labels, weights, asked, problem.oracle)


def expected(head, hidden, labels, weights, question):
    """The fields of HeadGradient, by the oracle, one sequence at a time."""

    def each(hidden, labels, weights):
        hidden = hidden.astype(jnp.float32)
        return [oracle.head_gradient(head, *one) for one in zip(hidden, labels, weights, strict=True)]

    answers, asked = each(hidden, labels, weights), each(*question)
    fields = {name: np.asarray([one[name] for one in answers]) for name in (*ANSWER, "rank")}
    owner = [asked[at * len(asked) // len(answers)] for at in range(len(answers))]
    pairs = zip(answers, owner, strict=True)
    fields["cross"] = np.asarray([(one["gradient"] * other["gradient"]).sum() for one, other in pairs])
    return fields | {f"question_{name}": np.asarray([one[name] for one in asked]) for name in QUESTION}


def check(got, wanted, rtol=2e-5, atol=2e-5):
    for name, values in wanted.items():
        ours = getattr(got, name)
        assert ours.dtype == (jnp.int32 if name == "rank" else jnp.float32)
        if name == "rank":
            np.testing.assert_array_equal(ours, values.reshape(ours.shape))
            continue
        # cross and share are sums of both signs: their error is that of the largest.
        size = 1 + np.abs(values).max(initial=0.0) if name in ("cross", "share") else 1.0
        np.testing.assert_allclose(ours, values.reshape(ours.shape), rtol=rtol, atol=atol * size, err_msg=name)


@pytest.mark.parametrize("shape", SHAPES)
@every_implementation
def test_oracle(implementation, shape):
    problem = given(shape)
    got = run(*problem.arguments, implementation)
    check(got, expected(problem.oracle, problem.hidden, problem.labels, problem.weights, problem.question))
    np.testing.assert_allclose(jnp.sum(got.share, -1), got.norm, rtol=1e-5)


@in_use
def test_without_question_and_rank(implementation):
    problem = given("tiles")
    got, alone = (
        run(*problem.arguments[:4], question, implementation, rank=question is not None)
        for question in (problem.question, None)
    )
    assert alone.rank is alone.cross is alone.question_norm is alone.question_label_logp is alone.question_brier is None
    for name in ANSWER:
        np.testing.assert_allclose(getattr(alone, name), getattr(got, name), rtol=2e-5, atol=2e-5)


@every_implementation
def test_bfloat16(implementation):
    """Of bfloat16 states and head as they are: products of them are exact in float32."""
    problem = given("tiles_tied_padded_capped", jnp.bfloat16)
    got = run(*problem.arguments, implementation)
    check(got, expected(problem.oracle, problem.hidden, problem.labels, problem.weights, problem.question))


# The vector of scas 9.3: three positions, three entries, width two.
MATRIX = np.asarray([[0.5, -0.25], [0.0, 1.0], [-1.0, 0.5]])
STATES, LABELS = np.asarray([[1.0, 2.0], [0.0, -1.0], [2.0, 1.0]]), np.asarray([0, 2, 1])


@every_implementation
def test_the_vector(implementation):
    weights = jnp.full((1, 3), 1 / 3)
    head = Head(jnp.asarray(MATRIX, jnp.float32), 3, vocab_major=True)
    arguments = jnp.asarray(STATES, jnp.float32)[None], head, jnp.asarray(LABELS)[None], weights, None
    got = run(*arguments, implementation)
    np.testing.assert_allclose(got.label_logp[0], [-2.239544766, -1.314672325, -0.621052601], rtol=1e-6)
    np.testing.assert_allclose(got.brier[0], [1.429020546, 0.884779688, 0.391115696], rtol=1e-6)
    p = np.exp(STATES @ MATRIX.T)
    errors = p / p.sum(-1, keepdims=True) - np.eye(3)[LABELS]
    gram = ((errors @ errors.T) * (STATES @ STATES.T)).sum() / 9
    np.testing.assert_allclose(gram, (np.square(errors.T @ STATES / 3)).sum(), rtol=1e-12)
    np.testing.assert_allclose(got.norm[0], gram, rtol=1e-6)


# --- against autodiff


def loss(weight, head, hidden, labels, weights):
    """The weighted loss of one answer as anybody would write it, the head [D, V] being its own."""
    logits = head.logit_scale * (hidden @ weight)[:, : head.vocab_size]
    logits = head.soft_cap * jnp.tanh(logits / head.soft_cap) if head.soft_cap else logits
    return -jnp.sum(weights * jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0])


def drawn(dtype, soft_cap, width=8, vocab=61, padding=3):
    draw = np.random.default_rng(5)
    weight = jnp.asarray(draw.normal(size=(width, vocab + padding)) * 0.7, dtype)
    hidden = jnp.asarray(draw.normal(size=(4, 12, width)), dtype)
    labels = jnp.asarray(draw.integers(vocab, size=(4, 12)), jnp.int32)
    question = (hidden[:2, :5] * 0.5, labels[:2, ::-1][:, :5], jnp.full((2, 5), 0.2, dtype))
    return (
        Head(weight, vocab, logit_scale=1.3, soft_cap=soft_cap),
        hidden,
        labels,
        jnp.full((4, 12), 1 / 12, dtype),
        question,
    )


@jax.jit
def autodiff(head, hidden, labels, weights, question):
    """(squared norms [R], products with the question's [R])."""
    gradients = jax.vmap(jax.grad(loss), (None, None, 0, 0, 0))
    own, asked = (gradients(head.weight, head, *rows) for rows in ((hidden, labels, weights), question))
    return jnp.sum(own**2, (1, 2)), jnp.sum(own * jnp.repeat(asked, len(own) // len(asked), 0), (1, 2))


@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
@every_implementation
def test_norm_is_that_of_autodiff(implementation, soft_cap):
    """An untied head, with scale, cap and padding; scas 9.13 in float32."""
    arguments = drawn(jnp.float32, soft_cap)
    head, hidden, labels, weights, question = arguments
    got = run(hidden, head, labels, weights, question, implementation)
    norm, cross = autodiff(*arguments)
    np.testing.assert_allclose(got.norm, norm, rtol=1e-4)
    np.testing.assert_allclose(got.cross, cross, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
def test_norm_in_float64(soft_cap):
    with jax.enable_x64(True):
        arguments = drawn(jnp.float64, soft_cap)
        head, hidden, labels, weights, question = arguments
        got = run(hidden, head, labels, weights, question, "reference")
        norm, cross = autodiff(*arguments)
        assert got.norm.dtype == jnp.float64
        np.testing.assert_allclose(got.norm, norm, rtol=1e-10)
        np.testing.assert_allclose(got.cross, cross, rtol=1e-10, atol=1e-13)


@in_use
def test_tied_embeddings_are_the_heads_side_alone(implementation):
    """scas 9.13: the input's side adds to the gradient of a shared matrix; equality holds where it is stopped."""
    draw = np.random.default_rng(7)
    embedding = jnp.asarray(draw.normal(size=(31, 6)), jnp.float32)
    mix = jnp.asarray(draw.normal(size=(6, 6)), jnp.float32)
    tokens = jnp.asarray(draw.integers(31, size=11), jnp.int32)
    weights = jnp.full(10, 0.1)

    def states(embedding):
        return jnp.tanh(jnp.cumsum(embedding[tokens[:-1]], 0) @ mix)

    def total(embedding, stopped):
        hidden = states(embedding)
        hidden = jax.lax.stop_gradient(hidden) if stopped else hidden
        return loss(embedding.T, Head(embedding.T, 31), hidden, tokens[1:], weights)

    head = Head(embedding, 31, vocab_major=True)
    got = run(jax.jit(states)(embedding)[None], head, tokens[None, 1:], weights[None], None, implementation).norm[0]
    norm = jax.jit(lambda embedding, stopped: jnp.sum(jax.grad(total)(embedding, stopped) ** 2), static_argnums=1)
    whole, own = norm(embedding, False), norm(embedding, True)
    np.testing.assert_allclose(got, own, rtol=1e-4)
    assert abs(got / whole - 1) > 0.1


@every_implementation
def test_logit_gradients(implementation):
    """scas 9.14: sum of brier / n^2 is the logits' gradient, and ||e|| lies between its bounds."""

    def mean_nll(logits, labels):
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1))

    problem, n = given("tiles"), 15
    got = run(*problem.arguments, implementation)
    for hidden, labels, brier in zip(problem.hidden, problem.labels, got.brier, strict=True):
        by_logits = jax.grad(mean_nll)(jnp.asarray(problem.oracle.logits(hidden), jnp.float32), labels)
        np.testing.assert_allclose(jnp.sum(brier) / n**2, jnp.sum(by_logits**2), rtol=1e-4)
    error, missed = np.sqrt(got.brier), -np.expm1(oracle.f64(got.label_logp))
    vocab = problem.head.vocab_size
    assert (error >= np.sqrt(vocab / (vocab - 1)) * missed * (1 - 1e-5)).all()
    assert (error <= np.sqrt(2) * np.minimum(missed, -oracle.f64(got.label_logp)) * (1 + 1e-5)).all()


# --- what does not matter, and what must not harm


@pytest.mark.parametrize("garbage", [1e30, np.nan])
@every_implementation
def test_positions_of_weight_0(implementation, garbage):
    """Neither their states nor their labels move the sums; other answers stay as they are bit by bit."""
    problem = given("tiles_tied_padded_capped")
    weights = jnp.where(jnp.arange(15) < 9, problem.weights, 0.0)
    asked = (*problem.question[:2], jnp.where(jnp.arange(9)[None, :] < 4, problem.question[2], 0.0))
    got = run(problem.hidden, problem.head, problem.labels, weights, asked, implementation)

    def spoilt(hidden, labels, weights):
        dead = weights == 0
        return jnp.where(dead[:, :, None], garbage, hidden), jnp.where(dead, -1, labels), weights

    hidden, labels, _ = spoilt(problem.hidden, problem.labels, weights)
    other = run(hidden, problem.head, labels, weights, spoilt(*asked), implementation)
    for name in ("norm", "cross", "question_norm"):
        assert np.isfinite(getattr(other, name)).all()
        np.testing.assert_allclose(getattr(other, name), getattr(got, name), rtol=1e-5, atol=1e-6)
    live = weights != 0
    np.testing.assert_array_equal(other.share[~live], 0.0)
    np.testing.assert_allclose(other.brier[live], got.brier[live], rtol=1e-6)


@every_implementation
def test_an_answer_does_not_depend_on_the_others(implementation):
    problem = given("tiles")
    got = run(*problem.arguments, implementation)
    keep = jnp.arange(20) % 3 == 0
    hidden = jnp.where(keep[:, None, None], problem.hidden, 2 * problem.hidden[::-1])
    other = run(hidden, *problem.arguments[1:], implementation)
    for name in (*ANSWER, "cross", "rank"):
        np.testing.assert_array_equal(getattr(other, name)[keep], getattr(got, name)[keep])
    assert not np.allclose(other.norm[~keep], got.norm[~keep])
    bad = run(problem.hidden.at[3, 8].set(jnp.nan), *problem.arguments[1:], implementation)
    assert np.argwhere(np.isnan(bad.norm)).tolist() == np.argwhere(np.isnan(bad.cross)).tolist() == [[3]]


@every_implementation
def test_extreme_logits(implementation):
    """+-1e4: finite, right to what float32 leaves of them; a label of probability 1 has no gradient at all."""
    draw = np.random.default_rng(3)
    logits = draw.normal(size=(2, 6, 40))
    logits[0, :3, 7], logits[0, 3:, 8] = 1e4, -1e4
    logits[1, :, ::2], logits[1, :, 5] = -1e4, 1e4
    labels = jnp.asarray([[7, 3, 7, 8, 2, 9], [5] * 6])
    weights = jnp.full((2, 6), 1 / 6)
    question = jnp.asarray(-logits[:, :4], jnp.float32), labels[:, :4], weights[:, :4]
    arguments = jnp.asarray(logits, jnp.float32), Head(jnp.eye(40), 40), labels, weights, question
    got = run(*arguments, implementation)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
    assert got.norm[1] == 0.0
    assert not got.share[1].any()
    head = oracle.HeadOracle(np.eye(40), 40, False)
    check(got, expected(head, arguments[0], labels, weights, question))


@every_implementation
def test_well_predicted_labels(implementation):
    """Labels of probability 1 - 1e-5: nothing is lost to 1 - 2 p + p^2."""
    draw = np.random.default_rng(4)
    logits = draw.normal(size=(1, 8, 50))
    labels = draw.integers(50, size=(1, 8))
    logits[0, np.arange(8), labels[0]] = 16.0 + draw.normal(size=8)
    arguments = (
        jnp.asarray(logits, jnp.float32),
        Head(jnp.eye(50), 50),
        jnp.asarray(labels),
        jnp.full((1, 8), 1 / 8),
        None,
    )
    got = run(*arguments, implementation)
    wanted = oracle.head_gradient(
        oracle.HeadOracle(np.eye(50), 50, False), arguments[0][0], labels[0], np.full(8, 1 / 8)
    )
    assert wanted["norm"] < 1e-6
    np.testing.assert_allclose(got.norm[0], wanted["norm"], rtol=1e-4)
    np.testing.assert_allclose(got.brier[0], wanted["brier"], rtol=1e-4)


@every_implementation
def test_ties_give_the_best_rank(implementation):
    """Every column three times over, far apart: a label's equals never stand above it, whoever sums its products."""
    draw = np.random.default_rng(6)
    few = draw.normal(size=(333, 70)).astype(np.float32)
    hidden = jnp.asarray(draw.normal(size=(2, 25, 333)), jnp.float32)
    labels = draw.integers(210, size=(2, 25))
    head = Head(jnp.asarray(np.tile(few, (1, 3))), 210)
    got = run(hidden, head, jnp.asarray(labels), jnp.ones((2, 25)), None, implementation).rank
    logits = oracle.f64(hidden) @ oracle.f64(few)
    own = np.take_along_axis(logits, labels[:, :, None] % 70, 2)
    np.testing.assert_array_equal(got, 1 + 3 * (logits > own).sum(-1))
    same = run(jnp.zeros_like(hidden), head, jnp.asarray(labels), jnp.ones((2, 25)), None, implementation).rank
    assert (same == 1).all()


@in_use
def test_unknown_labels(implementation):
    """NaN where they are read, and nowhere else."""
    problem = given("tiles")
    labels = problem.labels.at[2, 0].set(37).at[6, 2].set(-1)
    weights = problem.weights.at[2, 0].set(1.0).at[6, 2].set(0.0)
    asked = (problem.question[0], problem.question[1].at[3, 1].set(40), problem.question[2])
    got = run(problem.hidden, problem.head, labels, weights, asked, implementation)
    for name, places in {"label_logp": [[2, 0], [6, 2]], "brier": [[2, 0], [6, 2]], "norm": [[2]]}.items():
        np.testing.assert_array_equal(np.argwhere(np.isnan(getattr(got, name))), places)
    assert np.isnan(got.share[2]).all()
    assert np.argwhere(np.isnan(got.cross))[:, 0].tolist() == [2, 12, 13, 14, 15]
    assert np.argwhere(np.isnan(got.question_norm)).tolist() == [[3]]
    assert got.rank[2, 0] == got.rank[6, 2] == 0


@in_use
def test_vmap(implementation):
    problem = given("tied_padded_capped")
    states = jnp.stack([problem.hidden, 2 * problem.hidden[:, ::-1]])
    got = jax.vmap(lambda hidden: run(hidden, *problem.arguments[1:], implementation))(states)
    for at in range(2):
        wanted = expected(problem.oracle, states[at], problem.labels, problem.weights, problem.question)
        check(jax.tree.map(lambda a, at=at: a[at], got), wanted)


@in_use
def test_no_gradient(implementation):
    problem = given("tied")

    def total(hidden, weight, weights):
        head = dataclasses.replace(problem.head, weight=weight)
        got = run(hidden, head, problem.labels, weights, problem.question, implementation)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(got) if leaf.dtype == jnp.float32)

    for gradient in jax.grad(total, (0, 1, 2))(problem.hidden, problem.head.weight, problem.weights):
        assert not gradient.any()


@pytest.mark.parametrize(
    ("answers", "question", "message"),
    [
        ((3, 4, 6), (2, 5, 6), "^hidden must hold as many answers for each of the 2 questions, got 3; .*weight 0"),
        ((2, 4, 6), (0, 5, 6), "^hidden must hold as many answers for each of the 0 questions, got 2; "),
        ((2, 4, 6), (2, 5, 7), "^question's hidden states must be as wide as the answers' 6, got 7; .*one model"),
    ],
)
def test_bad_sizes(answers, question, message):
    def rows(size):
        return jnp.zeros(size), jnp.zeros(size[:2], jnp.int32), jnp.zeros(size[:2])

    hidden, labels, weights = rows(answers)
    with pytest.raises(ValueError, match=message):
        answer_gradient(hidden, Head(jnp.zeros((6, 9)), 9), labels, weights, question=rows(question))


# --- a vocabulary that is split over devices


def split(mesh, vocab, implementation):
    """(answers and questions over 'data', weight over 'vocab') -> HeadGradient over 'data'."""

    def local(hidden, labels, weights, question, weight):
        head = Head(weight, vocab, soft_cap=9.0, vocab_axis="vocab")
        name = implementation.partition(",")[0]
        return answer_gradient(hidden, head, labels, weights, question=question, rank=True, implementation=name)

    specs = (P("data"), P("data"), P("data"), P("data"), P(None, "vocab"))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)


def vocab_mesh():
    return jax.make_mesh((2, 4), ("data", "vocab"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("vocab", [37, 13])
@every_implementation
def test_split_vocabulary(implementation, vocab):
    """2 x 4 devices; a last device with padding, or with nothing but padding."""
    draw, width = np.random.default_rng(vocab), -(-vocab // 4) + 1
    weight = draw.normal(size=(5, 4 * width)).astype(np.float32)
    weight[:, vocab:] = 50.0

    def rows(count, size):
        hidden = jnp.asarray(draw.normal(size=(count, size, 5)), jnp.float32)
        labels = jnp.asarray(draw.integers(vocab, size=(count, size)), jnp.int32)
        return hidden, labels, jnp.asarray(draw.uniform(size=(count, size)), jnp.float32)

    answers, question = rows(12, 6), rows(4, 3)
    got = jax.jit(split(vocab_mesh(), vocab, implementation))(*answers, question, weight)
    check(got, expected(oracle.HeadOracle(weight, vocab, False, soft_cap=9.0), *answers, question))


# --- how it is computed


def test_the_form_is_counted_out():
    """Gram while T + U < 3 D, and while the pairs of one answer can be kept."""
    assert xla._in_gram_form(8, 512, 256, 576)
    assert xla._in_gram_form(1, 1728, 0, 576)
    assert not xla._in_gram_form(1, 1729, 0, 576)
    assert not xla._in_gram_form(1, 1500, 1000, 576)
    assert xla._in_gram_form(1, 4096, 0, 4096)
    assert not xla._in_gram_form(1, 4097, 0, 4096)


@pytest.mark.parametrize(
    ("sizes", "tile"),
    [((1, 8, 128, 128), (1, 8)), ((1, 30, 256, 256), (1, 15)), ((40, 8, 32, 32), (14, 8)), ((3, 1, 9000, 9), (1, 1))],
)
def test_tiles(sizes, tile):
    """All answers of a question at once if they fit, and as many questions; evened out."""
    assert xla._tile_sizes(*sizes) == tile


@pytest.mark.parametrize(("size", "length"), [(128, 128), (512, 256), (8192, 100)])
def test_nothing_is_rows_by_vocabulary(size, length):
    """Nor rows x vocabulary, nor vocabulary x width but the head itself; the long one in the sum form."""
    vocab, width, each, questions = 50257, 16 if size == 8192 else 256, 4, 2

    def rows(count, size):
        shapes = ((count, size, width), jnp.float32), ((count, size), jnp.int32), ((count, size), jnp.float32)
        return tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)

    head = Head(jax.ShapeDtypeStruct((vocab, width), jnp.float32), vocab, vocab_major=True)
    hidden, labels, weights = rows(questions * each, size)
    program = run.lower(hidden, head, labels, weights, rows(questions, length), "xla").compile()
    text = program.as_text().replace(f"[{vocab},{width}]", "")
    elements, shape = oracle.largest_shape(text)
    states = questions * each * size * width
    assert elements <= max(xla.LOGITS, states), shape
    assert program.memory_analysis().temp_size_in_bytes < 4 * (6 * xla.LOGITS + 6 * states)


def test_the_scan_sees_it_in_the_reference():
    head = Head(jax.ShapeDtypeStruct((1000, 4), jnp.float32), 1000, vocab_major=True)
    shapes = ((2, 48, 4), jnp.float32), ((2, 48), jnp.int32), ((2, 48), jnp.float32)
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    program = run.lower(arguments[0], head, *arguments[1:], None, "reference").compile()
    assert oracle.largest_shape(program.as_text())[0] >= 48 * 1000
