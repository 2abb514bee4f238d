"""ToDi, AKL, DKD and their kin: what their definitions fix beyond the contract that all losses keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kdjax.config import Loss
from kdjax.kernels.linear_divergence import Pair, linear_divergence
from kdjax.losses import LOSSES
from kdjax.types import Head
from tests.kernels import oracle


@functools.partial(jax.jit, static_argnames=("name", "config", "implementation"))
def run(student, teacher, labels, name, config, implementation=None):
    """(values [N], gradient [N, V]) on rows that are their own logits."""
    eye = Head(jnp.eye(student.shape[1]), student.shape[1])
    term, ones = LOSSES[name](config), jnp.ones(len(student))

    def total(student):
        arguments = (student, eye, teacher, eye, labels, ones, [term], [1.0])
        return linear_divergence(*arguments, given=0.75 * ones, implementation=implementation)

    (_, values), gradient = jax.value_and_grad(total, has_aux=True)(student)
    return values[0], gradient


def evaluate(name, student, teacher, labels=None, config=None, implementation=None):
    student, teacher = jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32)
    labels = jnp.zeros(len(student), jnp.int32) if labels is None else jnp.asarray(labels, jnp.int32)
    return run(student, teacher, labels, name, config or Loss(), implementation)


def scalars(name, student, teacher, labels, config):
    """What the term says of each row."""
    logp, logq = (jax.nn.log_softmax(jnp.asarray(z, jnp.float32)) for z in (teacher, student))
    is_label = np.arange(logp.shape[1])[None] == np.asarray(labels)[:, None]
    pair = Pair(logp, logq, jnp.exp(logp), jnp.exp(logq), jnp.asarray(is_label))
    return np.asarray(LOSSES[name](config).row_scalars(pair, lambda values: jnp.sum(values, -1, keepdims=True)))


# paced 8, fixture F
F_STUDENT, F_TEACHER = np.array([[1, 0, -1, 0.5]]), np.array([[0.5, 1.5, -0.5, 0]])
F_FORWARD, F_REVERSE = 0.437472, 0.386548


# --- ToDi


def test_todi_value_is_forward_plus_reverse():
    """At scale 1 the shares are p / (p + q); at 0 a half each. Only the gradient tells that they are detached."""
    value, gradient = evaluate("todi", F_STUDENT, F_TEACHER)
    np.testing.assert_allclose(value, F_FORWARD + F_REVERSE, atol=1e-6)
    np.testing.assert_allclose(
        evaluate("todi", F_STUDENT, F_TEACHER, config=Loss(todi_scale=0.0))[0], (F_FORWARD + F_REVERSE) / 2, atol=1e-6
    )
    p, q = np.exp(oracle.log_softmax(F_TEACHER)), np.exp(oracle.log_softmax(F_STUDENT))
    share = p / (p + q)
    slope = -share * p + (1 - share) * q * (np.log(q / p) + 1)
    np.testing.assert_allclose(gradient, slope - q * slope.sum(), atol=1e-6)
    both = sum(np.asarray(evaluate(name, F_STUDENT, F_TEACHER)[1]) for name in ("forward_kl", "reverse_kl"))
    assert np.abs(gradient - both).max() > 0.05


# --- AKL


def logits_of(probabilities):
    return np.log(np.array([probabilities]))


@pytest.mark.parametrize(
    ("mu", "teacher", "head"),
    [
        (0.5, [0.3, 0.15, 0.4, 0.1, 0.05], [2]),  # the next would make it 0.7
        (0.75, [0.3, 0.15, 0.4, 0.1, 0.05], [2, 0]),
        (0.25, [0.3, 0.15, 0.4, 0.1, 0.05], [2]),  # the first always
        (0.97, [0.3, 0.15, 0.4, 0.1, 0.05], [2, 0, 1, 3]),
        (0.7, [0.125, 0.25, 0.25, 0.25, 0.125], [1, 2, 3]),  # equals are all first
        (0.6, [0.125, 0.25, 0.1875, 0.1875, 0.25], [1, 4]),  # of two equals one would fit: they stay together
        (0.9, [0.125, 0.25, 0.1875, 0.1875, 0.25], [1, 2, 3, 4]),
        (0.5, [1e-30, 1.0, 1e-30, 1e-30, 1e-30], [1]),
    ],
)
def test_akl_head(mu, teacher, head):
    student = [0.1, 0.3, 0.2, 0.35, 0.05]
    gap = np.abs(np.array(teacher) - student)
    got = scalars("akl", logits_of(student), logits_of(teacher), [0], Loss(akl_mu=mu))
    share = gap[head].sum() / gap.sum()
    np.testing.assert_allclose(got, [[share, 1 - share]], atol=1e-6)


def test_akl_head_of_many():
    """The threshold over thousands of entries, flat and steep rows: next to it the cumulative mass passes mu."""
    numbers = np.random.default_rng(0)
    scales = np.array([0.1, 0.3, 1.0, 3.0, 10.0, 40.0])[:, None]
    teacher = (numbers.normal(size=(6, 20000)) * scales).astype(np.float32)
    student = numbers.normal(size=teacher.shape).astype(np.float32)
    p, q = (np.exp(oracle.log_softmax(z)) for z in (teacher, student))
    order = np.argsort(-p, axis=-1, kind="stable")
    mass = np.cumsum(np.take_along_axis(p, order, -1), -1)
    for mu in (0.05, 0.5, 0.99):
        head = mass <= mu
        head[:, 0] = True
        gap = np.abs(np.take_along_axis(p - q, order, -1))
        share = (gap * head).sum(-1) / gap.sum(-1)
        got = scalars("akl", student, teacher, np.zeros(6, int), Loss(akl_mu=mu))
        np.testing.assert_allclose(got[:, 0], share, atol=2e-5)
        np.testing.assert_allclose(got.sum(-1), 1.0, atol=1e-6)


def test_akl_is_zero_where_nothing_differs():
    """No gap, no mixture; and a row of NaN does not stop the others' search."""
    rows = np.random.default_rng(1).normal(size=(4, 7))
    assert not scalars("akl", rows, rows, np.zeros(4, int), Loss()).any()
    other = rows[::-1].copy()
    plain = scalars("akl", rows, other, np.zeros(4, int), Loss())
    other[2] = np.nan
    np.testing.assert_array_equal(scalars("akl", rows, other, np.zeros(4, int), Loss())[[0, 1, 3]], plain[[0, 1, 3]])


