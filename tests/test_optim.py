"""The optimiser against AdamW in float64 numpy, and what is decayed in every model family."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import models
from kdjax.config import Optim
from kdjax.optim import decayed, make_optimiser

SHAPES = {"embed": (5, 3), "final_norm": (3,), "layers": {"wq": (2, 3, 4), "bq": (2, 4), "q_norm": (2, 4)}}
MATRICES = {"embed", "wq"}


def draw(seed, scale=1.0):
    numbers = np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.unflatten(structure, [jnp.asarray(scale * numbers.normal(size=s), jnp.float32) for s in leaves])


def flat(tree):
    return {path[-1].key: np.asarray(leaf, np.float64) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def rate(config, step, steps):
    """Linear from 0 in `warmup` updates, then a cosine down to final_fraction of the peak at update `steps`."""
    if step < config.warmup:
        return config.learning_rate * step / config.warmup
    done = min(1.0, (step - config.warmup) / (steps - config.warmup))
    low = config.final_fraction * config.learning_rate
    return low + (config.learning_rate - low) * 0.5 * (1 + np.cos(np.pi * done))


def adamw(config, params, gradients, steps):
    """Parameters after each of the updates."""
    params = dict(params)
    first, second = ({name: np.zeros_like(leaf) for name, leaf in params.items()} for _ in range(2))
    for at, gradient in enumerate(gradients):
        norm = np.sqrt(sum((leaf**2).sum() for leaf in gradient.values()))
        shrink = min(1.0, config.clip / norm) if config.clip else 1.0
        for name in params:
            g = gradient[name] * shrink
            first[name] = config.b1 * first[name] + (1 - config.b1) * g
            second[name] = config.b2 * second[name] + (1 - config.b2) * g * g
            step = first[name] / (1 - config.b1 ** (at + 1))
            step = step / (np.sqrt(second[name] / (1 - config.b2 ** (at + 1))) + config.eps)
            if name in MATRICES:
                step = step + config.weight_decay * params[name]
            params[name] = params[name] - rate(config, at, steps) * step
        yield dict(params)


CONFIGS = {
    "default": Optim(warmup=2),
    "decay": Optim(warmup=0, weight_decay=0.3, learning_rate=0.05),
    "clipped": Optim(warmup=1, clip=0.01, eps=1e-3, learning_rate=0.1, final_fraction=0.0),  # eps shows the scale
    "no clip": Optim(warmup=1, clip=0.0, eps=1e-3, learning_rate=0.1, b1=0.5, b2=0.999),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_against_adamw(name):
    config, steps, params = CONFIGS[name], 6, draw(0)
    optimiser, learning_rate = make_optimiser(config, steps)
    gradients = [draw(1 + at, scale=0.002 if at == 3 else 3.0) for at in range(steps)]
    state, update = optimiser.init(params), jax.jit(optimiser.update)
    want = adamw(config, flat(params), map(flat, gradients), steps)
    for at, (gradient, expected) in enumerate(zip(gradients, want, strict=True)):
        np.testing.assert_allclose(learning_rate(at), rate(config, at, steps), rtol=1e-5, atol=1e-9)
        updates, state = update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for leaf, values in flat(params).items():
            # atol: 1 - 0.999 has 1e-5 of relative error in float32, the update is of size 0.1
            message = f"{leaf} after {at + 1}"
            np.testing.assert_allclose(values, expected[leaf], rtol=1e-5, atol=5e-6, err_msg=message)


def test_state_is_float32_and_arrays():
    """All of it goes through jit, donation and the checkpoint."""
    optimiser, _ = make_optimiser(Optim(), 100)
    params = draw(0)
    leaves = jax.tree.leaves(jax.eval_shape(optimiser.init, params))
    assert {str(leaf.dtype) for leaf in leaves} == {"float32", "int32"}
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sum(leaf.size for leaf in leaves if leaf.dtype == jnp.float32) == 2 * size


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_decayed_in_every_family(family, tied):
    """Matrices and embeddings; no norm scale, no bias."""
    cfg = models.ModelConfig(family, 11, 8, 2, 2, 1, 4, 12, tied=tied, attention_bias=True)
    decisions = decayed(models.abstract_params(cfg))
    specs = models.param_specs(cfg)
    assert jax.tree.structure(decisions) == jax.tree.structure(models.abstract_params(cfg))
    named = {path[-1].key: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(decisions)}
    for group in (specs, specs["layers"]):
        for name, spec in group.items():
            if name == "layers":
                continue
            bias = "b" in name[:1]
            matrix = len([axis for axis in spec.axes if axis != "layers"]) >= 2
            assert named[name] == (matrix and not bias), name
    assert named["embed"] is True
    assert ("head" in named) == (not tied)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [10, 11])
def test_warmup_needs_steps_after_it(schedule, warmup):
    config = Optim(schedule=schedule, warmup=warmup)
    with pytest.raises(
        ValueError, match=f"^optim.warmup must be less than train.steps = 10, got {warmup}; .* Lower it"
    ):
        make_optimiser(config, 10)
    make_optimiser(config, warmup + 1)


def test_other_errors():
    with pytest.raises(ValueError, match="^optim.schedule must be a known name .*'cosin'.* Did you mean 'cosine'"):
        make_optimiser(dataclasses.replace(Optim(), schedule="cosin"), 100)


def test_no_warmup_takes_any_number_of_steps():
    _, learning_rate = make_optimiser(Optim(warmup=0, learning_rate=0.5, schedule="linear"), 1)
    np.testing.assert_allclose(learning_rate(0), 0.5)
    _, learning_rate = make_optimiser(Optim(warmup=5, learning_rate=0.5, schedule="constant"), 3)
    np.testing.assert_allclose([learning_rate(0), learning_rate(1), learning_rate(7)], [0.0, 0.1, 0.5])
