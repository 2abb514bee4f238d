"""A choice that is stopped in the middle, or made in a directory where there was another run: its costs, its page."""

import dataclasses

import pytest

from kdjax.curation.answers.scorer import Scored
from kdjax.curation.answers.stage import read_manifest
from kdjax.run.answers_report import write_report
from tests.run.answer_choices import choice_among

POOL = {"ada": dict.fromkeys(range(8)), "bob": dict.fromkeys(range(2, 8)), "cy": dict.fromkeys(range(5))}
ANSWERS, PLACES = 8 + 6 + 5, 10


class Stopped(Exception):
    pass


def measured(choice, stop=None):
    """No student is run: a question is a call, of PLACES tokens an answer; it stops after so many answers."""
    told = []

    def measure(params, missing):
        for encoded, _ in missing:
            choice._on_call(len(encoded.answers), PLACES * len(encoded.answers))
            for answer in encoded.answers:
                if len(told) == stop:
                    raise Stopped
                told.append((encoded.id, answer.row))
                yield Scored(encoded.id, answer.row, answer.teacher, {"answer_nll": 1.0, "n_answer": 3.0})

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
