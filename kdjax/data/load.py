"""From the `data` part of an experiment to its train and held-out rows."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdjax.config import Data
from kdjax.data.encode import Encoded, encode
from kdjax.data.packing import Rows, eligible, make_rows, splits, take
from kdjax.data.sources import read_documents

FEW_TARGETS = 1000  # held-out figures from fewer are mostly noise


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedData:
    """Rows of both parts; summary: counts per part, notes for the user; fingerprint: SHA-256 over all row hashes."""

    train: Rows
    heldout: Rows
    summary: dict[str, Any]
    fingerprint: str


def load_data(data: Data, tokenizer: Any) -> LoadedData:
    """Reads, tokenises, splits by document and packs what `data` names; the same rows for the same input, always.

    summary: {"train": counts, "heldout": counts, "notes": [sentences]}, counts = documents, tokens, targets, rows,
    splits (of documents by row borders), rows_without_targets, longest_document (tokens).
    """
    documents, notes = read_documents(data.path)
    encoded = encode(documents, tokenizer, chat_template=data.chat_template, system_prompt=data.system_prompt)
    if len(encoded) < len(documents):
        notes = [*notes, f"{len(documents) - len(encoded)} blank documents were left out"]
    if not encoded:
        raise ValueError(
            f"data.path must hold tokens, got {data.path!r} with {len(documents)} documents, all of them blank."
        )
    heldout_documents, train_documents = split(encoded, data)
    train = _cut(make_rows(train_documents, data.seq_len, data.packing), data.max_train_tokens)
    heldout = make_rows(heldout_documents, data.seq_len, data.packing)
    train_documents = train_documents[: int(train.begins.sum())]  # those that the cut left
    counts = {"train": _counts(train, train_documents), "heldout": _counts(heldout, heldout_documents)}
    for part, field in (("train", "data.seq_len"), ("heldout", "data.heldout_fraction")):
        if not counts[part]["targets"]:
            raise ValueError(
                f"data.path must hold targets in its {part} part, got {data.path!r} with {counts[part]['tokens']} "
                "tokens and 0 targets there; a target needs a token of its document before it in the row. Add text "
                f"or raise {field}."
            )
    notes = [*notes, *_notes(counts, train_documents, heldout_documents, data)]
    return LoadedData(train, heldout, {**counts, "notes": notes}, _fingerprint(train, heldout))


def split(documents: Sequence[Encoded], data: Data) -> tuple[list[Encoded], list[Encoded]]:
    """(held-out, train): documents in the order of hash(data.seed, id), the first `heldout_fraction` of them held out.

    Neither order nor place of the files matters, and a part of the rows is a random part of the documents.
    """
    if len(documents) < 2:
        raise ValueError(
            f"data.path must hold at least 2 documents, got {len(documents)} in {data.path!r} ({documents[0].id}); the "
            "held-out part is split off by document. Cut the text into several .txt files or .jsonl lines."
        )
    ordered = sorted(documents, key=lambda document: (_rank(data.seed, document.id), document.id))
    count = min(max(1, round(data.heldout_fraction * len(ordered))), len(ordered) - 1)
    return ordered[:count], ordered[count:]


def _rank(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest()


def _cut(rows: Rows, max_tokens: int) -> Rows:
    if not max_tokens:
        return rows
    total = np.cumsum((rows.segment_ids > 0).sum(1))
    if total[0] > max_tokens:
        raise ValueError(
            f"data.max_train_tokens must be 0 (all) or at least the {total[0]} tokens of the first row, got "
            f"{max_tokens}; whole rows are kept. Raise it or lower data.seq_len."
        )
    return take(rows, slice(0, int(np.searchsorted(total, max_tokens, side="right"))))


def _counts(rows: Rows, documents: Sequence[Encoded]) -> dict[str, int]:
    targets = eligible(rows).sum(1)
    return {
        "documents": len(documents),
        "tokens": int((rows.segment_ids > 0).sum()),
        "targets": int(targets.sum()),
        "rows": len(rows),
        "splits": splits(rows),
        "rows_without_targets": int((targets == 0).sum()),
        "longest_document": max(len(document.tokens) for document in documents),
    }


def _notes(counts: dict[str, dict[str, int]], train: list[Encoded], heldout: list[Encoded], data: Data) -> list[str]:
    notes = []
    if counts["heldout"]["targets"] < FEW_TARGETS:
        notes.append(
            f"the held-out part has only {counts['heldout']['targets']} targets, fewer than {FEW_TARGETS}: its figures "
            "are noisy. Raise data.heldout_fraction."
        )
    known = {document.tokens.tobytes() for document in train}
    copies = sum(document.tokens.tobytes() in known for document in heldout)
    if copies:
        notes.append(f"{copies} held-out documents are also in the train part, word for word: remove the copies")
    cut, idle = (
        sum(counts[part][what] for part in ("train", "heldout")) for what in ("splits", "rows_without_targets")
    )
    if cut and data.packing == "row":
        notes.append(
            f"documents longer than data.seq_len={data.seq_len} go on in another row without their context: {cut} times"
        )
    if idle:
        notes.append(f"{idle} rows have no target (a prompt, or the end of a document, alone): raise data.seq_len")
    return notes


def _fingerprint(train: Rows, heldout: Rows) -> str:
    digest = hashlib.sha256()
    for rows in (train, heldout):
        digest.update(f"{rows.tokens.shape}".encode())
        digest.update(rows.row_hash.astype("<u8").tobytes())
    return digest.hexdigest()
