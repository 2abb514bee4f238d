"""TAID: a target between student and teacher, and how far it has come."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.build import named_parts
from kdjax.config import Experiment, Loss, Selection
from kdjax.kernels.linear_divergence import linear_divergence
from kdjax.losses import LOSSES
from kdjax.selection import POLICIES, Context
from kdjax.selection.policies.interpolated import interpolated
from kdjax.types import Head, LossOutput
from tests.kernels import oracle

TAID = Loss(terms=(("taid", 1.0),))
EVERYWHERE = POLICIES["all"](Selection())
# paced 8, fixture F
STUDENT, TEACHER = np.array([[1, 0, -1, 0.5]]), np.array([[0.5, 1.5, -0.5, 0]])


@jax.jit
def run(student, teacher, share):
    eye, term, ones = Head(jnp.eye(4), 4), LOSSES["taid"](TAID), jnp.ones(len(student))

    def total(student):
        rest = (jnp.zeros(len(student), jnp.int32), ones, [term], [1.0])
        return linear_divergence(student, eye, teacher, eye, *rest, given=share)

    (_, values), gradient = jax.value_and_grad(total, has_aux=True)(student)
    return values[0], gradient


def evaluate(student, teacher, shares):
    student, teacher = (jnp.asarray(np.tile(side, (len(shares), 1)), jnp.float32) for side in (student, teacher))
    return run(student, teacher, jnp.asarray(shares, jnp.float32))


def test_the_target_walks_from_the_student_to_the_teacher():
    shares = [0.0, 0.4, 1.0]
    values, gradient = evaluate(STUDENT, TEACHER, shares)
    q = np.exp(oracle.log_softmax(STUDENT))[0]
    for at, share in enumerate(shares):
        target = np.exp(oracle.log_softmax((1 - share) * STUDENT + share * TEACHER))[0]
        np.testing.assert_allclose(values[at], -target @ np.log(q), atol=1e-6)
        np.testing.assert_allclose(gradient[at], q - target, atol=1e-6)
    np.testing.assert_allclose(gradient[0], 0.0, atol=1e-6)
    np.testing.assert_allclose(gradient[2], [0.260894, -0.404887, -0.014246, 0.158240], atol=1e-6)  # forward KL's


def test_where_neither_side_has_mass_in_common():
    """The product of the two underflows everywhere: the target is still a distribution."""
    student, teacher = np.array([[0, 400, 0, 100]]), np.array([[400, 0, 30, 0]])
    values, gradient = evaluate(student, teacher, [0.5])
    target = np.exp(oracle.log_softmax(0.5 * student + 0.5 * teacher))
    np.testing.assert_allclose(values, -(target * oracle.log_softmax(student)).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(gradient, np.exp(oracle.log_softmax(student)) - target, atol=1e-4)


def walk(losses, loss=TAID, steps=10, policy=EVERYWHERE):
    """The share at each update, as the slots are given it, and at the end the state."""
    one = interpolated(policy, loss, steps)
    eligible, zeros = jnp.ones((2, 3), bool), jnp.zeros((2, 3))
    shares, state = [], one.init()
    for step, value in enumerate(losses):
        now = jnp.int32(step)
        selection, state = one.select(zeros, eligible, state, Context(now, zeros))
        assert selection.given.shape == selection.weight.shape
        shares.append(float(selection.given[0, 0]))
        count = 0.0 if value is None else 6.0
        metrics = {"taid": (jnp.float32(count * (value or 0.0)), jnp.float32(count))}
        state = one.observe(state, LossOutput(jnp.float32(9.0), jnp.float32(count), metrics), now)
    return shares, state


def test_the_line_alone():
    shares, _ = walk([3.0] * 10, dataclasses.replace(TAID, taid_rate=0.0))
    np.testing.assert_allclose(shares, 0.4 + 0.06 * np.arange(10), atol=1e-6)


def test_a_falling_loss_hurries_it():
    """paced L11, by hand: nothing after the first loss, then at least the line and at least dt more each time."""
    losses, rate, steps = [4.0, 2.0, 1.0, 2.0, 0.5, 0.25], 0.9, 1000
    share, trend, before, want = 0.4, 0.0, None, []
    for step, now in enumerate(losses):
        share = min(1.0, max(0.4 + 0.6 * step / steps, share))
        want.append(share)
        if before is not None:
            trend = 0.99 * trend + 0.01 * (before - now) / before
            share = min(1.0, share + rate * (1 - share) / (1 + np.exp(-trend)))
        before = now
    got, _ = walk(losses, dataclasses.replace(TAID, taid_rate=rate), steps)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert got[2] > 0.6 > got[1]
    flat, _ = walk([4.0] * 6, dataclasses.replace(TAID, taid_rate=rate), steps)
    assert got[3] > flat[3]


def test_a_batch_without_slots_is_not_seen():
    (*_, last), state = walk([4.0, None, 2.0])
    assert float(state.before) == 2.0
    assert float(state.trend) == pytest.approx(0.01 * (4 - 2) / 4, rel=1e-5)
    assert last < 0.4 + 0.06 * 2 + 1e-6
    empty, state = walk([None, None])
    assert float(state.before) == -1.0
    np.testing.assert_allclose(empty, [0.4, 0.46], atol=1e-6)


def test_any_policy_and_its_state():
    counting = dataclasses.replace(
        EVERYWHERE,
        select=lambda score, eligible, state, context: (EVERYWHERE.select(score, eligible, (), context)[0], state + 1),
        init=lambda: 0,
        observe=lambda state, output, step: state + 10,
    )
    shares, state = walk([2.0] * 3, policy=counting)
    np.testing.assert_allclose(shares, [0.4, 0.46, 0.52], atol=1e-6)
    assert state.inner == 33


def parts(*names, policy="top_fraction"):
    loss = Loss(terms=tuple((name, 1.0) for name in names))
    return named_parts(Experiment(loss=loss, selection=Selection(policy=policy)))


def test_the_run_says_the_share():
    chooser, _, *_ = parts("taid", "cross_entropy")
    assert chooser.policy.gives == "teacher_share"
    assert parts("forward_kl")[0].policy.gives == ""
    with pytest.raises(
        ValueError, match="^loss.terms must hold one of 'taid' and 'at_kd', got both; they read different"
    ):
        parts("taid", "at_kd", policy="easy_hard")
