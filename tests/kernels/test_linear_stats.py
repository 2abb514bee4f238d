"""linear_stats and linear_pair_stats: every implementation x every shape against the float64 oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.kernels.linear_stats import (
    IMPLEMENTATIONS,
    PAIR_IMPLEMENTATIONS,
    head_gradient_norm,
    linear_pair_stats,
    linear_stats,
)
from kdjax.types import Head
from tests.kernels import oracle
from tests.kernels.problems import SHAPES, Shape, make_problem

pytestmark = pytest.mark.usefixtures("small_tiles")
# pallas_gpu takes none of these small float32 shapes and has its own in test_pallas_gpu.py.
every_implementation = pytest.mark.parametrize("implementation", sorted({*IMPLEMENTATIONS} - {"pallas_gpu"}))


@functools.cache  # one program per shape for all tests
def program(implementation, pair=False, top_k=0):
    function = linear_pair_stats if pair else linear_stats
    return jax.jit(functools.partial(function, top_k=top_k, implementation=implementation))


def compare(stats, logits, labels, tolerance=1e-5):
    want = oracle.statistics(logits, labels)
    assert {field.name for field in dataclasses.fields(stats)} == {*want, "top"}
    for name, values in want.items():
        got = getattr(stats, name)
        assert got.dtype == (jnp.int32 if name == "argmax" else jnp.float32)
        np.testing.assert_allclose(got, values, rtol=tolerance, atol=2e-6, err_msg=name)


@every_implementation
@pytest.mark.parametrize("name", SHAPES)
def test_against_the_oracle(implementation, name):
    p = make_problem(SHAPES[name])
    logits, teacher_logits = p.oracle.logits(p.hidden), p.teacher_oracle.logits(p.teacher_hidden)
    pair = program(implementation, True)(p.hidden, p.head, p.teacher_hidden, p.teacher_head, p.labels)
    compare(pair.student, logits, p.labels)
    compare(pair.teacher, teacher_logits, p.labels)
    np.testing.assert_allclose(pair.kl, oracle.kl(teacher_logits, logits), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(pair.reverse_kl, oracle.kl(logits, teacher_logits), rtol=2e-5, atol=1e-6)


@every_implementation
@pytest.mark.parametrize("name", ["empty", "tied_padded_capped", "tiles"])
def test_one_side(implementation, name):
    p = make_problem(SHAPES[name])
    compare(program(implementation)(p.hidden, p.head, p.labels), p.oracle.logits(p.hidden), p.labels)


def test_every_implementation_has_a_pair():
    assert set(PAIR_IMPLEMENTATIONS) == set(IMPLEMENTATIONS)


@every_implementation
def test_bfloat16(implementation):
    """Inputs in bfloat16, statistics in float32: as exact as from float32 inputs of the same values."""
    p = make_problem(SHAPES["tiles_tied_padded_capped"], jnp.bfloat16)
    pair = program(implementation, True)(p.hidden, p.head, p.teacher_hidden, p.teacher_head, p.labels)
    compare(pair.student, p.oracle.logits(p.hidden.astype(jnp.float32)), p.labels)
    compare(pair.teacher, p.teacher_oracle.logits(p.teacher_hidden.astype(jnp.float32)), p.labels)


@every_implementation
def test_vmap(implementation):
    parts = [make_problem(Shape(70, 9, padding=2), seed=seed) for seed in range(3)]
    hidden, teacher_hidden, labels = (
        jnp.stack([getattr(p, name) for p in parts]) for name in ("hidden", "teacher_hidden", "labels")
    )
    heads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *((p.head, p.teacher_head) for p in parts))
    pair = jax.jit(jax.vmap(program(implementation, True)))(hidden, heads[0], teacher_hidden, heads[1], labels)
    for at, p in enumerate(parts):
        mine = jax.tree.map(lambda leaf, at=at: leaf[at], pair)
        compare(mine.student, p.oracle.logits(p.hidden), p.labels)
        compare(mine.teacher, p.teacher_oracle.logits(p.teacher_hidden), p.labels)


LOGITS = {
    "peaks": [[1e4, -1e4, 0, 0, 0], [-1e4, 1e4, 1e4, -1e4, 1e4], [0, 0, 0, 0, 1e4]],
    "all high": [[1e4] * 5, [-1e4] * 5, [1e4, 1e4 + 1, 1e4 - 1, 1e4, 1e4 + 2]],
    "underflow": [[-88, -90, 0, 9, 104], [0, -104, -103, -87, -88], [200, 0, -200, 100, -100]],
}


@every_implementation
@pytest.mark.parametrize("name", LOGITS)
def test_extreme_logits(implementation, name):
    logits, eye = jnp.array(LOGITS[name], jnp.float32), Head(jnp.eye(5), 5)
    other, labels = logits[::-1], jnp.array([1, 0, 4])
    pair = program(implementation, True)(logits, eye, other, eye, labels)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(pair))
    compare(pair.student, logits, labels)
    np.testing.assert_allclose(pair.kl, oracle.kl(other, logits), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pair.reverse_kl, oracle.kl(logits, other), rtol=1e-5, atol=1e-6)


@every_implementation
def test_vectors(implementation):
    """sekd 9.1, 9.3 and 9.4: entropies, both KL, cross-entropies at target 1; uniform logits."""
    teacher, student = jnp.array([[2.0, 1, 0, -1, -2]]), jnp.array([[0.5, 1.5, -0.5, 0, -1]])
    eye = Head(jnp.eye(5), 5)
    pair = program(implementation, True)(student, eye, teacher, eye, jnp.array([1]))
    got = [pair.teacher.entropy, pair.student.entropy, pair.kl, pair.reverse_kl]
    got += [-pair.student.label_logp, -pair.teacher.label_logp]
    want = [0.9999728283, 1.2441059105, 0.4778198667, 0.4621568362, 0.5924590010, 1.4519143959]
    np.testing.assert_allclose(np.concatenate(got), want, rtol=1e-6)
    wide = Head(jnp.zeros((1, 151936)), 151936)
    uniform = program(implementation)(jnp.ones((1, 1)), wide, jnp.array([7]))
    np.testing.assert_allclose(uniform.entropy, 11.931215, rtol=2e-5)  # the reference adds 152k float32 numbers
    np.testing.assert_allclose(uniform.label_logp, -11.931215, rtol=1e-6)


@every_implementation
@pytest.mark.parametrize("name", ["tied", "tiles"])
def test_gradient_norms(implementation, name):
    """||q - onehot|| and its outer product with the hidden states, with the logit scale of the head."""
    p = make_problem(dataclasses.replace(SHAPES[name], logit_scale=-0.5))
    stats = program(implementation)(p.hidden, p.head, p.labels)
    q = np.exp(oracle.log_softmax(p.oracle.logits(p.hidden)))
    by_logits = q - np.eye(p.head.vocab_size)[p.labels]
    np.testing.assert_allclose(stats.token_gradient_norm, np.linalg.norm(by_logits, axis=-1), rtol=1e-5)
    by_head = -0.5 * np.einsum("nv,nd->nvd", by_logits, oracle.f64(p.hidden))
    norm = np.linalg.norm(by_head.reshape(len(q), -1), axis=-1)
    np.testing.assert_allclose(head_gradient_norm(stats, p.hidden, p.head), norm, rtol=1e-5)


@every_implementation
@pytest.mark.parametrize("missing", [1e-2, 1e-6, 1e-10, 1e-30])
def test_gradient_norms_of_sure_labels(implementation, missing):
    """A label of probability 1 - 1e-6: sum q^2 - 2 q_y + 1 would be rounding alone, brier has all its digits."""
    logits = np.log(np.array([[1 - missing, *(missing * np.array([0.5, 0.2, 0.3, 0.0]) + 1e-45)]])).astype(np.float32)
    hidden, labels = jnp.asarray(np.repeat(logits, 3, 0)), jnp.array([0, 0, 1])
    stats = program(implementation)(hidden, Head(jnp.eye(5), 5), labels)
    q = np.exp(oracle.log_softmax(hidden))
    others = np.delete(q[0], 0)
    sure = np.sqrt((others**2).sum() + others.sum() ** 2)  # q_y - 1 = - the sum of the others, without cancellation
    unsure = np.linalg.norm(q[2] - np.eye(5)[1])
    # Squares of 1e-30 underflow in float32: 0, as good as it gets.
    want = [sure if sure > 1e-18 else 0.0] * 2 + [unsure]
    np.testing.assert_allclose(stats.token_gradient_norm, want, rtol=1e-5)
    np.testing.assert_allclose(stats.brier, np.square(want), rtol=2e-5)


def test_the_cap_has_no_head_gradient_norm():
    p = make_problem(SHAPES["tied_padded_capped"])
    with pytest.raises(ValueError, match="^head.soft_cap must be 0, got 4.0; .* Use token_gradient_norm"):
        head_gradient_norm(program("xla")(p.hidden, p.head, p.labels), p.hidden, p.head)


@every_implementation
@pytest.mark.parametrize("name", ["empty", "untied_padded", "tiles_tied_padded_capped"])
def test_top_k(implementation, name):
    """The largest entries of both sides, by the way."""
    p = make_problem(SHAPES[name])
    pair = program(implementation, True, 5)(p.hidden, p.head, p.teacher_hidden, p.teacher_head, p.labels)
    one = program(implementation, False, 1)(p.hidden, p.head, p.labels)
    assert program(implementation)(p.hidden, p.head, p.labels).top is None
    student, teacher = p.oracle.logits(p.hidden), p.teacher_oracle.logits(p.teacher_hidden)
    for stats, logits, k in ((pair.student, student, 5), (pair.teacher, teacher, 5), (one, student, 1)):
        order = np.argsort(-logits, -1, kind="stable")[:, :k]
        np.testing.assert_array_equal(stats.top.ids, order)
        logp = np.take_along_axis(oracle.log_softmax(logits), order, 1)
        np.testing.assert_allclose(stats.top.logp, logp, rtol=1e-5, atol=2e-6)
        assert (stats.top.ids.dtype, stats.top.logp.dtype) == (jnp.int32, jnp.float32)


@every_implementation
def test_top_k_takes_the_lower_index(implementation):
    """All of them, across chunks of columns: 40 columns in chunks of 16, of which the last one starts again at 24."""
    logits = np.zeros((2, 40), np.float32)
    logits[0, [5, 20, 39]] = 3.0
    logits[1, :] = -7.0
    top = program(implementation, False, 40)(jnp.asarray(logits), Head(jnp.eye(40), 40), jnp.zeros(2, jnp.int32)).top
    np.testing.assert_array_equal(top.ids, np.argsort(-logits, -1, kind="stable"))


@every_implementation
def test_argmax_takes_the_lower_index(implementation):
    logits = jnp.array([[0.0, 2, 1, 2], [3, 3, 3, 3], [-1, -5, -1, -1], [0, -0.0, 0, 0]])
    stats = program(implementation)(logits, Head(jnp.eye(4), 4), jnp.zeros(4, jnp.int32))
    assert stats.argmax.tolist() == [1, 0, 0, 0]


@every_implementation
def test_no_gradient(implementation):
    p = make_problem(SHAPES["tiles"])

    def total(hidden, head, teacher_hidden, teacher_head):
        one = program(implementation)(hidden, head, p.labels)
        two = program(implementation, True)(hidden, head, teacher_hidden, teacher_head, p.labels)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves((one, two)) if leaf.dtype == jnp.float32)

    gradients = jax.grad(total, (0, 1, 2, 3))(p.hidden, p.head, p.teacher_hidden, p.teacher_head)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


@every_implementation
def test_rows_do_not_touch_each_other(implementation):
    """A NaN row, or a label outside the vocabulary on a row that is masked later, spoils that row alone."""
    p = make_problem(SHAPES["tiles"])
    clean = program(implementation)(p.hidden, p.head, p.labels)
    hidden, labels = p.hidden.at[70].set(jnp.nan), p.labels.at[71].set(10**6)
    dirty = program(implementation)(hidden, p.head, labels)
    rest = np.delete(np.arange(300), [70, 71])
    for name in ("logz", "entropy", "label_logp", "sum_p_sq", "max_logp", "argmax"):
        np.testing.assert_array_equal(getattr(clean, name)[rest], getattr(dirty, name)[rest], err_msg=name)
    assert np.isnan(dirty.entropy[70])


def test_errors():
    p = make_problem(SHAPES["tied"])
    message = "^implementation of {} must be .*'refrence'.* Did you mean 'reference'"
    with pytest.raises(ValueError, match=message.format("linear_stats")):
        linear_stats(p.hidden, p.head, p.labels, implementation="refrence")
    rest = (p.teacher_hidden, p.teacher_head, p.labels)
    with pytest.raises(ValueError, match=message.format("linear_pair_stats")):
        linear_pair_stats(p.hidden, p.head, *rest, implementation="refrence")
    other = dataclasses.replace(p.head, vocab_size=12)
    with pytest.raises(ValueError, match="^teacher_head.vocab_size must equal the student's 12, got 13; .* Set both"):
        linear_pair_stats(p.hidden, other, *rest)
    for k in (-1, 14):
        with pytest.raises(ValueError, match=f"^top_k must be between 0 and the 13 entries .*, got {k}; .* Set it to"):
            linear_stats(p.hidden, p.head, p.labels, top_k=k)
        with pytest.raises(ValueError, match=f"^top_k must be between 0 and the 13 entries .*, got {k}; .* Set it to"):
            linear_pair_stats(p.hidden, p.head, *rest, top_k=k)


def test_the_default_is_xla(monkeypatch):
    def ran(*rows, **options):
        raise RuntimeError("xla ran")

    monkeypatch.setitem(IMPLEMENTATIONS, "xla", ran)
    monkeypatch.setitem(PAIR_IMPLEMENTATIONS, "xla", ran)
    p = make_problem(SHAPES["tied"])
    with pytest.raises(RuntimeError, match="xla ran"):
        linear_stats(p.hidden, p.head, p.labels)
    with pytest.raises(RuntimeError, match="xla ran"):
        linear_pair_stats(p.hidden, p.head, p.teacher_hidden, p.teacher_head, p.labels)
