"""Rollouts on disk: what a kill leaves, what a second start finds, what is refused."""

import json
import os
import signal
import subprocess
import sys

import pytest

from kdjax.generation import store
from kdjax.generation.store import Rollout, open_store, read_manifest, read_rollouts

DEPENDS = {"model": "abc", "generation.temperature": 1.0, "generation.stop": ("\n",)}
MADE = {"command": "python -m launch.generate"}
ONE = Rollout("a", 0, "zwölf \ud800 \u2028 12", "stop", -1.25, (5, 9))
TWO = Rollout("a", 1, "", "length", -3.5, ())
SERVED = Rollout("b", 0, "x", "stop", chosen=(["x", -0.5],), top=([["x", -0.5], [[195], -1.0]],))


def lines(folder):
    return (folder / store.ROLLOUTS).read_bytes().split(b"\n")


def test_what_is_appended_is_read_back(tmp_path):
    with open_store(tmp_path / "out", DEPENDS, MADE) as opened:
        for rollout in (ONE, TWO, SERVED):
            opened.append(rollout)
        assert opened.done == {("a", 0), ("a", 1), ("b", 0)}
    assert read_rollouts(tmp_path / "out") == [ONE, TWO, SERVED]
    first, second, third, rest = lines(tmp_path / "out")
    assert json.loads(first) == {
        "id": "a",
        "sample": 0,
        "response": ONE.response,
        "tokens": [5, 9],
        "logp": -1.25,
        "finish": "stop",
    }
    assert json.loads(second)["tokens"] == []
    assert set(json.loads(third)) == {"id", "sample", "response", "finish", "logp", "chosen", "top"}
    assert rest == b""
    assert read_manifest(tmp_path / "out")["made"] == MADE
    assert read_rollouts(tmp_path / "nowhere") == []


@pytest.mark.parametrize("cut", [1, 30, 70])
def test_a_torn_last_line_is_cut_off_and_drawn_again(tmp_path, cut):
    with open_store(tmp_path, DEPENDS, MADE) as opened:
        opened.append(ONE)
        opened.append(TWO)
    path = tmp_path / store.ROLLOUTS
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_rollouts(tmp_path) == [ONE]
    with open_store(tmp_path, DEPENDS, MADE) as opened:
        assert opened.done == {("a", 0)}
        opened.append(TWO)
    assert read_rollouts(tmp_path) == [ONE, TWO]
    assert len(lines(tmp_path)) == 3


def test_a_torn_line_longer_than_a_block_is_cut_off(tmp_path):
    with open_store(tmp_path, DEPENDS, MADE) as opened:
        opened.append(ONE)
        opened.append(Rollout("long", 0, "x" * 200_000, "stop"))
    path = tmp_path / store.ROLLOUTS
    path.write_bytes(path.read_bytes()[:-1])
    open_store(tmp_path, DEPENDS, MADE).close()
    assert len(lines(tmp_path)) == 2
    path.write_bytes(path.read_bytes()[:-1])  # and the first one, with no line before it
    open_store(tmp_path, DEPENDS, MADE).close()
    assert path.read_bytes() == b""


def test_a_failed_sample_is_not_done_and_the_later_line_counts(tmp_path):
    failed = Rollout("a", 0, "", "failed", reason="status 500")
    with open_store(tmp_path, DEPENDS, MADE) as opened:
        opened.append(failed)
        opened.append(TWO)
        assert opened.done == {("a", 1)}
    assert read_rollouts(tmp_path) == [failed, TWO]
    with open_store(tmp_path, DEPENDS, MADE) as opened:
        assert opened.done == {("a", 1)}
        opened.append(ONE)
    assert read_rollouts(tmp_path) == [ONE, TWO]


