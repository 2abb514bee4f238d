"""What a run on selected answers cost: tokens trained on and scored, from the files that it leaves."""

import dataclasses
import json

import pytest

from kdjax.analysis.study_results import _answers
from kdjax.config import Answers, Experiment, Prompts, Train

MADE = Experiment(
    prompts=Prompts(answers="pool"),
    answers=Answers(rescore_every=4, scored="../.."),
    train=Train(steps=10, batch_size=3),
)


def leave(folder, step, *, tokens, rows, scored, **depends):
    place = folder / "answers" / f"selected{f'-{step}' if step else ''}.manifest.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({"depends": {"scored": scored} | depends, "counts": {"tokens": tokens, "rows": rows}}))


def test_each_choice_counts_for_the_steps_that_it_held(tmp_path):
    run = tmp_path / "scas" / "0"
    for step, tokens in ((0, 40), (4, 20), (8, 100)):
        leave(run, step, tokens=tokens, rows=10, scored=f"scored-{step}.jsonl")
        shared = tmp_path / "answers" / f"scored-{step}.manifest.json"
        shared.parent.mkdir(exist_ok=True)
        shared.write_text(json.dumps({"counts": {"places": 1000 + step, "seconds": 2.5}}))
    found = _answers(run, MADE, 10)
    # means of 4, 2 and 10 tokens, 3 rows a step, for 4, 4 and 2 steps
    assert found == {"answer_tokens": 3 * (4 * 4 + 2 * 4 + 10 * 2), "scored_tokens": 3012, "scoring_seconds": 7.5}


def test_gradients_of_teachers_cost_too(tmp_path):
    once = dataclasses.replace(MADE, answers=Answers())
    (tmp_path / "answers").mkdir()
    for name, places in (("scored-1", 1000), ("gradients-1", 30)):
        counts = {"counts": {"places": places, "seconds": 2.5}}
        (tmp_path / f"answers/{name}.manifest.json").write_text(json.dumps(counts))
    for scored, wanted in (("scored-1.jsonl", (1030, 5.0)), ("", (30, 2.5))):
        leave(tmp_path, 0, tokens=30, rows=10, scored=scored, gradients="gradients-1.jsonl")
        found = _answers(tmp_path, once, 10)
        assert (found["scored_tokens"], found["scoring_seconds"]) == wanted


def test_a_choice_without_scores_costs_nothing(tmp_path):
    leave(tmp_path, 0, tokens=30, rows=10, scored="")
    made = dataclasses.replace(MADE, answers=dataclasses.replace(MADE.answers, rescore_every=0))
    assert _answers(tmp_path, made, 10) == {"answer_tokens": 90, "scored_tokens": 0, "scoring_seconds": 0.0}


@pytest.mark.parametrize("answers", ["", "gold"])
def test_other_runs_have_no_such_costs(tmp_path, answers):
    assert _answers(tmp_path, dataclasses.replace(MADE, prompts=Prompts(answers=answers)), 10) == {}
