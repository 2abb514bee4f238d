"""Losses of drawn tokens: their means over all draws, what they do off the path, and which runs may have them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.build import named_parts
from kdjax.config import Experiment, Loss, default_config, from_config_dict
from kdjax.kernels.linear_divergence import linear_divergence
from kdjax.losses import LOSSES
from kdjax.types import Head

# paced 8, fixture F; every token of the vocabulary is drawn once, and weighs as likely as the student draws it
STUDENT, TEACHER = np.array([1, 0, -1, 0.5]), np.array([0.5, 1.5, -0.5, 0])
DRAWN = np.exp(STUDENT) / np.exp(STUDENT).sum()
ADVANTAGES = [-0.799439, 1.200561, 0.200561, -0.799439]
FORWARD, REVERSE = [0.260894, -0.404887, -0.014246, 0.158240], [0.195706, -0.276747, -0.037662, 0.118702]


@functools.partial(jax.jit, static_argnums=0)
def of_all_draws(name, student, teacher, weight):
    """(values [V] of each draw, gradient [V] of their weighted sum on the student's logits)."""
    v = student.shape[0]
    eye, term, labels = Head(jnp.eye(v), v), LOSSES[name](Loss()), jnp.arange(v, dtype=jnp.int32)

    def total(student):
        rows = (jnp.tile(side[None], (v, 1)) for side in (student, teacher))
        hidden, other = rows
        return linear_divergence(hidden, eye, other, eye, labels, weight, [term], [1.0])

    (_, values), gradient = jax.value_and_grad(total, has_aux=True)(student)
    return values[0], gradient


def evaluate(name, student=STUDENT, teacher=TEACHER, weight=DRAWN):
    return of_all_draws(name, *(jnp.asarray(a, jnp.float32) for a in (student, teacher, weight)))


def test_paced_vector_7_advantages():
    values, _ = evaluate("sampled_reverse_kl")
    np.testing.assert_allclose(-values, ADVANTAGES, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "gradient"),
    [
        ("sampled_reverse_kl", 0.386548, REVERSE),  # k1, its gradient that of the score function
        ("sampled_k2", 0.370287, REVERSE),
        ("sampled_k3", 0.386548, FORWARD),
    ],
)
def test_paced_vector_7_means(name, value, gradient):
    values, found = evaluate(name)
    np.testing.assert_allclose(DRAWN @ np.asarray(values, np.float64), value, atol=1e-6)
    np.testing.assert_allclose(found, gradient, atol=1e-6)


@pytest.mark.parametrize("name", ["sampled_reverse_kl", "sampled_k2", "sampled_k3"])
def test_far_off_the_path(name):
    """A token that the student gives e^-200 and the teacher likes pulls, and stays finite."""
    values, gradient = evaluate(name, [0, 200, 0, 0], [300, 0, 0, 0], [1, 0, 0, 0])
    assert np.isfinite(values).all()
    assert np.isfinite(np.sum(np.square(gradient)))
    assert gradient[0] < -100 < 100 < gradient[1]


def test_k3_of_a_small_difference():
    """e^d - 1 - d keeps its digits: d^2 / 2 + d^3 / 6."""
    teacher = np.log(DRAWN) + np.array([1e-3, 0, 0, 0])
    d = teacher - np.log(np.exp(teacher).sum()) - np.log(DRAWN)
    values, _ = evaluate("sampled_k3", np.log(DRAWN), teacher)
    np.testing.assert_allclose(values, np.expm1(d) - d, rtol=2e-3)


def experiment(**fields) -> Experiment:
    changes = {"loss.terms": (("sampled_reverse_kl", 1.0),), "on_policy.fraction": 1.0, "prompts.path": "arith"}
    config = default_config()
    config.update_from_flattened_dict(changes | fields)
    return from_config_dict(config)


@pytest.mark.parametrize(
    ("field", "value", "needed"),
    [
        ("on_policy.fraction", 0.5, "1.0"),
        ("on_policy.fraction", ("step", 0.0, 1.0, 5.0), "1.0"),
        ("on_policy.block", 2, "1"),
        ("on_policy.reuse", 3, "1"),
        ("on_policy.truncated", "drop", "'keep'"),
        ("generation.temperature", 0.9, "1.0"),
        ("generation.top_p", 0.95, "1.0"),
        ("generation.top_k", 20, "0"),
        ("generation.min_p", 0.1, "0.0"),
        ("generation.stop", ("\n",), r"\(\)"),
    ],
)
def test_only_fresh_draws_of_the_whole_distribution(field, value, needed):
    named_parts(experiment())
    with pytest.raises(ValueError, match=f"^{field} must be {needed} with the loss 'sampled_reverse_kl', got "):
        named_parts(experiment(**{field: value}))
    named_parts(experiment(**{field: value, "loss.terms": (("reverse_kl", 1.0), ("sampled_k3", 0.0))}))


def test_no_sampled_loss_of_a_few_entries():
    with pytest.raises(ValueError, match="^loss.terms must be 'forward_kl' .* got 'sampled_reverse_kl'"):
        named_parts(experiment(**{"classes.kind": "sampled"}))
