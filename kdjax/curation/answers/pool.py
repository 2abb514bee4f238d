"""An index of a pool of answers: the answers stay on disk and are read question after question.

Memory is about 30 bytes an answer, besides the questions, whatever the length of the answers.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from kdjax.data.answer_pools import PoolFile, PoolRow, asked_by, canonical, lines, parse, pool_files
from kdjax.data.prompts import Prompt, question_digest

# why an answer of the pool is not admitted, in the order in which it is asked; "" = it is
REASONS = (
    "",
    "malformed",  # the line is no row
    "unknown_teacher",  # the teacher's name is blank, or is missing where other lines of the file have one
    "unknown_question",  # its id is none of prompts.path
    "heldout",  # of a question that is kept for evaluation
    "other_question",  # the question of this id is another one
    "empty",  # there is no answer, or it failed
    "wrong",
    "undecided",  # nobody can tell whether it is right
    "loop",  # it repeats itself
    "too_long",  # as in encode.REASONS, these four: the student cannot be trained on it
    "truncated",
    "special_only",
    "altered",
    "duplicate",  # the teacher has a right answer to this question before it
    "identical",  # another teacher says the same
)
NONE = -1  # question of a row that answers none of them


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An answer to a question. row: 16 hex digits of (question id, teacher, text). cut_off: at the length limit."""

    question: Prompt
    teacher: str
    text: str
    row: str
    cut_off: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Pool:
    """The rows of a pool, those that answer no question first, then question after question and by teacher.

    questions: in the order of their ids as JSON. heldout: ids. Of each row: file, line (from 1), offset, question
    (NONE = -1), teacher (number in `teachers`, which are sorted) and reason (number in REASONS, 0 = it can be
    verified). first: where the rows of a question begin. content: (teacher, sha256) of the files.
    """

    files: tuple[PoolFile, ...]
    teachers: tuple[str, ...]
    questions: tuple[Prompt, ...]
    heldout: frozenset[str]
    file: np.ndarray
    line: np.ndarray
    offset: np.ndarray
    question: np.ndarray
    teacher: np.ndarray
    reason: np.ndarray
    first: np.ndarray
    content: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.offset)

    def of(self, question: int) -> range:
        """The rows of a question; of NONE those of no question."""
        return range(int(self.first[question + 1]), int(self.first[question + 2]))

    def place(self, row: int) -> str:
        """'file:line' of a row."""
        return f"{self.files[self.file[row]].path}:{self.line[row]}"


def open_pool(paths: Sequence[str], train: Sequence[Prompt], heldout: Sequence[Prompt], instruction: str = "") -> Pool:
    """Index the files of `answers.pool` in one pass. train: the questions whose answers are wanted.

    instruction: what the questions end with (prompts.instruction); those of the pool may lack it. The same whatever the
    order of paths and prompts. Raises ValueError for files that are not there, and for rollouts of two models in
    folders of one name.
    """
    files = pool_files(paths)
    _check_models(files)
    questions = sorted(train, key=lambda prompt: canonical(prompt.id))
    number_of = {prompt.id: number for number, prompt in enumerate(questions)}
    asked = [asked_by(prompt, instruction) for prompt in questions]
    asks = [question_digest(prompt, instruction) for prompt in questions]
    kept_out = frozenset(prompt.id for prompt in heldout)

    def judged(row: PoolRow) -> tuple[int, str]:
        """The question that it answers, or why it answers none."""
        number = number_of.get(row.id, NONE)
        if not row.teacher:
            return NONE, "unknown_teacher"
        if number == NONE:
            return NONE, "heldout" if row.id in kept_out else "unknown_question"
        other = row.question and asked_by(Prompt("", row.question), instruction) != asked[number]
        if other or row.asks not in ("", asks[number]):
            return NONE, "other_question"
        return (number, "") if row.text else (NONE, "empty")

    teachers: dict[str, int] = {}
    columns = {name: array.array(kind) for name, kind in _COLUMNS.items()}
    content = []
    for at, file in enumerate(files):
        digest, nameless, named = hashlib.sha256(), array.array("q"), False
        for number, offset, line in lines(file):
            digest.update(line)
            teacher, question, reason = file.teacher, NONE, ""
            try:
                row = parse(line, file)
            except ValueError:
                reason = "malformed"
            else:
                teacher, (question, reason) = row.teacher or file.teacher, judged(row)
                named |= row.named and row.teacher != ""
                if not row.named:
                    nameless.append(len(columns["file"]))
            place = teachers.setdefault(teacher, len(teachers))
            values = (at, number, offset, question, place, REASONS.index(reason))
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
        for entry in nameless if named else ():
            columns["question"][entry], columns["reason"][entry] = NONE, REASONS.index("unknown_teacher")
        content.append((file.teacher, digest.hexdigest()))
    return _sorted(files, tuple(teachers), tuple(questions), kept_out, columns, tuple(content))


