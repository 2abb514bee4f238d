"""What is compiled: one program a run, no larger for more layers or more devices."""

import collections
import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import quickstart
from kdjax import loop, models
from kdjax.build import build, build_parts
from kdjax.config import Mesh, from_config_dict
from kdjax.sharding import make_rules
from kdjax.step import init_state, make_train_step
from tests.step import step_bench

STUDENT, TEACHER = (dataclasses.replace(cfg, vocab_size=96) for cfg in (step_bench.STUDENT, step_bench.TEACHER))


def program(devices=1, student=STUDENT, teacher=TEACHER, **fields):
    """The lowered step on so many devices; its parameters have shapes and no values."""
    mesh = Mesh("fsdp", f"data:{devices}") if devices > 1 else Mesh("single")
    rules = make_rules(mesh, jax.devices()[:devices])
    parts = build_parts(step_bench.experiment(**fields), student, teacher, rules)
    params, teacher_params = (models.abstract_params(cfg, rules) for cfg in (student, teacher))
    state = jax.eval_shape(lambda params: init_state(parts, params, 3), params)
    rows = {name: np.asarray(a) for name, a in vars(step_bench.ragged_batch()).items() if a is not None}
    return jax.jit(make_train_step(parts)).lower(state, teacher_params, loop.place(rows, rules, parts.accumulate))


def operations(text):
    return sum(" = " in line for line in text.splitlines())


SEKD, DENSE = {"selection__fraction": 0.3}, {"selection__policy": "all"}


@pytest.mark.parametrize("fields", [SEKD, DENSE | {"train__accumulate": 2}], ids=["se_kd", "dense, accumulated"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_layers_add_nothing(fields, side):
    deeper = {side: dataclasses.replace({"student": STUDENT, "teacher": TEACHER}[side], layers=8)}
    shallow, deep = (operations(program(**fields, **models).as_text()) for models in ({}, deeper))
    assert deep == shallow > 500


def test_layers_add_nothing_to_what_the_compiler_makes():
    deeper = {"student": dataclasses.replace(STUDENT, layers=8), "teacher": dataclasses.replace(TEACHER, layers=9)}
    shallow, deep = (operations(program(**SEKD, **models).compile().as_text()) for models in ({}, deeper))
    assert shallow > 500
    assert deep == pytest.approx(shallow, rel=0.02)


@pytest.mark.parametrize("fields", [SEKD, DENSE], ids=["se_kd", "dense"])
def test_devices_add_nothing(fields):
    lowered = {devices: program(devices, **fields) for devices in (2, 4, 8)}
    two, four, eight = (operations(low.as_text()) for low in lowered.values())
    assert two > 500
    assert max(abs(four - two), abs(eight - two)) <= 2
    if fields == SEKD:
        two, eight = (operations(lowered[devices].compile().as_text()) for devices in (2, 8))
        assert eight == pytest.approx(two, rel=0.02)


# --- a whole run


@contextlib.contextmanager
def compilations():
    """How often the backend compiles a function of each name inside the block."""
    found = collections.Counter()

    def listen(event, duration, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found[fun_name] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("mesh", ["single", "fsdp"])
def test_a_run_compiles_its_step_once_and_its_evaluation_once(tmp_path, mesh):
    said = [{"text": f"{i} bottles of beer on the wall, {i} bottles; take {i % 7} down."} for i in range(60)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, said)))
    config = quickstart.get_config()
    config.teacher.path, config.student.init.layers, config.mesh.preset = "synthetic", 1, mesh
    config.data.path, config.data.seq_len = str(tmp_path / "text.jsonl"), 32
    config.train.batch_size, config.train.steps, config.eval.every = 8, 5, 2
    config.eval.rows, config.eval.completions, config.optim.warmup = 8, 0, 1
    config.log.tensorboard = False
    experiment = from_config_dict(config)
    loop.claim_workdir(tmp_path / "run", experiment)
    with compilations() as compiled:
        outcome = loop.run(build(experiment), tmp_path / "run")
    assert outcome.step == 5
    evaluated = [json.loads(line)["step"] for line in (tmp_path / "run" / "evals.jsonl").read_text().splitlines()]
    assert {0, 2, 4, 5} <= set(evaluated)
    assert compiled["jit(train_step)"] == compiled["jit(eval_step)"] == 1
