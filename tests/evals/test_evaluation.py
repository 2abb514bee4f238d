"""Figures from per-row sums: bootstrap, calibration error, JSON."""

import dataclasses
import json
import math

import numpy as np
import pytest

from kdjax.evals.bootstrap import percentile_interval, resample_counts
from kdjax.evals.evaluation import BINS, Evaluation, calibration_error, summarise


def make_rows(rng, rows=40, tokens=50, teacher=True):
    """Per-row sums of a made-up model whose top token is right with exactly its stated probability."""
    count = rng.integers(1, tokens, rows).astype(float)
    made = {"count": count, "kl": count * rng.gamma(2, 1, rows), "agreement": rng.binomial(count.astype(int), 0.4)}
    for model in ("student", "teacher"):
        bins = np.zeros((rows, BINS, 3))
        for row, n in enumerate(count.astype(int)):
            confidence = rng.beta(1.2, 2, n)
            at = np.minimum((confidence * BINS).astype(int), BINS - 1)
            np.add.at(bins[row], at, np.stack([np.ones(n), confidence, rng.random(n) < confidence], 1))
        made[f"{model}_bins"] = bins
        made[f"{model}_nll"] = count * rng.normal(3, 0.4, rows)
        made[f"{model}_entropy"] = count * rng.normal(2, 0.4, rows)
        made[f"{model}_correct"] = bins[:, :, 2].sum(1)
    return made if teacher else {k: v for k, v in made.items() if k not in ("kl", "agreement") and "teacher" not in k}


def test_values_are_sums_over_counts():
    rows = make_rows(np.random.default_rng(0))
    found = summarise(rows)
    tokens = rows["count"].sum()
    assert (found.tokens, found.rows) == (tokens, 40)
    assert found.kl.value == pytest.approx(rows["kl"].sum() / tokens)
    assert found.student.nll.value == pytest.approx(rows["student_nll"].sum() / tokens)
    for end in ("value", "low", "high"):
        nll, perplexity = (getattr(getattr(found.teacher, name), end) for name in ("nll", "perplexity"))
        assert perplexity == pytest.approx(math.exp(nll))
    assert sum(found.student.calibration.count) == tokens


def test_padding_rows_do_not_count():
    rows = make_rows(np.random.default_rng(1))
    padded = {name: np.concatenate([np.zeros_like(value[:3]), value]) for name, value in rows.items()}
    assert summarise(padded) == summarise(rows)


def test_student_alone():
    found = summarise(make_rows(np.random.default_rng(2), teacher=False))
    assert found.teacher is found.kl is found.agreement is None
    assert Evaluation.from_dict(found.to_dict()) == found


def test_nothing_to_measure_is_an_error():
    rows = {name: value * 0 for name, value in make_rows(np.random.default_rng(3), rows=2).items()}
    with pytest.raises(
        ValueError, match=r"held-out rows must have at least one target, got 2 rows without any; .* Set data"
    ):
        summarise(rows)


def test_seeded():
    rows = make_rows(np.random.default_rng(4))
    assert summarise(rows) == summarise(rows)
    assert summarise(rows).kl != summarise(rows, seed=1).kl


def test_json_round_trip():
    found = summarise(make_rows(np.random.default_rng(5)), resamples=50)
    record = {"step": 3, "which": "student", **json.loads(json.dumps(found.to_dict(), allow_nan=False))}
    assert Evaluation.from_dict(record) == found
    broken = dataclasses.replace(found, kl=dataclasses.replace(found.kl, value=math.nan, high=math.inf))
    record = json.loads(json.dumps(broken.to_dict(), allow_nan=False))
    assert record["kl"]["value"] is record["kl"]["high"] is None
    assert math.isnan(Evaluation.from_dict(record).kl.value)


def test_a_diverged_model_gives_nan_and_no_error():
    rows = make_rows(np.random.default_rng(6), rows=3)
    rows["student_nll"][1] = np.nan
    rows["teacher_nll"] = rows["count"] * 1e5
    found = summarise(rows, resamples=20)
    assert math.isnan(found.student.perplexity.value)
    assert found.teacher.perplexity.value > 1e300
    assert math.isfinite(found.kl.high)


def test_resample_counts_are_draws_with_replacement():
    counts = resample_counts(30, resamples=4000, seed=0)
    assert counts.shape == (4000, 30)
    np.testing.assert_array_equal(counts.sum(1), 30)
    np.testing.assert_allclose(counts.mean(0), 1, atol=0.08)
    np.testing.assert_allclose(counts.var(0), 29 / 30, atol=0.12)  # binomial(30, 1/30)


def test_interval_is_the_percentiles_of_resampled_means():
    rng = np.random.default_rng(7)
    rows = {"sum": rng.normal(5, 2, 25), "count": rng.integers(1, 9, 25).astype(float)}
    counts = resample_counts(25, resamples=300, seed=3)
    drawn = [np.repeat(np.arange(25), line.astype(int)) for line in counts]  # one resample at a time, row by row
    means = [rows["sum"][index].sum() / rows["count"][index].sum() for index in drawn]
    value, low, high = percentile_interval(lambda sums: sums["sum"] / sums["count"], rows, counts)
    assert value == pytest.approx(rows["sum"].sum() / rows["count"].sum())
    np.testing.assert_allclose([low, high], np.percentile(means, [2.5, 97.5]))


def test_interval_covers_the_truth_at_its_level():
    rng, inside = np.random.default_rng(8), 0
    counts = resample_counts(40, resamples=400)
    for _ in range(300):
        rows = {"sum": rng.gamma(2, 1.5, 40)}  # mean 3
        _, low, high = percentile_interval(lambda sums: sums["sum"] / 40, rows, counts)
        inside += low <= 3 <= high
    assert 0.89 <= inside / 300 <= 0.98


def test_calibration_error_by_hand():
    bins = np.zeros((BINS, 3))
    bins[4], bins[10], bins[14] = (10, 3.0, 5), (20, 14.0, 11), (10, 9.8, 9.8)
    twice = np.stack([bins, 3 * bins])
    np.testing.assert_allclose(calibration_error(twice), (2 + 3 + 0) / 40)


def test_calibration_error_of_a_calibrated_and_of_a_sure_model():
    rng = np.random.default_rng(9)
    calibrated = summarise(make_rows(rng, rows=200, tokens=400), resamples=200).student.ece
    assert calibrated.value < 0.02
    assert 0 <= calibrated.low <= calibrated.value <= calibrated.high < 0.03
    sure = make_rows(rng)
    sure["student_bins"] = np.zeros_like(sure["student_bins"])
    sure["student_bins"][:, -1] = np.stack([sure["count"], 0.99 * sure["count"], np.zeros(40)], 1)
    assert summarise(sure).student.ece.value == pytest.approx(0.99)
