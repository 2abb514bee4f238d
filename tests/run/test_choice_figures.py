"""What a choice makes of the figures of answers, and the page of a question that nobody answered rightly."""

import dataclasses
from types import SimpleNamespace

import pytest

from kdjax.analysis.explain_page import write_explained
from kdjax.curation.answers.scorer import Scored
from kdjax.curation.answers.selected import read_selected
from kdjax.run.explain import explain
from launch.curate_answers import show
from tests.run.answer_choices import choice_among, write_pool

FIGURES = {"answer_nll": 2.0, "question_nll": 3.0, "sim_aa": 0.5, "sim_aq": 0.25, "n_answer": 4.0}


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_share_of_the_question_is_that_of_the_config(base, tmp_path, share):
    choice = choice_among(base, tmp_path, {"ada": {0: None}}, policy="best", score="scas", question_share=share)

    def measure(params, missing):
        for encoded, _ in missing:
            for answer in encoded.answers:
                yield Scored(encoded.id, answer.row, answer.teacher, FIGURES)

    choice._measure = measure
    choice(base[0].student_params)
    (one,) = read_selected(tmp_path)
    assert one.score_value == pytest.approx((1 - share) * 2.0**2 * 0.5 + share * 2.0 * 3.0 * 0.25)


def test_a_question_without_right_answers_is_explained(base, tmp_path):
    """Where one wants to see why; nothing is ranked or chosen."""
    built, questions = base
    pool = write_pool(
        tmp_path / "pool", questions, {"ada": {3: "It is 99."}, "bob": {3: "Who knows?"}, "cy": {4: None}}
    )
    answers = dataclasses.replace(built.experiment.answers, pool=(pool,), policy="group", score="scas")
    built = dataclasses.replace(built, experiment=dataclasses.replace(built.experiment, answers=answers))
    found = explain(built, questions[3].id, built.student_params, None, "curate")
    assert {one.teacher: one.verdict for one in found.answers} == {"ada": "wrong", "bob": "wrong"}
    assert [one.reason for one in found.answers] == [one.verdict for one in found.answers]
    assert all(len(one.nll) > 0 and one.score_rank == one.group == 0 and not one.selected for one in found.answers)
    page = write_explained(tmp_path / "x.html", found).read_text()
    assert all(said in page for said in ("ada", "bob", "wrong", "99"))


def test_how_many_answers_are_cut_off_is_said(capsys):
    counts = {"rows": 2, "selected": 2, "questions": 2, "forced": 0, "teachers": {"ada": 2}}
    counts |= {"means_of_groups": {}, "errors": {}, "dropped": {}}
    reasons = {"": 3, "wrong": 1}
    e = SimpleNamespace(answers=SimpleNamespace(score="scas"))
    for cut, said in (
        (2, "pool: 4 rows, 3 admitted, 2 of them cut off at data.seq_len; left"),
        (0, "3 admitted; left"),
    ):
        pool = {"rows": 4, "reasons": reasons, "teachers": {"ada": reasons}, "truncated": cut}
        show(e, pool, SimpleNamespace(counts=counts, rated=None, file=None))
        assert said in capsys.readouterr().out