@contextlib.contextmanager
def reader(pool: Pool) -> Iterator[Callable[[int], PoolRow]]:
    """(row number) -> what its line says. Raises ValueError for what is no row (any more)."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open(file.path, "rb")) for file in pool.files]

        def read(row: int) -> PoolRow:
            file = int(pool.file[row])
            opened[file].seek(int(pool.offset[row]))
            found = parse(opened[file].readline(), pool.files[file])
            asked = int(pool.question[row])
            if asked != NONE and found.id != pool.questions[asked].id:
                raise ValueError(f"it answers {found.id!r}")
            return found

        yield read


def candidates(pool: Pool, read: Callable[[int], PoolRow], question: int) -> list[Candidate]:
    """The answers to a question, by teacher, then as they are in the files; `pool.of(question)` are their rows."""
    found, seen = [], dict[tuple[str, str], int]()
    asked = pool.questions[question]
    for row in pool.of(question):
        try:
            said = read(row)
        except ValueError as error:
            raise ValueError(
                f"answers.pool must not change while it is read, got another line at {pool.place(row)}: {error}. "
                "Run the same command again."
            ) from error
        again = seen[said.teacher, said.text] = seen.get((said.teacher, said.text), -1) + 1
        digest = digest_of(asked.id, said.teacher, said.text, again)
        found.append(Candidate(asked, said.teacher, said.text, digest, said.cut_off))
    return found


def digest_of(question: str, teacher: str, text: str, again: int = 0) -> str:
    """16 hex digits of an answer. again: how often the teacher has given the same answer to it before."""
    said = f"{len(question)} {len(teacher)} {again} {question}{teacher}{text}"
    return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


_COLUMNS = {"file": "i", "line": "i", "offset": "q", "question": "i", "teacher": "i", "reason": "b"}


def _sorted(
    files: tuple[PoolFile, ...],
    teachers: tuple[str, ...],
    questions: tuple[Prompt, ...],
    heldout: frozenset[str],
    columns: dict[str, array.array],
    content: tuple[tuple[str, str], ...],
) -> Pool:
    found = {name: np.frombuffer(column, dtype=column.typecode) for name, column in columns.items()}
    names = tuple(sorted(teachers))
    place = {name: number for number, name in enumerate(names)}
    renumbered = np.array([place[name] for name in teachers], np.int32)
    if len(found["teacher"]):
        found["teacher"] = renumbered[found["teacher"]]
    by_teacher = np.where(found["question"] == NONE, 0, found["teacher"])
    order = np.lexsort((found["line"], found["file"], by_teacher, found["question"]))
    found = {name: column[order] for name, column in found.items()}
    first = np.searchsorted(found["question"], np.arange(NONE, len(questions) + 1))
    return Pool(files, names, questions, heldout, **found, first=first, content=content)


def _check_models(files: Sequence[PoolFile]) -> None:
    """Folders of one name are one teacher: they must be of one model."""
    known: dict[str, tuple[str, Path]] = {}
    for file in files:
        if not file.rollouts:
            continue
        manifest = file.path.parent / "manifest.json"
        try:
            model = str(json.loads(manifest.read_text(encoding="utf-8"))["depends"]["model"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"answers.pool must name directories of launch.generate, got {str(file.path.parent)!r} without a whole "
                f"{manifest.name}; {error!r}. Name its --out."
            ) from error
        other, folder = known.setdefault(file.teacher, (model, file.path.parent))
        if other != model:
            raise ValueError(
                f"answers.pool must name each teacher's folder differently, got {str(folder)!r} and "
                f"{str(file.path.parent)!r} of two models; a folder's name is its teacher's. Rename one."
            )
