"""The (sum, count) algebra: added up in any grouping, divided once."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax import metrics


def test_mean_is_a_sum_and_a_count():
    total, count = metrics.mean(jnp.arange(6).reshape(2, 3))
    assert (total.dtype, count.dtype, total.shape, count.shape) == (jnp.float32, jnp.float32, (), ())
    assert (float(total), float(count)) == (15.0, 6.0)


def test_mask_leaves_out_values_that_are_not_finite():
    values = jnp.array([1.0, jnp.nan, 3.0, jnp.inf])
    total, count = metrics.mean(values, jnp.array([True, False, True, False]))
    assert (float(total), float(count)) == (4.0, 2.0)


def test_gradients_through_a_mask_stay_finite():
    def loss(x):
        return metrics.mean(x, jnp.array([True, False]))[0]

    np.testing.assert_array_equal(jax.grad(loss)(jnp.array([1.0, jnp.inf])), [1.0, 0.0])


def test_half_precision_values_are_added_in_float32():
    total, _ = metrics.mean(jnp.full(4096, 1.0, jnp.bfloat16))
    assert float(total) == 4096.0


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(-1000, 1000), st.booleans()), min_size=1, max_size=12), st.data())
def test_any_split_gives_the_mean_of_the_whole(items, data):
    values = np.array([value for value, _ in items], np.float32)
    mask = np.array([kept for _, kept in items])
    cut = data.draw(st.integers(0, len(items)))
    parts = [{"m": metrics.mean(jnp.asarray(values[s]), jnp.asarray(mask[s]))} for s in (slice(cut), slice(cut, None))]
    got = metrics.divide(metrics.add(*parts))["m"]
    if mask.any():
        assert got == pytest.approx(values[mask].astype(np.float64).mean(), rel=1e-6)
    else:
        assert math.isnan(got)


def test_add_is_not_a_mean_of_means():
    one = {"loss": metrics.mean(jnp.array([6.0]))}
    many = {"loss": metrics.mean(jnp.array([1.0, 1.0, 1.0, 1.0, 2.0]))}
    assert metrics.divide(metrics.add(one, many)) == {"loss": 2.0}


def test_different_names_do_not_add():
    with pytest.raises(ValueError, match="loss"):
        metrics.add({"loss": metrics.mean(jnp.ones(1))}, {"kl": metrics.mean(jnp.ones(1))})


def test_divide_gives_python_floats_and_nan_for_nothing():
    out = metrics.divide({"a": (jnp.float32(1.0), jnp.float32(4.0)), "b": (jnp.float32(0.0), jnp.float32(0.0))})
    assert out["a"] == 0.25
    assert math.isnan(out["b"])
    assert all(type(value) is float for value in out.values())


def test_every_metric_has_a_unit_and_a_sentence():
    assert all(unit in ("nats", "fraction", "") and said for unit, said in metrics.UNITS.values())
