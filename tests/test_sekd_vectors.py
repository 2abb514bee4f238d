"""The invariants and vectors of SE-KD's reference, section 9, one by one: here, or where ELSEWHERE says.

float32 statistics hold a number to 6e-8 of it, so ten printed digits are checked to seven.
"""

import dataclasses
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import models
from kdjax.build import build_objective, build_parts
from kdjax.config import Loss
from kdjax.config import Selection as SelectionConfig
from kdjax.kernels.linear_divergence import Pair, linear_divergence
from kdjax.kernels.linear_stats import linear_pair_stats, linear_stats
from kdjax.losses import LOSSES
from kdjax.selection import POLICIES, SIGNALS, Chooser, Context, View, token_stats
from kdjax.sharding import Rules
from kdjax.step import make_supervise
from kdjax.types import DenseTargets, Head, Selection, TokenStats, gather_slots, targets_of
from tests.step import step_bench

ROOT = pathlib.Path(__file__).parents[1]
ELSEWHERE = {  # item -> tests that would fail if it broke
    2: ["contracts/test_losses.py::test_sekd_vector_2", "losses/test_objective.py::test_gradient_at_a_temperature"],
    4: [
        "contracts/test_policies.py::test_fraction_1_is_dense",
        "step/test_step.py::test_fraction_one_is_dense",
        "step/test_step.py::test_student_equal_to_teacher_has_no_loss_and_no_gradient",
    ],
    6: [
        "selection/test_budget.py::test_sekd_vector_6",
        "selection/test_budget.py::test_sekd_vector_6_with_position_1_ineligible",
    ],
    7: ["selection/test_budget.py::test_budget", "selection/test_budget.py::test_budget_is_exact"],
    8: ["selection/test_budget.py::test_sekd_vector_8", "contracts/test_policies.py::test_permuting_rows"],
    9: ["selection/test_each_policy.py::test_shared_quota"],
    10: [
        "selection/test_budget.py::test_sekd_vector_10",
        "step/test_step.py::test_padding_and_masked_targets_move_nothing",
        "step/test_step.py::test_a_batch_without_a_target_changes_nothing",
    ],
    11: [
        "selection/test_each_policy.py::test_the_threshold_is_taken_before_the_push",
        "selection/test_each_policy.py::test_a_stationary_stream_is_accepted_at_the_fraction",
    ],
    12: [
        "selection/test_each_policy.py::test_curriculum",
        "selection/test_each_policy.py::test_curriculum_ends_as_top_fraction",
    ],
    17: ["step/test_step.py::test_one_batch_of_eight_is_four_of_two"],
    20: ["step/test_baselines.py::test_at_kd", "losses/test_adaptive_losses.py::test_sekd_vector_20"],
    22: [
        "kernels/test_memory.py::test_nothing_of_n_by_v",
        "kernels/test_memory.py::test_memory_does_not_grow_with_n",
        "aot/test_step_memory.py::test_no_buffer_of_batch_positions_vocabulary",
    ],
    23: ["contracts/test_signals.py::test_no_gradient"],
    25: ["contracts/test_losses.py::test_zero_at_the_teacher"],
}


@pytest.mark.parametrize(("item", "test"), [(item, test) for item, tests in ELSEWHERE.items() for test in tests])
def test_elsewhere(item, test):
    """The test that stands for an item is there under that name."""
    path, name = test.split("::")
    assert re.search(rf"^def {name}\(", (ROOT / "tests" / path).read_text("utf-8"), re.MULTILINE), item


TEACHER, STUDENT = np.array([[2.0, 1, 0, -1, -2]]), np.array([[0.5, 1.5, -0.5, 0, -1]])
EXACT = {"rtol": 3e-7}
SIX = {"atol": 6e-7, "rtol": 0}  # six decimals


def rows(logits):
    """Hidden states and a head that make these logits, which are their own hidden states."""
    logits = jnp.asarray(logits, jnp.float32)
    return logits, Head(jnp.eye(logits.shape[-1]), logits.shape[-1])


def scores(name, student, teacher, labels):
    """A signal at positions [B, T] of logits [B, T, V]."""
    stats = token_stats(SIGNALS[name].needs, rows(student), rows(teacher), jnp.asarray(labels))
    eligible = jnp.ones(np.shape(labels), bool)
    return np.asarray(SIGNALS[name].score(View(stats, eligible, jnp.zeros(eligible.shape))))


