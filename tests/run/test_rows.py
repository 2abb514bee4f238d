"""What begins anew when answers are chosen anew."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax.build import build
from kdjax.config import Answers, Data, Experiment, StudentInit
from kdjax.run.rows import restarted
from kdjax.types import TrainState


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"{i} bottles of beer on the wall."}) for i in range(20)))
    e = Experiment()
    return build(
        dataclasses.replace(
            e,
            teacher=dataclasses.replace(e.teacher, path="synthetic"),
            student=dataclasses.replace(e.student, init=StudentInit("cut", layers=1)),
            data=Data(path=str(text), seq_len=16),
        )
    )


def after(built, steps):
    """A state after so many updates with a constant gradient."""
    params = jax.tree.map(jnp.copy, built.student_params)
    state = TrainState(jnp.int32(0), params, built.parts.optimiser.init(params), (), jax.random.key(0))
    for _ in range(steps):
        ones = jax.tree.map(jnp.ones_like, params)
        updates, moments = built.parts.optimiser.update(ones, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=moments)
    return state


def parts_of(state):
    """(updates that the moments are of, that the learning rate is of, the first moment)."""
    found = {}
    for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "_fields") and "count" in x._fields):
        if hasattr(part, "_fields") and "count" in part._fields:
            found[type(part).__name__] = part
    adam = found["ScaleByAdamState"]
    return int(adam.count), int(found["ScaleByScheduleState"].count), np.asarray(adam.mu["embed"])


@pytest.mark.parametrize("restart", ["", "optimiser", "weights"])
def test_the_schedule_goes_on(built, restart):
    built = dataclasses.replace(
        built, experiment=dataclasses.replace(built.experiment, answers=Answers(restart=restart))
    )
    before, first = after(built, 4), np.asarray(built.student_params["embed"])
    weights = np.asarray(before.params["embed"])
    assert not np.allclose(weights, first)
    found = restarted(before, built)
    moments, rate, mean = parts_of(found)
    assert int(found.step) == rate == 4
    assert moments == (0 if restart else 4)
    assert np.all(mean == 0) == bool(restart)
    np.testing.assert_array_equal(found.params["embed"], first if restart == "weights" else weights)
    assert not found.params["embed"].is_deleted()
    np.testing.assert_array_equal(built.student_params["embed"], first)
