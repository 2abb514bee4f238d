"""Where text comes from: the built-in corpora and local files, as a list of documents with stable ids."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kdjax import registry

FACTBOOK_FILE = "factbook.jsonl.xz"
SUFFIXES = (".jsonl", ".txt")
SECTIONS = 40  # of a text that is the only document: enough for a held-out part of 5 %
FORMS = '"messages", "prompt" and "response", or "text"'


@dataclasses.dataclass(frozen=True)
class Document:
    """The unit of the train / held-out split: a text, or a chat as (role, content) turns; exactly one of the two.

    id: stable for the same data wherever it lies, e.g. "africa/ag", "notes/today.txt", "chats.jsonl#12" (line 12).
    """

    id: str
    text: str | None = None
    messages: tuple[tuple[str, str], ...] | None = None


def read_factbook() -> list[Document]:
    """The embedded corpus: one document per country file of The World Factbook. See PROVENANCE.md."""
    import lzma  # some Pythons are built without it; only this corpus needs it

    packed = importlib.resources.files("kdjax.data").joinpath(FACTBOOK_FILE).read_bytes()
    rows = map(json.loads, lzma.decompress(packed).decode("utf-8").splitlines())
    return [Document(row["id"], text=row["text"]) for row in rows]


def read_topics() -> list[Document]:
    """The language topics of Python's own help(), one document each; they differ between Python versions."""
    from pydoc_data.topics import topics

    return [Document(name, text=topics[name]) for name in sorted(topics)]


SOURCES: dict[str, Callable[[], Iterable[Document]]] = {
    "factbook": read_factbook,
    "topics": read_topics,
}


def read_documents(path: str) -> tuple[list[Document], list[str]]:
    """The documents of `data.path`, and notes on what was left out.

    `path` is a name in `SOURCES`, 'package.module:function', a .txt file (one document), a .jsonl file (one document
    per line: `FORMS`, the first that fits) or a directory of such files, read recursively in the order of their names.
    A text that is the only document is cut into `sections`, since train and held-out are split by document.
    Raises ValueError that names the file and the byte or line for whatever cannot be read.
    """
    notes: list[str] = []
    if path in SOURCES or (":" in path and not Path(path).exists()):
        documents = list(registry.lookup(SOURCES, path, "data.path")())
    else:
        root, files, notes = _files(path)
        documents = [document for file in files for document in _read_file(file, _id(file, root))]
    if len(documents) == 1 and documents[0].text is not None:
        documents = sections(documents[0])
        if len(documents) > 1:
            notes = [*notes, f"{path} is one document; it was cut at blank lines into {len(documents)} sections"]
    if not documents:
        raise ValueError(f"data.path must hold documents, got {path!r}; it has none. Set it to data with at least two.")
    return documents, notes


def sections(document: Document) -> list[Document]:
    """A text cut at blank lines into at most SECTIONS parts of about equal length, with ids "book.txt#1", ..."""
    paragraphs = [part for part in re.split(r"\n\s*\n", document.text or "") if part.strip()]
    least = sum(map(len, paragraphs)) / SECTIONS
    made: list[str] = []
    for paragraph in paragraphs:
        if made and len(made[-1]) < least:
            made[-1] += "\n\n" + paragraph
        else:
            made.append(paragraph)
    if len(made) < 2:
        return [document]
    return [Document(f"{document.id}#{at}", text=text) for at, text in enumerate(made, start=1)]


def _id(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix()


def _files(path: str) -> tuple[Path, list[Path], list[str]]:
    given = Path(path).expanduser()
    if not path or not given.exists():
        raise ValueError(
            f"data.path must be a built-in corpus or an existing file or directory, got {path!r}; there is no such "
            "path." + registry.did_you_mean(path, SOURCES)
        )
    if given.is_file():
        if given.suffix.lower() not in SUFFIXES:
            raise ValueError(
                f"data.path must be a .txt file, a .jsonl file or a directory of these, got {path!r}; files of type "
                f"{given.suffix!r} are not supported. Write one JSON object with {FORMS} per line to a .jsonl file."
            )
        return given.parent, [given], []
    shown = [part for part in given.rglob("*") if part.is_file() and not _is_hidden(part, given)]
    files = sorted((f for f in shown if f.suffix.lower() in SUFFIXES), key=lambda f: _id(f, given))
    others = sorted(_id(f, given) for f in shown if f.suffix.lower() not in SUFFIXES)
    if not files:
        found = f"it holds {_shorten(others)}" if others else "it is empty"
        raise ValueError(f"data.path must be a directory with .txt or .jsonl files, got {path!r}; {found}.")
    notes = (
        [f"{len(others)} files that are neither .txt nor .jsonl were left out: {_shorten(others)}"] if others else []
    )
    return given, files, notes


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _shorten(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _read_file(file: Path, name: str) -> list[Document]:
    try:
        text = file.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data.path must hold UTF-8 text, got byte 0x{error.object[error.start]:02x} at offset {error.start} of "
            f"{file}; {error.reason}. Convert the file, e.g. with iconv -t UTF-8."
        ) from error
    if file.suffix.lower() == ".txt":
        return [Document(name, text=text)]
    # Not splitlines(): a JSON string may hold U+2028 and its like.
    lines = enumerate(text.split("\n"), start=1)
    return [_parse_line(line, f"{file}:{at}", f"{name}#{at}") for at, line in lines if line.strip()]


def _parse_line(line: str, where: str, name: str) -> Document:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"data.path must hold one JSON object per line, got bad JSON at {where}; {error}.") from error
    if not isinstance(row, dict):
        raise ValueError(f"data.path must hold one JSON object per line, got a {type(row).__name__} at {where}.")
    if "messages" in row:
        return Document(name, messages=_turns(row["messages"], where))
    if "prompt" in row and "response" in row:
        return Document(
            name, messages=(("user", _string(row, "prompt", where)), ("assistant", _string(row, "response", where)))
        )
    if "text" in row:
        return Document(name, text=_string(row, "text", where))
    found = ", ".join(sorted(row)) or "no field"
    raise ValueError(f"data.path must hold rows with {FORMS}, got {found} at {where}. Rename the fields.")


def _string(row: dict[str, Any], field: str, where: str) -> str:
    if not isinstance(row[field], str):
        raise ValueError(f'the field "{field}" must be a string, got {type(row[field]).__name__} at {where}.')
    return row[field]


def _turns(messages: Any, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'the field "messages" must be a non-empty list, got {messages!r:.60} at {where}.')
    turns = []
    for turn in messages:
        if not (isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)):
            raise ValueError(
                f'each of "messages" must be {{"role": text, "content": text}}, got {turn!r:.80} at {where}.'
            )
        turns.append((turn["role"], turn["content"]))
    if "assistant" not in (role for role, _ in turns):
        raise ValueError(
            f'the field "messages" must have an assistant turn, got roles {", ".join(role for role, _ in turns)} at '
            f"{where}; only answers are targets. Leave the row out."
        )
    return tuple(turns)
