"""Self-distillation and its kin: the teacher reads another prompt before the same answer (PACED, section 2.6)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import models
from kdjax.build import build_parts
from kdjax.config import Mesh
from kdjax.data import as_batch
from kdjax.data.responses import Answered, answer_rows, room_for_teacher
from kdjax.sharding import Rules, make_rules
from kdjax.step import init_state, make_supervise
from kdjax.types import TeacherText
from tests.step import step_bench

SAME = dataclasses.replace(step_bench.STUDENT, vocab_size=96, initializer_range=0.3)
RNG = np.random.default_rng(5)
ANSWERED = [
    Answered(
        tuple(RNG.integers(1, 96, 3 + row % 3).tolist()),
        tuple(RNG.integers(1, 96, 2 + row).tolist()),
        0.5 + row,
        tuple(RNG.integers(1, 96, 4 + 2 * row).tolist()),
    )
    for row in range(4)
]
LENGTH = 10


def batch_of(answered, put=jnp.asarray):
    rows, text = answer_rows(answered, LENGTH, room_for_teacher(answered))
    columns = {n: getattr(rows, n) for n in ("tokens", "segment_ids", "positions", "loss_mask", "row_id", "weight")}
    columns["epoch"] = np.zeros(len(answered), np.int32)
    return as_batch(columns | ({"teacher": text} if text else {}), put)


def parts_of(rules=Rules(), **fields):
    fields = {"selection__policy": "all", "loss__terms": (("reverse_kl", 1.0),)} | fields
    return build_parts(step_bench.experiment(**fields), SAME, SAME, rules)


@functools.cache
def supervised(loss):
    parts = parts_of(loss__terms=((loss, 1.0),))
    state = init_state(parts, params_of(0), 3)
    supervise = make_supervise(parts)

    @jax.jit
    def total(params, teacher, batch):
        output, _, _ = supervise(params, teacher, batch, state.policy_state, state.key, state.step)
        return output.total, output.count

    return total


def total_of(batch, loss="reverse_kl"):
    return lambda student, teacher: supervised(loss)(student, teacher, batch)


@functools.cache
def params_of(seed):
    return models.init_params(SAME, jax.random.key(seed))


@jax.jit
def logits_of(params, tokens):
    """[U, V] of one row [U]."""
    places = jnp.arange(len(tokens), dtype=jnp.int32)[None]
    hidden = models.hidden(SAME, params, tokens[None], jnp.ones_like(places), places)
    head = models.head(SAME, params)
    return hidden[0] @ (head.weight.T if head.vocab_major else head.weight)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def logp_after(params, prompt, answer):
    """float64 [n, V]: of each of the answer's tokens, one text alone."""
    tokens = [*prompt, *answer]
    logits = np.asarray(logits_of(params, jnp.asarray(tokens + [0] * (32 - len(tokens)), jnp.int32)))
    return log_softmax(logits[len(prompt) - 1 : len(tokens) - 1])


@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl"])
def test_both_score_the_answer_after_their_own_prompt(loss):
    student, teacher = params_of(0), params_of(1)
    expected, count = 0.0, 0
    for one in ANSWERED:
        answer = one.answer[: LENGTH - len(one.prompt)]
        q, p = logp_after(student, one.prompt, answer), logp_after(teacher, one.seen_by_teacher, answer)
        value = np.exp(q) * (q - p) if loss == "reverse_kl" else np.exp(p) * (p - q)
        expected, count = expected + one.weight * value.sum(), count + len(answer)
    total, counted = total_of(batch_of(ANSWERED), loss)(student, teacher)
    np.testing.assert_allclose(float(total), expected, rtol=2e-5)
    assert float(counted) == count


def test_the_same_prompt_is_the_plain_loss():
    student, teacher = params_of(0), params_of(1)
    same = [dataclasses.replace(one, seen_by_teacher=one.prompt) for one in ANSWERED]
    plain = [dataclasses.replace(one, seen_by_teacher=None) for one in ANSWERED]
    assert isinstance(batch_of(same).teacher, TeacherText)
    assert batch_of(plain).teacher is None
    left, right = (float(total_of(batch_of(made))(student, teacher)[0]) for made in (same, plain))
    np.testing.assert_allclose(left, right, rtol=1e-6)
    np.testing.assert_allclose(float(total_of(batch_of(same))(student, student)[0]), 0, atol=1e-4)


def test_what_is_not_the_answer_is_not_compared():
    """Tokens behind the answer and the padding of either row move nothing."""
    student, teacher = params_of(0), params_of(1)
    batch = batch_of(ANSWERED)
    before = float(total_of(batch)(student, teacher)[0])
    text = batch.teacher
    moved = jnp.where(text.segment_ids > 0, text.tokens, 77)
    edited = dataclasses.replace(
        batch,
        tokens=jnp.where(batch.segment_ids > 0, batch.tokens, 55),
        teacher=dataclasses.replace(text, tokens=moved),
    )
    np.testing.assert_allclose(float(total_of(edited)(student, teacher)[0]), before, rtol=1e-6)


def test_no_gradient_reaches_the_teacher_or_its_prompt():
    params = params_of(0)
    total = total_of(batch_of(ANSWERED))
    gradients = jax.jit(jax.grad(lambda s, t: total(s, t)[0], argnums=(0, 1)))(params, params)
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradients[0])) > 1e-3
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradients[1]))
    # one set of weights in both roles: as if the teacher's were a copy
    both = jax.jit(jax.grad(lambda s: total(s, s)[0]))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), both, gradients[0])


def test_eight_devices_equal_one():
    student, teacher = params_of(0), params_of(1)
    answered = ANSWERED * 2
    one = total_of(batch_of(answered))(student, teacher)[0]
    rules = make_rules(Mesh("dp"))
    put = lambda a: jax.device_put(a, rules.batch(a.ndim))  # noqa: E731
    spread = [models.init_params(SAME, jax.random.key(seed), rules) for seed in (0, 1)]
    parts = parts_of(rules)
    state = init_state(parts, spread[0], 3)
    eight, _, _ = jax.jit(make_supervise(parts))(
        *spread, batch_of(answered, put), state.policy_state, state.key, state.step
    )
    np.testing.assert_allclose(float(eight.total), float(one), rtol=1e-5)
