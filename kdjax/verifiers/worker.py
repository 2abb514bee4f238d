"""A process of its own for checks that may take for ever, or all memory, or read what a model wrote as code.

It stays for the next question, since what it imports takes seconds; a question that takes too long ends it. This file
is also what it runs, so it imports nothing but the standard library.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import pickle
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

START = 120.0  # seconds until it has imported what it needs, on a busy machine
MEMORY = 4 << 30  # bytes of addresses
PASSED_ON = ("HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "SYSTEMROOT", "TMPDIR", "VIRTUAL_ENV")  # no keys
_workers: dict[str, subprocess.Popen[bytes]] = {}
_lock = threading.Lock()


def installed(package: str) -> bool:
    """Can it be imported? It is not imported here."""
    return importlib.util.find_spec(package) is not None


def ask(job: str, *arguments: Any, seconds: float) -> Any:
    """What the function `job` of this file says in the process kept for it; questions take turns.

    Raises TimeoutError after `seconds`, which do not count the start of the process, and RuntimeError with what it
    raised or how it ended.
    """
    with _lock:
        try:
            worker = _workers.get(job) or _start(job)
            content = pickle.dumps(arguments)
            worker.stdin.write(struct.pack(">I", len(content)) + content)  # type: ignore[union-attr]
            worker.stdin.flush()  # type: ignore[union-attr]
            answer = _read(worker, seconds)
        except (OSError, EOFError) as error:  # TimeoutError is an OSError
            _stop(job)
            if isinstance(error, TimeoutError):
                raise TimeoutError(f"it took longer than {seconds:g} s") from error
            raise RuntimeError(f"the process that checks ended: {error}") from error
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer["value"]


def stop_all() -> None:
    """End all these processes; the next question starts them anew."""
    with _lock:
        for job in list(_workers):
            _stop(job)


atexit.register(stop_all)


def _start(job: str) -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ} | {"OPENBLAS_NUM_THREADS": "1"}
    # -P: the files beside this one have names of the standard library
    command = [sys.executable, "-P", __file__, job]
    pipe = subprocess.PIPE
    _workers[job] = worker = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment, bufsize=0
    )
    ready = _read(worker, START)
    if "error" in ready:
        raise EOFError(ready["error"])
    return worker


def _stop(job: str) -> None:
    worker = _workers.pop(job, None)
    if worker is not None:
        worker.kill()
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            with contextlib.suppress(OSError):  # what was not sent is lost with it
                pipe.close()  # type: ignore[union-attr]


def _read(worker: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
    """A line of its answers. TimeoutError, or EOFError if it has ended."""
    answers = worker.stdout.fileno()  # type: ignore[union-attr]
    until, line = time.monotonic() + seconds, b""
    while not line.endswith(b"\n"):
        left = until - time.monotonic()
        if left <= 0 or not select.select([answers], [], [], left)[0]:
            raise TimeoutError
        part = os.read(answers, 1 << 16)
        if not part:
            raise EOFError(f"exit status {worker.wait()}")
        line += part
    return json.loads(line)


# --- in the process


def symbolic() -> Callable[[str, str], bool | str]:
    """(gold, answer) -> are they equal, by math-verify? A text says what could not be read."""
    from math_verify import parse, verify

    def equal(gold: str, answer: str) -> bool | str:
        read = []
        for text in (gold, answer):
            # The limits of math-verify are signals; here the process has one.
            found = parse(f"${text}$", parsing_timeout=None, raise_on_error=False)
            if all(isinstance(one, str) for one in found):
                return text
            read.append(found)
        return bool(verify(*read, timeout_seconds=None, raise_on_error=True))

    return equal


def reasoning_gym() -> Callable[[str, Sequence[str], Mapping[str, Any]], list[float | str]]:
    """(generator, answers, entry) -> the score of each answer, or what the scorer raised."""
    import reasoning_gym as gym

    def scores(generator: str, answers: Sequence[str], entry: Mapping[str, Any]) -> list[float | str]:
        score, found = gym.get_score_answer_fn(generator), list[float | str]()
        for answer in answers:
            try:
                found.append(float(score(answer, entry)))
            except Exception as error:  # noqa: BLE001  scorers raise what they like
                found.append(f"{type(error).__name__}: {error}")
        return found

    return scores


JOBS: dict[str, Callable[[], Callable[..., Any]]] = {"symbolic": symbolic, "reasoning_gym": reasoning_gym}


def _serve(job: str) -> None:
    try:
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        pass  # the limit of time remains
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no answer

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        function = JOBS[job]()
    except Exception as error:  # noqa: BLE001  it is told
        say({"error": f"{type(error).__name__}: {error}"})
        return
    say({"value": "ready"})
    while header := sys.stdin.buffer.read(4):
        arguments = pickle.loads(sys.stdin.buffer.read(struct.unpack(">I", header)[0]))
        try:
            say({"value": function(*arguments)})
        except Exception as error:  # noqa: BLE001  it is told
            say({"error": f"{type(error).__name__}: {error}"[:500]})


if __name__ == "__main__":
    _serve(sys.argv[1])
