"""A choice that is stopped in the middle, or made in a directory where there was another run: its costs, its page.

And what it depends on: what is there for another model, pool or config is not taken.
"""

import copy
import dataclasses
import json

import numpy as np
import pytest

from kdjax.build import build
from kdjax.config import Answers, Data
from kdjax.curation.answers.encode import REASONS, coding, coding_basis
from kdjax.curation.answers.measure import context_of
from kdjax.curation.answers.pool import REASONS as OF_ROWS
from kdjax.curation.answers.scored import read_scored
from kdjax.curation.answers.scorer import Scored, TokenFigures
from kdjax.curation.answers.selected import read_selected
from kdjax.curation.answers.stage import read_manifest
from kdjax.curation.answers.verify import admitted_answers, right_shares
from kdjax.models import tokenizer as tokenizers
from kdjax.models.shared_prefix import DEFAULT, TAPS
from kdjax.run import report_data
from kdjax.run.answers_report import write_report
from kdjax.run.explain import explain
from tests.run.answer_choices import choice_among

POOL = {"ada": dict.fromkeys(range(8)), "bob": dict.fromkeys(range(2, 8)), "cy": dict.fromkeys(range(5))}
ANSWERS, PLACES = 8 + 6 + 5, 10


class Stopped(Exception):
    pass


def measured(choice, stop=None, figures=lambda row: {"answer_nll": 1.0, "n_answer": 3.0}):
    """No student is run: a question is a call, of PLACES tokens an answer; it stops after so many answers."""
    told = []

    def measure(params, missing):
        for encoded, _ in missing:
            choice._on_call(len(encoded.answers), PLACES * len(encoded.answers))
            for answer in encoded.answers:
                if len(told) == stop:
                    raise Stopped
                told.append((encoded.id, answer.row))
                yield Scored(encoded.id, answer.row, answer.teacher, figures(answer.row))

    choice._measure = measure
    return told


def costs(choice, workdir):
    (file,) = (workdir / "answers").glob("scored-*.jsonl")
    return read_manifest(file)["counts"]


def test_a_pass_that_was_stopped_has_cost_what_it_cost(base, tmp_path):
    params, by_score = base[0].student_params, {"policy": "best", "score": "grape"}
    whole = choice_among(base, tmp_path / "whole", POOL, **by_score)
    every = measured(whole)
    made = whole(params)
    assert (made.scored, made.places, len(every)) == (ANSWERS, ANSWERS * PLACES, ANSWERS)
    undisturbed = costs(whole, tmp_path / "whole")
    assert undisturbed == {"answers": ANSWERS, "places": made.places, "seconds": round(made.seconds, 3)}

    ends = [at for at in range(1, ANSWERS) if every[at - 1][0] != every[at][0]]  # after a question, and within one
    within = next(at for at in range(ends[0], ANSWERS) if every[at - 1][0] == every[at][0])
    left = sum(question == every[within][0] for question, _ in every[within:])
    for name, stop, again in (("between", ends[2], 0), ("within", within, PLACES * left)):
        run = tmp_path / name
        stopped = choice_among(base, run, POOL, **by_score)
        measured(stopped, stop)
        with pytest.raises(Stopped):
            stopped(params)
        before = costs(stopped, run)
        assert before["answers"] == stop
        rest = choice_among(base, run, POOL, **by_score)
        measured(rest)
        made = rest(params)
        assert made.scored == ANSWERS - stop
        spent = costs(rest, run)
        assert (spent["answers"], spent["places"]) == (ANSWERS, undisturbed["places"] + again)
        assert spent["seconds"] == pytest.approx(before["seconds"] + made.seconds, abs=1e-3)
        assert 0 < before["seconds"] < spent["seconds"]
        measured(rest)
        assert rest(params).scored == 0
        assert costs(rest, run) == spent


