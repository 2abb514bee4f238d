"""The scores of a student on disk: each answer once, whatever kills the run; none of another student or setting."""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from kdjax.curation.answers import stage
from kdjax.curation.answers.scored import ScoredLine, open_scored, read_scored, scored_path
from kdjax.curation.answers.stage import read_manifest

ROWS = [f"{number:016x}" for number in (3, 2**64 - 1, 1)]
DEPENDS = {"student": "abc", "alignment": "token", "pool": ("x", 1)}


@pytest.fixture
def path(tmp_path):
    return scored_path(tmp_path, "0123456789abcdef")


def test_a_line_is_what_was_handed_in(path):
    with open_scored(path, DEPENDS) as scored:
        scored.append(ROWS[0], "q1", "ada", {"answer_nll": 1.5, "sim_aq": math.nan, "n_answer": 3})
        scored.append(ROWS[1], "q1", "bob", None, "special_only")
        assert scored[ROWS[1]] == ScoredLine(ROWS[1], "bob", {}, "special_only"), "at once"
        scored.spent(places=7)
    assert path.name == "scored-0123456789ab.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {
            "row": ROWS[0],
            "id": "q1",
            "teacher": "ada",
            "figures": {"answer_nll": 1.5, "sim_aq": None, "n_answer": 3.0},
            "error": "",
        },
        {"row": ROWS[1], "id": "q1", "teacher": "bob", "figures": None, "error": "special_only"},
    ]
    assert read_manifest(path)["counts"] == {"places": 7}
    with read_scored(path) as scored:
        assert ROWS[0] in scored
        assert ROWS[2] not in scored
        assert len(scored) == 2
        line = scored[ROWS[0]]
        assert (line.values["answer_nll"], line.error, line.teacher) == (1.5, "", "ada")
        assert math.isnan(line.values["sim_aq"])
        scored.spent(places=9)  # of a process that only reads
        assert read_manifest(path)["counts"] == {"places": 7}
        with pytest.raises(ValueError, match="must be opened by open_scored to be written"):
            scored.append(ROWS[2], "q1", "cy", None, "x")


@pytest.mark.parametrize(
    ("row", "figures", "error", "message"),
    [
        (ROWS[0], {"a": 1.0}, "", "answers must be scored once, got 0000000000000003 of 'ada' to 'q' again"),
        (ROWS[1], None, "", "must have figures or an error, got None and ''"),
        (ROWS[1], {"a": 1.0}, "late", "must have figures or an error"),
        (ROWS[1], {"a": 1.0, "b": math.inf}, "", "figures must be finite or NaN, got b=inf"),
    ],
)
def test_what_is_no_score_is_refused(path, row, figures, error, message):
    with open_scored(path, DEPENDS) as scored:
        scored.append(ROWS[0], "q", "ada", {"a": 1.0})
        with pytest.raises(ValueError, match=message):
            scored.append(row, "q", "ada", figures, error)
        assert len(scored) == 1


def test_figures_that_another_score_asks_for_are_added(path):
    with open_scored(path, DEPENDS) as scored:
        scored.append(ROWS[0], "q", "ada", {"a": 1.0, "b": math.nan})
        scored.append(ROWS[1], "q", "bob", None, "too_long")
        assert [scored.lacks(row, ("a", "b")) for row in ROWS] == [False, False, True]
        assert [scored.lacks(row, ("a", "c")) for row in ROWS] == [True, False, True]
        scored.append(ROWS[0], "q", "ada", {"a": 3.0, "c": 2.0})
        with pytest.raises(ValueError, match="answers must be scored once"):
            scored.append(ROWS[0], "q", "ada", {"c": 2.0})
    with read_scored(path) as scored:
        assert (len(scored), scored.lacks(ROWS[0], ("a", "b", "c"))) == (2, False)
        one, other = scored
        assert (one.values["a"], one.values["c"], math.isnan(one.values["b"])) == (3.0, 2.0, True)
        assert other == ScoredLine(ROWS[1], "bob", {}, "too_long")
    assert len(path.read_text().splitlines()) == 3


