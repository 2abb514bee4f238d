"""One device and eight devices take the same step, in every preset."""

import contextlib
import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from kdjax.config import Mesh
from kdjax.data import as_batch
from kdjax.loop import place
from kdjax.sharding import Rules, make_rules
from kdjax.step import make_supervise, make_train_step
from kdjax.teacher import drawn_entries, live_targets
from kdjax.types import targets_of

_spec = importlib.util.spec_from_file_location("step_bench", Path(__file__).parents[1] / "step" / "conftest.py")
step_bench = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(step_bench)

# A vocabulary that devices divide: with equal widths each keeps its columns of both heads, else they are gathered.
# Large draws: entropies that are nearly equal would be ranked by rounding.
LIKE = {"vocab_size": 96, "kv_heads": 4, "initializer_range": 0.3}
STUDENT = dataclasses.replace(step_bench.STUDENT, heads=8, **LIKE)
TEACHER = dataclasses.replace(step_bench.TEACHER, **LIKE)
WIDER = dataclasses.replace(TEACHER, vocab_size=104)
MESHES = {
    "dp": Mesh("dp"),
    "fsdp": Mesh("fsdp"),
    "tp": Mesh("tp", "model:4"),
    "fsdp_tp": Mesh("fsdp_tp", "data:2,model:4"),
    "slices": Mesh("fsdp_tp", "replica:2,data:-1,model:2"),
    "sequence": Mesh("fsdp_tp", "data:4,model:2", sequence=True),
    "fsdp, teacher fsdp_tp": Mesh("fsdp", "data:2,model:4"),
    "fsdp_tp, teacher dp": Mesh("fsdp_tp", "data:4,model:2"),
    "fsdp_tp, wider teacher": Mesh("fsdp_tp", "data:2,model:4"),
}

CASES = {
    "dense": {"selection__policy": "all"},
    "se_kd, sample reduction": {"selection__fraction": 0.3, "loss__reduction": "sample"},
    "random, mixture": {
        "selection__policy": "random_fraction",
        "loss__terms": (("jsd", 0.5), ("cross_entropy", 0.5)),
        "loss__tau": 2.0,
    },
    "threshold": {"selection__policy": "threshold", "selection__queue": 64, "selection__signal": "kl"},
    "drawn classes": {"selection__fraction": 0.3, "classes__kind": "sampled", "classes__entries": 7},
    "cached 3X": {
        "selection__fraction": 0.3,
        "classes__kind": "sampled",
        "classes__entries": 7,
        "teacher__source": "cache",
    },
}


def columns_of(batch):
    columns = {name: np.asarray(getattr(batch, name)) for name in batch.__dataclass_fields__ if name != "teacher"}
    columns["tokens"] = columns["tokens"] % STUDENT.vocab_size
    return columns


@functools.cache
def cached_columns():
    """What a cache of the teacher holds, drawn on one device."""
    fields = CASES["cached 3X"] | {"teacher__source": "live"}
    parts = step_bench.build_parts(step_bench.experiment(**fields), STUDENT, TEACHER, Rules())
    params, batch = step_bench.models.init_params(TEACHER, jax.random.key(1)), step_bench.ragged_batch(16)
    batch = as_batch(columns_of(batch), jax.numpy.asarray)
    index = np.broadcast_to(np.arange(batch.tokens.shape[1]), batch.tokens.shape).astype(np.int32)
    live = live_targets(parts.teacher.hidden(params, batch), parts.teacher.head(params), jax.numpy.asarray(index))
    ids, codes, entropy = drawn_entries(
        parts.classes, live, jax.numpy.asarray(index), batch, jax.numpy.float32(1), None
    )
    stored = np.asarray(targets_of(batch)[1])
    return {"ids": np.asarray(ids), "codes": np.asarray(codes), "stored": stored, "entropy": np.asarray(entropy)}