def values(name, student, teacher, labels, **config):
    """A loss at rows [N]."""
    term, ones = LOSSES[name](Loss(**config)), jnp.ones(len(student))
    sides = (*rows(student), *rows(teacher))
    return np.asarray(linear_divergence(*sides, jnp.asarray(labels), ones, [term], [1.0])[1][0])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_item_1(implementation):
    pair = linear_pair_stats(*rows(STUDENT), *rows(TEACHER), jnp.array([1]), top_k=5, implementation=implementation)
    want = {
        "teacher": (0.9999728283, [0.636409, 0.234122, 0.086129, 0.031685, 0.011656]),
        "student": (1.2441059105, [0.203425, 0.552966, 0.074836, 0.123383, 0.045390]),
    }
    for side, (entropy, probabilities) in want.items():
        stats = getattr(pair, side)
        np.testing.assert_allclose(stats.entropy, [entropy], **EXACT)
        found = np.zeros(5)
        found[np.asarray(stats.top.ids[0])] = np.exp(stats.top.logp[0])
        np.testing.assert_allclose(found, probabilities, **SIX)
    np.testing.assert_allclose([pair.kl, pair.reverse_kl], [[0.4778198667], [0.4621568362]], **EXACT)
    np.testing.assert_allclose(values("jsd", STUDENT, TEACHER, [0]), [0.1118345454], **EXACT)


def test_item_3():
    """The release divides the entropy by ln 5 in both sums; the signals have it in nats, as the paper does."""
    names = ("student_ce", "teacher_ce", "ce_ratio", "ce_ratio_plus_entropy", "ce_ratio_times_entropy")
    ce_s, ce_t, ratio, plus, times = (scores(name, [STUDENT], [TEACHER], [[1]])[0, 0] for name in names)
    np.testing.assert_allclose([ce_s, ce_t, ratio], [0.5924590010, 1.4519143959, 0.4080533911], **EXACT)
    np.testing.assert_allclose(ratio + (plus - ratio) / math.log(5), 1.1810598556, **EXACT)
    np.testing.assert_allclose(times / math.log(5), 0.3154279092, **EXACT)


def test_item_4():
    """Uniform logits have the entropy ln V; identical sides neither loss nor gradient."""
    zeros, head = jnp.zeros((3, 1)), Head(jnp.zeros((1, 151936)), 151936)
    np.testing.assert_allclose(linear_stats(zeros, head, jnp.zeros(3, jnp.int32)).entropy, 11.931215, atol=1e-5)
    term = LOSSES["forward_kl"](Loss())
    _, eye = rows(TEACHER)

    def total(student):
        return linear_divergence(student, eye, rows(TEACHER)[0], eye, jnp.array([0]), jnp.ones(1), [term], [1.0])[0]

    value, gradient = jax.value_and_grad(total)(rows(TEACHER)[0])
    np.testing.assert_allclose(value, 0.0, atol=1e-7)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-7)


# --- through a model


@pytest.fixture(scope="module")
def made():
    """A step of SE-KD at 30 %, its weights, and a batch."""
    parts = build_parts(step_bench.experiment(selection__fraction=0.3), step_bench.STUDENT, step_bench.TEACHER, Rules())
    params, teacher_params = (
        models.init_params(dataclasses.replace(cfg, initializer_range=0.3), jax.random.key(seed))
        for seed, cfg in enumerate((step_bench.STUDENT, step_bench.TEACHER))
    )
    return parts, params, teacher_params, step_bench.ragged_batch()


@pytest.fixture(scope="module")
def of_the_step(made):
    """(loss sum, gradient of it) of the step's own way."""
    parts, params, teacher_params, batch = made
    supervise = make_supervise(parts)

    def total(params):
        return supervise(params, teacher_params, batch, (), jax.random.key(0), jnp.int32(0))[0].total

    return jax.jit(jax.value_and_grad(total))(params)


