"""Small caches for tests: records that look like a teacher's, and a second, plain reader of the format."""

import dataclasses
import itertools
import struct
import zlib

import numpy as np

from kdjax.teacher.cache import Header, RowRecord, create_or_open, open_cache, rows_digest


def row_keys(count, first=100):
    """Ids that are no positions, in no order, and hashes that fill 64 bits."""
    rng = np.random.default_rng(count)
    return rng.permutation(count).astype(np.int32) * 3 + first, rng.integers(0, 2**64, count, np.uint64)


def make_header(keys, **changes):
    ids, hashes = keys
    fields = {
        "teacher": "3f",
        "tokenizer": "7c",
        "vocab_size": 1000,
        "kind": "sampled",
        "entries": 50,
        "power": 1.0,
        "seed": 0,
        "tau": 1.0,
        "dtype": "float32",
        "seq_len": 16,
        "superset": 0.0,
        "student": "",
        "entropy": True,
        "label_logp": True,
        "rows": len(ids),
        "rows_digest": rows_digest(ids, hashes),
        "rows_per_shard": 4,
    }
    return Header(**(fields | changes))


def drawn(rng, n, vocab_size, entries):
    """ids [n, K], codes [n, K] of N draws per position from Zipf-like teachers, from nearly certain to nearly flat."""
    ids, codes = np.zeros((n, entries), np.int32), np.zeros((n, entries), np.uint16)
    ranks = np.arange(1, vocab_size + 1.0)
    cumulative = [np.cumsum(ranks**-power) / np.sum(ranks**-power) for power in (1.1, 1.3, 1.6, 2.0, 3.0, 5.0)]
    for at in range(n):
        picked = np.searchsorted(cumulative[rng.integers(len(cumulative))], rng.random(entries))
        # An odd step that shares no factor with most sizes spreads the likely ids over the vocabulary.
        found, counts = np.unique((picked.clip(max=vocab_size - 1) * 7919 + at) % vocab_size, return_counts=True)
        ids[at, : len(found)], codes[at, : len(found)] = found, counts
    return ids, codes


def text_like(rng, n, vocab_size, entries):
    """As `drawn`, but tokens that are likely in general have low ids, as where a tokenizer's merges made them."""
    ids, codes = np.zeros((n, entries), np.int32), np.zeros((n, entries), np.uint16)
    cumulative = np.cumsum(1 / (np.arange(vocab_size) + 2.7))
    for at in range(n):
        likely = np.searchsorted(cumulative, rng.random(200) * cumulative[-1])  # here, from the most likely on
        share = np.arange(1, 201.0) ** -rng.choice([1.0, 1.2, 1.5, 2.0, 3.0])
        found, counts = np.unique(rng.choice(likely, entries, p=share / share.sum()), return_counts=True)
        ids[at, : len(found)], codes[at, : len(found)] = found, counts
    return ids, codes


def weighted(rng, n, vocab_size, entries):
    """`entries` ids per position with 16-bit codes; the same id may be there twice."""
    ids = rng.integers(0, vocab_size, (n, entries)).astype(np.int32)
    return ids, rng.integers(1, 65536, (n, entries)).astype(np.uint16)


def make_row(header, rng, eligible):
    """The record of a row with these eligible places [T]."""
    places = np.flatnonzero(eligible).astype(np.int32)
    if header.superset:
        kept = rng.random(len(places)) < header.superset
        places = places[kept] if kept.any() else places[:1]
    n = len(places)
    make = drawn if header.counts else weighted
    ids, codes = make(rng, n, header.vocab_size, header.entries if header.counts else header.fixed_entries)
    return RowRecord(
        ids=ids,
        codes=codes,
        eligible=int(eligible.sum()),
        entropy=(rng.random(n) * np.log(header.vocab_size)).astype(np.float32) if header.entropy else None,
        label_logp=(-rng.exponential(3, n)).astype(np.float32) if header.label_logp else None,
        places=places if header.superset else None,
    )


