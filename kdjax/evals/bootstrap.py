"""Percentile bootstrap over rows, for figures that are functions of sums. NumPy only.

A row of the batch (one window of text) is the unit that is drawn, because tokens of one window are not independent.
Documents that were cut over several rows still tie these together, so the intervals are a little too narrow there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Sums = Mapping[str, np.ndarray]
RESAMPLES = 1000


def resample_counts(rows: int, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each row is drawn in each resample: float64 [resamples, rows], every line sums to `rows`."""
    drawn = np.random.default_rng(seed).integers(rows, size=(resamples, rows))
    flat = drawn + rows * np.arange(resamples)[:, None]
    return np.bincount(flat.ravel(), minlength=resamples * rows).reshape(resamples, rows).astype(np.float64)


def percentile_interval(
    figure: Callable[[Sums], np.ndarray], rows: Sums, counts: np.ndarray, level: float = 0.95, *, unbias: bool = False
) -> tuple[float, float, float]:
    """(value, low, high) of `figure`, a function of sums over rows, at confidence `level`.

    rows: name -> [N] or [N, ...] per-row sums. counts: [R, N] of `resample_counts`. `figure` gets the summed arrays
    with one leading axis (1 for the data itself, R for the resamples) and returns one number per entry of that axis.
    unbias: for a figure >= 0 that resampling makes larger (a sum of absolute values): move the percentiles down by the
    difference between the mean of the resamples and the value, not below 0.
    """
    one = np.ones((1, counts.shape[1]))
    value = figure(_sums(rows, one))[0]
    tail = 50 * (1 - level)
    drawn = figure(_sums(rows, counts))
    low, high = np.percentile(drawn, [tail, 100 - tail])
    if unbias:
        low, high = np.maximum(np.array([low, high]) - (drawn.mean() - value), 0.0)
    return float(value), float(low), float(high)


def _sums(rows: Sums, counts: np.ndarray) -> dict[str, np.ndarray]:
    return {name: np.tensordot(counts, np.asarray(row, np.float64), 1) for name, row in rows.items()}
