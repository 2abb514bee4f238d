"""What a run says while it goes: `metrics.jsonl`, `evals.jsonl`, TensorBoard, W&B and the progress line.

`metrics.jsonl` holds one JSON object per line, {"step": 7, "seconds": 12.3, "loss": 2.1, ...}; `evals.jsonl` one per
evaluation, {"step": 0, "seconds": 1.2, "which": "student", ...}. Both are strict JSON (a non-finite number is null),
whole lines only. Only process 0 writes; everywhere else a `RunLog` does nothing.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

METRICS, EVALS, CONFIG = "metrics.jsonl", "evals.jsonl", "config.json"
BAR_WIDTH = 24


class RunLog:
    """The record of one run in `workdir`; a context manager.

    resume_step: the step that the run goes on from; lines of later steps are dropped, atomically, because those steps
        will be done again. None = a new run: whatever an earlier one left in the two files is dropped.
    tensorboard: event files in workdir/tensorboard. wandb: a W&B run of that project, which a resumed run goes on with.
    config: written to config.json and handed to W&B.
    Raises ValueError if a sink is asked for whose package is not installed, or a file holds a line that is not JSON.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        resume_step: int | None = None,
        tensorboard: bool = False,
        wandb: bool = False,
        wandb_project: str = "kdjax",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        import jax

        self.active = jax.process_index() == 0
        self._root = Path(workdir)
        self._board: Any = None
        self._wandb: Any = None
        self._start = time.monotonic()
        if not self.active:
            return
        board = _import_sink("tensorboardX", "log.tensorboard") if tensorboard else None
        wandb_module = _import_sink("wandb", "log.wandb") if wandb else None
        root = self._root
        root.mkdir(parents=True, exist_ok=True)
        last = -1 if resume_step is None else resume_step
        seconds = max(_drop_after(root / name, last) for name in (METRICS, EVALS))
        self._start -= seconds  # the clock of a resumed run goes on where its last kept line was written
        if config is not None:
            write_whole(root / CONFIG, json.dumps(_strict(config), indent=2) + "\n")
        if board is not None:
            self._board = board.SummaryWriter(str(root / "tensorboard"), purge_step=last + 1)
        if wandb_module is not None:
            self._wandb = _start_wandb(wandb_module, root, wandb_project, config, resume_step is not None)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One line of training metrics (scalars), and one point per name in the other sinks."""
        self._line(METRICS, {"step": step, "seconds": self._seconds(), **metrics})
        self._points(step, "train/", metrics)

    def write_evaluation(self, step: int, which: str, evaluation: Mapping[str, Any]) -> None:
        """One evaluation (`Evaluation.to_dict()`) of the model `which`; its numbers also go to the other sinks."""
        self._line(EVALS, {"step": step, "seconds": self._seconds(), "which": which, **evaluation})
        self._points(step, f"heldout/{which}/", _numbers(evaluation))

    def close(self) -> None:
        """Flush and close TensorBoard and W&B; the files need no closing."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._board, self._wandb = None, None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _seconds(self) -> float:
        return round(time.monotonic() - self._start, 3)

    def _line(self, name: str, record: Mapping[str, Any]) -> None:
        if self.active:
            with open(self._root / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(_strict(record), allow_nan=False) + "\n")

    def _points(self, step: int, prefix: str, values: Mapping[str, Any]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(prefix + name, float(value), step)
        if self._wandb is not None:
            self._wandb.log({prefix + name: float(value) for name, value in values.items()}, step=step)


class Progress:
    """The progress line: a bar that rewrites itself on a terminal, else a plain line every `every` seconds.

    step/total, the figures handed in, tokens/s and the time left, from the mean rate since `start_step`. unit: what is
    counted, the first word of a plain line.
    """

    def __init__(
        self,
        total: int,
        *,
        start_step: int = 0,
        every: float = 30.0,
        stream: TextIO | io.TextIOBase | None = None,
        unit: str = "step",
    ) -> None:
        import jax

        self._stream = sys.stderr if stream is None else stream
        self._active = jax.process_index() == 0
        self._terminal = self._stream.isatty()
        self._total, self._from, self._every, self._unit = total, start_step, every, unit
        self._start = time.monotonic()
        self._printed: float | None = None
        self._width = 0

    def update(self, step: int, *, tokens_per_second: float | None = None, **figures: float) -> None:
        """Show `step` as done, with `figures` by name. Plain lines: the first, the last, and one every now and then."""
        now = time.monotonic()
        due = self._printed is None or now - self._printed >= self._every or step >= self._total
        if not self._active or not (self._terminal or due):
            return
        done = step - self._from
        left = (now - self._start) / done * (self._total - step) if done > 0 else math.nan
        shown = "".join(f"{name.replace('_', ' ')} {value:.4g}  " for name, value in figures.items())
        rate = "" if tokens_per_second is None else f"{tokens_per_second:,.0f} tokens/s  "
        text = f"{step:>{len(str(self._total))}}/{self._total}  {shown}{rate}ETA {duration(left)}"
        self._printed = now
        if self._terminal:
            filled = BAR_WIDTH * min(step, self._total) // max(self._total, 1)
            text = "[" + "=" * filled + " " * (BAR_WIDTH - filled) + "] " + text
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(f"{self._unit} {text}\n")
        self._stream.flush()

    def close(self) -> None:
        """End the bar's line, so that what is printed next starts on its own."""
        if self._active and self._terminal and self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0


def duration(seconds: float) -> str:
    """'45s', '3m20s', '2h05m'; '?' if it is not known."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file; [] if it does not exist. A last line without its end (a killed run) is left out.

    Raises ValueError that names the file and the line if another line is not a JSON object.
    """
    if not path.exists():
        return []
    *whole, _cut_off = path.read_text(encoding="utf-8").split("\n")
    return [_parse(line, path, number) for number, line in enumerate(whole, 1)]


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} must be a JSON object, got {line[:60]!r}; {error}.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}, line {number} must be a JSON object, got {line[:60]!r}; it has no fields.")
    return record


