"""Files of teachers' answers: which files a pool is, what a line says, and the questions that a pool answers.

A *.jsonl of a pool has one JSON object a line: "id" (of the question, shared by all teachers), "instruction" (the
question), "teacher_output" or "output" (the answer); perhaps "teacher_name" or "teacher" (else it is the file's name),
"system", "reference_answer" (the gold answer), "category", "dataset" or "source_dataset". This is the layout of the
pool released with SCAS (arXiv 2605.26872). A rollouts.jsonl is a file of `launch.generate`, of one teacher.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdjax.data.prompts import Prompt, messages, question_of

ROLLOUTS = "rollouts.jsonl"
SUFFIXES = ("_teacher_responses_evaluated", "_teacher_responses", "_student_train")  # of released names of files
_FIELDS = (
    "instruction",
    "teacher_output",
    "output",
    "teacher_name",
    "teacher",
    "system",
    "category",
    "dataset",
    "source_dataset",
)


@dataclasses.dataclass(frozen=True)
class PoolFile:
    """A file of answers. teacher: whose they are, unless a line says so. rollouts: it is of launch.generate."""

    path: Path
    teacher: str
    rollouts: bool = False


@dataclasses.dataclass(frozen=True)
class PoolRow:
    """What a line says. text: "" = no answer, `failed` says why. cut_off: it reached the length limit.

    teacher: "" = the line gives a blank name. named: does the line give a name? else it is the file's. asks: of a
    rollout `question_digest` of the question, "" = not known.
    """

    id: str
    teacher: str
    text: str
    question: str = ""
    system: str = ""
    reference: str | None = None
    meta: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cut_off: bool = False
    failed: str = ""
    named: bool = True
    asks: str = ""


def pool_files(paths: Sequence[str], where: str = "answers.pool") -> tuple[PoolFile, ...]:
    """The files of a pool, each once, in the order of their paths whatever the order of `paths`.

    paths: *.jsonl, or directories; of these all *.jsonl at any depth, of one with a rollouts.jsonl that file alone.
    where: the config path that named them. Raises ValueError for what does not exist or holds no such file.
    """
    found: dict[Path, PoolFile] = {}
    for given in paths:
        path = Path(given).expanduser().resolve()
        if path.is_dir():
            files = list(_below(path))
        elif path.is_file() and path.suffix == ".jsonl":
            files = [path]
        else:
            kind = "no .jsonl file" if path.exists() else "which does not exist"
            raise ValueError(
                f"{where} must name existing *.jsonl files or directories of these, got {given!r}, {kind}; answers are "
                "read from there. Mend the path."
            )
        if not files:
            raise ValueError(
                f"{where} must name directories that hold *.jsonl files, got {given!r} without one. Mend the path."
            )
        found |= {path: _pool_file(path) for path in files}
    return tuple(found[path] for path in sorted(found, key=str))


def lines(file: PoolFile) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset, content) of the lines that are not blank."""
    offset = 0
    with open(file.path, "rb") as opened:
        for number, line in enumerate(opened, 1):
            if line.strip():
                yield number, offset, line
            offset += len(line)


def parse(line: bytes, file: PoolFile) -> PoolRow:
    """What a line says. Raises ValueError with what is wrong with it."""
    try:
        row = json.loads(line.decode("utf-8").removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON in UTF-8: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"it is a {type(row).__name__} and no JSON object")
    return _rollout(row, file) if file.rollouts else _released(row, file)


def holds_answers(path: str) -> bool:
    """Is it a directory, or a *.jsonl file whose first JSON object has an "instruction" and no "prompt"?"""
    file = Path(path).expanduser()
    if file.is_dir():
        return True
    if file.suffix != ".jsonl" or not file.is_file():
        return False
    for _, _, line in lines(PoolFile(file, "")):
        try:
            row = json.loads(line.decode("utf-8").removeprefix("\ufeff"))
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            return "instruction" in row and "prompt" not in row
    return False


def read_questions(path: str, where: str = "prompts.path") -> list[Prompt]:
    """The questions of a pool, each once, in the order of their ids: reference_answer is gold, meta has the rest.

    A system text on which all rows of a question agree is its first turn. Lines that are no row are passed over: they
    are listed when the answers are read. Of equal questions the one with the first id stays. Raises ValueError if one
    id has two questions or two gold answers, or if there is none.
    """
    known: dict[str, tuple[PoolRow, str]] = {}
    for file in pool_files([path], where):
        if file.rollouts:
            continue
        for number, _, line in lines(file):
            try:
                row = parse(line, file)
            except ValueError:
                continue  # listed with its reason by kdjax.curation.answers.verify
            place = f"{file.path}:{number}"
            row = dataclasses.replace(row, text="", teacher="")  # the answers stay on disk
            if row.id in known:
                first, at = known[row.id]
                known[row.id] = _merged(first, at, row, place, where), at
            else:
                known[row.id] = row, place
    if not known:
        raise ValueError(
            f'{where} must hold questions, got {path!r} without a row that has "id", "instruction" and an answer. Name '
            "a file of questions, or the *.jsonl of teachers."
        )
    asked: dict[str, Prompt] = {}
    for name in sorted(known, key=canonical):
        prompt = _prompt(known[name][0])
        asked.setdefault(question_of(prompt), prompt)
    return list(asked.values())


