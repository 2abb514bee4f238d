"""What identifies a cache, as header.json, and the rows that it covers, as a file named after their digest."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from kdjax.registry import did_you_mean
from kdjax.teacher.cache.words import MAX_CODE, MAX_VOCAB, word_bytes

FORMAT = 1
HEADER_FILE = "header.json"
ROW = np.dtype([("row_id", "<i8"), ("row_hash", "<u8")])
FREE = ("made",)  # fields that tell where a cache comes from and are not compared


@dataclasses.dataclass(frozen=True)
class Header:
    """Everything that must be equal for two caches to be the same, and `made`, which is not compared.

    teacher, tokenizer: fingerprints. student: of the student that chose the superset, '' without one.
    kind, entries, power, seed: as in config.Classes. tau: the temperature of what is stored.
    dtype: the teacher's compute type. superset: share of a row's positions that is stored at most, 0 = all; 1 without a
    student: those of which the teacher says anything.
    entropy, label_logp: are they stored? rows: how many; rows_digest: `rows_digest` of their ids and hashes, in order.
    Raises ValueError if a field is out of range or two contradict each other.
    """

    teacher: str
    tokenizer: str
    vocab_size: int
    kind: str
    entries: int
    power: float
    seed: int
    tau: float
    dtype: str
    seq_len: int
    superset: float
    student: str
    entropy: bool
    label_logp: bool
    rows: int
    rows_digest: str
    rows_per_shard: int
    format: int = FORMAT
    made: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for field in ("power", "tau", "superset"):  # 1 and 1.0 are the same cache
            object.__setattr__(self, field, float(getattr(self, field)))
        self._require("format", self.format == FORMAT, f"{FORMAT}", "this version of kdjax reads no other")
        self._require("vocab_size", 2 <= self.vocab_size <= MAX_VOCAB, f"in 2..{MAX_VOCAB}", "an id has 24 bits")
        self._require("entries", 1 <= self.entries <= MAX_CODE, f"in 1..{MAX_CODE}", "a count has 16 bits")
        self._require("tau", self.tau > 0, "positive", "logits are divided by it")
        self._require("power", self.power > 0, "positive", "draws are from p^power")
        self._require("superset", 0 <= self.superset <= 1, "in [0, 1]", "it is a fraction, 0 stores all positions")
        named = "a fingerprint" if self.superset else "''"
        good = self.superset == 1 or bool(self.student) == (self.superset > 0)
        self._require("student", good, named, "it chooses the superset")
        for count in ("seq_len", "rows", "rows_per_shard"):
            self._require(count, getattr(self, count) >= 1, "at least 1", "it is a count")

    def _require(self, field: str, good: bool, rule: str, why: str) -> None:
        if not good:
            raise ValueError(f"{field} of a cache must be {rule}, got {getattr(self, field)!r}; {why}.")

    @property
    def counts(self) -> bool:
        """Are codes counts that sum to `entries` at each position?"""
        return self.kind == "sampled" and self.power == 1

    @property
    def fixed_entries(self) -> int:
        """Words per position if they are no counts: one per draw, or the largest entries, of which V are all."""
        return self.entries if self.kind == "sampled" else min(self.entries, self.vocab_size)

    @property
    def word_bytes(self) -> int:
        """Bytes per stored entry, before a row is deflated."""
        return word_bytes(self.vocab_size, self.entries if self.counts else MAX_CODE)

    @property
    def shards(self) -> int:
        """How many shards hold the rows."""
        return -(-self.rows // self.rows_per_shard)

    def rows_in(self, shard: int) -> int:
        """How many rows the shard holds."""
        if not 0 <= shard < self.shards:
            raise ValueError(f"shard must be in 0..{self.shards - 1}, got {shard}.")
        return min(self.rows_per_shard, self.rows - shard * self.rows_per_shard)

    def identity(self) -> bytes:
        """SHA-256 over the fields that are compared; every shard carries it."""
        return hashlib.sha256(json.dumps(compared(self), sort_keys=True).encode()).digest()


def compared(header: Header) -> dict[str, Any]:
    """The fields that identify the cache, by name."""
    return {name: value for name, value in dataclasses.asdict(header).items() if name not in FREE}


def differences(header: Header, wanted: Mapping[str, Any]) -> list[str]:
    """'<field> is <in the cache> in the cache and <wanted> here' for each field that differs."""
    known = compared(header)
    for name in wanted:
        if name not in known:
            raise ValueError(f"a cache's header has no field {name!r} to compare." + did_you_mean(name, known))
    return [
        f"{name} is {known[name]!r} in the cache and {value!r} here"
        for name, value in wanted.items()
        if known[name] != value
    ]


def header_bytes(header: Header) -> bytes:
    """The content of header.json."""
    return (json.dumps(dataclasses.asdict(header) | {"made": dict(header.made)}, indent=1) + "\n").encode()


def parse_header(raw: bytes, file: str) -> Header:
    """The header in the bytes of header.json. Raises ValueError that names `file` if it is none."""
    try:
        values = json.loads(raw)
        if values.get("format") != FORMAT:
            raise ValueError(f"its format is {values.get('format')!r}, this version of kdjax reads {FORMAT}")
        return Header(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} must be the header of a teacher cache; {error}. Delete the cache and run launch.cache_teacher."
        ) from error


def row_table(row_ids: np.ndarray, row_hashes: np.ndarray) -> np.ndarray:
    """ROW [R] from ids [R] and hashes [R]. Raises ValueError if ids repeat or are negative."""
    ids, hashes = np.asarray(row_ids), np.asarray(row_hashes)
    if ids.ndim != 1 or ids.shape != hashes.shape or not len(ids):
        raise ValueError(f"row_ids and row_hashes must be [R] with R >= 1, got {ids.shape} and {hashes.shape}.")
    if ids.dtype.kind not in "iu" or hashes.dtype != np.uint64:
        raise ValueError(f"row_ids must be integers and row_hashes uint64, got {ids.dtype} and {hashes.dtype}.")
    if ids.min() < 0 or len(np.unique(ids)) < len(ids):
        raise ValueError(
            f"row_ids must be distinct and at least 0, got {len(np.unique(ids))} distinct ones among {len(ids)}, the "
            f"least {ids.min()}; a row is found by its id."
        )
    table: np.ndarray = np.empty(len(ids), ROW)
    table["row_id"], table["row_hash"] = ids, hashes
    return table


def rows_digest(row_ids: np.ndarray, row_hashes: np.ndarray) -> str:
    """SHA-256 (hex) over the rows of a cache, in order: (int64 id, uint64 hash) each, little endian."""
    return hashlib.sha256(row_table(row_ids, row_hashes).tobytes()).hexdigest()


def rows_name(header: Header) -> str:
    """The name of the file with the rows: different rows never share one."""
    return f"rows-{header.rows_digest[:16]}.npy"


def table_bytes(table: np.ndarray) -> bytes:
    """The content of the file with the rows, an .npy file."""
    out = io.BytesIO()
    np.save(out, table, allow_pickle=False)
    return out.getvalue()


def parse_table(raw: bytes, header: Header, file: str) -> np.ndarray:
    """ROW [R] from these bytes. Raises ValueError if they are not the rows that the header speaks of."""
    content = raw[-header.rows * ROW.itemsize :]
    if hashlib.sha256(content).hexdigest() == header.rows_digest:
        table = np.frombuffer(content, ROW)
        if raw == table_bytes(table):
            return table
    raise ValueError(
        f"{file} must hold the rows that {HEADER_FILE} beside it speaks of, got other bytes; it is damaged. Delete it "
        "and run launch.cache_teacher again, which writes it anew."
    )
