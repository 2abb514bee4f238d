"""Which layers a cut student keeps, and that it is a copy of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdjax import models
from kdjax.models import prune

CFG = models.ModelConfig("qwen2", 11, 8, layers=5, heads=2, kv_heads=1, head_dim=4, mlp=12, attention_bias=True)


def parameters():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda spec: jnp.asarray(rng.standard_normal(spec.shape)), models.param_specs(CFG))


def test_the_piloted_student():
    assert prune.default_keep(30, 6) == (0, 1, 2, 10, 20, 29)


@given(st.data(), st.integers(1, 80))
def test_default_keep_has_the_first_three_the_last_and_even_steps(data, total):
    layers = data.draw(st.integers(1, total))
    keep = prune.default_keep(total, layers)
    assert len(keep) == layers == len(set(keep))
    assert list(keep) == sorted(keep)
    assert keep[:3] == tuple(range(min(3, layers)))
    assert keep[-1] == (total - 1 if layers > 3 else layers - 1)
    steps = np.diff(keep[3:])
    if total >= 3 * layers:  # room enough that no step is held back
        assert len(steps) == 0 or steps.max() - steps.min() <= 2


@pytest.mark.parametrize("layers", [0, -1, 31])
def test_default_keep_out_of_range(layers):
    with pytest.raises(ValueError, match=rf"student\.init\.layers must be in 1\.\.30, .*got {layers}"):
        prune.default_keep(30, layers)


def test_cut_copies_the_layers_and_all_the_rest():
    params = parameters()
    cfg, student = prune.cut(CFG, params, [0, 2, 4])
    assert cfg.layers == 3
    shapes = jax.tree.map(lambda spec: spec.shape, models.param_specs(cfg), is_leaf=lambda x: not isinstance(x, dict))
    assert jax.tree.map(jnp.shape, student) == shapes
    for name, leaf in student["layers"].items():
        np.testing.assert_array_equal(leaf, np.asarray(params["layers"][name])[[0, 2, 4]])
    for name in ("embed", "final_norm", "head"):
        np.testing.assert_array_equal(student[name], params[name])
        assert student[name].unsafe_buffer_pointer() != params[name].unsafe_buffer_pointer()  # the teacher may go


def test_cut_of_everything_is_the_teacher():
    params = parameters()
    cfg, student = prune.cut(CFG, params, range(5))
    assert cfg == CFG
    jax.tree.map(np.testing.assert_array_equal, student, params)


@pytest.mark.parametrize("keep", [(), (0, 5), (-1, 2), (2, 1), (1, 1)])
def test_a_cut_that_is_none_is_refused(keep):
    with pytest.raises(ValueError, match=r"student\.init\.keep must be ascending layers in 0\.\.4, each once, got \("):
        prune.cut(CFG, parameters(), keep)
