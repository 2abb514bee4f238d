"""The sample axis on given answers: launch.curate scores the rows of prompts, training takes those that it kept."""

import json
from functools import partial

import jax
import numpy as np
import pytest

from configs import quickstart
from kdjax import models
from kdjax.build import build
from kdjax.config import from_config_dict
from kdjax.curation import load_samples
from kdjax.curation.answers import selected
from kdjax.run.rows import RowChoice

VALUES = {
    "teacher.path": "synthetic",
    "student.init.layers": 1,
    "data.seq_len": 64,
    "data.chat_template": False,
    "prompts.answers": "gold",
    "samples.fraction": 0.25,
    "train.batch_size": 4,
    "train.steps": 4,
    "optim.warmup": 1,
}


@pytest.fixture
def typed(tmp_path):
    """typed(workdir, samples__score=...) -> (arguments of launch.curate, the same experiment); text and prompts."""
    text, prompts = tmp_path / "text.jsonl", tmp_path / "prompts.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"{i} bottles of beer on the wall; take {i}."}) for i in range(20)))
    asked = [{"id": str(i), "prompt": f"{'very ' * (i % 4)}{i} + {i}?", "answer": str(i * i)} for i in range(25)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in asked))

    def arguments(workdir, *more, **changes):
        values = VALUES | {"data.path": str(text), "prompts.path": str(prompts)}
        values |= {name.replace("__", "."): value for name, value in changes.items()}
        config = quickstart.get_config()
        for name, value in values.items():
            config.update_from_flattened_dict({name: value})
        flags = [f"--config.{name}={value}" for name, value in values.items()]
        found = ["--config=configs/quickstart.py", f"--workdir={workdir}", *flags, *more]
        return found, from_config_dict(config)

    return arguments


def log_probs(run, params, ids):
    """float64 [T, V] of a text in a row of its own."""
    row, own = np.zeros((2, 1, 64), np.int32)
    row[0, : len(ids)], own[0, : len(ids)] = ids, 1
    hidden = np.asarray(run(params, row, own, np.arange(64, dtype=np.int32)[None])[0], np.float64)[: len(ids)]
    logits = hidden @ np.asarray(params["embed"], np.float64)[:264].T
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def expected(built):
    """KL of each gold answer, by teacher and student on texts of their own."""
    found = []
    student, teacher = (jax.jit(partial(models.hidden, cfg)) for cfg in (built.student_cfg, built.teacher.cfg))
    for number, prompt in enumerate(built.asked.train):
        answer = [*built.tokenizer(prompt.answer, add_special_tokens=False)["input_ids"], built.asked.end]
        own, shown = built.asked.ids[number], built.asked.seen_by_teacher[number]
        q = log_probs(student, built.student_params, [*own, *answer])[len(own) - 1 : -1]
        p = log_probs(teacher, built.teacher_params, [*shown, *answer])[len(shown) - 1 : -1]
        found.append(np.sum(np.exp(p) * (p - q), -1).mean())
    return np.array(found)


def test_gold_answers_of_highest_kl_are_trained_on(call, typed, tmp_path):
    """The teacher reads prompts of its own, in scoring and, row by row, in training."""
    run, other = tmp_path / "run", {"teacher__privileged": "{question} ({answer})", "samples__score": "kl"}
    arguments, e = typed(run, **other)
    said = call("curate", *arguments)
    built = build(e, run)
    want = expected(built)
    assert 20 <= len(want) < 24  # 25 but for those held out
    assert f"kept 5 of {len(want)} rows, those of highest kl: " in said
    chosen = load_samples(run)
    np.testing.assert_allclose(chosen.scores, want, rtol=1e-4)
    best = np.sort(np.argsort(-want)[:5])
    np.testing.assert_array_equal(chosen.kept, best)
    assert not np.array_equal(best, np.arange(5))
    assert set(built.train.row_id) == set(best)

    batch = next(RowChoice(built, run).iterator(0))
    assert set(batch["row_id"]) <= set(best)
    for row, number in enumerate(batch["row_id"]):
        own, shown = built.asked.ids[number], built.asked.seen_by_teacher[number]
        assert tuple(batch["tokens"][row][: len(own)]) == own
        assert tuple(batch["teacher"]["tokens"][row][: len(shown)]) == shown

    again = call("curate", *arguments)
    assert again.startswith("the rows are chosen already, nothing was scored")
    changed, _ = typed(run, **other | {"teacher__privileged": "{question} = {answer}"})
    assert "does not hold: the teacher is" in call("curate", *changed)


def test_answers_of_a_pool_are_selected_and_then_kept(call, typed, tmp_path):
    teachers = tmp_path / "pool.jsonl"
    rows = [
        {"id": str(i), "instruction": f"{'very ' * (i % 4)}{i} + {i}?", "teacher_output": f"{s}{i * i}", "teacher": t}
        for i in range(25)
        for t, s in (("a", "It is "), ("b", ""))
    ]
    teachers.write_text("".join(json.dumps(line) + "\n" for line in rows))
    run = tmp_path / "run"
    pool = {"prompts__answers": "pool", "answers__pool": (str(teachers),), "answers__policy": "random"}
    pool |= {"prompts__verifier": "numeric", "samples__score": "random"}
    arguments, e = typed(run, **pool)
    call("curate", *typed(tmp_path / "all", **pool | {"samples__fraction": 1.0})[0])
    with pytest.raises(ValueError, match=r"must hold the rows that samples\.fraction keeps, got no manifest"):
        build(e, tmp_path / "all")
    said = call("curate", *arguments)
    count = len(list(selected.read_selected(run)))
    assert 20 <= count < 24
    assert f"kept 5 of {count} rows, those of highest random: " in said
    built = build(e, run)
    assert len(built.train) == 5
    np.testing.assert_array_equal(built.train.row_id, load_samples(run).kept)


def test_own_answers_alone_need_no_choice_before(call, typed, tmp_path):
    arguments, e = typed(tmp_path / "run", prompts__answers="", on_policy__fraction=1.0, data__seq_len=96)
    assert "launch.train scores each block of own answers; nothing to choose now." in call("curate", *arguments)
    built = build(e, tmp_path / "run")
    assert len(built.train) == len(built.data.train)
    with pytest.raises(ValueError, match=r"^samples\.fraction must be 1 with --snr, got 0\.25; gradients are"):
        call("curate", *typed(tmp_path / "run")[0], "--snr=2")