def test_another_manifest_is_refused_and_what_differs_is_named(tmp_path):
    open_store(tmp_path, DEPENDS, MADE).close()
    open_store(tmp_path, DEPENDS, {"command": "another"}).close()  # how it was made may differ
    changed = DEPENDS | {"generation.temperature": 0.7, "model": "xyz"}
    with pytest.raises(ValueError, match="model is 'xyz', there it is 'abc'; generation.temperature is 0.7, there"):
        open_store(tmp_path, changed, MADE)
    with pytest.raises(ValueError, match="new is 1, there it is None"):
        open_store(tmp_path, DEPENDS | {"new": 1}, MADE)


def test_answers_without_or_with_a_damaged_manifest_are_refused(tmp_path):
    (tmp_path / store.ROLLOUTS).write_text("")
    with pytest.raises(ValueError, match="--out must hold manifest.json beside rollouts.jsonl"):
        open_store(tmp_path, DEPENDS, MADE)
    with pytest.raises(ValueError, match="rollouts must be in a directory with manifest.json"):
        read_manifest(tmp_path)
    (tmp_path / store.MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="must be the manifest of rollouts, got a damaged file"):
        open_store(tmp_path, DEPENDS, MADE)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a", "sample": 0, "response": "x", "finish": "stop"}', "line 2 .* got sample 0 of 'a' again"),
        ('{"id": "a", "sample": -1, "response": "x", "finish": "stop"}', "line 2 must be a rollout, got sample=-1"),
        ('{"id": 3, "sample": 1, "response": "x", "finish": "stop"}', "got id=3"),
        ('{"id": "a", "sample": 1, "finish": "stop"}', "got response=None"),
        ('{"id": "a", "sample": 1, "response": "x", "finish": "eos"}', "got finish='eos'"),
        ('{"id": "a", "sample": 1, "response": "x", "finish": "stop", "tokens": ["x"]}', r"got tokens=\['x'\]"),
        ('{"id": "a", "sample": 1, "response": "x", "finish": "stop", "logp": "x"}', "got logp='x'"),
        ("nonsense", "line 2 must be a JSON object"),
    ],
)
def test_a_line_that_is_no_rollout_is_named(tmp_path, line, message):
    with open_store(tmp_path, DEPENDS, MADE) as opened:
        opened.append(ONE)
    with open(tmp_path / store.ROLLOUTS, "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        open_store(tmp_path, DEPENDS, MADE)


def test_an_answer_is_appended_once_and_its_logp_is_finite(tmp_path):
    with open_store(tmp_path, DEPENDS, MADE) as opened:
        opened.append(ONE)
        with pytest.raises(ValueError, match="must be appended once, got sample 0 of 'a' again"):
            opened.append(ONE)
        with pytest.raises(ValueError, match="logp of sample 2 of 'a' must be finite, got nan; the model's"):
            opened.append(Rollout("a", 2, "", "stop", float("nan"), ()))
    assert read_rollouts(tmp_path) == [ONE]


def test_one_process_writes_at_a_time(tmp_path):
    message = "--out must be written by one process at a time"
    with open_store(tmp_path, DEPENDS, MADE), pytest.raises(ValueError, match=message):
        open_store(tmp_path, DEPENDS, MADE)
    open_store(tmp_path, DEPENDS, MADE).close()


ENDLESS = """
import sys
from kdjax.generation.store import Rollout, open_store
with open_store(sys.argv[1], {}, {}) as opened:
    for number in range(10**9):
        if ("a", number) not in opened.done:
            opened.append(Rollout("a", number, "x" * (number % 7000), "stop", -1.0, (number,)))
            print(number, flush=True)
"""


def test_kill_9_loses_and_repeats_nothing(tmp_path):
    for least in (200, 400):
        process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        said = -1
        while said < least:
            said = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        rest, _ = process.communicate()
        said = max([said, *map(int, rest.split("\n")[:-1])])  # what it says is in the file
        found = read_rollouts(tmp_path)
        assert [rollout.sample for rollout in found] == list(range(len(found)))
        assert len(found) > said >= least
        assert all(rollout.response == "x" * (rollout.sample % 7000) for rollout in found)
