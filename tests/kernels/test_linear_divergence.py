"""linear_divergence: every implementation x every shape against the float64 oracle; then what it must survive."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.kernels.linear_divergence import IMPLEMENTATIONS, Term, linear_divergence
from kdjax.types import Head
from tests.kernels import oracle
from tests.kernels.problems import SHAPES, Shape, make_problem

# Each kind of term a divergence can be; the kernel knows nothing else about it. Beside it: the same in numpy,
# (log p, log q, one-hot labels) -> [N].
FORWARD = Term(lambda pair: pair.p * (pair.logp - pair.logq), gradient_sum=-1.0)
SQUARE = Term(lambda pair: jnp.square(pair.p - pair.q))  # its gradient sum differs from row to row
SURPRISE = Term(lambda pair: jnp.where(pair.is_label, -pair.logq, 0.0), False, False, gradient_sum=-1.0)
CONFIDENCE = Term(lambda pair: pair.q * pair.logq, teacher=False)
# A number of the teacher's row, from the whole vocabulary, scales it.
SHARPNESS = Term(
    lambda pair: pair.row[:, 0:1] * jnp.square(pair.p - pair.q),
    row_scalars=lambda pair, vocab_sum: vocab_sum(jnp.square(pair.p)),
)
NUMPY = {
    FORWARD: lambda logp, logq, is_label: (np.exp(logp) * (logp - logq)).sum(-1),
    SQUARE: lambda logp, logq, is_label: ((np.exp(logp) - np.exp(logq)) ** 2).sum(-1),
    SURPRISE: lambda logp, logq, is_label: -(logq * is_label).sum(-1),
    CONFIDENCE: lambda logp, logq, is_label: (np.exp(logq) * logq).sum(-1),
    SHARPNESS: lambda logp, logq, is_label: (np.exp(logp) ** 2).sum(-1) * ((np.exp(logp) - np.exp(logq)) ** 2).sum(-1),
}
MIXTURE = {FORWARD: 0.7, SQUARE: 2.0, SURPRISE: 1.3, CONFIDENCE: -0.4, SHARPNESS: 1.6}

pytestmark = pytest.mark.usefixtures("small_tiles")
# pallas_gpu takes none of these small float32 shapes and has its own in test_pallas_gpu.py.
every_implementation = pytest.mark.parametrize("implementation", sorted({*IMPLEMENTATIONS} - {"pallas_gpu"}))


def arguments(p):
    return p.hidden, p.head, p.teacher_hidden, p.teacher_head, p.labels, p.weight


@functools.cache  # one program per shape for all tests
def programs(implementation, terms):
    """(total and values, total and values and the gradients by hidden and head), jitted."""

    def run(p, coefficients, tau):
        return linear_divergence(*p, terms, coefficients, tau, implementation=implementation)

    def split(hidden, head, rest, coefficients, tau):
        return run((hidden, head, *rest), coefficients, tau)

    def differentiated(p, coefficients, tau):
        (total, values), gradients = jax.value_and_grad(split, (0, 1), has_aux=True)(*p[:2], p[2:], coefficients, tau)
        return total, values, gradients[0], gradients[1].weight

    return jax.jit(run), jax.jit(differentiated)


def run(implementation, p, mixture, tau=1.0):
    """(total, values)."""
    return programs(implementation, tuple(mixture))[0](arguments(p), list(mixture.values()), tau)


def with_gradients(implementation, p, mixture, tau=1.0):
    """(total, values, d total / d hidden, d total / d head.weight)."""
    return programs(implementation, tuple(mixture))[1](arguments(p), list(mixture.values()), tau)


def expected(p, mixture, tau=1.0):
    """The same from the oracle."""
    is_label = np.eye(p.head.vocab_size)[p.labels]
    teacher = p.teacher_oracle.logits(p.teacher_hidden.astype(jnp.float32))
    hidden = p.hidden.astype(jnp.float32)

    def value(term, logits):
        t = tau if term.tempered else 1.0
        return NUMPY[term](oracle.log_softmax(teacher / t), oracle.log_softmax(logits / t), is_label)

    def mixed(logits):
        return sum(c * (tau**2 if term.tempered else 1.0) * value(term, logits) for term, c in mixture.items())

    logits = p.oracle.logits(hidden)
    total = (oracle.f64(p.weight) * mixed(logits)).sum()
    return total, np.stack([value(term, logits) for term in mixture]), *p.oracle.gradients(hidden, mixed, p.weight)


def compare(got, want, values, gradients):
    """Values within `values` relative, gradients within `gradients` of their largest entry."""
    np.testing.assert_allclose(got[0], want[0], rtol=values, atol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=values, atol=2e-6)
    for ours, oracles in zip(got[2:], want[2:], strict=True):
        scale = np.abs(oracles).max(initial=1e-6)
        np.testing.assert_allclose(oracle.f64(ours), oracles, rtol=gradients, atol=gradients * scale)


@every_implementation
@pytest.mark.parametrize("name", SHAPES)
def test_against_the_oracle(implementation, name):
    shape = SHAPES[name]
    p = make_problem(shape)
    _, _, _, d_weight = got = with_gradients(implementation, p, MIXTURE, 1.7)
    compare(got, expected(p, MIXTURE, 1.7), 1e-5, 1e-4)
    assert [array.shape for array in got] == [(), (len(MIXTURE), shape.rows), p.hidden.shape, p.head.weight.shape]
    assert {array.dtype for array in got} == {jnp.dtype("float32")}
    padding = d_weight[shape.vocab :] if shape.vocab_major else d_weight[:, shape.vocab :]
    assert not padding.any()


@every_implementation
@pytest.mark.parametrize("name", ["empty", "tied", "tiles"])
def test_without_differentiation(implementation, name):
    """Another path runs; it gives the same."""
    p = make_problem(SHAPES[name])
    total, values = run(implementation, p, MIXTURE, 1.7)
    want = with_gradients(implementation, p, MIXTURE, 1.7)
    np.testing.assert_allclose(total, want[0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(values, want[1], rtol=1e-6, atol=1e-7)


@every_implementation
@pytest.mark.parametrize("term", NUMPY)
def test_one_term_and_temperature(implementation, term):
    """Each kind of term by itself, so that nothing hides behind a larger part of the mixture."""
    p = make_problem(Shape(5, 7, padding=2), seed=3)
    for tau in (0.5, 3.0):
        compare(with_gradients(implementation, p, {term: 1.0}, tau), expected(p, {term: 1.0}, tau), 2e-5, 1e-4)


@every_implementation
def test_bfloat16(implementation):
    """Inputs in bfloat16, statistics in float32: values as exact as ever, gradients to the 8 bits they are kept in."""
    p = make_problem(SHAPES["tiles_tied_padded_capped"], jnp.bfloat16)
    got = with_gradients(implementation, p, MIXTURE)
    assert [array.dtype for array in got] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16]
    compare(got, expected(p, MIXTURE), 1e-5, 1e-2)


@every_implementation
def test_only_the_student_has_a_gradient(implementation):
    p = make_problem(SHAPES["tiles"])

    def total(teacher_hidden, teacher_head, weight, coefficients, tau):
        q = (p.hidden, p.head, teacher_hidden, teacher_head, p.labels, weight)
        total, values = programs(implementation, tuple(MIXTURE))[0](q, coefficients, tau)
        return total + jnp.sum(values)

    others = (p.teacher_hidden, p.teacher_head, p.weight, [jnp.float32(c) for c in MIXTURE.values()], jnp.float32(2.0))
    assert not any(leaf.any() for leaf in jax.tree.leaves(jax.grad(total, (0, 1, 2, 3, 4))(*others)))

    def values(hidden):
        return jnp.sum(run(implementation, dataclasses.replace(p, hidden=hidden), MIXTURE)[1])

    assert not jax.grad(values)(p.hidden).any()


@every_implementation
def test_the_gradient_takes_the_cotangent(implementation):
    p = make_problem(SHAPES["tied"])
    total, _, d_hidden, d_weight = with_gradients(implementation, p, MIXTURE)

    def squared(hidden, head):
        return run(implementation, dataclasses.replace(p, hidden=hidden, head=head), MIXTURE)[0] ** 2

    by_hidden, by_head = jax.jit(jax.grad(squared, (0, 1)))(p.hidden, p.head)
    np.testing.assert_allclose(by_hidden, 2 * total * d_hidden, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_head.weight, 2 * total * d_weight, rtol=1e-5, atol=1e-6)


@every_implementation
def test_vmap(implementation):
    parts = [make_problem(Shape(70, 9, padding=2), seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(arguments, parts))
    one = programs(implementation, tuple(MIXTURE))[1]
    batched = jax.jit(jax.vmap(one, (0, None, None)))(stacked, list(MIXTURE.values()), 1.5)
    for at, p in enumerate(parts):
        compare([part[at] for part in batched], expected(p, MIXTURE, 1.5), 1e-5, 1e-4)


EYE = Head(jnp.eye(5), 5)  # rows are their own logits
LOUD = jnp.array(
    [
        [1e4, -1e4, 0, 0, 0],
        [-1e4, 1e4, 1e4, -1e4, 1e4],
        [1e4, 1e4, 1e4, 1e4, 1e4],
        [0, 0, 0, 0, -1e4],
        [-88, -90, 0, 9, 104],
    ],
    jnp.float32,
)


def logits_problem(student, teacher, soft_cap=0.0):
    """A problem whose hidden states are the logits before the soft cap."""
    p = make_problem(Shape(len(student), 5, width=5, teacher_width=5))
    exact = oracle.HeadOracle(np.eye(5), 5, False)
    return dataclasses.replace(
        p,
        hidden=student,
        teacher_hidden=teacher,
        head=dataclasses.replace(EYE, soft_cap=soft_cap),
        teacher_head=EYE,
        oracle=dataclasses.replace(exact, soft_cap=soft_cap),
        teacher_oracle=exact,
        weight=jnp.ones(len(student)),
    )


@every_implementation
@pytest.mark.parametrize("soft_cap", [0.0, 30.0])
def test_extreme_logits(implementation, soft_cap):
    """Logits of +-1e4, probabilities that underflow to 0 on either side or both: finite and still right."""
    order = np.array([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 4])
    other = np.array([0, 1, 2, 3, 4, 0, 1, 3, 2, 4, 3, 0, 4])
    p = logits_problem(LOUD[order], LOUD[other], soft_cap)
    got = with_gradients(implementation, p, MIXTURE)
    assert all(np.isfinite(array).all() for array in got)
    compare(got[:3], expected(p, MIXTURE)[:3], 1e-5, 1e-4)


@every_implementation
@pytest.mark.parametrize("soft_cap", [0.0, 3.0])
def test_rows_of_weight_0_add_nothing(implementation, soft_cap):
    """Whatever they hold, on either side: 0 * nan would be enough to lose the gradient of the whole head."""
    p = make_problem(Shape(150, 9, soft_cap=soft_cap))
    empty = np.asarray(p.weight == 0)
    assert 10 < empty.sum() < 50
    clean = with_gradients(implementation, p, MIXTURE)
    for junk in (np.nan, np.inf, -np.inf, 3e38):
        hidden, teacher = (jnp.where(empty[:, None], junk, h) for h in (p.hidden, p.teacher_hidden))
        dirty = with_gradients(implementation, dataclasses.replace(p, hidden=hidden, teacher_hidden=teacher), MIXTURE)
        for at in (0, 2, 3):
            np.testing.assert_array_equal(clean[at], dirty[at])
        np.testing.assert_array_equal(clean[1][:, ~empty], dirty[1][:, ~empty])
    assert not clean[2][empty].any()


@every_implementation
def test_rows_with_weight_are_not_hidden(implementation):
    """NaN in a row that counts, or in its weight, reaches the total and the gradient: the loop must see it."""
    p = make_problem(SHAPES["tied"])
    for field in ("hidden", "teacher_hidden", "weight"):
        spoiled = dataclasses.replace(p, **{field: getattr(p, field).at[0].set(jnp.nan)})
        total, _, _, d_weight = with_gradients(implementation, spoiled, MIXTURE)
        assert np.isnan(total)
        assert np.isnan(d_weight).any()


@every_implementation
def test_temperature_rule(implementation):
    """d tau^2 KL / d logits = tau (q - p), p and q at temperature tau (sekd 9.2)."""
    student, teacher = jnp.array([[0.5, 1.5, -0.5, 0, -1]]), jnp.array([[2.0, 1, 0, -1, -2]])
    for tau in (1.0, 0.5, 4.0):
        p = logits_problem(student, teacher)
        total, values, d_hidden, _ = with_gradients(implementation, p, {FORWARD: 1.0}, tau)
        soft_p, soft_q = (np.exp(oracle.log_softmax(z / tau)) for z in (teacher, student))
        np.testing.assert_allclose(d_hidden, tau * (soft_q - soft_p), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(total, tau**2 * oracle.kl(teacher / tau, student / tau)[0], rtol=1e-5)
        np.testing.assert_allclose(values[0], oracle.kl(teacher / tau, student / tau), rtol=1e-5)


@every_implementation
def test_no_teacher(implementation):
    """Terms that read no teacher run without one, and do not look at one that is there."""
    p, own = make_problem(SHAPES["tied"]), {SURPRISE: 1.0, CONFIDENCE: 0.5}
    want, _ = run(implementation, p, own)
    without, _ = run(implementation, dataclasses.replace(p, teacher_hidden=None, teacher_head=None), own)
    poisoned, _ = run(implementation, dataclasses.replace(p, teacher_hidden=p.teacher_hidden * jnp.nan), own)
    assert want == without == poisoned


@every_implementation
def test_a_term_sees_only_what_it_declares(implementation):
    """In a mixture, too: a term that forgot to say that it reads the teacher fails at once, not only when alone."""
    p, blind = make_problem(SHAPES["tied"]), Term(lambda pair: pair.q * pair.p, teacher=False)
    with pytest.raises(TypeError, match="NoneType"):
        run(implementation, p, {FORWARD: 1.0, blind: 1.0})


@every_implementation
def test_default_temperature(implementation):
    p = make_problem(SHAPES["tied"])
    rest = (tuple(MIXTURE), list(MIXTURE.values()))
    total, _ = jax.jit(lambda p: linear_divergence(*p, *rest, implementation=implementation))(arguments(p))
    np.testing.assert_allclose(total, expected(p, MIXTURE)[0], rtol=1e-5)


@every_implementation
@hypothesis.given(st.data())
@hypothesis.settings(max_examples=3)
def test_rows_are_independent(implementation, data):
    """Ragged N, V and padding: the total of all rows is the sum over any two parts of them."""
    n, v, pad = (data.draw(st.integers(low, high)) for low, high in ((2, 20), (1, 17), (0, 9)))
    cut = data.draw(st.integers(1, n - 1))
    p = make_problem(Shape(n, v, padding=pad, vocab_major=data.draw(st.booleans())), seed=n)

    @jax.jit
    def whole_and_parts(p):
        hidden, head, teacher_hidden, teacher_head, labels, weight = p

        def part(rows):
            inputs = (hidden[rows], head, teacher_hidden[rows], teacher_head, labels[rows], weight[rows])
            return linear_divergence(*inputs, tuple(MIXTURE), list(MIXTURE.values()), implementation=implementation)

        return part(slice(None)), part(slice(cut)), part(slice(cut, None))

    whole, first, second = whole_and_parts(arguments(p))
    np.testing.assert_allclose(whole[0], first[0] + second[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole[1], np.concatenate([first[1], second[1]], 1), rtol=1e-5, atol=1e-6)


def test_errors():
    p = make_problem(SHAPES["tied"])
    with pytest.raises(ValueError, match="^implementation of linear_divergence must be .*'xal'.* Did you mean 'xla'"):
        run("xal", p, MIXTURE)
    for missing in ("teacher_hidden", "teacher_head"):
        with pytest.raises(ValueError, match="^teacher_hidden and teacher_head must be given, got None; a term com"):
            run(None, dataclasses.replace(p, **{missing: None}), MIXTURE)
    other = dataclasses.replace(p.teacher_head, vocab_size=12)
    with pytest.raises(ValueError, match="^teacher_head.vocab_size must equal the student's 13, got 12; .* Set both"):
        run(None, dataclasses.replace(p, teacher_head=other), MIXTURE)
