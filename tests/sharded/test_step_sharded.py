"""One device and eight devices take the same three steps in every preset: gradients, positions and draws one by one."""

import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import models
from kdjax.build import build_parts
from kdjax.config import Mesh
from kdjax.data import as_batch
from kdjax.loop import place
from kdjax.losses.objective import Objective
from kdjax.selection.choose import Chooser
from kdjax.sharding import Rules, make_rules
from kdjax.step import StepParts, init_state, make_train_step
from kdjax.teacher import drawn_entries, live_targets
from kdjax.types import SparseTargets, targets_of
from tests.step import step_bench

# A vocabulary that devices divide: with equal widths each keeps its columns of both heads, else they are gathered.
# Large draws: entropies that are nearly equal would be ranked by rounding.
LIKE = {"vocab_size": 96, "kv_heads": 4, "initializer_range": 0.3}
STUDENT = dataclasses.replace(step_bench.STUDENT, heads=8, **LIKE)
TEACHER = dataclasses.replace(step_bench.TEACHER, **LIKE)
WIDER = dataclasses.replace(TEACHER, vocab_size=104)
ROWS, STEPS = 16, 3
# Large updates, so that positions change; smooth ones where gradients vanish, so that rounding does not.
OPTIM = {"optim__learning_rate": 0.003, "optim__eps": 0.01}
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

DRAWN = {"selection__fraction": 0.3, "classes__kind": "sampled", "classes__entries": 7}
CASES = {
    "dense": {"selection__policy": "all"},
    "se_kd": {"selection__fraction": 0.3, "loss__reduction": "sample"},
    "drawn classes": DRAWN,
    "cached 3X": DRAWN | {"teacher__source": "cache"},
    "random, mixture": {
        "selection__policy": "random_fraction",
        "loss__terms": (("jsd", 0.5), ("cross_entropy", 0.5)),
        "loss__tau": 2.0,
    },
    "threshold": {"selection__policy": "threshold", "selection__queue": 64, "selection__signal": "kl"},
}


# --- a step that also says what it chose and drew


def watched(parts: StepParts) -> StepParts:
    """`parts` whose step has the metrics positions, weights, and classes, shares of the draws: each (by row, count).

    They are written down where the step makes them, inside its `shard_map`; each device adds its rows to zeros. The
    optimiser's state is (its own, the gradient it was given).
    """
    row_ids = []

    class Watched(Chooser):
        def __call__(self, stats, batch, *rest):
            row_ids.append(batch.row_id)
            return super().__call__(stats, batch, *rest)

    class Told(Objective):
        def __call__(self, hidden, head, targets, labels, selection, *rest):
            output = super().__call__(hidden, head, targets, labels, selection, *rest)
            chosen = {"positions": selection.index, "weights": selection.weight}
            if isinstance(targets, SparseTargets):
                chosen |= {"classes": targets.ids, "shares": targets.probs}
            rows = row_ids.pop()
            one = jnp.ones(())
            by_row = {name: (jnp.zeros((ROWS, *a.shape[1:])).at[rows].set(a), one) for name, a in chosen.items()}
            return dataclasses.replace(output, metrics=output.metrics | by_row)

    def init(params):
        return parts.optimiser.init(params), jax.tree.map(jnp.zeros_like, params)

    def update(gradient, state, params):
        updates, own = parts.optimiser.update(gradient, state[0], params)
        return updates, (own, gradient)

    def turned(to, old):
        return to(**{field.name: getattr(old, field.name) for field in dataclasses.fields(old)})

    return dataclasses.replace(
        parts,
        chooser=turned(Watched, parts.chooser),
        objective=turned(Told, parts.objective),
        optimiser=optax.GradientTransformation(init, update),
    )


# --- the runs


class Run(NamedTuple):
    """Of each step: the metrics (sum, count) and the gradient, on the host. The parameters before, the state after."""

    metrics: list[dict[str, Any]]
    gradients: list[Any]
    shardings: list[Any]
    state: Any


@functools.cache
def weights(cfg, seed):
    return jax.tree.map(np.asarray, models.init_params(cfg, jax.random.key(seed)))


def stored(cfg, seed, rules):
    def put(leaf, spec):
        return jax.device_put(leaf, rules.storage(spec.axes, spec.shape))

    return jax.tree.map(put, weights(cfg, seed), models.param_specs(cfg))


def columns_of(batch):
    columns = {name: np.asarray(getattr(batch, name)) for name in batch.__dataclass_fields__ if name != "teacher"}
    columns["tokens"] = columns["tokens"] % STUDENT.vocab_size
    return columns


@functools.cache
def cached_columns():
    """What a cache of the teacher holds, drawn on one device."""
    parts = build_parts(step_bench.experiment(**DRAWN), STUDENT, TEACHER, Rules())
    batch = as_batch(columns_of(step_bench.ragged_batch(ROWS)), jnp.asarray)
    index = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)[None], batch.tokens.shape)

    @jax.jit
    def draw(params):
        live = live_targets(parts.teacher.hidden(params, batch), parts.teacher.head(params), index)
        return drawn_entries(parts.classes, live, index, batch, jnp.float32(1), None)

    ids, codes, entropy = map(np.asarray, draw(stored(TEACHER, 1, Rules())))
    return {"ids": ids, "codes": codes, "stored": np.asarray(targets_of(batch)[1]), "entropy": entropy}


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


