"""Schedules against values worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.schedules import SCHEDULES, learning_rate, make_schedule

HALF = math.cos(math.pi / 4)  # a cosine a quarter of the way has gone (1 - HALF) / 2 of the distance


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        (0.5, {0: 0.5, 1: 0.5, 1000: 0.5}),
        (3, {0: 3.0, 7: 3.0}),
        (("constant", 0.25), {0: 0.25, 99: 0.25}),
        (("linear", 2.0, 1.0, 10), {0: 2.0, 1: 1.9, 5: 1.5, 10: 1.0, 11: 1.0, 500: 1.0}),
        (("linear", 0.0, 1.0, 4.0), {0: 0.0, 1: 0.25, 4: 1.0}),
        (("cosine", 1.0, 0.0, 8), {0: 1.0, 2: (1 + HALF) / 2, 4: 0.5, 6: (1 - HALF) / 2, 8: 0.0, 9: 0.0}),
        (("cosine", 0.5, 2.5, 2), {0: 0.5, 1: 1.5, 2: 2.5, 100: 2.5}),
        (("hold_linear", 2.0, 1.0, 4, 8), {0: 2.0, 4: 2.0, 5: 1.75, 6: 1.5, 8: 1.0, 20: 1.0}),
        (("step", 1.0, 0.25, 3), {0: 1.0, 2: 1.0, 3: 0.25, 50: 0.25}),
        (("hold_linear", 2.0, 1.0, 0, 2), {0: 2.0, 1: 1.5, 2: 1.0}),
        (("step", 1.0, 0.0, "50%"), {0: 1.0, 10: 1.0, 11: 0.0}),  # of 23 updates
        (("linear", 0.0, 1.0, "17.4%"), {0: 0.0, 1: 0.25, 4: 1.0}),
        (("hold_linear", 2.0, 1.0, 4, "34.79%"), {4: 2.0, 6: 1.5, 8: 1.0}),
    ],
)
def test_values(spec, values):
    schedule = make_schedule(spec, "loss.tau", 23)
    for step, value in values.items():
        np.testing.assert_allclose(schedule(step), value, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(step)), value, rtol=1e-6, atol=1e-7)


def test_every_schedule_is_tried_above():
    assert set(SCHEDULES) == {"constant", "linear", "cosine", "step", "hold_linear"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (("linear", 1.0, 2.0), "'steps'"),
        (("linear", 1.0, 2.0, 3, 4), "positional arguments"),
        (("constant", "1.0"), "the arguments are numbers"),
        (("constant", "50%"), "the arguments are numbers"),
        (("linear", 1.0, "50%", 4), "the arguments are numbers"),
        (("linear", 1.0, 2.0, "half"), "or where updates are counted shares of the run such as '50%'"),
        (("linear", 1.0, 2.0, "-5%"), "the arguments are numbers"),
        (("linear", 1.0, 2.0, "1%"), "steps must be positive"),
        (("linear", 1.0, 2.0, 0), "steps must be positive"),
        (("cosine", 1.0, 2.0, -3), "steps must be positive"),
        (("hold_linear", 1.0, 2.0, 5, 5), "steps - hold must be positive"),
        ((), "the name is missing"),
        ((1.0, 2.0), "the name is missing"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ValueError, match=r"^loss.tau must be a number or \(name, \*arguments\), got ") as caught:
        make_schedule(spec, "loss.tau", 23)
    assert message in str(caught.value)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="^loss.tau must be a known name .*Did you mean 'cosine'"):
        make_schedule(("cosin", 1.0, 0.0, 5), "loss.tau")
    with pytest.raises(ValueError, match="^optim.schedule must be a known name .*Did you mean 'linear'"):
        learning_rate("liner", 1.0, 0, 10, 0.1)


@pytest.mark.parametrize(
    ("kind", "after"),
    [
        ("constant", {4: 1.0, 6: 1.0, 12: 1.0, 99: 1.0}),
        ("linear", {4: 1.0, 6: 0.8, 8: 0.6, 12: 0.2, 99: 0.2}),
        ("cosine", {4: 1.0, 6: 0.6 + 0.4 * HALF, 8: 0.6, 12: 0.2, 99: 0.2}),
    ],
)
def test_learning_rate(kind, after):
    rate = learning_rate(kind, 1.0, 4, 12, 0.2)
    for step, value in ({0: 0.0, 1: 0.25, 2: 0.5, 3: 0.75} | after).items():
        np.testing.assert_allclose(jax.jit(rate)(jnp.int32(step)), value, rtol=1e-6, atol=1e-7)


def test_learning_rate_without_warmup_starts_at_its_peak():
    rate = learning_rate("cosine", 3e-4, 0, 10, 0.0)
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [3e-4, 1.5e-4, 0.0], rtol=1e-6, atol=1e-10)


def test_a_run_shorter_than_its_warmup_stays_finite():
    rate = learning_rate("cosine", 1.0, 10, 3, 0.1)
    np.testing.assert_allclose([rate(0), rate(3), rate(10), rate(11)], [0.0, 0.3, 1.0, 0.1], rtol=1e-6)
