"""Scores of rows against float64, what they may depend on, and exact numbers of rows kept."""

import dataclasses
import math
import re

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from kdjax.config import Mesh, Samples
from kdjax.curation import SCORES, agreement, keep, make_scorer, overlap
from kdjax.curation.scores import make_score_step
from kdjax.data import heldout_batches, take, to_batch
from kdjax.data.packing import eligible
from kdjax.sharding import Rules, make_rules

# Without a trunk: sums over a row are in float32, so another batch or mesh may add them up in another order, a few
# units in the last place (6e-8 each). Bitwise equality is not promised.
ROUNDING = 1e-6


def score(small, name="student_entropy", rows=None, batch_size=8, rules=Rules(), **samples):
    rows = small.rows if rows is None else rows
    scorer = make_scorer(small.model, small.model, Samples(score=name, **samples), rules, batch_size)
    return scorer(small.student, small.teacher, rows)


# --- values


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_row_means_of_float64(small, name):
    found = score(small, name)
    values = small.oracle(small.student, small.teacher, small.rows)
    assert found.dtype == np.float64
    assert found[small.no_target] == -np.inf
    assert np.isfinite(np.delete(found, small.no_target)).all()
    if SCORES[name].needs:  # an added score fails here until the oracle knows it
        want = [np.mean(row[name]) if len(row[name]) else -np.inf for row in values]
        np.testing.assert_allclose(found, want, rtol=2e-5)
    np.testing.assert_array_equal(found, found.astype(np.float32))


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("positions", [1.0, 0.3])
def test_a_score_does_not_depend_on_batch_order_or_neighbours(small, name, positions):
    samples = Samples(score=name, positions=positions)
    five, nine = (make_scorer(small.model, small.model, samples, batch_size=size) for size in (5, 9))
    want = nine(small.student, small.teacher, small.rows)
    np.testing.assert_allclose(five(small.student, small.teacher, small.rows), want, rtol=ROUNDING)
    for index in (np.random.default_rng(0).permutation(len(small.rows)), np.array([2, 11, 17])):
        found = nine(small.student, small.teacher, take(small.rows, index))
        np.testing.assert_allclose(found, want[index], rtol=ROUNDING)


def test_padding_is_not_looked_at(small):
    rows = small.rows
    noisy = dataclasses.replace(rows, tokens=np.where(rows.segment_ids == 0, 7, rows.tokens))
    assert (noisy.tokens != rows.tokens).any()
    np.testing.assert_array_equal(score(small, rows=noisy), score(small))


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("preset", ["dp", "fsdp"])
def test_eight_devices_score_as_one(small, name, preset):
    rules = make_rules(Mesh(preset))
    model, params = small.bigram_model(rules), (small.student, small.teacher)
    if preset == "fsdp":  # a head that is stored in parts, V = 37 padded to 40 columns
        model = dataclasses.replace(model, head_spec=rules.storage_spec(("embed", "vocab"), (3, 40)))
        params = [p | {"head": jnp.pad(p["head"], ((0, 0), (0, 3)), constant_values=9)} for p in params]
        assert "data" in model.head_spec
    specs = {"table": jax.sharding.PartitionSpec(), "head": model.head_spec}
    placed = [
        {key: jax.device_put(a, jax.NamedSharding(rules.mesh, specs[key])) for key, a in p.items()} for p in params
    ]
    samples = Samples(score=name, positions=0.5, seed=3)
    found = make_scorer(model, model, samples, rules, 16)(*placed, small.rows)
    np.testing.assert_allclose(found, score(small, name, positions=0.5, seed=3), rtol=ROUNDING)


def test_random_scores_are_of_seed_and_row(small):
    many = take(small.rows, np.zeros(4000, int))
    many = dataclasses.replace(many, row_id=np.arange(4000, dtype=np.int32))
    found = score(small, "random", rows=many)
    assert scipy.stats.kstest(found, "uniform").pvalue > 0.01
    other = score(small, "random", rows=many, seed=1)
    assert abs(np.corrcoef(found, other)[0, 1]) < 4 / math.sqrt(4000)


# --- a part of the positions


def copies(rows, row, count):
    """`count` rows with the text of one: what is drawn of each is independent."""
    many = take(rows, np.full(count, row))
    return dataclasses.replace(many, row_id=np.arange(count, dtype=np.int32))