def steps(mesh, case, accumulate=1, teacher_cfg=TEACHER, teacher_preset=""):
    """Three steps on the same rows, with one compilation, that leave every array where it was."""
    rules = make_rules(mesh)
    fields = CASES[case] | OPTIM | {"teacher__preset": teacher_preset}
    experiment = step_bench.experiment(train__batch_size=ROWS, train__accumulate=accumulate, **fields)
    parts = watched(build_parts(experiment, STUDENT, teacher_cfg, rules))
    teacher = () if parts.teacher is None else stored(teacher_cfg, 1, rules.of_preset(teacher_preset))
    columns = columns_of(step_bench.ragged_batch(ROWS))
    if case == "cached 3X":
        columns["teacher"] = cached_columns()
    batch = place(columns, parts.rules, accumulate)
    state = jax.jit(lambda params: init_state(parts, params, 3))(stored(STUDENT, 0, rules))
    before = jax.tree.map(lambda leaf: leaf.sharding, state)
    step, metrics, gradients = jax.jit(make_train_step(parts), donate_argnums=0), [], []
    for number in range(STEPS):
        with compilations() as compiled:
            state, report = step(state, teacher, batch)
        assert len(compiled) == (number == 0)
        metrics.append(jax.device_get(report.metrics))
        gradients.append(jax.device_get(state.opt_state[1]))
    for old, leaf in zip(*map(jax.tree.leaves, (before, state)), strict=True):
        assert leaf.sharding.is_equivalent_to(old, leaf.ndim)
    return Run(metrics, gradients, jax.tree.leaves(before.params), state)


@functools.cache
def on_one_device(case, wider):
    return steps(Mesh("single"), case, teacher_cfg=WIDER if wider else TEACHER)


# --- their comparison

# (mesh, case, micro-batches); one device always takes the batch whole
EVERY = [
    (mesh, case, 2 if (mesh, case) in {("fsdp", "se_kd"), ("fsdp_tp", "se_kd"), ("dp", "drawn classes")} else 1)
    for mesh in ("dp", "fsdp", "tp", "fsdp_tp")
    for case in ("dense", "se_kd", "drawn classes", "cached 3X")
]
EVERY += [(mesh, "se_kd", 1) for mesh in list(MESHES)[4:]]
EVERY += [("fsdp_tp", case, 1) for case in ("random, mixture", "threshold")]
CHOSEN = {"positions", "weights", "classes", "shares"}


@pytest.mark.parametrize(("mesh", "case", "accumulate"), EVERY)
def test_three_steps_equal_one_device(mesh, case, accumulate):
    wider = "wider" in mesh
    one = on_one_device(case, wider)
    teacher_preset = mesh.partition("teacher ")[2] if "teacher " in mesh else ""
    eight = steps(MESHES[mesh], case, accumulate, WIDER if wider else TEACHER, teacher_preset)
    for left, right in zip(one.metrics, eight.metrics, strict=True):
        assert left.keys() == right.keys() >= {"loss", "positions"}
        np.testing.assert_array_equal(right["positions"][0], left["positions"][0])
        np.testing.assert_allclose(right["weights"][0], left["weights"][0], rtol=1e-5)
        if case in ("drawn classes", "cached 3X"):
            np.testing.assert_array_equal(right["classes"][0], left["classes"][0])
            np.testing.assert_allclose(right["shares"][0], left["shares"][0], rtol=1e-5)
        for name in left.keys() - CHOSEN - {"learning_rate"}:
            np.testing.assert_allclose(right[name], left[name], rtol=1e-5, err_msg=name)
    for number, (left, right) in enumerate(zip(one.gradients, eight.gradients, strict=True)):
        scale = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(left)) * (10 if number else 1)
        for expected, leaf in zip(*map(jax.tree.leaves, (left, right)), strict=True):
            np.testing.assert_allclose(leaf, expected, atol=1e-5 * scale)
    for sharding, part in zip(eight.shardings, jax.tree.leaves(eight.state.opt_state[1]), strict=True):
        assert part.sharding.is_equivalent_to(sharding, part.ndim)
    if mesh in ("fsdp", "fsdp_tp"):  # what is large is split: parameters, both moments and the gradient
        large = [leaf for leaf in jax.tree.leaves((eight.state.params, eight.state.opt_state)) if leaf.size >= 2048]
        assert len(large) >= 4 * 3
        assert all(leaf.addressable_shards[0].data.size == leaf.size // 8 for leaf in large)


def test_what_is_compared_is_a_choice():
    """Fewer positions than there are, other ones at another step, and draws of many classes."""
    drawn, dense = (on_one_device(case, False).metrics for case in ("drawn classes", "dense"))
    positions, weights = (np.asarray([m[name][0] for m in drawn]) for name in ("positions", "weights"))
    assert 0 < np.sum(weights[0] > 0) < 0.5 * np.sum(dense[0]["weights"][0] > 0)
    assert np.any((positions[0] != positions[2]) & (weights[0] > 0))
    assert len(np.unique(drawn[0]["classes"][0][weights[0] > 0])) > 20