# --- DKD


# sekd 20
AT_TEACHER = np.array([[2, 1, 0, -1, -2], [0, 0, 3, 0, 0], [1, 1, 1, 1, 1], [4, 0, 0, 0, 0]])
AT_STUDENT = np.array([[0.5, 1.5, -0.5, 0, -1], [1, 0, 1, 0, 0], [0, 1, 2, 0, 0], [1, 0, 0, 0, 0]])
AT_LABELS = [1, 2, 0, 0]
AT_UNC = np.array([0.765878, 0.166075, 0.800000, 0.068262])  # 1 - p_y
AT_KL = np.array([0.4778199, 0.5772953, 0.3637343, 0.6293447])  # KL(bin) + (1 - p_y) KL(rest)
AT_UDKD = np.array([0.454457, 0.264229, 0.769225, 0.057549])  # KL(rest) + (1 - p_y) (-p_y log q_y)


@pytest.mark.parametrize("beta", [0.0, 1.0, 8.0])
def test_sekd_vector_20(beta):
    label_logq = oracle.log_softmax(AT_STUDENT)[np.arange(4), AT_LABELS]
    rest = AT_UDKD + AT_UNC * (1 - AT_UNC) * label_logq
    got, _ = evaluate("dkd", AT_STUDENT, AT_TEACHER, AT_LABELS, Loss(dkd_beta=beta))
    np.testing.assert_allclose(got, AT_KL + (beta - AT_UNC) * rest, atol=1e-6 * (1 + 2 * beta))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_dkd_at_saturation(implementation):
    """Label probabilities of 1 to the last bit: the rest is compared as if the label were not there."""
    rest_student, rest_teacher = F_STUDENT, F_TEACHER
    for gap in (10.0, 40.0, 90.0, 1000.0, 1e4):  # of the label's logit over the others
        student, teacher = (np.concatenate([rest, [[gap]]], 1) for rest in (rest_student, rest_teacher))
        values, gradient = evaluate("dkd", student, teacher, [4], implementation=implementation)
        np.testing.assert_allclose(values, 8 * F_FORWARD, rtol=1e-4 + 2e-7 * gap)
        q, p = (np.exp(oracle.log_softmax(rest)) for rest in (rest_student, rest_teacher))
        np.testing.assert_allclose(gradient[:, :4], 8 * (q - p), atol=1e-3 + 1e-6 * gap)
        np.testing.assert_allclose(gradient[:, 4], 0.0, atol=1e-4 + 1e-6 * gap)  # float32 logits are that coarse


def test_dkd_of_nothing_but_the_label():
    values, gradient = evaluate("dkd", [[3.0]], [[5.0]])
    assert values == 0.0
    assert gradient == 0.0


# --- all of them


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", ["todi", "akl", "dkd", "udkd", "at_kd", "adakd_reverse_kl", "taid"])
def test_split_vocabulary(name, implementation):
    """Four devices with a quarter of the columns each, padding in the last: the numbers of one device."""
    numbers, vocab, width = np.random.default_rng(7), 21, 6
    student, teacher = (jnp.asarray(numbers.normal(size=(9, 5)) * 3, jnp.float32) for _ in range(2))
    weights = [jnp.asarray(numbers.normal(size=(5, 4 * width)), jnp.float32) for _ in range(2)]
    labels = jnp.asarray(numbers.integers(vocab, size=9), jnp.int32)
    # The gate knows how many columns there are, padding not counted.
    term, axes = LOSSES[name](Loss(udkd_gate="student_entropy")), (jax.sharding.AxisType.Auto,)

    def total(student, weight, teacher_weight, axis=None):
        sides = (student, Head(weight, vocab, vocab_axis=axis), teacher, Head(teacher_weight, vocab, vocab_axis=axis))
        rest, given = (labels, jnp.ones(9), [term], [1.0], 1.3), jnp.linspace(0.5, 1.5, 9)
        return linear_divergence(*sides, *rest, given=given, implementation=implementation)

    split = jax.shard_map(
        lambda *arrays: total(*arrays, axis="vocab"),
        mesh=jax.make_mesh((4,), ("vocab",), axis_types=axes),
        in_specs=(P(), P(None, "vocab"), P(None, "vocab")),
        out_specs=P(),
        check_vma=False,
    )
    one, four = (jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(student, *weights) for f in (total, split))
    for got, want in zip(jax.tree.leaves(four), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["akl", "dkd", "adakd_forward_kl"])
def test_vmap(name):
    numbers = np.random.default_rng(8)
    student, teacher = jnp.asarray(numbers.normal(size=(2, 3, 4, 6)), jnp.float32)
    labels = jnp.asarray(numbers.integers(6, size=4), jnp.int32)
    got = jax.vmap(lambda *sides: run(*sides, labels, name, Loss()))(student, teacher)
    for at in range(3):
        want = evaluate(name, student[at], teacher[at], labels)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a[at], b, rtol=1e-5, atol=1e-6)
