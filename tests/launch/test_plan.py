"""launch.plan: what it says of a run without loading it."""

import dataclasses
import json
import sys

import jax
import pytest
from absl import flags

from kdjax import loop
from kdjax.analysis.plan_generation import generation_figures, not_counted
from kdjax.build import build
from kdjax.config import default_config, from_config_dict
from kdjax.data import abstract_batch, train_iterator
from kdjax.generation.batching import padded_width
from kdjax.models import synthetic
from kdjax.models.decoder_cached import init_cache
from tests.launch import launched


@pytest.fixture(scope="module")
def plan():
    with launched.loaded("plan") as module:
        yield module


@pytest.fixture(scope="module")
def experiment():
    config = default_config()
    config.teacher.path = "synthetic"
    config.student.init.kind = "cut"
    config.student.init.layers = 1
    config.data.path = "topics"
    config.data.seq_len = 32
    config.data.max_train_tokens = 1024
    config.train.batch_size = 4
    config.train.accumulate = 2
    config.selection.policy = "all"
    return from_config_dict(config)


@pytest.fixture(scope="module")
def built(experiment):
    return build(experiment)


@pytest.fixture(scope="module")
def live(plan, experiment):
    return plan.step_figures(experiment)


def test_the_batch_is_shaped_as_the_one_of_a_run(experiment, built):
    columns = next(train_iterator(built.data.train, 4, 0))
    real = loop.place(columns, built.rules, experiment.train.accumulate)

    def form(leaf):
        return leaf.shape, leaf.dtype

    assert jax.tree.map(form, abstract_batch(experiment, built.rules, 264)) == jax.tree.map(form, real)


def test_the_batch_of_a_privileged_teacher_is_shaped_as_the_one_of_a_run(plan, experiment):
    prompts = dataclasses.replace(experiment.prompts, path="arith:sum1", size=20, answers="gold")
    teacher = dataclasses.replace(experiment.teacher, privileged="{question} It is {answer}, is it not?")
    data = dataclasses.replace(experiment.data, seq_len=64)
    e = dataclasses.replace(experiment, prompts=prompts, teacher=teacher, data=data)
    built = build(e)
    columns = next(train_iterator(built.train, 4, 0))
    columns["teacher"] = {name: column[columns["row_id"]] for name, column in built.text.teacher.items()}
    real = loop.place(columns, built.rules, experiment.train.accumulate)
    room = plan.teacher_room(e)
    assert room >= len(" It is , is it not?")
    planned = abstract_batch(e, built.rules, 264, room)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), planned) == jax.tree.map(lambda a: (a.shape, a.dtype), real)
    rows = plan.data_figures(e)
    assert rows["train_rows"] == len(built.train) < 20
    assert rows["train_targets"] == built.train.loss_mask.sum()


def test_what_own_answers_take(experiment):
    """Keys and values as the sampler makes them: of the prompts that it reads, and of the answers."""
    own = dataclasses.replace(experiment.on_policy, fraction=0.5, block=3)
    generation = dataclasses.replace(experiment.generation, new_tokens=10, batch_size=6)
    data = dataclasses.replace(experiment.data, seq_len=70)
    e = dataclasses.replace(experiment, on_policy=own, generation=generation, data=data)
    cfg = synthetic.config()
    found = generation_figures(e, cfg)
    width = padded_width(60)
    read, made = (jax.eval_shape(lambda c=c: init_cache(cfg, 6, c, jax.numpy.float32)) for c in (width, width + 10))
    leaves = [leaf for cache in (read, made) for leaf in jax.tree.leaves((cache.keys, cache.values))]
    assert found["own_answers_cache_bytes_at_most"] == sum(leaf.size * 4 for leaf in leaves)
    assert found["own_tokens_a_block_at_most"] == 3 * 4 * 10
    assert generation_figures(e, cfg, 2, 2)["own_answers_cache_bytes_at_most"] * 4 == sum(
        leaf.size * 4 for leaf in leaves
    )
    (note,) = not_counted(e, found)
    assert "for every 3 steps on own answers" in note
    kept = dataclasses.replace(e, samples=dataclasses.replace(e.samples, fraction=0.7))
    more = generation_figures(kept, cfg)
    assert more["own_answers_a_block"] == 18  # 12 of 0.7
    assert more["own_tokens_a_block_at_most"] == 180
    assert "for each answer of 18, and scores these (samples.fraction=0.7)." in not_counted(kept, more)[0]
    assert generation_figures(experiment, cfg) == {}
    assert not_counted(experiment, {}) == []


