"""A run that begins anew with each choice of answers: what is evaluated, what is saved, what goes on after a stop."""

import json
import shutil

import jax
import numpy as np
import pytest

from kdjax import loop
from kdjax.build import build
from kdjax.config import Prompts, default_config, from_config_dict
from kdjax.data.prompts import load_prompts, split_prompts
from kdjax.offline import to_answer
from kdjax.run.answers import AnswerChoice
from tests.run.answer_choices import write_pool

STEPS = range(1, 7)
VALUES = {
    "teacher.path": "synthetic",
    "student.init.kind": "cut",
    "student.init.layers": 1,
    "data.seq_len": 64,
    "data.chat_template": False,
    "prompts.path": "arith:sum1",
    "prompts.size": 6,
    "prompts.answers": "pool",
    "answers.policy": "best",
    "answers.score": "grape",
    "answers.rescore_every": 2,
    "answers.restart": "weights",
    "selection.policy": "all",
    "loss.terms": (("cross_entropy", 1.0),),
    "optim.schedule": "constant",
    "optim.warmup": 0,
    "optim.learning_rate": 1e-2,
    "train.steps": STEPS[-1],
    "train.log_every": 1,
    "eval.every": 1,
    "eval.rows": 2,
    "eval.prompts": 0,
    "eval.completions": 0,
    "checkpoint.every": 2,
    "checkpoint.keep": 9,
    "log.tensorboard": False,
}


@pytest.fixture
def experiment(tmp_path):
    """All answers are in each batch, so that steps from the same weights have the same figures."""
    (tmp_path / "text.txt").write_text("\n\n".join(f"Bottle {i} stands beside bottle {i * i % 11}." for i in range(30)))
    config = default_config()
    prompts = Prompts(path=VALUES["prompts.path"], size=VALUES["prompts.size"])
    questions = split_prompts(load_prompts(prompts), prompts)[1]
    pool = write_pool(tmp_path / "pool", questions, {"ada": dict.fromkeys(range(len(questions)))})
    there = {"data.path": str(tmp_path / "text.txt"), "answers.pool": (pool,), "train.batch_size": len(questions)}
    config.update_from_flattened_dict(VALUES | there)
    return from_config_dict(config)


def figures(run):
    """Step -> the training loss; step -> the NLL of the student on held-out text."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    nlls = {line["step"]: line["student"]["nll"]["value"] for line in evaluations}
    return {line["step"]: line["loss"] for line in lines if "loss" in line}, nlls


def test_the_student_that_was_trained_is_evaluated_and_saved(experiment, tmp_path):
    run = tmp_path / "run"
    AnswerChoice(choosing := build(to_answer(experiment)), run)(choosing.student_params)
    built = build(experiment, run)
    loop.run(built, run)
    losses, nlls = figures(run)
    for of in (losses, nlls):  # three times the same two steps
        np.testing.assert_allclose([of[step] for step in STEPS], [of[1], of[2]] * 3, rtol=1e-4)
    assert losses[2] < 0.99 * losses[1]
    assert abs(nlls[2] - nlls[0]) > 1e-3 * nlls[0]
    first, second = (jax.device_get(loop.restore(built, run, step)[0].params) for step in ("2", "4"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), first, second)
    assert np.abs(first["embed"] - np.asarray(built.student_params["embed"])).max() > 1e-3

    for step in ("3", "4", "5", "6"):
        shutil.rmtree(run / "checkpoints" / step)
    loop.run(built, run)
    assert figures(run) == (losses, nlls)
