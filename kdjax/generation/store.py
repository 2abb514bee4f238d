"""Answers on disk: `<directory>/rollouts.jsonl`, one line per prompt and sample, and `manifest.json` beside it.

A line: {"id": of the prompt, "sample": its number, "response": text, "tokens": [ids] (not of a served model), "logp":
sum over them in nats or null, "finish": "stop" | "length" | "failed", "reason": why it failed, "chosen", "top": see
`kdjax/generation/logprobs.py`, "asks": digest of the question}. Lines are only ever appended, as answers come.
A failed sample is tried again at the next start and then has a second line; the later one counts.
manifest.json: "depends", what the answers depend on, and "made", how they came about. After a kill at any moment
what is in the file is whole but for the last line, which is cut off when the file is opened again.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from kdjax.run_log import cut_off_last_line, lock, read_lines, write_whole

FORMAT = 1
ROLLOUTS, MANIFEST = "rollouts.jsonl", "manifest.json"
STOP, LENGTH, FAILED = "stop", "length", "failed"
FINISHES = (STOP, LENGTH, FAILED)
OPTIONAL = ("tokens", "reason", "chosen", "top", "asks")  # left out of a line where they say nothing


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One answer to one prompt; the fields are those of a line of `rollouts.jsonl`.

    finish: stop: it ended by itself; length: it was cut off; failed: there is none, and `reason` says why. asks:
    `data.prompts.question_digest` of the question, "" = not known: what an id means is the prompts' affair.
    """

    id: str
    sample: int
    response: str
    finish: str
    logp: float | None = None
    tokens: tuple[int, ...] | None = None
    reason: str = ""
    chosen: tuple[Any, ...] | None = None
    top: tuple[Any, ...] | None = None
    asks: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """What there is one answer of."""
        return self.id, self.sample


class Store:
    """An open `rollouts.jsonl`, by `open_store`; a context manager.

    done: (prompt, sample) of the answers that are there; those that failed are not among them.
    """

    def __init__(self, file: BinaryIO, done: set[tuple[str, int]]) -> None:
        self._file, self.done = file, done

    def append(self, rollout: Rollout) -> None:
        """Hand one line to the operating system: from then on a kill cannot lose it.

        Raises ValueError for an answer that is there already or a sum of log-probabilities that is not finite.
        """
        if rollout.key in self.done:
            raise ValueError(f"rollouts must be appended once, got sample {rollout.sample} of {rollout.id!r} again.")
        if rollout.logp is not None and not math.isfinite(rollout.logp):
            raise ValueError(
                f"logp of sample {rollout.sample} of {rollout.id!r} must be finite, got {rollout.logp}; the model's "
                "logits are not. Look at its weights."
            )
        line = memoryview((json.dumps(_record(rollout), allow_nan=False) + "\n").encode())
        while line:
            line = line[self._file.write(line) :]
        if rollout.finish != FAILED:
            self.done.add(rollout.key)

    def close(self) -> None:
        """Close the file, and let another process write it."""
        self._file.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_store(directory: str | Path, depends: Mapping[str, Any], made: Mapping[str, Any]) -> Store:
    """Begin or go on with the rollouts in `directory`, which must depend on the same things.

    Raises ValueError that names what differs, a damaged line, or that another process writes there.
    """
    folder = Path(directory)
    depends = json.loads(json.dumps({"format": FORMAT, **depends}))  # tuples as JSON has them
    manifest = folder / MANIFEST
    if manifest.is_file():
        _check(manifest, depends)
    elif (folder / ROLLOUTS).is_file():
        raise ValueError(
            f"--out must hold {MANIFEST} beside {ROLLOUTS}, got {str(directory)!r} without; what the answers in it "
            "depend on is not known. Set another --out."
        )
    else:
        write_whole(manifest, json.dumps({"depends": depends, "made": made}, indent=2) + "\n")
    file = open(folder / ROLLOUTS, "ab", buffering=0)  # noqa: SIM115, it is the store's
    try:
        _lock(file, directory)
        cut_off_last_line(folder / ROLLOUTS)
        return Store(file, {rollout.key for rollout in read_rollouts(folder) if rollout.finish != FAILED})
    except BaseException:
        file.close()
        raise