def test_items_5_and_23(made, of_the_step):
    """The selective head is the whole of the logits, of which some positions count; and the choice of them is a
    constant: positions chosen beforehand give the same loss and gradient."""
    parts, params, teacher_params, batch = made
    labels, eligible = targets_of(batch)
    hidden, head = parts.student.hidden(params, batch), parts.student.head(params)
    stats = token_stats(("student_entropy",), (hidden, head), None, labels)
    chosen, _ = parts.chooser(stats, batch, eligible, (), jax.random.key(0), jnp.int32(0))
    mask = jnp.zeros(labels.shape).at[jnp.arange(len(labels))[:, None], chosen.index].max(chosen.weight)
    assert 0 < mask.sum() < eligible.sum()
    vocab = head.vocab_size
    teacher = parts.teacher.hidden(teacher_params, batch) @ parts.teacher.head(teacher_params).weight[:, :vocab]
    logp = jax.nn.log_softmax(teacher)

    def total(params):
        logq = jax.nn.log_softmax(parts.student.hidden(params, batch) @ params["embed"].T)
        return jnp.sum(mask * batch.weight[:, None] * jnp.sum(jnp.exp(logp) * (logp - logq), -1))

    (value, gradient), (got, slope) = jax.jit(jax.value_and_grad(total))(params), of_the_step
    np.testing.assert_allclose(got, value, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(slope), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-5 * float(jnp.max(jnp.abs(theirs))))


def test_item_5_chunks():
    """Entropies of positions by 1, 7, 128 or all at a time."""
    numbers = np.random.default_rng(0)
    hidden = jnp.asarray(numbers.normal(size=(2 * 255, 24)), jnp.float32)
    head = Head(jnp.asarray(numbers.normal(size=(24, 301)), jnp.float32), 301)
    labels, entropy = jnp.zeros(len(hidden), jnp.int32), jax.jit(lambda *rows: linear_stats(*rows).entropy)
    whole = entropy(hidden, head, labels)
    for size in (7, 128, 255):
        parts = [entropy(hidden[at : at + size], head, labels[at : at + size]) for at in range(0, len(hidden), size)]
        np.testing.assert_allclose(np.concatenate(parts), whole, atol=5e-6)
    by_one = [entropy(hidden[at : at + 1], head, labels[:1]) for at in range(20)]
    np.testing.assert_allclose(np.concatenate(by_one), whole[:20], atol=5e-6)


@pytest.mark.parametrize("left", [3, 8])
def test_item_10_padding(made, of_the_step, left):
    """Padding on the left, on the right or on both sides: the same loss."""
    parts, params, teacher_params, batch = made

    def padded(array):
        return jnp.pad(array, ((0, 0), (left, 8 - left))) if array.ndim == 2 else array

    moved = jax.tree.map(padded, batch)
    supervise = jax.jit(make_supervise(parts))
    output, _, _ = supervise(params, teacher_params, moved, (), jax.random.key(0), jnp.int32(0))
    np.testing.assert_allclose(output.total, of_the_step[0], rtol=1e-5)


# --- AT-KD and its kin

AT_TEACHER = np.array([[2, 1, 0, -1, -2], [0, 0, 3, 0, 0], [1, 1, 1, 1, 1], [4, 0, 0, 0, 0]], float)
AT_STUDENT = np.array([[0.5, 1.5, -0.5, 0, -1], [1, 0, 1, 0, 0], [0, 1, 2, 0, 0], [1, 0, 0, 0, 0]])
AT_LABELS = np.array([1, 2, 0, 0])
UNC = np.array([0.765878, 0.166075, 0.800000, 0.068262])
KL = np.array([0.4778199, 0.5772953, 0.3637343, 0.6293447])
UDKD = np.array([0.454457, 0.264229, 0.769225, 0.057549])


def test_item_20():
    unc = scores("unc", AT_STUDENT[None], AT_TEACHER[None], AT_LABELS[None])
    np.testing.assert_allclose(unc, UNC[None], **SIX)
    np.testing.assert_allclose(values("forward_kl", AT_STUDENT, AT_TEACHER, AT_LABELS), KL, **SIX)
    among = values("dkd", AT_STUDENT, AT_TEACHER, AT_LABELS, dkd_beta=1.0)
    against = values("dkd", AT_STUDENT, AT_TEACHER, AT_LABELS, dkd_beta=0.0)
    np.testing.assert_allclose(against + unc[0] * (among - against), KL, rtol=0, atol=2e-7)
    np.testing.assert_allclose(values("udkd", AT_STUDENT, AT_TEACHER, AT_LABELS), UDKD, **SIX)


