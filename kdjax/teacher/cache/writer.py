"""Writing a cache: shard by shard, in any order, by any number of processes, again and again until it is whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from kdjax.teacher.cache import files
from kdjax.teacher.cache.header import (
    HEADER_FILE,
    Header,
    compared,
    differences,
    header_bytes,
    parse_header,
    parse_table,
    row_table,
    rows_name,
    table_bytes,
)
from kdjax.teacher.cache.records import RowRecord, encode_row
from kdjax.teacher.cache.shards import Shard, deflate, open_shard, pack_shard, shard_name


def create_or_open(
    path: str | os.PathLike[str], header: Header, row_ids: np.ndarray, row_hashes: np.ndarray
) -> CacheWriter:
    """The writer of the cache at `path`, begun now or before; row_ids [R], row_hashes uint64 [R] in their order.

    Temporary files that killed writers left behind are removed. Any number of processes may call this at once.
    Raises ValueError if another cache is there, naming every field that differs; OSError if the disk is full.
    """
    table = row_table(row_ids, row_hashes)
    found = hashlib.sha256(table.tobytes()).hexdigest()
    if header.rows != len(table) or header.rows_digest != found:
        raise ValueError(
            f"header.rows and header.rows_digest must be those of the rows, got {header.rows} and "
            f"{header.rows_digest!r} for {len(table)} rows with {found!r}."
        )
    directory = files.locate(path)
    directory.mkdir(parents=True, exist_ok=True)
    names = files.names_in(directory)
    if HEADER_FILE not in names:
        strangers = sorted(name for name in names if name.startswith("shard-") and not name.endswith(files.TEMPORARY))
        if strangers and not (directory / HEADER_FILE).exists():  # it may have come this very moment
            raise ValueError(
                f"{directory} must hold a whole cache or none, got {len(strangers)} shards without {HEADER_FILE}; "
                "whose they are cannot be told. Delete them or choose another cache.path."
            )
        files.publish(directory / rows_name(header), [table_bytes(table)])  # where a header is, its rows are
        files.publish(directory / HEADER_FILE, [header_bytes(header)])
    there = parse_header((directory / HEADER_FILE).read_bytes(), str(directory / HEADER_FILE))
    different = differences(there, compared(header))
    if different:
        raise ValueError(
            f"{directory} holds another cache: {'; '.join(different)}. Set what differs as it was, or choose another "
            "cache.path, or delete the directory."
        )
    rows_file = directory / rows_name(there)
    files.publish(rows_file, [table_bytes(table)])  # unless it is there
    parse_table(rows_file.read_bytes(), there, str(rows_file))
    files.clean(directory)
    return CacheWriter(directory, there, table)


class CacheWriter:
    """The shards of one cache that are there, that are missing, and how to add one.

    header: as it is on the disk. damaged: shard -> why, of the files that `missing` found to be no valid shards.
    """

    def __init__(self, directory: files.Place, header: Header, table: np.ndarray) -> None:
        self.directory = directory
        self.header = header
        self.damaged: dict[int, str] = {}
        self._table = table
        self._identity = header.identity()

    def missing(self, process_index: int = 0, process_count: int = 1, *, verify: bool = True) -> list[int]:
        """The shards of this process that have no valid file yet, ascending. Shard s is process s % count's.

        What a process is to write does not depend on how far the others are, so they may start at different times.
        verify: read the files that are there whole and check their SHA-256 (0.8 ms per MB), not head and size only.
        """
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index must be in 0..{process_count - 1}, got {process_index}.")
        names = files.names_in(self.directory)
        out = []
        for shard in range(process_index, self.header.shards, process_count):
            if shard_name(shard) not in names:
                out.append(shard)
            elif why := self._why_damaged(shard, verify):
                self.damaged[shard] = why
                out.append(shard)
        return out

    def rows(self, shard: int) -> np.ndarray:
        """int64: the positions, in the order of the cache's rows, of those that belong to the shard."""
        first = shard * self.header.rows_per_shard
        return np.arange(first, first + self.header.rows_in(shard))

    def write(self, shard: int, records: Sequence[RowRecord]) -> int:
        """Write the shard from the records of its rows, in the order of `rows`; returns the size of its file in bytes.

        The file appears whole or not at all, and a damaged one is replaced. A valid one that is there already stays;
        it must say the same, in other bytes if its writer had another zlib.
        Raises ValueError if a record does not fit the header or two writers disagree, OSError if the disk is full.
        """
        rows = self.rows(shard)
        if len(records) != len(rows):
            raise ValueError(f"shard {shard} must get {len(rows)} records, got {len(records)}.")
        encoded = [
            encode_row(self.header, record, row_id)
            for record, row_id in zip(records, self._table["row_id"][rows].tolist(), strict=True)
        ]
        eligible = [record.eligible for record in records]
        content = pack_shard(shard, self._identity, list(map(deflate, encoded)), eligible)
        target = self.directory / shard_name(shard)
        if not files.publish(target, [content]):
            if self._why_damaged(shard, verify=True):
                files.publish(target, [content], replace=True)
            elif target.read_bytes() != content and not self._open(shard).says(list(map(b"".join, encoded)), eligible):
                raise ValueError(
                    f"{target} must be the same whoever writes it, got other rows from two writers; one of them runs "
                    "other code, weights, data or devices. Find out which, delete the file, and run one of them again."
                )
        self.damaged.pop(shard, None)
        return len(content)

    def _open(self, shard: int) -> Shard:
        return open_shard(self.directory / shard_name(shard), shard, self.header.rows_in(shard), self._identity)

    def _why_damaged(self, shard: int, verify: bool) -> str:
        try:
            opened = self._open(shard)
            if verify:
                opened.verify()
        except ValueError as error:
            return str(error)
        return ""