def test_a_part_of_the_positions_estimates_the_mean_without_bias(small):
    row, count = 6, 3000
    values = small.oracle(small.student, small.teacher, small.rows)[row]["student_entropy"]
    n, drawn = len(values), math.ceil(0.25 * (small.rows.tokens.shape[1] - 1))
    assert drawn < n
    found = score(small, rows=copies(small.rows, row, count), positions=0.25, batch_size=500)
    # The mean of a draw without replacement has the variance s^2 / S * (1 - S / n), s^2 with n - 1.
    spread = math.sqrt(np.var(values, ddof=1) / drawn * (1 - drawn / n))
    assert abs(found.mean() - values.mean()) < 4 * spread / math.sqrt(count)
    assert found.std() == pytest.approx(spread, rel=0.1)


def test_rows_with_few_targets_are_scored_in_full(small):
    part, full = score(small, positions=0.25), score(small)
    assert eligible(small.rows)[4].sum() == 2
    assert part[4] == pytest.approx(full[4], rel=ROUNDING)
    long = eligible(small.rows).sum(1) > 6
    assert (np.abs(part[long] - full[long]) > 1e-4).all()


def test_all_positions_by_the_sampled_path_equal_the_full_score(small):
    np.testing.assert_allclose(score(small, positions=0.9999), score(small, positions=1.0), rtol=ROUNDING)


def test_another_seed_draws_other_positions(small):
    assert not np.array_equal(score(small, positions=0.25, seed=0), score(small, positions=0.25, seed=1))


def test_the_head_sees_the_drawn_positions_only(small):
    """Counted in the compiled program: the model has no trunk, so nearly all its work is the head's."""
    batch = to_batch(next(heldout_batches(small.make_rows(16, length=257), 16)))

    def work(positions):
        samples = Samples(positions=positions)
        step = make_score_step(small.model, None, samples, Rules(kernels="reference"))
        return step.lower(small.student, (), batch).compile().cost_analysis()["transcendentals"]

    # One exponential per logit: B * S * V with S = 64 of 257 columns (the full path looks at the last one too).
    assert work(1.0) >= 16 * 257 * 37
    assert work(0.25) / work(1.0) == pytest.approx(64 / 257, rel=0.1)


# --- how it runs


def test_one_compilation_for_all_batches_and_calls(small):
    traces = []

    def hidden(params, batch):
        traces.append(batch.tokens.shape)
        return small.model.hidden(params, batch)

    scorer = make_scorer(dataclasses.replace(small.model, hidden=hidden), None, Samples(), batch_size=4)
    first = scorer(small.student, (), small.rows)
    np.testing.assert_array_equal(scorer(small.student, (), small.rows), first)
    assert traces == [(4, small.rows.tokens.shape[1])]


def test_progress_counts_rows_and_tokens(small):
    seen = []
    scorer = make_scorer(small.model, None, Samples(), batch_size=8)
    scorer(small.student, (), small.rows, lambda done, tokens: seen.append((done, tokens)))
    filled = (small.rows.segment_ids > 0).sum(1)
    assert seen == [(done, filled[:done].sum()) for done in (8, 16, 21)]


def test_scoring_again_keeps_other_rows_and_says_how_many_stay(small):
    scorer = make_scorer(small.model, None, Samples(), batch_size=8)
    first = keep(scorer(small.student, (), small.rows), 0.3)
    again = keep(scorer(small.student, (), small.rows), 0.3)
    np.testing.assert_array_equal(again, first)
    assert overlap(first, again) == 1
    other = keep(scorer(small.make_params(5), (), small.rows), 0.3)
    share = overlap(first, other)
    assert len(other) == len(first) == 6
    assert share == len(set(other.tolist()) & set(first.tolist())) / 6 < 1


# --- refusals


@pytest.mark.parametrize("name", [name for name, entry in SCORES.items() if entry.needs_teacher])
def test_scores_that_need_a_teacher_are_refused_without_one(small, name):
    with pytest.raises(
        ValueError, match=rf"^samples\.score must not need a teacher where none is loaded, got '{name}'\. Set teacher"
    ):
        make_scorer(small.model, None, Samples(score=name))


def test_an_unknown_score_is_refused(small):
    with pytest.raises(
        ValueError, match=r"^samples\.score must be a known name .*, got 'entropy'\. Did you mean 'stud"
    ):
        make_scorer(small.model, None, Samples(score="entropy"))


def test_batches_that_do_not_divide_are_refused(small):
    rules = make_rules(Mesh("dp"))
    with pytest.raises(ValueError, match=r"^batch_size must be a positive multiple of the mesh's 8 devices, got 12;"):
        make_scorer(small.bigram_model(rules), None, Samples(), rules, 12)