@pytest.mark.parametrize("shape", [(1, 4), (2, 2), (4, 1)])
def test_item_20_mixture(shape):
    """hard = {0, 2} of the four, in however many rows they are; the loss of the reference's two formulas."""
    parts = [values("dkd", AT_STUDENT, AT_TEACHER, AT_LABELS, dkd_beta=beta) for beta in (0.0, 1.0)]
    among, whole = parts[1] - parts[0], parts[1]  # KL of the rest, and with that of the label against it
    easy, hard = among[[1, 3]], whole[[0, 2]]
    student, teacher, labels = AT_STUDENT.reshape(*shape, 5), AT_TEACHER.reshape(*shape, 5), AT_LABELS.reshape(shape)
    score, eligible = jnp.asarray(scores("unc", student, teacher, labels)), jnp.ones(shape, bool)
    for name, want in (
        ("easy_hard", (0.2 * easy.sum() + 0.8 * hard.sum()) / 4),
        ("easy_hard_means", 0.2 * easy.mean() + 0.8 * hard.mean()),
    ):
        policy = POLICIES[name](SelectionConfig(policy=name, fraction=0.5))
        selection, _ = policy.select(score, eligible, (), Context(jnp.int32(0), jnp.zeros(shape)))
        assert np.flatnonzero(selection.given).tolist() == [0, 2]
        objective = build_objective(Loss(terms=(("at_kd", 1.0),)))
        targets = DenseTargets(*rows(teacher))
        slots = gather_slots(jnp.asarray(labels), selection.index)
        output = objective(*rows(student), targets, slots, selection, jnp.ones(len(labels)), 0)
        np.testing.assert_allclose(output.total / output.count, want, rtol=1e-6)


def test_item_25():
    """Hellinger(p, p) = 0, and never above 1. ToDi at p = q: weight 1/2 on both divergences, loss 0."""
    same, apart = np.array([[2.0, 1, 0, -1, -2]]), np.array([[[1e4, 0, 0], [3.0, 1, 2]]])
    np.testing.assert_array_equal(scores("hellinger", [same], [same], [[0]]), 0.0)
    np.testing.assert_allclose(scores("hellinger", apart, apart[..., ::-1], [[0, 0]])[0, 0], 1.0, rtol=1e-6)
    many = np.random.default_rng(0).normal(size=(2, 50, 9)) * 30
    found = scores("hellinger", many, many[:, ::-1], np.zeros((2, 50), int))
    assert (found >= 0).all()
    assert (found <= 1 + 1e-6).all()
    np.testing.assert_array_equal(values("todi", same, same, [0]), 0.0)
    logp = jax.nn.log_softmax(jnp.asarray(same, jnp.float32))

    def value(shift):
        pair = Pair(logp, logp + shift, jnp.exp(logp), jnp.exp(logp + shift), jnp.zeros(logp.shape, bool))
        return LOSSES["todi"](Loss()).value(pair)[0, 0]

    # d/dlogq [s p log(p/q) + (1 - s) q log(q/p)] = -s p + (1 - s) q at p = q: 0 if and only if s = 1/2.
    np.testing.assert_allclose(jax.grad(value)(0.0), 0.0, atol=1e-8)


def test_item_8_invariance():
    """Adding a constant to u or scaling it by c > 0 changes nothing for top-k, in the chooser as a whole."""
    numbers = np.random.default_rng(3)
    score = jnp.asarray(numbers.integers(0, 64, size=(8, 24)) / 8, jnp.float32)
    batch = step_bench.ragged_batch()
    _, eligible = targets_of(batch)
    chooser = Chooser(SIGNALS["student_entropy"], POLICIES["top_fraction"](SelectionConfig(fraction=0.28)))

    def select(score) -> Selection:
        return chooser(TokenStats(student_entropy=score), batch, eligible, (), jax.random.key(0), jnp.int32(0))[0]

    plain = select(score)
    for other in (score + 2.0, 4.0 * score, 0.5 * score - 1.0):
        jax.tree.map(np.testing.assert_array_equal, select(other), plain)
