"""A row of the cache: what the teacher said at its stored positions, to bytes and back.

The bytes of a row with n stored positions, in this order (`Header` says which are there):
  bitmap    superset only: one bit per place of the row, lowest bit first, is it stored?
  entropy   uint8 [n];  label_logp  float16 [n]
  words     the entries, position after position, as planes (`words.py`). Counts: a position ends where its counts have
            summed to `entries`. Others: every position has the same number of them. So no lengths are stored.
A row without eligible positions has no bytes. What a shard makes of these bytes is in `shards.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from kdjax.teacher.cache import words
from kdjax.teacher.cache.header import Header

Columns = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class RowRecord:
    """What is to be stored of one row; n = its stored positions, in order.

    ids: int32 [n, K]; codes: uint16 [n, K], 0 = empty. eligible: how many eligible positions the row has; all of
    them are stored unless the cache is of a superset. entropy, label_logp: float32 [n], nats, if the cache keeps them.
    places: int32 [n], superset only: the stored positions' places in the row, ascending.
    """

    ids: np.ndarray
    codes: np.ndarray
    eligible: int
    entropy: np.ndarray | None = None
    label_logp: np.ndarray | None = None
    places: np.ndarray | None = None


def encode_row(header: Header, record: RowRecord, row_id: int) -> list[bytes]:
    """The row's bytes, in parts of one kind or plane each.

    Raises ValueError that names the row if the record is not what the header promises.
    """
    problem = _problem(header, record)
    if problem:
        raise ValueError(f"the record of row {row_id} must fit the cache; {problem}.")
    if not record.eligible:
        return []
    parts = []
    if record.places is not None:
        bits: np.ndarray = np.zeros(header.seq_len, bool)
        bits[record.places] = True
        parts.append(np.packbits(bits, bitorder="little").tobytes())
    try:
        if record.entropy is not None:
            parts.append(words.encode_entropy(record.entropy, header.vocab_size))
        if record.label_logp is not None:
            parts.append(words.encode_log_prob(record.label_logp))
    except ValueError as error:
        raise ValueError(f"the record of row {row_id} must fit the cache; {error}") from error
    kept = record.codes > 0
    many = kept.sum(1)
    planes = words.encode_words(record.ids[kept], record.codes[kept], np.cumsum(many) - many, header.word_bytes)
    return [*parts, *(plane.tobytes() for plane in planes)]


def _problem(header: Header, record: RowRecord) -> str:
    n = len(record.ids)
    if record.ids.ndim != 2 or record.ids.shape != record.codes.shape:
        return f"ids and codes must both be [n, K], got {record.ids.shape} and {record.codes.shape}"
    if record.codes.dtype != np.uint16 or record.ids.dtype.kind not in "iu":
        return f"ids must be integers and codes uint16, got {record.ids.dtype} and {record.codes.dtype}"
    if not 0 <= record.eligible <= header.seq_len:
        return f"it has {record.eligible} eligible positions, a row has {header.seq_len} places"
    for name, kept in (("entropy", header.entropy), ("label_logp", header.label_logp), ("places", header.superset > 0)):
        value = getattr(record, name)
        if (value is not None) != kept:
            return f"{name} must {'be given' if kept else 'be None'}, the header says so"
        if value is not None and value.shape != (n,):
            return f"{name} must have {n} values, one per stored position, got {value.shape}"
    if record.places is None and n != record.eligible:
        return f"it has {n} stored and {record.eligible} eligible positions, and all of them are to be stored"
    if record.places is not None and n:
        if n > record.eligible:
            return f"it has {n} stored and only {record.eligible} eligible positions"
        if record.places[0] < 0 or record.places[-1] >= header.seq_len or (np.diff(record.places) <= 0).any():
            return f"places must be ascending and in 0..{header.seq_len - 1}"
    return _entries_problem(header, record)


def _entries_problem(header: Header, record: RowRecord) -> str:
    kept = record.codes > 0
    inside = (record.ids >= 0) & (record.ids < header.vocab_size)
    if not (inside | ~kept).all():
        return f"ids must be in 0..{header.vocab_size - 1}, got {record.ids[kept & ~inside][0]}"
    if header.counts:
        found, rule = record.codes.sum(1, dtype=np.int64), f"codes are counts that sum to {header.entries}"
        wanted = header.entries
    else:
        found, rule = kept.sum(1), f"every position has {header.fixed_entries} entries"
        wanted = header.fixed_entries
    wrong = np.flatnonzero(found != wanted)
    return f"{rule}, got {found[wrong[0]]} at its stored position {wrong[0]}" if len(wrong) else ""


def decode_rows(header: Header, rows: Sequence[np.ndarray], eligible: np.ndarray) -> Columns:
    """The fields of types.CachedTeacher for rows of which these are the bytes (uint8) and the eligible places [B, T].

    ids int32 [B, T, K], codes uint16 [B, T, K] with the entries first, stored bool [B, T], and if the cache keeps
    them entropy and label_logp float32 [B, T]; K = header.entries, 0 where nothing is stored.
    Raises ValueError if the bytes and the eligible places do not fit together.
    """
    stored = _stored(header, rows, eligible)
    columns: Columns = {
        "ids": np.zeros((*stored.shape, header.entries), np.int32),
        "codes": np.zeros((*stored.shape, header.entries), np.uint16),
        "stored": stored,
    }
    parts = _split(header, rows, stored.sum(1))
    if header.entropy:
        columns["entropy"] = np.zeros(stored.shape, np.float32)
        columns["entropy"][stored] = words.decode_entropy(parts["entropy"], header.vocab_size)
    if header.label_logp:
        columns["label_logp"] = np.zeros(stored.shape, np.float32)
        columns["label_logp"][stored] = words.decode_log_prob(parts["label_logp"])
    steps, codes = words.decode_words(parts["words"])
    places = np.flatnonzero(stored)
    first = _first(header, codes, len(places))
    at = np.repeat(places * header.entries - first, np.diff(first, append=len(codes))) + np.arange(len(codes))
    columns["ids"].reshape(-1)[at] = words.follow(steps, first, header.word_bytes)
    columns["codes"].reshape(-1)[at] = codes
    return columns


def stored_places(header: Header, row: np.ndarray) -> np.ndarray:
    """bool [T]: the places that the bytes of a row of a superset cache flag as stored."""
    if not len(row):
        return np.zeros(header.seq_len, bool)
    bitmap = row[: -(-header.seq_len // 8)]
    return np.unpackbits(bitmap, count=header.seq_len, bitorder="little").astype(bool)


def _stored(header: Header, rows: Sequence[np.ndarray], eligible: np.ndarray) -> np.ndarray:
    if not header.superset:
        return eligible.copy()
    stored = np.stack([stored_places(header, row) for row in rows])
    if (stored & ~eligible).any():
        raise ValueError(_unfit("places are stored that are not eligible here"))
    return stored


def _split(header: Header, rows: Sequence[np.ndarray], stored: np.ndarray) -> Columns:
    """The bytes of all rows, kind by kind."""
    bitmap = -(-header.seq_len // 8) if header.superset else 0
    parts: dict[str, list[np.ndarray]] = {"entropy": [], "label_logp": [], "words": []}
    for row, n in zip(rows, stored.tolist(), strict=True):
        start = bitmap
        for name, size in (("entropy", header.entropy), ("label_logp", 2 * header.label_logp)):
            parts[name].append(row[start : start + size * n])
            start += size * n
        if len(row) and (len(row) < start or (len(row) - start) % header.word_bytes):
            raise ValueError(_unfit(f"{len(row)} bytes are no {n} positions"))
        parts["words"].append(row[start:].reshape(header.word_bytes, -1))
    return {name: np.concatenate(part, axis=-1) for name, part in parts.items()}


def _first(header: Header, codes: np.ndarray, positions: int) -> np.ndarray:
    """int64 [positions]: where among the words [M] of these codes each position begins."""
    if not header.counts:
        if len(codes) != positions * header.fixed_entries:
            raise ValueError(_unfit(f"{len(codes)} entries at {positions} positions"))
        return np.arange(positions) * header.fixed_entries
    before = np.cumsum(codes, dtype=np.int64) - codes
    first = np.flatnonzero(before % header.entries == 0)
    total = int(codes.sum(dtype=np.int64))
    if len(first) != positions or total != header.entries * positions:
        raise ValueError(_unfit(f"counts sum to {total} at {positions} positions"))
    return first


def _unfit(why: str) -> str:
    return (
        f"the eligible positions must be those that the cache was written for; {why}. The data or how positions become "
        "eligible has changed: write the cache anew."
    )
