"""From per-row sums to figures with intervals: the `Evaluation` of a student on held-out rows. NumPy only.

With N eligible positions, all logs natural:
  nll = -1/N sum log p(label)         perplexity = exp(nll)            entropy = 1/N sum H(p)
  accuracy = share of positions whose top token is the label           agreement = share with the teacher's top token
  kl = 1/N sum KL(teacher || student)
  ece = sum over 15 bins of equal width of |sum of confidences - number correct| / N   (confidence: the top token's
        probability). It is biased upwards on few tokens: a calibrated model has a little more than 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kdjax.evals.accuracy import Accuracy
from kdjax.evals.bootstrap import RESAMPLES, Sums, percentile_interval, resample_counts

BINS = 15
LARGEST_EXPONENT = 700.0  # exp of more than this is no float; a perplexity of 1e304 says enough


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The reliability diagram: per bin, how many positions, their sum of confidences, how many are correct."""

    count: tuple[float, ...]
    confidence: tuple[float, ...]
    correct: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Figures:
    """What is measured of one model against the true next tokens. nll, entropy in nats."""

    nll: Estimate
    perplexity: Estimate
    accuracy: Estimate
    ece: Estimate
    entropy: Estimate
    calibration: Calibration


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out figures of a student, and of its teacher if there was one. kl in nats, agreement a fraction."""

    tokens: int  # eligible positions
    rows: int  # rows with at least one of them
    student: Figures
    teacher: Figures | None = None
    kl: Estimate | None = None
    agreement: Estimate | None = None
    answers: Accuracy | None = None  # the student's answers to held-out prompts

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; a number that is not finite becomes None."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Evaluation:
        """The inverse of `to_dict`; other fields of the record (step, which, ...) are ignored."""
        teacher, kl, agreement = (record.get(name) for name in ("teacher", "kl", "agreement"))
        return cls(
            tokens=int(record["tokens"]),
            rows=int(record["rows"]),
            student=_figures(record["student"]),
            teacher=None if teacher is None else _figures(teacher),
            kl=None if kl is None else _estimate(kl),
            agreement=None if agreement is None else _estimate(agreement),
            answers=None if record.get("answers") is None else _answers(record["answers"]),
        )


def summarise(rows: Sums, *, resamples: int = RESAMPLES, seed: int = 0) -> Evaluation:
    """The evaluation that per-row sums add up to.

    rows: "count" [N]; for each model m of student, teacher: "m_nll", "m_correct", "m_entropy" [N] and
    "m_bins" [N, 15, 3] (count, sum of confidences, correct); with a teacher also "kl" and "agreement" [N].
    Rows without an eligible position (padding) take no part. Raises ValueError if no row has one.
    """
    rows = {name: np.asarray(value, np.float64) for name, value in rows.items()}
    real = rows["count"] > 0
    if not real.any():
        raise ValueError(
            f"held-out rows must have at least one target, got {len(real)} rows without any; nothing can be measured. "
            "Set data.heldout_fraction or eval.rows higher, or check that the answers are not masked out."
        )
    rows = {name: value[real] for name, value in rows.items()}
    counts = resample_counts(int(real.sum()), resamples=resamples, seed=seed)

    def mean_of(name: str) -> Estimate:
        return Estimate(*percentile_interval(lambda sums: sums[name] / sums["count"], rows, counts))

    def model(name: str) -> Figures:
        nll, bins = mean_of(f"{name}_nll"), rows[f"{name}_bins"].sum(0)
        return Figures(
            nll=nll,
            perplexity=Estimate(*(math.exp(min(v, LARGEST_EXPONENT)) for v in dataclasses.astuple(nll))),
            accuracy=mean_of(f"{name}_correct"),
            ece=Estimate(
                *percentile_interval(lambda sums: calibration_error(sums[f"{name}_bins"]), rows, counts, unbias=True)
            ),
            entropy=mean_of(f"{name}_entropy"),
            calibration=Calibration(*(tuple(column) for column in bins.T.tolist())),
        )

    paired = "kl" in rows
    return Evaluation(
        tokens=round(float(rows["count"].sum())),
        rows=int(real.sum()),
        student=model("student"),
        teacher=model("teacher") if paired else None,
        kl=mean_of("kl") if paired else None,
        agreement=mean_of("agreement") if paired else None,
    )


def calibration_error(bins: np.ndarray) -> np.ndarray:
    """ECE of bins [..., 15, 3] (count, sum of confidences, correct): sum |confidence - correct| / sum count, [...]."""
    gap = np.abs(bins[..., 1] - bins[..., 2]).sum(-1)
    return gap / bins[..., 0].sum(-1)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _estimate(record: Mapping[str, Any]) -> Estimate:
    return Estimate(*(_number(record[field.name]) for field in dataclasses.fields(Estimate)))


def _answers(record: Mapping[str, Any]) -> Accuracy:
    right, wrong, undecided = (int(record[name]) for name in ("right", "wrong", "undecided"))
    return Accuracy(right, wrong, undecided, *(_number(record[name]) for name in ("value", "low", "high")))


def _figures(record: Mapping[str, Any]) -> Figures:
    bins = Calibration(**{name: tuple(map(float, values)) for name, values in record["calibration"].items()})
    names = (field.name for field in dataclasses.fields(Figures) if field.name != "calibration")
    return Figures(**{name: _estimate(record[name]) for name in names}, calibration=bins)