@dataclasses.dataclass
class Problem:
    """A cache to be: keys (ids, hashes), eligible [R, T] and a record per row, in the order of the cache."""

    header: Header
    keys: tuple
    eligible: np.ndarray
    records: list

    def open(self, path, **changes):
        return create_or_open(path, dataclasses.replace(self.header, **changes), *self.keys)

    def write(self, path, shards=None):
        writer = self.open(path)
        for shard in range(self.header.shards) if shards is None else shards:
            writer.write(shard, [self.records[at] for at in writer.rows(shard)])
        return writer

    def wanted(self, at):
        """What a reader is to hand out for the row at this place of the order: entries first, zeros behind."""
        record, eligible = self.records[at], self.eligible[at]
        places = np.flatnonzero(eligible) if record.places is None else record.places
        ids, codes = np.zeros((2, len(eligible), self.header.entries), int)
        for n, place in enumerate(places):
            kept = [(i, c) for i, c in zip(record.ids[n].tolist(), record.codes[n].tolist(), strict=True) if c]
            for slot, (i, c) in enumerate(kept):
                ids[place, slot], codes[place, slot] = i, c
        stored = np.zeros(len(eligible), bool)
        stored[places] = True
        out = {"ids": ids, "codes": codes, "stored": stored}
        for name in ("entropy", "label_logp"):
            if getattr(record, name) is not None:
                out[name] = np.zeros(len(eligible))
                out[name][places] = getattr(record, name)
        return out


def make_problem(rows=10, seed=0, **changes):
    rng = np.random.default_rng(seed)
    keys = row_keys(rows)
    header = make_header(keys, **changes)
    eligible = rng.random((rows, header.seq_len)) < 0.8
    eligible[:, -1] = False
    eligible[rows // 2] = False  # a row without any eligible position
    return Problem(header, keys, eligible, [make_row(header, rng, row) for row in eligible])


def streams(file):
    """The deflate streams of a shard's rows."""
    raw = file.read_bytes()
    (rows,) = struct.unpack_from("<I", raw, 16)
    ends = [0, *(struct.unpack_from("<I", raw, 96 + 12 * r)[0] for r in range(rows))]
    return [raw[96 + 12 * rows :][start:end] for start, end in itertools.pairwise(ends)]


def parse_shard(raw, header):
    """The shard's number, and per row: stored places or None, entropy bytes, label bytes, a position's [(id, code)]."""
    magic, version, number, rows, behind, _, _, _ = struct.unpack("<8sIIIQ32s32sI", raw[:96])
    assert (magic, version, behind) == (b"KDJAXSHD", 1, len(raw) - 96)
    index = [struct.unpack("<III", raw[96 + 12 * r : 108 + 12 * r]) for r in range(rows)]
    body = raw[96 + 12 * rows :]
    size = 3 if header.vocab_size <= 2**18 and header.counts and header.entries <= 63 else 5
    bits = 18 if size == 3 else 24
    per_position = header.entries if header.kind == "sampled" else min(header.entries, header.vocab_size)
    out, start = [], 0
    for end, eligible, _ in index:
        stream = zlib.decompressobj(wbits=-15)
        blob, start = stream.decompress(body[start:end]), end
        assert (stream.eof, stream.unused_data) == (True, b"")
        places = None
        n = eligible
        if header.superset and blob:
            bitmap, blob = blob[: -(-header.seq_len // 8)], blob[-(-header.seq_len // 8) :]
            places = [t for t in range(header.seq_len) if bitmap[t // 8] >> (t % 8) & 1]
            n = len(places)
        entropy = blob[:n] if header.entropy else None
        blob = blob[n if header.entropy else 0 :]
        labels = blob[: 2 * n] if header.label_logp else None
        blob = blob[2 * n if header.label_logp else 0 :]
        assert len(blob) % size == 0
        many = len(blob) // size
        words = [sum(blob[plane * many + at] << 8 * plane for plane in range(size)) for at in range(many)]
        entries = iter([(word & (1 << bits) - 1, word >> bits) for word in words])
        positions = []
        for _ in range(n):
            position, token = [], 0
            while sum(c for _, c in position) < header.entries if header.counts else len(position) < per_position:
                step, code = next(entries)
                token = (token + step) % 2**bits
                position.append((token, code))
            positions.append(position)
        assert next(entries, None) is None
        out.append((places, entropy, labels, positions))
    return number, out


def contents(path):
    """Name -> (bytes, time of the last change) of all files."""
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()}


def shard_files(path):
    return sorted(file.name for file in path.glob("shard-*"))


def assert_whole(path, problem):
    """Every row can be read, and its counts are right."""
    columns = open_cache(path).columns(*problem.keys, problem.eligible)
    np.testing.assert_array_equal(
        columns["codes"], np.stack([problem.wanted(at)["codes"] for at in range(len(problem.records))])
    )
