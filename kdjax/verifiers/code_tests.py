"""Does the code of a response pass unit tests? Runs what a model wrote, so it is off unless asked for."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from kdjax.data.prompts import Prompt
from kdjax.verifiers import code_runner
from kdjax.verifiers.extraction import final_part
from kdjax.verifiers.finding import Finding, right, setting, undecided, wrong

ALLOWED = "KDJAX_RUN_CODE"  # environment variable; 1 runs code
CPU_SECONDS = 5  # meta.seconds sets another
WALL, START = 4, 4  # times that and seconds more by the clock: the machine is busy, or the code sleeps
_FENCED = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL | re.IGNORECASE)


def unit_tests(response: str, prompt: Prompt) -> Finding:
    """Do the tests, Python source with assertions in meta["tests"], pass after the code of the response has run?

    The code is the last fenced block, or the whole response. Both run in a new process, in an empty directory that goes
    afterwards: 5 s of processor time (meta["seconds"]), 1 GiB, 32 files of 1 MiB, an empty environment, no network, no
    process, no file outside but Python's own to read. This keeps accidents in; it is no wall against an attacker, for
    whom a container is needed. Wrong: anything raised or exited, or the limits of processor time and memory. Undecided:
    the environment variable KDJAX_RUN_CODE is not 1, the system has no such limits, or four times the seconds passed by
    the clock. Raises ValueError without tests.
    """
    tests = setting(prompt, "code", "tests", "Python source", _is_source)
    seconds = setting(prompt, "code", "seconds", "a whole number of seconds, or absent", _is_seconds) or CPU_SECONDS
    text = final_part(response)
    if not text:
        return wrong("", "the response is empty or stops within its thoughts")
    fenced = _FENCED.findall(text)
    code = fenced[-1] if fenced else text
    if os.environ.get(ALLOWED) != "1":
        return undecided(code, f"running the code of models is off: set the environment variable {ALLOWED}=1")
    if sys.platform != "linux":
        return undecided(code, f"code is run on Linux only, where it can be limited; this is {sys.platform}")
    return _run(code, tests, seconds)


def _is_source(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_seconds(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 600)


def _run(code: str, tests: str, seconds: int) -> Finding:
    given = json.dumps({"code": code, "tests": tests, "seconds": seconds}).encode()
    with tempfile.TemporaryDirectory(prefix="kdjax-code-") as folder:
        report = Path(folder) / "report"  # open to it before the limits, in no directory that it can reach
        inside = Path(folder) / "inside"
        inside.mkdir()
        with open(report, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", code_runner.__file__, str(file.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=inside,
                env={},
                pass_fds=(file.fileno(),),
                start_new_session=True,
            )
        try:
            process.communicate(given, timeout=WALL * seconds + START)
        except subprocess.TimeoutExpired:
            return undecided(code, f"not done after {WALL * seconds + START} s by the clock")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it may have left
            process.wait()
        said = report.read_bytes()[:10_000].decode("utf-8", "replace")
    try:
        outcome = json.loads(said)["outcome"]
    except (ValueError, KeyError, TypeError):
        outcome = ""
    if outcome == "passed":
        return right(code)
    if outcome.startswith("no limits: "):
        return undecided(code, outcome)
    if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return wrong(code, f"took more than {seconds} s of processor time, or too much memory")
    return wrong(code, outcome or f"ended before the tests were done, exit status {process.returncode}")