def test_a_pass_that_had_nothing_left_to_do_has_sums(base, tmp_path):
    """A kill between the last answer and the next writing of the manifest."""
    params, choice = base[0].student_params, choice_among(base, tmp_path, POOL, policy="best", score="grape")
    measured(choice)
    choice(params)
    (manifest,) = (tmp_path / "answers").glob("scored-*.manifest.json")
    known = manifest.read_text()
    manifest.write_text(known[: known.index('"counts"')] + '"counts": null}')
    choice(params)
    assert costs(choice, tmp_path) == {"answers": 0, "places": 0, "seconds": 0.0}


def test_the_page_is_of_this_run_alone(base, tmp_path):
    """Six rounds of an earlier run are there, of which this one has made three."""
    params = base[0].student_params
    choice = choice_among(base, tmp_path, POOL, policy="random", rescore_every=2)
    for step in range(0, 12, 2):
        choice(params, step)
    train = dataclasses.replace(choice._built.experiment.train, steps=10)
    built = dataclasses.replace(choice._built, experiment=dataclasses.replace(choice._built.experiment, train=train))

    def rounds(step=None):
        page = write_report(built, tmp_path, step).read_text()
        return max(number for number in range(1, 9) if f"<th>Round {number}" in page)

    assert rounds() == 1, "that of launch.curate; nothing was trained yet"
    assert [rounds(step) for step in (0, 2, 4, 5)] == [1, 2, 3, 3]
    for step in (3, 6):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    assert rounds() == 4
    (tmp_path / "checkpoints" / "10").mkdir()
    assert rounds() == 5, "after the last step none is made"
    assert len(list((tmp_path / "answers").glob("selected*.jsonl"))) == 6, "nothing is deleted"


# --- what can be trained on


def too_long(question):
    """A right answer of more tokens than data.seq_len, whose words do not repeat."""
    return f"{' '.join(a + b for a in 'bcdfghklmn' for b in 'aeiou')}. The answer is {question.answer}."


def test_what_is_too_long_keeps_nothing_usable_out(base, tmp_path):
    """Neither as the first right answer of a teacher, as the same answer, nor by taking the place in a draw."""
    params, questions = base[0].student_params, base[1]
    long = [too_long(one) for one in questions]
    said = {"ada": {n: (long[n], None) for n in range(4)}, "bob": {0: long[0], 5: long[5]}}
    choice = choice_among(base, tmp_path / "a", said, policy="random")
    counts = choice(params).counts
    assert (counts["selected"], counts["teachers"], counts["errors"]) == (4, {"ada": 4}, {})
    reasons = choice.admitted.counts["reasons"]
    assert {name: count for name, count in reasons.items() if count} == {"": 4, "truncated": 6}
    assert right_shares(choice.admitted) == {"ada": 4 / 5, "bob": 2 / 5}, "too long is right nevertheless"
    lines = [json.loads(line) for line in (tmp_path / "a/answers/admitted.jsonl").read_text().splitlines()]
    assert all("where" in line for line in lines if line["reason"] == "truncated")

    said = {"ada": dict(enumerate(long)), "bob": dict.fromkeys(range(len(long)))}
    counts = choice_among(base, tmp_path / "b", said, policy="random", candidates=1)(params).counts
    assert (counts["teachers"], counts["not_drawn"]) == ({"bob": len(long)}, 0)
    message = r"none in 12 rows \(truncated 12\); .* prompts.verifier, data.seq_len=64 and the files"
    with pytest.raises(ValueError, match=message):
        choice_among(base, tmp_path / "c", {"ada": dict(enumerate(long))}, policy="random")
    again = choice_among(base, tmp_path / "a", {"ada": {0: (long[0], None)}}, policy="all", truncated="keep")
    assert again(params).counts["teachers"] == {"ada": 1, "bob": 1}, "judged anew: now the first is usable"
    assert again.admitted.counts["reasons"]["duplicate"] == 1
    assert set(REASONS) - {"not_finite"} <= set(OF_ROWS)