def test_figures_of_a_step(plan, experiment, built, live):
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(p)) for p in (built.student_params, built.teacher_params)]
    assert [live["student_parameters"], live["teacher_parameters"]] == sizes
    batch = abstract_batch(experiment, built.rules, 264)
    bytes_in = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
    # Student, its two moments and the teacher in float32, the batch; a few scalars more, what no policy reads less.
    wanted = 4 * (3 * sizes[0] + sizes[1]) + bytes_in
    assert live["step_argument_bytes"] == pytest.approx(wanted, abs=1024)
    assert live["step_temporary_bytes"] > 4 * sizes[0], "the gradient"


def test_with_a_cache_the_teacher_is_no_argument(plan, experiment, live):
    classes = dataclasses.replace(experiment.classes, kind="sampled", entries=20)
    cached = dataclasses.replace(
        experiment, classes=classes, teacher=dataclasses.replace(experiment.teacher, source="cache")
    )
    without = plan.step_figures(cached)
    positions = experiment.train.batch_size * experiment.data.seq_len
    columns = positions * (20 * (4 + 2) + 1 + 4)  # ids and codes, whether they are stored, the entropy
    saved = 4 * live["teacher_parameters"] - columns
    assert live["step_argument_bytes"] - without["step_argument_bytes"] == pytest.approx(saved, abs=8192)


def test_a_teacher_on_devices_of_its_own_is_not_planned(plan, experiment):
    apart = dataclasses.replace(experiment, teacher=dataclasses.replace(experiment.teacher, devices=4))
    with pytest.raises(ValueError, match=r"^teacher\.devices must be 0 for launch\.plan, got 4; .* Set it to 0, "):
        plan.step_figures(apart)


def test_the_script_writes_what_it_prints(plan, built, live, tmp_path, monkeypatch, capsys):
    config = default_config()
    for group, field, value in (
        ("teacher", "path", "synthetic"),
        ("data", "path", "topics"),
        ("data", "seq_len", 32),
        ("data", "max_train_tokens", 1024),
    ):
        config[group][field] = value
    config.student.init.kind = "cut"
    config.student.init.layers = 1
    monkeypatch.setattr(plan, "step_figures", lambda experiment: live)
    monkeypatch.setattr(plan.app, "require", lambda name: config)
    flags.FLAGS([sys.argv[0], f"--out={tmp_path / 'some' / 'plan.json'}"])
    plan.main()
    found = json.loads((tmp_path / "some" / "plan.json").read_text())
    assert (found["train_rows"], found["train_tokens"]) == (32, 1024)
    assert found["heldout_targets"] == built.data.summary["heldout"]["targets"]
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == [f"{v:,}" for v in found.values()]


def test_the_script_prints_and_writes_the_plan_of_a_topology(plan, tmp_path, monkeypatch, capsys):
    from kdjax.analysis import plan_text

    asked = []
    monkeypatch.setattr(plan, "topology_figures", lambda experiment, name: asked.append(name) or {"made": "of figures"})
    monkeypatch.setattr(plan_text, "render", lambda found: f"page {found['made']}\n")
    monkeypatch.setattr(plan.app, "require", lambda name: default_config())
    flags.FLAGS([sys.argv[0], "--topology=v5e:2x4", f"--out={tmp_path / 'plan.json'}"])
    try:
        plan.main()
    finally:
        flags.FLAGS["topology"].unparse()
    assert asked == ["v5e:2x4"]
    assert capsys.readouterr().out == "page of figures\n"
    assert json.loads((tmp_path / "plan.json").read_text()) == {"made": "of figures"}


def test_text_that_is_not_at_hand_is_no_error(plan, experiment):
    missing = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, path="nowhere.txt"))
    assert plan._text_if_here(missing) is None
    with pytest.raises(ValueError, match=r"^data\.path must be"):
        plan.data_figures(missing)
    assert plan._text_if_here(experiment)["train_rows"] == 32


def test_rows_that_the_mesh_does_not_divide_are_refused(plan, experiment):
    from kdjax.models import synthetic
    from kdjax.sharding import PRESETS, Rules

    mesh = jax.sharding.AbstractMesh((3,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    cfg = synthetic.config()
    message = r"^train\.batch_size / train\.accumulate must be a multiple of the 3 parts"
    with pytest.raises(ValueError, match=message):
        plan.abstract_step(experiment, cfg, cfg, Rules(mesh, PRESETS["fsdp"]))
