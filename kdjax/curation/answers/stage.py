"""A stage's file, <name>.jsonl, to which lines are only ever appended, and <name>.manifest.json beside it.

The manifest has what the lines depend on ("depends") and "counts": what came out once the stage is through, or what was
spent so far. A kill at any moment leaves whole lines but for the last one, which is cut off when the file is opened
again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from kdjax.run_log import cut_off_last_line, lock, write_whole

FORMAT = 1
FOLDER = "answers"  # of a workdir
EVERY = 1.0  # seconds between two writings of what was spent; a kill -9 loses the sums of that time at most


class Stage:
    """An open file of a stage, by `open_stage`; a context manager."""

    def __init__(self, path: Path, file: BinaryIO, depends: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
        self.path, self._file, self._depends = path, file, depends
        self._before = counts
        self._unwritten: dict[str, float] = {}
        self._written = time.monotonic()

    def append(self, record: Mapping[str, Any]) -> int:
        """Hand one line to the operating system: from then on a kill cannot lose it. Returns its byte offset."""
        at = self._file.seek(0, os.SEEK_END)
        line = memoryview((json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode())
        while line:
            line = line[self._file.write(line) :]
        return at

    def finish(self, counts: Mapping[str, Any]) -> None:
        """Write what came out into the manifest."""
        _write_manifest(self.path, self._depends, counts)

    def spent(self, **sums: float) -> None:
        """What was spent since the file was opened; added to what the manifest had then.

        It is written when EVERY seconds have passed since it was last, and when the file is closed.
        """
        self._unwritten = {name: round(self._before.get(name, 0) + of, 3) for name, of in sums.items()}
        if time.monotonic() - self._written > EVERY:
            self._write_spent()

    def _write_spent(self) -> None:
        if self._unwritten:
            self.finish(self._unwritten)
        self._unwritten, self._written = {}, time.monotonic()

    def close(self) -> None:
        """Write what was spent, close the file, and let another process write it."""
        try:
            self._write_spent()
        finally:
            self._file.close()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_stage(path: Path, depends: Mapping[str, Any], *, renew: bool) -> Stage:
    """Begin or go on with the stage of this file.

    renew: lines that depend on something else are dropped; else they are an error that names what differs. Raises
    ValueError then, and if another process writes the file.
    """
    depends = json.loads(json.dumps({"format": FORMAT, **depends}))  # tuples as JSON has them
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+b", buffering=0)  # noqa: SIM115, it is the stage's
    try:
        _lock(file, path)
        there = read_manifest(path)
        if there.get("depends") != depends:
            if not renew and os.path.getsize(path):
                raise ValueError(_differing(path, there.get("depends") or {}, depends))
            file.truncate(0)  # before there is a manifest that says what its lines are of
            _write_manifest(path, depends, None)
            there = {}
        cut_off_last_line(path)
        return Stage(path, file, depends, there.get("counts") or {})
    except BaseException:
        file.close()
        raise


def manifest_of(path: Path) -> Path:
    """The manifest beside a stage's file."""
    return path.with_name(path.name.removesuffix(".jsonl") + ".manifest.json")


def read_manifest(path: Path) -> dict[str, Any]:
    """{"depends", "counts" or None} of a stage's file; {} if there is no whole one."""
    try:
        found = json.loads(manifest_of(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte offset, record) of the whole lines, one at a time. Raises ValueError that names the line that is none."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            yield offset, parse_record(line, f"{path}, line {number}")
            offset += len(line)


def parse_record(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object that a line is. Raises ValueError that names the line."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} must be a JSON object, got {line[:60]!r}; {error}. Remove the file.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be a JSON object, got {line[:60]!r}; it has no fields. Remove the file.")
    return record


def _write_manifest(path: Path, depends: Mapping[str, Any], counts: Mapping[str, Any] | None) -> None:
    write_whole(manifest_of(path), json.dumps({"depends": depends, "counts": counts}, indent=2) + "\n")


def _differing(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    names = [name for name in dict.fromkeys([*here, *there]) if here.get(name) != there.get(name)]
    shown = "; ".join(f"{name} is {here.get(name)!r:.80}, there it is {there.get(name)!r:.80}" for name in names)
    return (
        f"{path} must be of the same model, pool and settings, got another one's: {shown}. Remove it to begin anew, or "
        "undo these changes to go on."
    )


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        lock(file.fileno())
    except BlockingIOError as error:
        raise ValueError(
            f"{path} must be written by one process at a time, got a second one. Wait for the first to end, or set "
            "another --workdir."
        ) from error