def test_an_explained_question_ranks_what_the_choice_ranks(base, tmp_path, monkeypatch):
    """Of each teacher the first that is usable, and of those as many as answers.candidates."""
    said = {"ada": {0: (too_long(base[1][0]), None)}, "bob": {0: None}, "cy": {0: None}}
    choice = choice_among(base, tmp_path, said, policy="group", score="grape", candidates=2)

    def make(*_, **__):
        def measure(params, asked):
            for encoded, _ in asked:
                for each in encoded.answers:
                    tokens = TokenFigures(*np.zeros((4, 0)))
                    yield Scored(encoded.id, each.row, each.teacher, {"answer_nll": 1.0, "n_answer": 3.0}, "", tokens)

        return measure

    monkeypatch.setattr("kdjax.run.explain.make_measurer", make)
    name = base[1][0].id
    shown = explain(choice._built, name, base[0].student_params, None, "").answers
    (drawn,) = (
        [one.teacher for one in found] for asked, found in admitted_answers(choice.admitted, choice._settings) if found
    )
    assert len(drawn) == 2
    ranked = [one for one in shown if one.score_rank]
    assert [one.teacher for one in ranked] == drawn
    assert {one.score_rank for one in ranked} == {1, 2}
    assert sorted(one.reason for one in shown) == ["", "", "not_drawn", "truncated"]


# --- what figures and selections depend on


def test_figures_of_something_else_are_not_taken(base, tmp_path, monkeypatch):
    params, by_score = base[0].student_params, {"policy": "best", "score": "grape"}

    def choose(**changes):
        choice = choice_among(base, tmp_path, POOL, **by_score | changes)
        measured(choice)
        return choice(params)

    assert choose().scored == ANSWERS
    other = next(name for name in TAPS if name != DEFAULT)
    for name, value in {"tap": other, "alignment": "predictor", "trailing": "keep", "truncated": "keep"}.items():
        with pytest.raises(ValueError, match=rf"must be of the same model, pool and settings.* {name} is '{value}', t"):
            choose(**{name: value})
    monkeypatch.setattr("kdjax.__version__", "0.0.9")
    with pytest.raises(ValueError, match="version is '0.0.9', there it is "):
        choose()
    monkeypatch.undo()
    assert choose(question_share=0.25, group=2).scored == 0, "neither figure nor token depends on these"


def test_what_ids_depend_on_names_the_template(base):
    tokenizer = copy.deepcopy(base[0].tokenizer)
    before = coding_basis(coding(tokenizer, Data(), Answers()))
    plain = coding_basis(coding(tokenizer, Data(chat_template=False), Answers()))
    tokenizer.chat_template = "{{ 'Please: ' }}" + tokenizer.chat_template
    after = coding_basis(coding(tokenizer, Data(), Answers()))
    assert before["tokenizer"] == after["tokenizer"] == tokenizers.fingerprint(tokenizer)
    assert {name for name in before if before[name] != after[name]} == {"template"}
    assert coding_basis(coding(tokenizer, Data(chat_template=False), Answers())) == plain, "it is not used"


def test_the_slope_is_of_the_answers_that_compete(base, tmp_path):
    """The file also holds answers without figures of steps, and with them those of another draw."""
    params = base[0].student_params
    names = ("answer_nll", "rest_logp", "first_logp", "first_share")

    def figures(row):
        return dict(zip(names, np.random.default_rng(int(row, 16)).uniform(0.1, 2, 4), strict=True)) | {"n_answer": 3.0}

    first = choice_among(base, tmp_path, POOL, policy="best", score="grape")
    measured(first)
    first(params)
    how = {"policy": "best", "score": "aslec_casl", "candidates": 1}
    other = choice_among(base, tmp_path, POOL, **how, seed=1)
    measured(other, figures=figures)
    other(params)
    choice = choice_among(base, tmp_path, POOL, **how)
    measured(choice, figures=figures)
    made = choice(params)
    assert 0 < made.scored < 8, "the same of some questions"
    rows = [one.row for _, found in admitted_answers(choice.admitted, choice._settings) for one in found]
    assert len(rows) == 8
    columns = np.array([[figures(row)[name] for name in names] for row in rows])
    design = np.concatenate([columns[:, 1:], np.ones((8, 1))], 1)
    slope = np.linalg.lstsq(design, -columns[:, 0], rcond=None)[0][2]
    with read_scored(made.file) as scored:
        found = context_of(choice._settings, scored, choice.admitted)
    assert found.first_share_slope == pytest.approx(slope)


