"""One device and eight devices take the same step, in every preset."""

import contextlib
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from kdjax.loop import place
from kdjax.sharding import PRESETS, make_rules
from kdjax.step import make_supervise, make_train_step

_spec = importlib.util.spec_from_file_location("step_bench", Path(__file__).parents[1] / "step" / "conftest.py")
step_bench = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(step_bench)

CASES = {
    "dense": {"selection__policy": "all"},
    "se_kd, sample reduction": {"selection__fraction": 0.3, "loss__reduction": "sample"},
    "random, mixture": {
        "selection__policy": "random_fraction",
        "loss__terms": (("jsd", 0.5), ("cross_entropy", 0.5)),
        "loss__tau": 2.0,
    },
    "drawn classes": {"selection__fraction": 0.3, "classes__kind": "sampled", "classes__entries": 7},
}
MESHES = [name for name, preset in PRESETS.items() if not preset.one_device]


def columns_of(batch):
    return {name: np.asarray(getattr(batch, name)) for name in batch.__dataclass_fields__ if name != "teacher"}


def make(rules, case, accumulate=1):
    parts = step_bench.build_parts(
        step_bench.experiment(train__batch_size=16, train__accumulate=accumulate, **CASES[case]),
        step_bench.STUDENT,
        step_bench.TEACHER,
        rules,
    )
    models = step_bench.models
    params, teacher = (
        models.init_params(cfg, jax.random.key(seed), rules)
        for seed, cfg in enumerate((step_bench.STUDENT, step_bench.TEACHER))
    )
    batch = place(columns_of(step_bench.ragged_batch(16)), rules, accumulate)
    return parts, params, teacher, batch


@contextlib.contextmanager
def compilations():
    """The list of what the backend compiles inside the block."""
    found = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def host(tree):
    return [np.asarray(jax.device_get(leaf), np.float64) for leaf in jax.tree.leaves(tree)]


def gradient_of(parts, params, teacher, batch):
    supervise, state = make_supervise(parts), step_bench.init_state(parts, params, 3)

    def total(params):
        one = jax.tree.map(lambda a: a[0], batch)
        output, _, _ = supervise(params, teacher, one, state.policy_state, state.key, state.step)
        return output.total, (output.count, output.metrics)

    return jax.jit(jax.value_and_grad(total, has_aux=True))(params)


@pytest.mark.parametrize("case", CASES)
def test_loss_gradient_and_metrics_equal_one_device(case):
    (value, (count, metrics)), gradient = gradient_of(*make(make_rules("single"), case))
    for preset in MESHES:
        rules = make_rules(preset)
        assert rules.batch_shards == 8
        made = make(rules, case)
        (value8, (count8, metrics8)), gradient8 = gradient_of(*made)
        assert float(count8) == float(count)
        np.testing.assert_allclose(float(value8), float(value), rtol=1e-5)
        np.testing.assert_allclose(host(metrics8), host(metrics), rtol=1e-5)
        scale = max(np.max(np.abs(leaf)) for leaf in host(gradient))
        for left, right in zip(host(gradient), host(gradient8), strict=True):
            np.testing.assert_allclose(right, left, atol=1e-5 * scale)
        for parameter, part in zip(jax.tree.leaves(made[1]), jax.tree.leaves(gradient8), strict=True):
            assert part.sharding.is_equivalent_to(parameter.sharding, part.ndim)


@pytest.mark.parametrize(("preset", "accumulate"), [("dp", 1), ("fsdp", 2)])
def test_three_steps_equal_one_device_and_compile_once(preset, accumulate):
    losses, sharded = {}, None
    for name in ("single", preset):
        rules = make_rules(name)
        parts, params, teacher, batch = make(rules, "se_kd, sample reduction", accumulate)
        step = jax.jit(make_train_step(parts), donate_argnums=0)
        state = jax.jit(lambda p, parts=parts: step_bench.init_state(parts, p, 3))(params)
        before = jax.tree.map(lambda leaf: leaf.sharding, state)
        reports = []
        for number in range(3):
            with compilations() as compiled:
                state, report = step(state, teacher, batch)
            assert len(compiled) == (number == 0)
            reports.append(float(report.metrics["loss"][0]) / float(report.metrics["loss"][1]))
        losses[name], sharded = reports, state
        after = jax.tree.map(lambda leaf: leaf.sharding, state)
        for old, new, leaf in zip(*map(jax.tree.leaves, (before, after, state)), strict=True):
            assert new.is_equivalent_to(old, leaf.ndim)
    np.testing.assert_allclose(losses[preset], losses["single"], rtol=1e-5)
    if preset == "fsdp":  # what is large is split: parameters and both moments
        whole = [leaf for leaf in jax.tree.leaves((sharded.params, sharded.opt_state)) if leaf.size >= 2048]
        assert len(whole) >= 3 * 3
        assert all(leaf.addressable_shards[0].data.size == leaf.size // 8 for leaf in whole)