def asked_by(prompt: Prompt, instruction: str = "") -> str:
    """What its last turn asks, up to blanks and the form of characters, without the instruction at its end."""
    return question_of(Prompt("", messages(prompt)[-1]["content"]), instruction)


def canonical(name: str) -> str:
    """A question's id as JSON: questions are taken in the order of these texts."""
    return json.dumps(name, ensure_ascii=False)


def _below(folder: Path) -> Iterator[Path]:
    for at, folders, names in os.walk(folder):
        folders[:] = [] if ROLLOUTS in names else [name for name in folders if not name.startswith(".")]
        for name in [ROLLOUTS] if ROLLOUTS in names else names:
            if name.endswith(".jsonl") and not name.startswith("."):
                yield Path(at) / name


def _pool_file(path: Path) -> PoolFile:
    if path.name == ROLLOUTS:
        return PoolFile(path, path.parent.name, rollouts=True)
    name = path.stem
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix) or name
    return PoolFile(path, name)


def _released(row: Mapping[str, Any], file: PoolFile) -> PoolRow:
    texts = _texts(row, *_FIELDS)
    question, one, other = texts["instruction"], texts["teacher_output"], texts["output"]
    if row.get("teacher_output") is None and row.get("output") is None:
        raise ValueError('the field "teacher_output" or "output" is missing')
    if not question.strip():
        raise ValueError('the field "instruction" is ' + ("empty" if "instruction" in row else "missing"))
    meta = {"category": texts["category"], "dataset": texts["dataset"] or texts["source_dataset"]}
    names = [texts[name] for name in ("teacher_name", "teacher") if row.get(name) is not None]
    return PoolRow(
        id=_id(row),
        teacher=next((name for name in names if name.strip()), "") if names else file.teacher,
        named=bool(names),
        text=one if one.strip() else other if other.strip() else "",
        question=question,
        system=texts["system"],
        reference=_gold(row),
        meta={name: value for name, value in meta.items() if value},
    )


def _rollout(row: Mapping[str, Any], file: PoolFile) -> PoolRow:
    finish = row.get("finish")
    if finish not in ("stop", "length", "failed"):
        raise ValueError(f'the field "finish" must be stop, length or failed, got {finish!r:.40}')
    if not isinstance(row.get("response"), str):
        raise ValueError(f'the field "response" must be a text, got {row.get("response")!r:.40}')
    texts = _texts(row, "response", "reason", "asks")
    failed = (texts["reason"] or "it failed") if finish == "failed" else ""
    text = "" if failed or not texts["response"].strip() else texts["response"]
    return PoolRow(_id(row), file.teacher, text, cut_off=finish == "length", failed=failed, asks=texts["asks"])


def _id(row: Mapping[str, Any]) -> str:
    name = row.get("id")
    if type(name) is int:
        return str(name)
    if not isinstance(name, str) or not name:
        shown = f"got {name!r:.40}" if "id" in row else "it is missing"
        raise ValueError(f'the field "id" must be a non-empty text or a whole number, {shown}')
    return _texts(row, "id")["id"]


def _gold(row: Mapping[str, Any]) -> str | None:
    value = row.get("reference_answer")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return _texts(row, "reference_answer")["reference_answer"].strip() or None


def _texts(row: Mapping[str, Any], *names: str) -> dict[str, str]:
    """These fields of a row; "" for one that is null or missing."""
    found = {}
    for name in names:
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f'the field "{name}" must be a text, got {value!r:.40}')
        found[name] = value or ""
    try:
        "".join(found.values()).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a text holds half of a character: {error.reason}") from error
    return found


def _merged(first: PoolRow, at: str, other: PoolRow, there: str, where: str) -> PoolRow:
    """What two rows say of one question."""
    if _plain(first.question) != _plain(other.question):
        raise ValueError(
            f"{where} must hold one question to an id, got two for {first.id!r}, at {at} and at {there}; answers are "
            "joined by it. Name the files of one corpus only."
        )
    if None not in (first.reference, other.reference) and first.reference != other.reference:
        raise ValueError(
            f"{where} must hold one gold answer to a question, got {first.reference!r} for {first.id!r} at {at} and "
            f"{other.reference!r} at {there}; one of them would be marked wrong. Mend one."
        )
    return dataclasses.replace(
        first,
        system=first.system if first.system == other.system else "",
        reference=other.reference if first.reference is None else first.reference,
        meta={**other.meta, **first.meta},
    )


def _prompt(row: PoolRow) -> Prompt:
    if not row.system.strip():
        return Prompt(row.id, row.question, row.reference, meta=dict(row.meta))
    turns = ({"role": "system", "content": row.system}, {"role": "user", "content": row.question})
    return Prompt(row.id, turns, row.reference, meta=dict(row.meta))


def _plain(text: str) -> str:
    return question_of(Prompt("", text))
