"""The offline teacher: what it said at every position, written once, read at training speed. numpy only, no jax.

A cache is a directory, local or on whatever etils.epath opens: header.json (what it was made from), rows-*.npy (ids
and hashes of its rows, in order), shard-000000.kdc, ... (`shards.py`: the file, whose rows are deflated one by one;
`records.py`: a row's bytes; `words.py`: its entries). The room knows ids and codes, not what they mean;
`types.CachedTeacher` and teacher/classes.py say that.

Writing:
  rows_digest(row_ids, row_hashes) -> str               for the header
  create_or_open(path, Header(...), row_ids, row_hashes) -> CacheWriter
    .missing(process_index, process_count) -> shards    that this process has still to write
    .rows(shard) -> positions in row_ids                .write(shard, [RowRecord(...), ...]) -> bytes of its file
Reading:
  open_cache(path, expect={"teacher": ..., ...}) -> CacheReader
    .columns(row_ids, row_hashes, eligible) -> the fields of types.CachedTeacher
    .summary() -> what it holds and takes               .verify() reads all of it and checks every byte

Promises: a file is there whole or not at all; finished shards are never written again; the bytes depend on the records
and the build of zlib alone; another cache's header, a truncated file or a damaged byte is a ValueError, a full disk an
OSError, that says what to do.

Before a row is deflated, a position of counts has 3 bytes per distinct id (5 if V > 2^18 or N > 63), 1 for the entropy,
2 for the label's log-probability; a row takes 12 bytes more, a shard 96. Deflated it is a little more than half: 50
draws of SmolLM2-135M on plain prose, V = 49152, rows of 512, have 18.8 distinct ids a position, so 57.5 bytes, and
take 32.5. A batch of 8 such rows is read in 2.8 ms of one core.
"""

from kdjax.teacher.cache.header import Header, rows_digest
from kdjax.teacher.cache.reader import CacheReader, open_cache
from kdjax.teacher.cache.records import RowRecord
from kdjax.teacher.cache.writer import CacheWriter, create_or_open

__all__ = ["CacheReader", "CacheWriter", "Header", "RowRecord", "create_or_open", "open_cache", "rows_digest"]