def test_scores_that_are_not_finite_are_refused_by_row(small):
    broken = small.student | {"table": small.student["table"].at[:8].set(jnp.nan)}
    hit = np.flatnonzero(((small.rows.tokens < 8) & eligible(small.rows)).any(1))
    assert len(hit) > 5
    shown = ", ".join(map(str, hit[:5])) + f" and {len(hit) - 5} more"
    message = f"samples.score must be finite, got 'student_entropy' that is not in the rows {shown} of the training"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make_scorer(small.model, None, Samples())(broken, (), small.rows)


def test_no_rows_are_refused(small):
    with pytest.raises(ValueError, match=r"^rows must not be empty; there is nothing to score\.$"):
        score(small, rows=take(small.rows, slice(0, 0)))


# --- which rows are kept


@pytest.mark.parametrize(
    ("rows", "fraction", "count"),
    [
        (7, 0.2, 1),
        (10, 0.2, 2),
        (4, 0.2, 1),  # the documented choice: never none, never all
        (1, 0.2, 1),
        (100, 0.29, 29),  # the float product is 28.999999999999996
        (100, 0.07, 7),
        (1000, 0.0025, 2),
        (9, 1.0, 9),
    ],
)
def test_numbers_of_rows(rows, fraction, count):
    scores = np.random.default_rng(0).normal(size=rows)
    kept = keep(scores, fraction)
    np.testing.assert_array_equal(kept, np.sort(np.argsort(-scores)[:count]))
    assert kept.dtype == np.int64


def test_ties_go_to_the_lower_row():
    assert keep(np.zeros(10), 0.3).tolist() == [0, 1, 2]
    assert keep(np.array([1.0, 5, 3, 3, 3]), 0.6).tolist() == [1, 2, 3]


def test_rows_without_a_target_are_never_kept():
    scores = np.array([-np.inf, 2, -np.inf, 1, -np.inf])
    assert keep(scores, 0.6).tolist() == [1, 3]
    assert keep(scores, 1.0).tolist() == [1, 3]
    assert keep(scores, 0.2).tolist() == [1]


@hypothesis.given(
    arrays.arrays(np.float64, st.integers(1, 40), elements=st.integers(-3, 3).map(float)),
    st.integers(1, 100).map(lambda percent: percent / 100),
)
def test_kept_rows_beat_the_others(scores, fraction):
    kept = keep(scores, fraction)
    rest = np.setdiff1d(np.arange(len(scores)), kept)
    assert len(kept) == max(1, round(fraction * 100) * len(scores) // 100)
    assert all((scores[k], -k) > (scores[r], -r) for k in kept for r in rest)


@pytest.mark.parametrize(
    ("scores", "fraction", "message"),
    [
        ([1.0], 0.0, r"^samples\.fraction must be in \(0, 1\], got 0\.0;"),
        ([1.0], 20.0, r"^samples\.fraction must be in \(0, 1\], got 20\.0;"),
        ([1.0, np.nan], 0.5, r"^scores must be numbers, got NaN in 1 of 2 rows\."),
        ([-np.inf, -np.inf], 0.5, r"^scores must be above -inf somewhere, got 2 rows without;"),
    ],
)
def test_what_keep_refuses(scores, fraction, message):
    with pytest.raises(ValueError, match=message):
        keep(np.array(scores), fraction)


def test_overlap_is_the_share_of_the_first():
    assert overlap(np.array([1, 2, 3, 4]), np.array([2, 4, 9])) == 0.5
    assert overlap(np.array([2, 4]), np.array([1, 2, 3, 4])) == 1


def test_agreement_against_scipy():
    rng = np.random.default_rng(0)
    full = np.round(rng.normal(size=200), 1)  # with ties
    estimate = full + rng.normal(scale=0.5, size=200)
    found = agreement(full, estimate, 0.2)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(full, estimate).statistic, abs=1e-12)
    best = [set(np.argsort(-side, kind="stable")[:40].tolist()) for side in (full, estimate)]
    assert found["overlap"] == len(best[0] & best[1]) / 40
    full[7] = estimate[7] = -np.inf
    rest = np.delete(np.arange(200), 7)
    without = scipy.stats.spearmanr(full[rest], estimate[rest]).statistic
    assert agreement(full, estimate, 0.2)["spearman"] == pytest.approx(without, abs=1e-12)
    assert math.isnan(agreement(np.ones(5), np.arange(5.0), 0.2)["spearman"])