def make(mesh, case, accumulate=1, teacher_cfg=TEACHER, teacher_preset=""):
    rules = make_rules(mesh)
    fields = CASES[case] | {"teacher__preset": teacher_preset}
    experiment = step_bench.experiment(train__batch_size=16, train__accumulate=accumulate, **fields)
    parts = step_bench.build_parts(experiment, STUDENT, teacher_cfg, rules)
    models = step_bench.models
    params = models.init_params(STUDENT, jax.random.key(0), rules)
    teacher: Any = ()
    if parts.teacher is not None:
        teacher = models.init_params(teacher_cfg, jax.random.key(1), rules.of_preset(teacher_preset))
    columns = columns_of(step_bench.ragged_batch(16))
    if case == "cached 3X":
        columns["teacher"] = cached_columns()
    return parts, params, teacher, place(columns, parts.rules, accumulate)


def of_mesh(name, case, accumulate=1):
    """`make` on a mesh by its name, and its equal on one device."""
    wider = WIDER if "wider" in name else TEACHER
    preset = name.partition("teacher ")[2] if "teacher " in name else ""
    sharded = make(MESHES[name], case, accumulate, wider, preset)
    return sharded, make(Mesh("single"), case, accumulate, wider)


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


EVERY = [(name, case) for name in list(MESHES)[:4] for case in ("dense", "se_kd, sample reduction", "cached 3X")]
EVERY += [(name, "se_kd, sample reduction") for name in list(MESHES)[4:]]
EVERY += [("fsdp_tp", case) for case in ("random, mixture", "threshold", "drawn classes")]


@functools.cache
def on_one_device(case, wider):
    return gradient_of(*make(Mesh("single"), case, teacher_cfg=WIDER if wider else TEACHER))


@pytest.mark.parametrize(("name", "case"), EVERY)
def test_loss_gradient_and_metrics_equal_one_device(name, case):
    (value, (count, metrics)), gradient = on_one_device(case, "wider" in name)
    made, _ = of_mesh(name, case)
    (value8, (count8, metrics8)), gradient8 = gradient_of(*made)
    assert float(count8) == float(count)
    np.testing.assert_allclose(float(value8), float(value), rtol=1e-5)
    np.testing.assert_allclose(host(metrics8), host(metrics), rtol=1e-5)
    scale = max(np.max(np.abs(leaf)) for leaf in host(gradient))
    for left, right in zip(host(gradient), host(gradient8), strict=True):
        np.testing.assert_allclose(right, left, atol=1e-5 * scale)
    for parameter, part in zip(jax.tree.leaves(made[1]), jax.tree.leaves(gradient8), strict=True):
        assert part.sharding.is_equivalent_to(parameter.sharding, part.ndim)


STEPS = [("dp", 1, "dense"), ("fsdp", 2, "se_kd, sample reduction"), ("tp", 1, "cached 3X")]
STEPS += [("fsdp_tp", 2, "se_kd, sample reduction")]


@pytest.mark.parametrize(("mesh", "accumulate", "case"), STEPS)
def test_three_steps_equal_one_device_and_compile_once(mesh, accumulate, case):
    losses, sharded = {}, None
    for name, made in zip(("mesh", "single"), of_mesh(mesh, case, accumulate), strict=True):
        parts, params, teacher, batch = made
        step = jax.jit(make_train_step(parts), donate_argnums=0)
        state = jax.jit(lambda p, parts=parts: step_bench.init_state(parts, p, 3))(params)
        before = jax.tree.map(lambda leaf: leaf.sharding, state)
        reports = []
        for number in range(3):
            with compilations() as compiled:
                state, report = step(state, teacher, batch)
            assert len(compiled) == (number == 0)
            reports.append(float(report.metrics["loss"][0]) / float(report.metrics["loss"][1]))
        losses[name], sharded = reports, state if name == "mesh" else sharded
        after = jax.tree.map(lambda leaf: leaf.sharding, state)
        for old, new, leaf in zip(*map(jax.tree.leaves, (before, after, state)), strict=True):
            assert new.is_equivalent_to(old, leaf.ndim)
    np.testing.assert_allclose(losses["mesh"], losses["single"], rtol=1e-5)
    if mesh.startswith("fsdp"):  # what is large is split: parameters and both moments
        whole = [leaf for leaf in jax.tree.leaves((sharded.params, sharded.opt_state)) if leaf.size >= 2048]
        assert len(whole) >= 3 * 3
        assert all(leaf.addressable_shards[0].data.size == leaf.size // 8 for leaf in whole)