def trained_on(base, choice, workdir, answers=None, **parts):
    """The student and the rows of a run in this directory. answers: changes of answers.*, parts: of other settings."""
    e = choice._built.experiment
    e = dataclasses.replace(e, prompts=dataclasses.replace(e.prompts, answers="pool"))
    for name, changes in ({"answers": answers or {}} | parts).items():
        e = dataclasses.replace(e, **{name: dataclasses.replace(getattr(e, name), **changes)})
    return build(e, workdir)


def test_a_selection_of_something_else_is_not_trained_on(base, tmp_path):
    choice = choice_among(base, tmp_path, POOL, policy="shortest", score="scas")
    choice(base[0].student_params)
    free = {"families": ("ada",), "scored": "elsewhere"}
    run = trained_on(base, choice, tmp_path, free)
    assert len(run.train) == 8
    assert report_data._answers(run).startswith("selected answers (shortest) to 12 prompts"), "it reads no score"
    assert "Selected: 8 answers to 8 of 12 questions" in write_report(run, tmp_path).read_text()
    differing = (
        ({"answers": {"policy": "longest"}}, "answers.policy is 'longest', there it is 'shortest'"),
        ({"answers": {"seed": 1, "official": True}}, "answers.loops is 1.0, there it is 0.5; .*seed is 1, there it"),
        ({"answers": {"pool": ("other",)}}, r"answers.pool is \['other'\], there it is"),
        ({"data": {"seq_len": 80}}, "seq_len is 80, there it is 64"),
        ({"prompts": {"verifier": "equivalent"}}, "prompts.verifier is 'equivalent', there it is ''"),
        ({"prompts": {"size": 12}}, "prompts is '[0-9a-f]{64}', there it is '"),
    )
    for changes, message in differing:
        with pytest.raises(ValueError, match=f"selected.jsonl must hold the answers that this config .*{message}"):
            trained_on(base, choice, tmp_path, **changes)
    path = tmp_path / "answers/selected.manifest.json"
    manifest = json.loads(path.read_text())
    manifest["depends"] = {name: of for name, of in manifest["depends"].items() if name != "seq_len"}
    path.write_text(json.dumps(manifest))
    assert len(list(read_selected(tmp_path, "selected", choice._settings, choice._basis | {"seq_len": 80}))) == 8


def test_a_selection_for_another_student_is_not_trained_on(base, tmp_path):
    choice = choice_among(base, tmp_path, POOL, policy="best", score="grape")
    measured(choice)
    choice(base[0].student_params)
    assert len(trained_on(base, choice, tmp_path).train) == 8
    init = dataclasses.replace(choice._built.experiment.student.init, layers=2)
    with pytest.raises(
        ValueError, match=r"^student\.\* must give the student that chose .*selected.jsonl, \w{12}, got"
    ):
        trained_on(base, choice, tmp_path, student={"init": init})


def test_a_score_that_is_not_read_is_a_known_one(base, tmp_path):
    choice_among(base, tmp_path, POOL, policy="random", score="car")
    with pytest.raises(ValueError, match="answers.score must be a known name .* Did you mean 'scas'"):
        choice_among(base, tmp_path, POOL, policy="random", score="scaz")