def test_scores_of_other_settings_are_not_gone_on_with(path):
    with open_scored(path, DEPENDS) as scored:
        scored.append(ROWS[0], "q", "ada", {"a": 1.0})
        with pytest.raises(ValueError, match="written by one process at a time"):
            open_scored(path, DEPENDS)
    with open_scored(path, dict(reversed(DEPENDS.items()))) as scored:
        assert ROWS[0] in scored
    with pytest.raises(ValueError, match="alignment is 'predictor', there it is 'token'.* Remove it to begin anew"):
        open_scored(path, DEPENDS | {"alignment": "predictor"})
    assert len(path.read_text().splitlines()) == 1
    path.unlink()
    with open_scored(path, {"other": 1}) as scored:
        assert len(scored) == 0


def test_scores_that_are_not_there_are_named(tmp_path, path):
    with pytest.raises(ValueError, match="must hold the scores of the answers by this student, got none"):
        read_scored(path)
    with open_scored(path, DEPENDS):
        pass
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1 must be a JSON object"):
        read_scored(path)


def test_a_kill_at_any_byte_loses_one_line(path):
    with open_scored(path, DEPENDS) as scored:
        for row in ROWS:
            scored.append(row, "q", "ada", {"a": 1.0})
    whole = path.read_bytes()
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        with open_scored(path, DEPENDS) as scored:
            assert [row in scored for row in ROWS] == [n < whole[:cut].count(b"\n") for n in range(3)]
            for row in ROWS:
                if row not in scored:
                    scored.append(row, "q", "ada", {"a": 1.0})
        assert path.read_bytes() == whole


def test_what_was_spent_is_added_up_over_passes(path, monkeypatch):
    """It is in the manifest while a pass is under way, now and then, and when it stops, for whatever reason."""

    def known():
        return read_manifest(path)["counts"]

    monkeypatch.setattr(stage, "EVERY", 0.0)
    with open_scored(path, DEPENDS) as scored:
        assert known() is None
        for answers in (1, 2):
            scored.spent(answers=answers, places=10 * answers, seconds=0.25 * answers)
            assert known() == {"answers": answers, "places": 10 * answers, "seconds": 0.25 * answers}
    monkeypatch.setattr(stage, "EVERY", 60.0)
    scored = open_scored(path, DEPENDS)
    scored.spent(answers=1, places=8, seconds=0.125)
    scored.spent(answers=2, places=16, seconds=0.1254)
    assert known()["answers"] == 2, "soon"
    with pytest.raises(KeyboardInterrupt), scored:
        raise KeyboardInterrupt
    assert known() == {"answers": 4, "places": 36, "seconds": 0.625}
    with open_scored(path, DEPENDS):
        pass
    assert known() == {"answers": 4, "places": 36, "seconds": 0.625}
    with open_scored(path, DEPENDS | {"alignment": "predictor"}) as scored:  # nothing is in the file
        scored.spent(answers=1, places=8, seconds=0.5)
    assert known() == {"answers": 1, "places": 8, "seconds": 0.5}


ENDLESS = """
import sys
from pathlib import Path
from kdjax.curation.answers.scored import open_scored
with open_scored(Path(sys.argv[1]), {}) as scored:
    for number in range(10**9):
        if f"{number:016x}" not in scored:
            scored.append(f"{number:016x}", "q" * (number % 500), "ada", {"a": number / 7})
            print(number, flush=True)
"""


def test_kill_9_scores_nothing_twice(tmp_path):
    path = tmp_path / "scored-x.jsonl"
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[3])}
    command = [sys.executable, "-c", ENDLESS, str(path)]
    for least in (200, 400):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        said = -1
        while said < least:
            said = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        rest, _ = process.communicate()
        said = max([said, *map(int, rest.split("\n")[:-1])])
        with open_scored(path, {}) as scored:
            assert len(scored) > said
            assert scored[f"{said:016x}"].values == {"a": said / 7}
        rows = [json.loads(line)["row"] for line in path.read_text().splitlines()]
        assert rows == [f"{number:016x}" for number in range(len(rows))]
