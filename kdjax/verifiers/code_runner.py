"""What runs the code of a model and its tests, in a process of its own that it limits first.

Run as a file, so it imports nothing but the standard library. stdin: {"code", "tests", "seconds"} as JSON. The number
of an open file is its argument; {"outcome": "passed" or why not} goes there.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

MEMORY = 1 << 30  # bytes of addresses
FILE_SIZE = 1 << 20  # bytes of a file
OPEN_FILES = 32
# What a solution has no business with, as the interpreter reports it before it happens
_REFUSED = re.compile(
    r"(?:socket|subprocess|shutil|ctypes|ftplib|http|urllib|smtplib|poplib|imaplib|webbrowser|pty|sqlite3|syslog|fcntl|"
    r"resource)\..*|os\.(?:system|exec|posix_spawn|spawn|fork|forkpty|kill|killpg|remove|rename|rmdir|mkdir|link|symlink|"
    r"chmod|chown|truncate|utime|chdir|setxattr|removexattr)|signal\.pthread_kill|sys\.addaudithook|cpython\.run_.*"
)


def _limit(seconds: int) -> None:
    import ctypes
    import resource
    import subprocess  # noqa: F401  while it can be: asyncio and others import it, and do not run anything

    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_FSIZE: FILE_SIZE,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for name, most in limits.items():
        resource.setrlimit(name, (most, most))
    # A network of its own, without any device, where the kernel lets everybody have one; the hook refuses sockets too.
    new_user, new_network = 0x10000000, 0x40000000
    ctypes.CDLL(None).unshare(new_user | new_network)
    for module in ("ctypes", "_ctypes", "_posixsubprocess"):  # the code must not find them loaded
        sys.modules.pop(module, None)


def _refuse(inside: str) -> None:
    readable = tuple({os.path.realpath(path) + os.sep for path in (sys.prefix, sys.base_prefix, *sys.path) if path})
    inside = os.path.realpath(inside) + os.sep

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int):
                return
            real = os.path.realpath(os.fsdecode(path))
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if not real.startswith(inside) and (writes or not real.startswith(readable)):
                raise PermissionError(f"files outside are closed to it: {path}")
        elif event == "import" and arguments[0] in ("_posixsubprocess", "_ctypes", "ctypes"):
            raise PermissionError(f"{arguments[0]} is closed to it")
        elif _REFUSED.fullmatch(event):
            raise PermissionError(f"{event} is closed to it")

    sys.addaudithook(hook)


def _main(report: int) -> None:
    given = json.loads(sys.stdin.buffer.read())
    say = os.write  # before the code can put another in its place

    def tell(outcome: str) -> None:
        say(report, json.dumps({"outcome": outcome[:500]}).encode())

    try:
        _limit(given["seconds"])
    except (ImportError, OSError, ValueError, AttributeError) as error:
        tell(f"no limits: {error}")
        return
    _refuse(os.getcwd())
    space: dict[str, Any] = {"__name__": "solution"}
    part = "the code"
    try:
        exec(compile(given["code"], "<response>", "exec"), space)
        part = "the tests"
        exec(compile(given["tests"], "<tests>", "exec"), space)
    except BaseException as error:  # noqa: BLE001  SystemExit is a failure too
        tell(f"{part} raised {type(error).__name__}: {error}")
    else:
        tell("passed")
    os._exit(0)  # no thread or exit handler of the code runs on


if __name__ == "__main__":
    _main(int(sys.argv[1]))
