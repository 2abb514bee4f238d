"""The script that sends many answers through a run that is killed: with few of them, and what it objects to."""

import json

import pytest

from tests.curation.answers import run_many

ANSWERS = 1501  # the last question has five


def test_each_answer_is_scored_once_across_a_kill(tmp_path, capsys):
    killed, ended = run_many.run(tmp_path, ANSWERS, every=0.05)
    before = killed[-1][0]
    assert ANSWERS // 2 <= before < ANSWERS
    assert ended[0][0] >= before, "what was there is kept"
    assert max(size for _, size in killed) > 50
    assert capsys.readouterr().out.splitlines()[-1] == "ended, 1,501 of 1,501 answers scored"

    (path,) = (tmp_path / "run/answers").glob("scored-*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    for wrong in (lines[:-1], [*lines, lines[3]], [*lines[:-1], lines[3]]):
        path.write_text("".join(wrong))
        with pytest.raises(SystemExit, match="1,501 answers must be scored once each, got 1,50"):
            run_many.check(tmp_path, ANSWERS)
    path.write_text("".join(lines))
    chosen = tmp_path / "run/answers/selected.jsonl"
    chosen.write_text("".join(chosen.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(SystemExit, match="each of 188 questions must have an answer, got 187"):
        run_many.check(tmp_path, ANSWERS)


def test_growth_is_of_the_second_half_over_the_first():
    start = [(0, 900.0), (0, 100.0)]  # before the first answer; compilers take more than what stays
    assert run_many.growth([*start, (10, 200.0), (40, 210.0), (60, 190.0), (100, 205.0)]) == 205 / 210
    assert run_many.growth([*start, (10, 200.0), (40, 210.0), (60, 190.0), (100, 420.0), (100, 0.0)]) == 2
    assert run_many.growth([(50, 900.0), (60, 100.0), (80, 100.0), (100, 150.0)]) == 1.5


def test_a_run_that_fails_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(run_many, "command", lambda folder: ["false"])
    with pytest.raises(SystemExit, match="the run must end with -9, got 1; see .*log.txt"):
        run_many.run(tmp_path, 16)


def test_the_pool_has_as_many_answers_as_asked_for(tmp_path):
    run_many.make_pool(tmp_path, 35)
    rows = [json.loads(line) for path in (tmp_path / "pool").iterdir() for line in path.read_text().splitlines()]
    assert len(rows) == len({(row["id"], row["teacher_output"]) for row in rows}) == 35
    assert len({row["id"] for row in rows}) == 5
    assert all(row["reference_answer"] in row["teacher_output"] for row in rows)
