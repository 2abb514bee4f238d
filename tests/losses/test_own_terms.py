"""Losses of their own for the steps on the student's own answers: DistiLLM-2, and sampled losses beside other text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.build import named_parts
from kdjax.config import Experiment, default_config, from_config_dict
from kdjax.schedules import own_steps
from kdjax.types import DenseTargets, Head, Selection
from tests.kernels import oracle

STEPS = 20
# paced L10: b = 1 + 0.5 min(1, 2 step / steps); (2 - b) on the teacher's answers, b on the student's own
DISTILLM_2 = {
    "loss.terms": (("skew_kl", ("linear", 1.0, 0.5, "50%")),),
    "on_policy.terms": (("skew_reverse_kl", ("linear", 1.0, 1.5, "50%")),),
}


def experiment(**fields) -> Experiment:
    changes = {"on_policy.fraction": 0.5, "prompts.path": "arith", "prompts.answers": "gold", "train.steps": STEPS}
    config = default_config()
    config.update_from_flattened_dict(changes | fields)
    return from_config_dict(config)


def objective_of(**fields):
    return named_parts(experiment(**fields))[1]


def test_distillm_2():
    """The total at each update is one divergence or the other, as the step's text is."""
    numbers = np.random.default_rng(0)
    student, teacher = (jnp.asarray(numbers.normal(size=(1, 3, 5)), jnp.float32) for _ in range(2))
    objective, eye = objective_of(**DISTILLM_2), Head(jnp.eye(5), 5)
    slots = Selection(jnp.arange(3, dtype=jnp.int32)[None], jnp.ones((1, 3)))

    @jax.jit
    def total(step):
        targets, labels = DenseTargets(teacher, eye), jnp.zeros((1, 3), jnp.int32)
        return objective(student, eye, targets, labels, slots, jnp.ones(1), step).total

    own, q, p = own_steps(0.5, STEPS, 0), oracle.f64(student[0]), oracle.f64(teacher[0])
    assert 0 < own.sum() < STEPS
    for step in range(STEPS):
        b = 1 + 0.5 * min(1, 2 * step / STEPS)
        want = b * oracle.kl_to_mixture(q, p, 0.1) if own[step] else (2 - b) * oracle.kl_to_mixture(p, q, 0.1)
        np.testing.assert_allclose(total(jnp.int32(step)), want.sum(), rtol=1e-5)


def test_the_same_loss_may_weigh_differently():
    fields = {"loss.terms": (("forward_kl", 1.0), ("cross_entropy", 0.5)), "on_policy.terms": (("forward_kl", 3.0),)}
    objective, own = objective_of(**fields), own_steps(0.5, STEPS, 0)
    assert set(objective.terms) == {"forward_kl", "cross_entropy"}
    for name, (here, there) in {"forward_kl": (3.0, 1.0), "cross_entropy": (0.0, 0.5)}.items():
        got = [float(objective.weights[name](jnp.int32(step))) for step in range(STEPS)]
        np.testing.assert_allclose(got, np.where(own, here, there))


def test_sampled_losses_keep_to_own_steps():
    mixed = {"on_policy.terms": (("sampled_reverse_kl", 1.0),)}
    assert set(objective_of(**mixed).terms) == {"forward_kl", "sampled_reverse_kl"}
    with pytest.raises(ValueError, match=r"^on_policy.reuse must be 1 with the loss .*'reverse_kl' in on_policy.terms"):
        objective_of(**mixed, **{"on_policy.reuse": 2})
    with pytest.raises(ValueError, match=r"^on_policy.fraction must be 1.0 with the loss 'sampled_k2', got 0.5"):
        objective_of(**mixed, **{"loss.terms": (("sampled_k2", 1.0),)})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"on_policy.fraction": 0.0}, r"^on_policy.terms must be \(\) with on_policy.fraction=0, got "),
        ({"on_policy.terms": (("jds", 1.0),)}, "^on_policy.terms must be a known name .*'jds'"),
        ({"on_policy.terms": (("jsd", 0.0),)}, "^on_policy.terms must have a weight that is not 0"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        objective_of(**DISTILLM_2 | fields)
