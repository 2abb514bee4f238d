"""Code by its tests: off unless asked for; then what passes, what fails, and what the limits keep in."""

import sys
from pathlib import Path

import pytest

from kdjax.data.prompts import Prompt
from kdjax.verifiers import VERIFIERS, code_tests

TESTS = "assert add(1, 2) == 3\nassert add('a', 'b') == 'ab'"
GOOD = "def add(a, b):\n    return a + b\n"
linux = pytest.mark.skipif(sys.platform != "linux", reason="code is run on Linux only")


@pytest.fixture
def allowed(monkeypatch):
    monkeypatch.setenv(code_tests.ALLOWED, "1")


def judged(response, tests=TESTS, **meta):
    return VERIFIERS["code"](response, Prompt("p", "?", meta={"tests": tests, "seconds": 1, **meta}))


@pytest.mark.parametrize("value", [None, "0", "true"])
def test_it_is_off_unless_asked_for(monkeypatch, tmp_path, value):
    monkeypatch.delenv(code_tests.ALLOWED, raising=False)
    if value is not None:
        monkeypatch.setenv(code_tests.ALLOWED, value)
    monkeypatch.setattr(code_tests, "_run", None)  # would raise
    found = judged(GOOD)
    assert found.verdict == "undecided"
    assert found.reason == "running the code of models is off: set the environment variable KDJAX_RUN_CODE=1"


@linux
@pytest.mark.parametrize(
    "response",
    [
        GOOD,
        f"Here it is:\n```python\n{GOOD}```\nIt adds.",
        f"```\ndef add(a, b): return 0\n```\nBetter:\n```py\n{GOOD}```",
        f"<think>```python\nraise\n```</think>```python\n{GOOD}",
        f"import asyncio, collections, datetime, heapq, json, math, random, re, statistics\n{GOOD}",
        f"open('notes', 'w').write('x')\nassert open('notes').read() == 'x'\n{GOOD}",
        f"import os\nassert not set(os.environ) - {{'LC_CTYPE'}}\nprint('x' * 10**6)\n{GOOD}",
        f"import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n{GOOD}",
    ],
)
def test_what_passes(allowed, monkeypatch, response):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    found = judged(response)
    assert (found.verdict, found.reason) == ("right", "")


OUTSIDE = "files outside are closed to it"


@linux
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def add(a, b): return a - b", "the tests raised AssertionError"),
        ("def sub(a, b): return a - b", "the tests raised NameError: name 'add' is not defined"),
        ("def add(a, b: return", "the code raised SyntaxError"),
        ("I cannot do this.", "the code raised SyntaxError"),
        ("import sys; sys.exit(0)", "the code raised SystemExit"),
        ("import os; os._exit(0)", "ended before the tests were done, exit status 0"),
        ("def add(a, b):\n    while True: pass", "took more than 1 s of processor time"),
        ("x = bytearray(2 << 30)", "the code raised MemoryError"),
        ("open('big', 'wb').write(b'x' * (1 << 22))", "File too large"),
        ("files = [open(f'{n}', 'w') for n in range(100)]", "Too many open files"),
        ("open('/etc/passwd').read()", OUTSIDE),
        ("import os; os.open('../report', os.O_WRONLY)", OUTSIDE),
        ("import os; os.symlink('/etc', 'etc')", "os.symlink is closed to it"),
        ("import os; os.remove('/etc/passwd')", "os.remove is closed to it"),
        ("import socket; socket.socket()", "socket.__new__ is closed to it"),
        ("import urllib.request as u; u.urlopen('http://127.0.0.1:9')", "urllib.Request is closed to it"),
        ("import subprocess; subprocess.run(['ls'])", "subprocess.Popen is closed to it"),
        ("import os; os.system('ls')", "os.system is closed to it"),
        ("import os; os.fork()", "os.fork is closed to it"),
        ("import os; os.kill(1, 0)", "os.kill is closed to it"),
        ("import ctypes", "ctypes is closed to it"),
        ("import _posixsubprocess", "_posixsubprocess is closed to it"),
        ("input()", "the code raised EOFError"),
        ("", "empty"),
    ],
)
def test_what_fails(allowed, code, reason):
    found = judged(code)
    assert found.verdict == "wrong"
    assert reason in found.reason


@linux
def test_a_test_that_is_wrong_is_no_pass(allowed):
    assert "the tests raised ZeroDivisionError" in judged(GOOD, "1 / 0").reason


@linux
def test_sleep_is_cut_off_and_cannot_be_told_from_a_busy_machine(allowed, monkeypatch):
    monkeypatch.setattr(code_tests, "WALL", 0)
    monkeypatch.setattr(code_tests, "START", 2)
    found = judged("import time; time.sleep(60)")
    assert (found.verdict, found.reason) == ("undecided", "not done after 2 s by the clock")


@linux
def test_nothing_runs_where_it_cannot_be_limited(allowed, monkeypatch, tmp_path):
    runner = tmp_path / "runner.py"
    source = Path(code_tests.code_runner.__file__).read_text()
    runner.write_text(source.replace("resource.setrlimit(name, (most, most))", "raise OSError('not here')"))
    monkeypatch.setattr(code_tests.code_runner, "__file__", str(runner))
    found = judged(f"open('x', 'w')\n{GOOD}")
    assert (found.verdict, found.reason) == ("undecided", "no limits: not here")


def test_other_systems_do_not_run_it(allowed, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "on Linux only" in judged(GOOD).reason


@pytest.mark.parametrize("tests", [None, "", 3])
def test_missing_tests_are_refused(tests):
    with pytest.raises(ValueError, match="\"meta.tests\" of prompt 'p' must be Python source, got"):
        judged(GOOD, tests)


@pytest.mark.parametrize("seconds", [0, 1.5, "2", True, 10_000])
def test_bad_seconds_are_refused(seconds):
    with pytest.raises(ValueError, match="\"meta.seconds\" of prompt 'p' must be a whole number of seconds"):
        judged(GOOD, seconds=seconds)
