"""What a student makes of the admitted answers: scored-<student>.jsonl, a line per answer, each scored once.

{"row", "id", "teacher", "figures": {name: number, null if it is not defined}, "error": ""}, or "figures": null and
the reason. The name of the file is of the student's weights: figures of two students are never mixed. Where a score
asks for figures that an answer has not, a second line has all of them; the later one counts.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from kdjax.curation.answers.stage import FOLDER, Stage, open_stage, parse_record, read_manifest, records

SHOWN = 12  # hex digits of a student's fingerprint in the name of its file


@dataclasses.dataclass(frozen=True)
class ScoredLine:
    """A line. values: NaN where a figure is not defined; {} with an error."""

    row: str
    teacher: str
    values: Mapping[str, float]
    error: str = ""


class ScoredFile:
    """The figures of one student's pass over the answers; a context manager.

    row in file: it is scored. file[row]: its `ScoredLine`. Memory is about 150 bytes an answer.
    """

    def __init__(self, path: Path, stage: Stage | None) -> None:
        self.path, self._stage = path, stage
        self._at = {int(record["row"], 16): offset for offset, record in records(path)}
        self._file = open(path, "rb")  # noqa: SIM115, closed by close()

    def append(
        self, row: str, question: str, teacher: str, figures: Mapping[str, float] | None, error: str = ""
    ) -> None:
        """Add a line. figures: None with an error, which says why there are none; those that are known stay.

        Raises ValueError if nothing new is said of an answer that is scored already, for an infinite figure, and unless
        one of both is given.
        """
        if self._stage is None:
            raise ValueError(f"{self.path} must be opened by open_scored to be written.")
        if row in self and not (figures and self.lacks(row, tuple(figures))):
            raise ValueError(f"answers must be scored once, got {row} of {teacher!r} to {question!r} again.")
        if (figures is None) != bool(error):
            raise ValueError(f"an answer must have figures or an error, got {figures!r:.80} and {error!r} of {row}.")
        values = None
        if figures is not None:
            wrong = [name for name, value in figures.items() if math.isinf(value)]
            if wrong:
                raise ValueError(f"figures must be finite or NaN, got {wrong[0]}={figures[wrong[0]]} of {row}.")
            values = _written(figures)
        if row in self and values is not None:
            values = _written(self[row].values) | values
        line = {"row": row, "id": question, "teacher": teacher, "figures": values, "error": error}
        self._at[int(row, 16)] = self._stage.append(line)

    def spent(self, **sums: float) -> None:
        """What the pass took since the file was opened: "answers", "places" (tokens with padding) and "seconds".

        The manifest has the sums of all passes over the answers, of those that were killed too.
        """
        if self._stage is not None:
            self._stage.spent(**sums)

    def __contains__(self, row: str) -> bool:
        return int(row, 16) in self._at

    def __getitem__(self, row: str) -> ScoredLine:
        self._file.seek(self._at[int(row, 16)])
        record = parse_record(self._file.readline(), f"the line of {row} in {self.path}")
        values = {name: math.nan if value is None else value for name, value in (record["figures"] or {}).items()}
        return ScoredLine(row, record["teacher"], values, record["error"])

    def __len__(self) -> int:
        return len(self._at)

    def __iter__(self) -> Iterator[ScoredLine]:
        return (self[f"{row:016x}"] for row in self._at)

    def lacks(self, row: str, names: Sequence[str]) -> bool:
        """Is it not scored, or without one of these figures? With an error it will never have them, and lacks none."""
        if row not in self:
            return True
        line = self[row]
        return not line.error and any(name not in line.values for name in names)

    def close(self) -> None:
        """Close the file, and let another process write it."""
        self._file.close()
        if self._stage is not None:
            self._stage.close()

    def __enter__(self) -> ScoredFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _written(figures: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else float(value) for name, value in figures.items()}


def scored_path(workdir: Path, student: str, elsewhere: str = "") -> Path:
    """The file of a student, by `params_fingerprint` of its weights. elsewhere: answers.scored."""
    return Path(os.path.normpath(workdir / elsewhere)) / FOLDER / f"scored-{student[:SHOWN]}.jsonl"


def open_scored(path: Path, depends: Mapping[str, Any]) -> ScoredFile:
    """Begin or go on with the scores of a student. depends: what figures depend on, in the manifest.

    Raises ValueError that names what differs from the scores that are there, or that another process writes them.
    """
    stage = open_stage(path, depends, renew=False)
    try:
        return ScoredFile(path, stage)
    except BaseException:
        stage.close()
        raise


def read_scored(path: Path) -> ScoredFile:
    """The scores that are there, to be read. Raises ValueError if there are none."""
    if not path.is_file() or not read_manifest(path):
        raise ValueError(
            f"{path} must hold the scores of the answers by this student, got none; they are not there yet. Run "
            "`python -m launch.curate` with the same config."
        )
    return ScoredFile(path, None)