def _drop_after(path: Path, last: int) -> float:
    """Keep the lines of steps <= `last`; the largest "seconds" among them (0 if none)."""
    kept = [record for record in read_lines(path) if record["step"] <= last]
    if path.exists():
        write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))
    return max((float(record.get("seconds", 0.0)) for record in kept), default=0.0)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write all or nothing: a crash leaves the old file or the new one. Folders are made; text is UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def cut_off_last_line(path: Path) -> None:
    """Remove what a killed process left without its end; a file of whole lines stays as it is."""
    with open(path, "r+b") as file:
        end = at = file.seek(0, os.SEEK_END)
        while at > 0:
            start = max(0, at - 65536)
            file.seek(start)
            newline = file.read(at - start).rfind(b"\n")
            if newline >= 0:
                at = start + newline + 1
                break
            at = start
        if at < end:
            file.truncate(at)


def lock(descriptor: int) -> bool:
    """Hold an open file until it is closed. False if the file system has no locks; BlockingIOError if it is held."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _strict(value: Any) -> Any:
    """JSON without NaN and Infinity, which other readers refuse; NumPy and JAX scalars become numbers."""
    if isinstance(value, Mapping):
        return {str(key): _strict(entry) for key, entry in value.items()}
    if isinstance(value, str | bool | int | None):
        return value
    if hasattr(value, "tolist"):
        return _strict(value.tolist())
    if isinstance(value, Iterable):
        return [_strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The single numbers of a nested record as {"student/perplexity/value": ...}; lists and texts are left out."""
    flat: dict[str, float] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[prefix + name] = float(value)
    return flat


def _import_sink(package: str, asked_by: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"{asked_by} must be False unless the package {package} is installed, got True; {error}. "
            f"Run `pip install {package}` or set {asked_by}=False."
        ) from error


def _start_wandb(module: Any, root: Path, project: str, config: Mapping[str, Any] | None, resumed: bool) -> Any:
    """A W&B run whose id is kept in the workdir, so that a resumed run goes on with the same curves."""
    kept = root / "wandb_run_id"
    if not (resumed and kept.exists()):
        write_whole(kept, uuid.uuid4().hex[:8])
    settings = dict(config) if config is not None else None
    return module.init(project=project, dir=str(root), id=kept.read_text(), resume="allow", config=settings)