def read_rollouts(directory: str | Path) -> list[Rollout]:
    """The rollouts of a directory, one per prompt and sample, in the order of their first lines; [] if there are none.

    Raises ValueError that names the line that is no rollout, or that answers once more what is answered.
    """
    return list({rollout.key: rollout for rollout in each_rollout(directory)}.values())


def each_rollout(directory: str | Path) -> Iterator[Rollout]:
    """As `read_rollouts`, a line at a time: failures too of what is answered later. Log-probabilities take memory."""
    path, answered = Path(directory) / ROLLOUTS, set[tuple[str, int]]()
    for number, record in enumerate(read_lines(path), 1):
        rollout = _parse(record, f"{path}, line {number}")
        if rollout.key in answered:
            raise ValueError(
                f"{path}, line {number} must be of a sample without an answer, got sample {rollout.sample} of "
                f"{rollout.id!r} again; two processes wrote this file. Remove one of the lines."
            )
        if rollout.finish != FAILED:
            answered.add(rollout.key)
        yield rollout


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """{"depends": ..., "made": ...} of a directory. Raises ValueError if it holds no whole manifest."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"rollouts must be in a directory with {MANIFEST}, got {str(directory)!r} without one. Name the --out of "
            "launch.generate."
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"depends": dict(record["depends"]), "made": dict(record["made"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be the manifest of rollouts, got a damaged file; {error!r}.") from error


def _check(manifest: Path, depends: Mapping[str, Any]) -> None:
    old = read_manifest(manifest.parent)["depends"]
    differing = [
        f"{name} is {depends.get(name)!r}, there it is {old.get(name)!r}"
        for name in dict.fromkeys([*depends, *old])
        if depends.get(name) != old.get(name)
    ]
    if differing:
        raise ValueError(
            f"--out must be empty or of the same model, prompts and settings, got {str(manifest.parent)!r}: "
            f"{'; '.join(differing)}. Set another --out, or undo these changes to go on with what is there."
        )


def _record(rollout: Rollout) -> dict[str, Any]:
    record = dataclasses.asdict(rollout)
    return {name: value for name, value in record.items() if name not in OPTIONAL or value not in (None, "")}


def _parse(record: Mapping[str, Any], where: str) -> Rollout:
    fields = {field.name for field in dataclasses.fields(Rollout)}
    values: dict[str, Any] = {name: record[name] for name in fields if name in record}
    right = {
        "id": lambda v: isinstance(v, str),
        "sample": lambda v: type(v) is int and v >= 0,
        "response": lambda v: isinstance(v, str),
        "finish": lambda v: v in FINISHES,
        "logp": lambda v: v is None or isinstance(v, (int, float)),
        "asks": lambda v: v is None or isinstance(v, str),
        "tokens": lambda v: v is None or (isinstance(v, list) and all(type(token) is int for token in v)),
    }
    for name, does in right.items():
        if not does(values.get(name)):
            raise ValueError(
                f"{where} must be a rollout, got {name}={values.get(name)!r}; see kdjax/generation/store.py. Remove "
                "the line, and the sample is drawn again."
            )
    for name in ("tokens", "chosen", "top"):
        if values.get(name) is not None:
            values[name] = tuple(values[name])
    return Rollout(**values)


def _lock(file: BinaryIO, directory: str | Path) -> None:
    try:
        lock(file.fileno())
    except BlockingIOError as error:
        raise ValueError(
            f"--out must be written by one process at a time, got {str(directory)!r}, which another one writes. Wait "
            "for it, or set another --out."
        ) from error
