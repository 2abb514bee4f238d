"""Held-out prompts: the student's likeliest answers, verified."""

import numpy as np
import pytest

from kdjax.build import build, student_speaker
from kdjax.config import default_config, from_config_dict
from kdjax.data.responses import prompt_ids
from kdjax.evals.evaluation import Evaluation
from kdjax.generation import Sampling, complete, rollouts
from kdjax.generation.batching import Completion
from kdjax.run.heldout import Heldout, heldout_prompts
from kdjax.verifiers import VERIFIERS, Finding, Verdict, verify


def experiment(tmp_path, **fields):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Bottle {i} stands beside bottle {i * i % 11} on the wall." for i in range(60)))
    config = default_config()
    fields = {
        "teacher.path": "synthetic",
        "student.init.kind": "cut",
        "student.init.layers": 1,
        "data.path": str(path),
        "data.seq_len": 64,
        "data.chat_template": False,
        "prompts.path": "arith:sum1",
        "prompts.size": 60,
        "generation.new_tokens": 5,
        "generation.batch_size": 4,
        "eval.prompts": 6,
        "eval.rows": 4,
    } | fields
    for name, value in fields.items():
        config.update_from_flattened_dict({name: value})
    return from_config_dict(config)


def test_answers_are_the_likeliest_and_verified(tmp_path, monkeypatch):
    built = build(experiment(tmp_path))
    seen = []

    def watched(response, prompt, default="", *, cut_off):
        seen.append((prompt.id, response))
        return verify(response, prompt, default, cut_off=cut_off)

    monkeypatch.setattr("kdjax.run.heldout.verify", watched)
    found = Heldout(built)(built.student_params)
    prompts = heldout_prompts(built)
    assert len(prompts) == found.answers.right + found.answers.wrong + found.answers.undecided == 6
    texts = [
        built.tokenizer.decode(prompt_ids(prompt, built.tokenizer, chat_template=False), skip_special_tokens=False)
        for prompt in prompts
    ]
    alone = complete(built.student_cfg, built.student_params, built.tokenizer, texts, 5)
    assert dict(seen) == dict(zip([prompt.id for prompt in prompts], alone, strict=True))
    expected = [str(verify(text, prompt).verdict) for prompt, text in zip(prompts, alone, strict=True)]
    assert found.answers.right == expected.count("right")
    again = Evaluation.from_dict(found.to_dict())
    np.testing.assert_equal(again.answers, found.answers)
    assert Evaluation.from_dict(found.to_dict() | {"answers": None}).answers is None


@pytest.mark.parametrize(("finish", "verdict"), [("length", "wrong"), ("stop", "undecided")])
def test_an_answer_that_is_cut_off_and_undecided_is_wrong(tmp_path, monkeypatch, finish, verdict):
    built = build(experiment(tmp_path))
    monkeypatch.setattr(
        "kdjax.run.heldout.rollouts", lambda *_, **__: iter([(0, 0, Completion("7 or 8", (1,), -1.0, finish))])
    )
    monkeypatch.setitem(VERIFIERS, "numeric", lambda *_: Finding(Verdict.UNDECIDED, "7 or 8"))
    answers = Heldout(built)(built.student_params).answers
    assert {"wrong": answers.wrong, "undecided": answers.undecided}[verdict] == 1
    assert answers.right + answers.wrong + answers.undecided == 1


def test_held_out_prompts_are_not_trained_on(tmp_path):
    built = build(experiment(tmp_path, **{"prompts.answers": "gold"}))
    held, trained = ({prompt.prompt for prompt in side} for side in (built.asked.heldout, built.asked.train))
    assert held
    assert trained
    assert not held & trained
    assert len(built.train) == len(built.asked.train)


def test_more_than_there_are(tmp_path):
    built = build(experiment(tmp_path, **{"eval.prompts": 50}))
    with pytest.raises(ValueError, match=r"^eval\.prompts must be at most the \d+ prompts that are held out, got 50"):
        Heldout(built)


def test_a_student_speaks_by_its_own_rules_where_the_teacher_has_others(tmp_path):
    """The step splits rows as the teacher does then; the student's weights do not lie that way."""
    fields = {"mesh.preset": "fsdp_tp", "mesh.shape": "data:2,model:2", "teacher.preset": "dp"}
    built, alone = build(experiment(tmp_path, **fields)), build(experiment(tmp_path))
    assert not built.rules.preset.tensor
    model = student_speaker(built, built.student_params)
    assert model.rules.preset.tensor
    prompts, settings = [[5, 6, 7], [8, 9]], Sampling(temperature=0)
    said = [
        sorted((at, one.tokens) for at, _, one in rollouts(who, prompts, 1, settings, new_tokens=4, batch_size=2))
        for who in (model, student_speaker(alone, alone.student_params))
    ]
    assert said[0] == said[1]
