"""A teacher on devices of its own gives what one beside the student gives."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from kdjax import loop
from kdjax.build import build
from kdjax.config import default_config, from_config_dict
from kdjax.curation import make_scorer
from kdjax.data import heldout_batches, to_batch, train_iterator
from kdjax.evals.text_page import make_page_step
from kdjax.run.heldout import Heldout
from kdjax.step import feed_of, feed_step, make_train_step
from kdjax.teacher import apart
from kdjax.types import TeacherHidden

SIDES = {
    "two devices": {"teacher.devices": 1},
    "four and four": {"mesh.preset": "fsdp", "teacher.devices": 4, "train.accumulate": 2},
    "two and four of another kind": {
        "mesh.preset": "dp",
        "mesh.shape": "data:4",
        "teacher.devices": 4,
        "teacher.preset": "fsdp_tp",
        "teacher.shape": "data:2,model:2",
    },
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("apart") / "text.txt"
    path.write_text("\n\n".join(f"Bottle {i} stands beside bottle {i * i % 11} on the wall." for i in range(80)))
    return path


def experiment(text, **fields):
    config = default_config()
    fields = {
        "teacher.path": "synthetic",
        "student.init.kind": "cut",
        "student.init.layers": 1,
        "data.path": str(text),
        "data.seq_len": 16,
        "selection.signal": "kl",
        "train.batch_size": 8,
        "train.steps": 2,
        "eval.rows": 8,
        "optim.warmup": 0,
        "samples.score": "kl",
    } | fields
    for name, value in fields.items():
        config.update_from_flattened_dict({name: value})
    return from_config_dict(config)


def figures(built):
    """Losses of two steps, and what the student makes of held-out text, of the rows and of one page."""
    state = loop.fresh_state(built)
    step, feed = jax.jit(make_train_step(built.parts), donate_argnums=0), feed_step(built.parts)
    data = train_iterator(built.train, 8, built.experiment.train.seed)
    losses = []
    for _ in range(2):
        batch = feed(loop.place(next(data), built.rules, built.experiment.train.accumulate))
        state, report = step(state, built.teacher_params, batch)
        losses.append(np.array(report.metrics["loss"]))
    assert step._cache_size() == 1
    held = Heldout(built)(state.params)
    scorer = make_scorer(built.parts.student, built.parts.teacher, built.experiment.samples, built.rules, 8)
    scores = scorer(state.params, built.teacher_params, built.train)
    columns = next(iter(heldout_batches(built.data.heldout, 8, 8)))
    batch = feed_of(built.parts.teacher)(to_batch(columns, built.rules))
    page = make_page_step(built.parts)(
        state.params, built.teacher_params, batch, state.policy_state, state.key, state.step
    )
    return losses, held.kl.value, scores, jax.device_get(page)


@functools.cache
def on_one_device(text):
    return figures(build(experiment(text)))


@pytest.mark.parametrize("name", SIDES)
def test_all_that_reads_the_teacher_gives_the_same(text, name):
    losses, kl, scores, page = on_one_device(text)
    built = build(experiment(text, **SIDES[name]))
    losses2, kl2, scores2, page2 = figures(built)
    np.testing.assert_allclose(losses2, losses, rtol=1e-5)
    np.testing.assert_allclose(kl2, kl, rtol=1e-5)
    np.testing.assert_allclose(scores2, scores, rtol=1e-5)
    np.testing.assert_array_equal(page2["selected"], page["selected"])
    teacher = {device for leaf in jax.tree.leaves(built.teacher.params) for device in leaf.devices()}
    student = {device for leaf in jax.tree.leaves(built.student_params) for device in leaf.devices()}
    assert teacher == set(jax.devices()[-built.experiment.teacher.devices :])
    assert not teacher & student
    head = jax.tree.leaves(built.teacher_params)
    assert len(head) == 1
    assert head[0].devices() <= student


def test_hidden_states_come_back_and_never_logits(text):
    built = build(experiment(text, **SIDES["two devices"]))
    batch = to_batch(next(iter(heldout_batches(built.data.heldout, 8, 8))), built.rules)
    fed = built.parts.teacher.feed(batch)
    assert isinstance(fed.teacher, TeacherHidden)
    assert fed.teacher.hidden.shape == (8, 16, built.teacher.cfg.width)
    assert fed.teacher.hidden.devices() == batch.tokens.devices()
    with pytest.raises(ValueError, match=r"^batch\.teacher must hold the teacher's hidden states"):
        built.parts.teacher.hidden(built.teacher_params, batch)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"teacher.devices": 8}, r"^teacher\.devices must be fewer than the 8 devices that are there, got 8; "),
        ({"teacher.devices": 2, "teacher.shape": "data:3"}, r"^teacher\.shape must be made of the 2 devices"),
        ({"teacher.devices": 2, "teacher.preset": "single"}, r"^teacher\.preset must not be 'single'"),
        ({"teacher.devices": 2, "teacher.preset": "tq"}, r"^teacher\.preset must be a known name"),
        (
            {"mesh.preset": "dp", "teacher.devices": 3, "train.batch_size": 10},
            r"^train\.batch_size / train\.accumulate",
        ),
    ],
)
def test_what_does_not_fit_is_said(text, fields, says):
    with pytest.raises(ValueError, match=says):
        build(experiment(text, **fields))


def test_several_processes_are_refused(text, monkeypatch):
    monkeypatch.setattr(apart.jax, "process_count", lambda: 2)
    e = dataclasses.replace(experiment(text), mesh=dataclasses.replace(experiment(text).mesh, preset="dp"))
    e = dataclasses.replace(e, teacher=dataclasses.replace(e.teacher, devices=4))
    with pytest.raises(ValueError, match=r"^teacher\.devices must be 0 with 2 processes, got 4; "):
        apart.share_devices(e)
