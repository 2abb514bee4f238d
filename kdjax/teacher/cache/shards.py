"""The file of a shard: a head, an index of its rows, their bytes. All numbers are little endian.

  head   magic (8 bytes), version, shard number, rows (uint32 each), bytes behind the head (uint64), the cache's
         identity (32 bytes), SHA-256 of all bytes behind the head (32), CRC-32 of the head so far and of the index
  index  per row: end of its bytes in the body, its eligible positions, CRC-32 of its bytes (uint32 each)
  body   one row after the other, each a deflate stream of its own (RFC 1951, no zlib or gzip around it) that inflates
         to the bytes of `records.py`

Who opens a shard checks head, index and size; who reads a row checks that row, each time (0.4 ms per MB), and inflates
it (8 ms per MB). So a damaged byte is found whenever it is read, and a large cache is open at once. `Shard.verify`
reads it whole (0.8 ms per MB).
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import zlib
from collections.abc import Sequence

import numpy as np

from kdjax.teacher.cache.files import Place, is_local

MAGIC, VERSION = b"KDJAXSHD", 1
HEAD = struct.Struct("<8sIIIQ32s32s")
CRC = struct.Struct("<I")
HEAD_BYTES = HEAD.size + CRC.size
INDEX = np.dtype([("end", "<u4"), ("eligible", "<u4"), ("crc", "<u4")])
MAX_BODY = (1 << 32) - 1

RAW_DEFLATE = -zlib.MAX_WBITS  # how zlib is told that a stream has no header and no checksum; the index has one
# Runs of one byte are looked for (an id drawn many times, a plane of zeros), other repeats are not: ids hardly ever
# repeat as a sequence, and what the search finds by chance costs more than it saves.
LEVEL, STRATEGY = 6, zlib.Z_RLE


def shard_name(shard: int) -> str:
    """The file's name."""
    return f"shard-{shard:06d}.kdc"


def deflate(parts: Sequence[bytes]) -> bytes:
    """The stream of a row: a block per part (more for a long one), for each has its own frequencies of bytes.

    Which bytes these are is up to the zlib at hand; what they inflate to is not.
    """
    stream = zlib.compressobj(LEVEL, zlib.DEFLATED, RAW_DEFLATE, zlib.DEF_MEM_LEVEL, STRATEGY)
    blocks = [stream.compress(part) + stream.flush(zlib.Z_BLOCK) for part in parts]
    return b"".join([*blocks, stream.flush()])


def pack_shard(shard: int, identity: bytes, rows: Sequence[bytes], eligible: Sequence[int]) -> bytes:
    """The file of a shard from the streams of its rows and their numbers of eligible positions.

    Raises ValueError if it is larger than its offsets can say.
    """
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    if ends[-1] > MAX_BODY:
        raise ValueError(
            f"cache.rows_per_shard must give shards of less than 4 GiB, got {ends[-1]} bytes in {len(rows)} rows; "
            "offsets have 32 bits. Lower it."
        )
    index: np.ndarray = np.empty(len(rows), INDEX)
    index["end"], index["eligible"], index["crc"] = ends, eligible, [zlib.crc32(row) for row in rows]
    behind = index.tobytes() + b"".join(rows)
    head = HEAD.pack(MAGIC, VERSION, shard, len(rows), len(behind), identity, hashlib.sha256(behind).digest())
    return head + CRC.pack(zlib.crc32(index.tobytes(), zlib.crc32(head))) + behind


@dataclasses.dataclass(frozen=True, eq=False)
class Shard:
    """An open shard. raw: uint8, the whole file, mapped if it is local; index: INDEX [rows]; body: uint8."""

    file: Place
    raw: np.ndarray
    index: np.ndarray
    body: np.ndarray

    def row(self, row: int) -> np.ndarray:
        """uint8: the bytes of a row, inflated. Raises ValueError if they are damaged."""
        start = int(self.index["end"][row - 1]) if row else 0
        found = self.body[start : int(self.index["end"][row])]
        if zlib.crc32(found.data) != self.index["crc"][row]:
            raise ValueError(damaged(self.file, f"the checksum of its row {row} is wrong"))
        try:
            return np.frombuffer(zlib.decompress(found.data, RAW_DEFLATE), np.uint8)
        except zlib.error as error:
            raise ValueError(damaged(self.file, f"its row {row} is no deflate stream: {error}")) from error

    def says(self, rows: Sequence[bytes], eligible: Sequence[int]) -> bool:
        """Does it hold rows of these bytes (not deflated) with these numbers of eligible positions?"""
        if self.index["eligible"].tolist() != list(eligible):
            return False
        return all(self.row(row).tobytes() == wanted for row, wanted in enumerate(rows))

    def verify(self) -> None:
        """Read it whole. Raises ValueError if a byte is not what was written."""
        digest = HEAD.unpack_from(self.raw.data)[-1]
        if hashlib.sha256(self.raw[HEAD_BYTES:].data).digest() != digest:
            raise ValueError(damaged(self.file, "its SHA-256 is wrong"))


def open_shard(file: Place, shard: int, rows: int, identity: bytes) -> Shard:
    """Map the file (a remote one is read whole) and check head, index and size.

    Raises ValueError that names it if it is truncated, damaged, of another number or of another cache.
    """
    raw = _bytes_of(file)
    if len(raw) < HEAD_BYTES:
        raise ValueError(damaged(file, f"it is truncated: {len(raw)} bytes, its head alone has {HEAD_BYTES}"))
    magic, version, number, count, behind, owner, _ = HEAD.unpack_from(raw.data)
    if magic != MAGIC or version != VERSION:
        raise ValueError(damaged(file, f"it begins with {magic!r}, version {version}, and not {MAGIC!r}, {VERSION}"))
    if len(raw) != HEAD_BYTES + behind:
        kind = "truncated" if len(raw) < HEAD_BYTES + behind else "too long"
        raise ValueError(damaged(file, f"it is {kind}: {len(raw)} bytes of {HEAD_BYTES + behind}"))
    split = HEAD_BYTES + count * INDEX.itemsize
    crc = zlib.crc32(raw[HEAD_BYTES:split].data, zlib.crc32(raw[: HEAD.size].data))
    if split > len(raw) or CRC.unpack_from(raw.data, HEAD.size)[0] != crc:
        raise ValueError(damaged(file, "the checksum of its head is wrong"))
    if number != shard or count != rows:
        raise ValueError(
            damaged(file, f"it is shard {number} with {count} rows, and not shard {shard} with {rows}", "misplaced")
        )
    if owner != identity:
        raise ValueError(damaged(file, "its head names another cache", "another cache's"))
    index = raw[HEAD_BYTES:split].view(INDEX)
    return Shard(file, raw, index, raw[split:])


def damaged(file: Place, why: str, what: str = "damaged") -> str:
    """The message about a shard that cannot be used."""
    return f"{file} is {what}: {why}. Delete it and run launch.cache_teacher again; only this shard is written anew."


def _bytes_of(file: Place) -> np.ndarray:
    if not is_local(file):
        return np.frombuffer(file.read_bytes(), np.uint8)
    if not file.stat().st_size:  # cannot be mapped
        return np.zeros(0, np.uint8)
    return np.asarray(np.memmap(file, np.uint8, "r"))
