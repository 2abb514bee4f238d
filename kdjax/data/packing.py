"""Encoded documents to rows of a fixed length, and what each row is made of."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from kdjax import registry
from kdjax.data.encode import Encoded

PADDING = 0  # a valid id of every vocabulary; segment 0 is what marks padding


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """A data set as columns over R rows of T places; the first four are those of `types.Batch`.

    tokens, segment_ids, positions: int32 [R, T]; loss_mask: bool [R, T].
    row_id:   int32 [R], the row's index in the data set; stays with the row when a part is taken.
    weight:   float32 [R], the row's weight in the loss.
    row_hash: uint64 [R], of the row's tokens, segments and mask, whatever its neighbours: the key for caches.
    begins:   int32 [R], documents that begin in the row.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    loss_mask: np.ndarray
    row_id: np.ndarray
    weight: np.ndarray
    row_hash: np.ndarray
    begins: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def take(rows: Rows, index: np.ndarray | slice) -> Rows:
    """The rows at `index`, with their ids, weights and hashes."""
    return Rows(**{field.name: getattr(rows, field.name)[index] for field in dataclasses.fields(rows)})


def pack(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents one after the other in windows of exactly `seq_len`; a border may fall inside a document."""
    return np.divmod(np.arange(lengths.sum()), seq_len)


def row(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Every document begins a row; one that is longer than `seq_len` goes on in the next rows."""
    rows = -(-lengths // seq_len)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(np.cumsum(rows) - rows, lengths) + within // seq_len, within % seq_len


# (tokens per document [D], seq_len) -> row and column of every token, documents in order.
PACKINGS: dict[str, Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]] = {"pack": pack, "row": row}


def make_rows(documents: Sequence[Encoded], seq_len: int, packing: str = "pack") -> Rows:
    """All tokens of all documents, each once and in order; only the places after the last of a row are padding.

    A segment is a document, or the part of it that lies in the row: numbered 1, 2, ... in the row, with
    positions 0, 1, ... of its own. So a document that a border cuts goes on as a new segment; its first token there has
    lost its context and is no target.
    """
    place = registry.lookup(PACKINGS, packing, "data.packing")
    lengths = np.array([len(document.tokens) for document in documents if len(document.tokens)], np.int64)
    if not len(lengths):
        raise ValueError(f"data.path must hold tokens, got {len(documents)} documents without any.")
    at_row, at_column = place(lengths, seq_len)
    shape = (int(at_row[-1]) + 1, seq_len)

    def scatter(values: np.ndarray, dtype: type) -> np.ndarray:
        out: np.ndarray = np.zeros(shape, dtype)
        out[at_row, at_column] = values
        return out

    begins = np.zeros(len(at_row), bool)
    begins[np.cumsum(lengths) - lengths] = True
    filled = scatter(np.ones(len(at_row), bool), np.bool_)
    starts = scatter(begins | (at_column == 0), np.bool_)
    columns = np.arange(seq_len)
    tokens = np.where(filled, scatter(np.concatenate([document.tokens for document in documents]), np.int32), PADDING)
    segment_ids = np.where(filled, np.cumsum(starts, 1), 0)
    positions = np.where(filled, columns - np.maximum.accumulate(np.where(starts, columns, 0), 1), 0)
    loss_mask = scatter(np.concatenate([document.loss_mask for document in documents]), np.bool_)
    tokens, segment_ids, positions = (array.astype(np.int32) for array in (tokens, segment_ids, positions))
    return Rows(
        tokens=tokens,
        segment_ids=segment_ids,
        positions=positions,
        loss_mask=loss_mask,
        row_id=np.arange(shape[0], dtype=np.int32),
        weight=np.ones(shape[0], np.float32),
        row_hash=hash_rows(tokens, segment_ids, loss_mask),
        begins=scatter(begins, np.bool_).sum(1, dtype=np.int32),
    )


def hash_rows(tokens: np.ndarray, segment_ids: np.ndarray, loss_mask: np.ndarray) -> np.ndarray:
    """uint64 [R]: BLAKE2b of each row's segments, mask and tokens; the ids under padding do not count."""
    content = [
        segment_ids.astype("<i4"),
        (loss_mask & (segment_ids > 0)),
        np.where(segment_ids > 0, tokens, 0).astype("<i4"),
    ]
    joined = np.concatenate([np.ascontiguousarray(part).view(np.uint8).reshape(len(tokens), -1) for part in content], 1)
    digests = b"".join(hashlib.blake2b(line, digest_size=8).digest() for line in joined)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def eligible(rows: Rows) -> np.ndarray:
    """bool [R, T]: the positions that `types.targets_of` finds eligible, on the host."""
    out = np.zeros(rows.tokens.shape, bool)
    segment = rows.segment_ids
    out[:, :-1] = rows.loss_mask[:, 1:] & (segment[:, 1:] == segment[:, :-1]) & (segment[:, :-1] > 0)
    return out


def splits(rows: Rows) -> int:
    """How often a border of a row cuts a document: segments that no document begins."""
    return int(rows.segment_ids.max(1, initial=0).sum() - rows.begins.sum())


def ids_in(rows: Rows) -> np.ndarray:
    """int32, sorted: the distinct token ids that the rows emit, padding apart."""
    return np.unique(rows.tokens[rows.segment_ids > 0])
