"""Reading a cache at training speed: any rows, in any order, from any thread."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.teacher.cache import files
from kdjax.teacher.cache.header import HEADER_FILE, Header, differences, parse_header, parse_table, rows_name
from kdjax.teacher.cache.records import Columns, decode_rows, stored_places
from kdjax.teacher.cache.shards import Shard, open_shard, shard_name

OPEN_SHARDS = 256  # each takes a file descriptor, of which a process has 1024 by default
EMPTY: np.ndarray = np.zeros(0, np.uint8)


def open_cache(
    path: str | os.PathLike[str], expect: Mapping[str, Any] | None = None, *, partial: bool = False
) -> CacheReader:
    """The cache at `path`; `expect` maps fields of Header to what they must be; partial: shards may be missing.

    Raises ValueError if there is no cache, if it is another one (every field that differs is named), if shards are
    missing, or if one is truncated or its head damaged. Remote shards are checked when they are copied, at first use.
    """
    directory = files.locate(path)
    names = files.names_in(directory)
    if HEADER_FILE not in names:
        raise ValueError(
            f"cache.path must be a teacher cache, got {directory}; there is no {HEADER_FILE}. Run launch.cache_teacher "
            "first."
        )
    header = parse_header((directory / HEADER_FILE).read_bytes(), str(directory / HEADER_FILE))
    different = differences(header, expect or {})
    if different:
        raise ValueError(
            f"the cache {directory} was written for something else: {'; '.join(different)}. Set what differs as it "
            "was, or choose another cache.path and run launch.cache_teacher."
        )
    rows_file = directory / rows_name(header)
    if rows_file.name not in names:
        raise ValueError(f"{rows_file} must be there, got none. Run the same launch.cache_teacher command again.")
    table = parse_table(rows_file.read_bytes(), header, str(rows_file))
    missing = [shard for shard in range(header.shards) if shard_name(shard) not in names]
    if missing and not partial:
        raise ValueError(
            f"the cache {directory} must be whole, {len(missing)} of its {header.shards} shards are missing "
            f"({_few(missing)}). Run the same launch.cache_teacher command again; it writes only these."
        )
    reader = CacheReader(directory, header, table, missing)
    if files.is_local(directory):
        for shard in reader.present:
            reader.shard(shard)
    return reader


class CacheReader:
    """An open cache; safe to use from several threads.

    missing: shards that are not there; present: those that are. row_ids: int64 [R], in the order of the cache.
    """

    def __init__(self, directory: files.Place, header: Header, table: np.ndarray, missing: Sequence[int] = ()) -> None:
        self.directory = directory
        self.header = header
        self.missing = tuple(missing)
        self._gone = frozenset(missing)
        self.present = tuple(shard for shard in range(header.shards) if shard not in self._gone)
        self._identity = header.identity()
        self.row_ids = table["row_id"]
        self._order = np.argsort(table["row_id"], kind="stable")
        self._ids = table["row_id"][self._order]
        self._hashes = table["row_hash"][self._order]
        self._lock = threading.Lock()
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._copies: Path | None = None
        if not files.is_local(directory):
            self._copies = Path(tempfile.mkdtemp(prefix="kdjax-cache-"))
            weakref.finalize(self, shutil.rmtree, self._copies, ignore_errors=True)  # or when Python ends

    def columns(self, row_ids: np.ndarray, row_hashes: np.ndarray, eligible: np.ndarray) -> Columns:
        """The fields of types.CachedTeacher for row_ids [B], row_hashes uint64 [B] and eligible bool [B, T].

        ids int32 [B, T, K], codes uint16 [B, T, K] (a position's entries first, then zeros), stored bool [B, T], and
        if the cache keeps them entropy and label_logp float32 [B, T], nats; K = header.entries. Row id -1 is padding:
        nothing is stored. Raises ValueError if a row is not in the cache or is another one, or if bytes are damaged.
        """
        if eligible.shape != (len(row_ids), self.header.seq_len):
            raise ValueError(
                f"eligible must be [{len(row_ids)}, {self.header.seq_len}], got {list(eligible.shape)}; data.seq_len "
                "of the cache is the second number."
            )
        found = self._find(row_ids, row_hashes)
        counts = eligible.sum(1).tolist()
        rows = [self._row(*where) for where in zip(found.tolist(), row_ids.tolist(), counts, strict=True)]
        return decode_rows(self.header, rows, eligible)

    def shard(self, shard: int) -> Shard:
        """The shard's file, mapped and its head checked; a remote one is copied to this machine first, once."""
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
            opened = open_shard(self._local(shard), shard, self.header.rows_in(shard), self._identity)
            self._open[shard] = opened
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
            return opened

    def verify(self, shards: Iterable[int] | None = None) -> None:
        """Read these shards (default: all that are there) whole. Raises ValueError at the first damaged byte."""
        for shard in self.present if shards is None else shards:
            self.shard(shard).verify()

    def summary(self, sample: int = 2000) -> dict[str, Any]:
        """What the cache holds and takes, ready for JSON; of all finished shards, missing ones are counted.

        rows, eligible, positions (stored); bytes: data, offsets (heads and indices of shards), headers (header.json
        and the rows' keys); bytes_per_position and bytes_per_eligible: data and offsets by these. distinct: how many
        different ids a stored position has, over about `sample` rows spread over the cache: mean, quantiles, histogram
        (its k-th number counts positions with k of them), and the rows and positions it is from.
        """
        from kdjax.teacher.cache.summary import summarise

        return summarise(self, sample)

    def sample(self, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids, codes) [n, K] of a row's n stored positions, for at most about `rows` rows spread over the cache."""
        header = self.header
        stride = max(1, -(-sum(header.rows_in(shard) for shard in self.present) // max(rows, 1)))
        seen = 0
        for shard in self.present:
            opened = self.shard(shard)
            for row in range(-seen % stride, len(opened.index), stride):
                raw = opened.row(row)
                # Which places are eligible does not matter here, only how many.
                eligible = np.arange(header.seq_len) < int(opened.index["eligible"][row])
                places = stored_places(header, raw) if header.superset else eligible
                columns = decode_rows(header, [raw], places[None])
                stored = columns["stored"][0]
                yield columns["ids"][0][stored], columns["codes"][0][stored]
            seen += len(opened.index)

    def _find(self, row_ids: np.ndarray, row_hashes: np.ndarray) -> np.ndarray:
        """Positions [B] in the order of the cache's rows; -1 for padding."""
        at = np.minimum(np.searchsorted(self._ids, row_ids), len(self._ids) - 1)
        real = row_ids >= 0
        unknown = real & (self._ids[at] != row_ids)
        if unknown.any():
            raise ValueError(
                f"row {row_ids[unknown][0]} must be in the cache {self.directory}, got one that is not; it holds "
                f"{self.header.rows} rows. Train on the rows that it was written for, or write one for these."
            )
        other = real & (self._hashes[at] != row_hashes)
        if other.any():
            raise ValueError(
                f"row {row_ids[other][0]} must be what it was when the cache {self.directory} was written, got other "
                "content; the data, its split, its packing or the tokenizer has changed. Set them as they were, or "
                "choose another cache.path and run launch.cache_teacher."
            )
        return np.where(real, self._order[at], -1)

    def _row(self, position: int, row_id: int, eligible: int) -> np.ndarray:
        if position < 0:
            if eligible:
                raise ValueError(
                    f"a row with id {row_id} is padding and must not have eligible positions, got {eligible}."
                )
            return EMPTY
        shard, row = divmod(position, self.header.rows_per_shard)
        if shard in self._gone:
            raise ValueError(
                f"row {row_id} must be in a finished shard, got {shard_name(shard)} of {self.directory}, which is "
                "missing. Run launch.cache_teacher again."
            )
        opened = self.shard(shard)
        stored = int(opened.index["eligible"][row])
        if stored != eligible:
            raise ValueError(
                f"row {row_id} must have the {stored} eligible positions that the cache {self.directory} was written "
                f"for, got {eligible}; which positions are eligible has changed. Write the cache anew."
            )
        return opened.row(row)

    def _local(self, shard: int) -> files.Place:
        file = self.directory / shard_name(shard)
        if self._copies is None:
            return file
        copy = self._copies / shard_name(shard)
        if not copy.exists():
            files.publish(copy, [file.read_bytes()])
        return copy


def _few(shards: Sequence[int]) -> str:
    return ", ".join(map(str, shards[:8])) + (", ..." if len(shards) > 8 else "")
