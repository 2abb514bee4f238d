"""What a cache, whole or not, holds and takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kdjax.teacher.cache import files
from kdjax.teacher.cache.header import HEADER_FILE, rows_name
from kdjax.teacher.cache.records import stored_places

if TYPE_CHECKING:
    from kdjax.teacher.cache.reader import CacheReader

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def summarise(reader: CacheReader, sample: int) -> dict[str, Any]:
    """See CacheReader.summary."""
    header = reader.header
    totals = {"rows": 0, "eligible": 0, "positions": 0, "data": 0, "offsets": 0}
    for shard in reader.present:
        opened = reader.shard(shard)
        totals["rows"] += len(opened.index)
        totals["eligible"] += int(opened.index["eligible"].sum())
        totals["data"] += opened.body.nbytes
        totals["offsets"] += opened.raw.nbytes - opened.body.nbytes
        if header.superset:
            rows = map(opened.row, range(len(opened.index)))
            totals["positions"] += sum(int(stored_places(header, row).sum()) for row in rows)
    if not header.superset:
        totals["positions"] = totals["eligible"]
    histogram, sampled = np.zeros(header.entries + 1, np.int64), 0
    for ids, codes in reader.sample(sample):
        histogram += _distinct(ids, codes)
        sampled += 1
    return _figures(reader, totals, histogram, sampled)


def _figures(reader: CacheReader, totals: dict[str, int], histogram: np.ndarray, sampled: int) -> dict[str, Any]:
    positions, kept = int(histogram.sum()), totals["data"] + totals["offsets"]
    return {
        "shards": reader.header.shards,
        "missing_shards": len(reader.missing),
        "rows": totals["rows"],
        "eligible": totals["eligible"],
        "positions": totals["positions"],
        "bytes": {
            "data": totals["data"],
            "offsets": totals["offsets"],
            "headers": sum(files.size_of(reader.directory / name) for name in (HEADER_FILE, rows_name(reader.header))),
        },
        "bytes_per_position": kept / totals["positions"] if totals["positions"] else None,
        "bytes_per_eligible": kept / totals["eligible"] if totals["eligible"] else None,
        "distinct": {
            "rows": sampled,
            "positions": positions,
            "mean": float(histogram @ np.arange(len(histogram)) / positions) if positions else None,
            "quantiles": {str(q): _quantile(histogram, q) for q in QUANTILES} if positions else {},
            "histogram": histogram.tolist(),
        },
    }


def _distinct(ids: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """int64 [K + 1]: how many of the positions [n, K] have 0, 1, ... different ids."""
    ids = np.sort(np.pad(np.where(codes > 0, ids, -1), ((0, 0), (1, 0)), constant_values=-1), 1)
    return np.bincount((np.diff(ids, axis=1) > 0).sum(1), minlength=ids.shape[1])


def _quantile(histogram: np.ndarray, q: float) -> int:
    """The least number of ids that at least a share q of the positions do not exceed."""
    below = np.cumsum(histogram)
    return int(np.searchsorted(below, q * below[-1]))
