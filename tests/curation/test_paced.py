"""Weights from pass rates: the edge cases of the reference, the rivals, and the file."""

import functools
import json

import numpy as np
import pytest

from kdjax import config
from kdjax.curation import batches, paced
from kdjax.curation.paced import WEIGHTS, load_weights, weigh, write_weights
from kdjax.curation.pass_rates import ESTIMATORS, PassRates, write_lines

Settings = functools.partial(config.PassRates, weight="paced")


def rates(right, tried, undecided=None, truncated=None, ids=None):
    right = np.array(right)
    tried = np.full(len(right), tried) if np.isscalar(tried) else np.array(tried)
    none = np.zeros(len(right), np.int64)
    ids = tuple(ids or map(str, range(len(right))))
    undecided, truncated = (none if c is None else np.array(c) for c in (undecided, truncated))
    return PassRates(ids, right, tried, undecided, truncated, {}, (0,))


EIGHTHS = rates(range(9), 8)


def raw(of, **settings):
    return weigh([of], Settings(normalise="none", **settings)).weight


# --- each weight


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("uniform", np.ones(9)),
        ("easy", np.arange(9) / 8),
        ("hard", 1 - np.arange(9) / 8),
        ("variance", np.sqrt(np.arange(9) * (8 - np.arange(9))) / 8),
        ("hard_filter", np.isin(np.arange(9), [2, 3, 4, 5, 6])),
        ("bayes", (np.arange(9) + 1) * (9 - np.arange(9)) / 110),
    ],
)
def test_rivals_of_k_of_8(name, want):
    np.testing.assert_allclose(raw(EIGHTHS, weight=name), want, rtol=1e-12)


def test_bayes_is_the_posterior_mean_of_the_kernel():
    p = (np.arange(40000) + 0.5) / 40000
    found = raw(EIGHTHS, weight="bayes", alpha=1.5, beta=2.0, prior=1.5)
    for k, weight in enumerate(found):
        density = p ** (k + 0.5) * (1 - p) ** (8 - k + 0.5)
        np.testing.assert_allclose(weight, np.sum(p**1.5 * (1 - p) ** 2 * density) / np.sum(density), rtol=1e-6)
    with pytest.raises(ValueError, match=r"pass_rates\.estimator must be 'raw' with pass_rates\.weight='bayes'"):
        raw(EIGHTHS, weight="bayes", estimator="laplace")


def test_exponents_of_0_switch_a_side_off():
    np.testing.assert_array_equal(raw(EIGHTHS, alpha=0.0), 1 - np.arange(9) / 8)
    np.testing.assert_array_equal(raw(EIGHTHS, beta=0.0), np.arange(9) / 8)
    np.testing.assert_array_equal(raw(EIGHTHS, alpha=0.0, beta=0.0), 1)


def test_shuffled_weights_are_those_of_other_problems():
    of = rates(np.arange(60) % 9, 8)
    want = weigh([of], Settings())
    found = weigh([of], Settings(weight="shuffled", seed=3))
    np.testing.assert_allclose(np.sort(found.weight), np.sort(want.weight))
    assert (found.weight != want.weight).mean() > 0.5
    assert abs(np.corrcoef(found.weight, want.weight)[0, 1]) < 0.35
    np.testing.assert_array_equal(weigh([of], Settings(weight="shuffled", seed=3)).weight, found.weight)
    assert (weigh([of], Settings(weight="shuffled", seed=4)).weight != found.weight).any()
    order = np.random.default_rng(0).permutation(60)
    other = rates(of.right[order], 8, ids=[str(i) for i in order])
    assert weigh([other], Settings(weight="shuffled", seed=3)).by_id() == found.by_id(), "whatever the order"


def test_a_weight_of_a_smoothed_rate():
    np.testing.assert_allclose(
        raw(EIGHTHS, estimator="laplace"), (np.arange(9) + 1) * (9 - np.arange(9)) / 100, rtol=1e-12
    )
    kept = raw(rates([1, 2], [8, 8]), weight="hard_filter", estimator="laplace")
    np.testing.assert_array_equal(kept, [0, 1])  # 2 of 10 is not above 1/5


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_weight_of_every_estimate(name, estimator):
    """Finite, not negative, mean 1 over what is kept, and a problem's weight has nothing to do with its place."""
    rng = np.random.default_rng(0)
    right = rng.integers(0, 9, (2, 40))
    settings = Settings(weight=name, estimator=estimator)

    def rounds(order):
        return [rates(k[order], 8, ids=[str(i) for i in order]) for k in right]

    if name == "bayes" and estimator != "raw":
        with pytest.raises(ValueError, match="the prior would count twice"):
            weigh(rounds(np.arange(40)), settings)
        return
    found = weigh(rounds(np.arange(40)), settings)
    assert np.isfinite(found.weight).all()
    assert (found.weight >= 0).all()
    assert found.weight[found.weight > 0].mean() == pytest.approx(1)
    other = weigh(rounds(rng.permutation(40)), settings).by_id()
    assert {name: pytest.approx(weight) for name, weight in found.by_id().items()} == other


# --- edge cases of the reference, section 4


@pytest.mark.parametrize("name", ["paced", "hard_filter", "shuffled", "variance"])
def test_nothing_left_is_an_error_with_counts_or_uniform(name):
    of = rates([0, 0, 8, 0], [8, 8, 8, 0], undecided=[0, 0, 0, 8])
    message = (
        rf"pass_rates\.weight='{name}' must leave problems to train on, got none of 4: 2 are never solved, 1 always, 1 "
        r"could not be judged\. Raise generation\.samples, set prompts\.path .* or pass_rates\.fallback='uniform'\."
    )
    with pytest.raises(ValueError, match=message):
        weigh([of], Settings(weight=name))
    found = weigh([of], Settings(weight=name, fallback="uniform"))
    np.testing.assert_array_equal(found.weight, [1, 1, 1, 0])
    assert "all weigh the same (pass_rates.fallback): 2 are never solved" in found.notes[0]
    with pytest.raises(ValueError, match="must leave problems"):
        weigh([rates([0, 0], 0)], Settings(weight=name))
    np.testing.assert_array_equal(weigh([rates([0], 0)], Settings(weight=name, fallback="uniform")).weight, [1])


def test_one_answer_is_refused_two_are_a_filter_and_three_are_few():
    with pytest.raises(ValueError, match=r"generation\.samples must be at least 2 with .*, got 1 answer per problem"):
        weigh([rates([0, 1], 1)], Settings())
    np.testing.assert_array_equal(raw(rates([0, 1], 1), beta=0.0), [0, 1])
    two = weigh([rates([0, 1, 2], 2)], Settings(normalise="none"))
    np.testing.assert_array_equal(two.weight, [0, 0.25, 0])
    for tried, few in [(3, True), (4, False)]:
        notes = weigh([rates([1, 2], tried)], Settings()).notes
        assert any("with fewer than 4 there are hardly any weights between" in note for note in notes) == few


def test_unequal_numbers_of_answers_are_weighed_without_bias():
    of = rates([2, 2, 1, 3], [8, 4, 3, 5])
    np.testing.assert_allclose(raw(of), [2 * 6 / 56, 2 * 2 / 12, 1 * 2 / 6, 3 * 2 / 20], rtol=1e-12)
    np.testing.assert_allclose(
        raw(of, beta=2.0), [2 * 6 * 5 / 336, 2 * 2 * 1 / 24, 1 * 2 * 1 / 6, 3 * 2 * 1 / 60], rtol=1e-12
    )
    np.testing.assert_array_equal(raw(rates([1, 1, 1], [8, 1, 2]), beta=2.0), [7 * 6 / 336, 0, 0])
    message = r"pass_rates\.alpha and beta must be integers where problems have 3 to 8 answers, got 0\.5 and 1\.0"
    with pytest.raises(ValueError, match=message):
        raw(of, alpha=0.5)
    np.testing.assert_allclose(raw(rates([2, 2], 4), alpha=0.5), 0.5**1.5, rtol=1e-12)


@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (1, 2), (2, 1), (0, 2), (3, 1)])
@pytest.mark.parametrize("tried", [4, 7])
def test_the_mean_of_the_unbiased_weight_is_the_kernel_of_the_true_rate(alpha, beta, tried):
    from math import comb

    k = np.arange(tried + 1)
    found = paced.unbiased(k.astype(float), np.full(tried + 1, float(tried)), alpha, beta)
    for p in (0.05, 0.3, 0.9):
        law = np.array([comb(tried, i) * p**i * (1 - p) ** (tried - i) for i in k])
        np.testing.assert_allclose(np.sum(law * found), p**alpha * (1 - p) ** beta, rtol=1e-12)


def test_negative_exponents_are_refused():
    for name in ("alpha", "beta"):
        wanted = config.default_config()
        wanted.pass_rates[name] = -0.5
        with pytest.raises(ValueError, match=rf"pass_rates\.{name} must be at least 0, got -0\.5"):
            config.from_config_dict(wanted)


def test_what_could_not_be_judged_has_no_weight_except_under_uniform():
    of = rates([0, 4], [0, 8], undecided=[8, 0])
    for name in set(WEIGHTS) - {"uniform"}:
        np.testing.assert_array_equal(weigh([of], Settings(weight=name)).weight, [0, 1])
    np.testing.assert_array_equal(weigh([of], Settings(weight="uniform")).weight, [1, 1])
    found = weigh([of], Settings(estimator="laplace")).weight
    np.testing.assert_array_equal(found, [0, 1])


def test_a_weight_that_is_not_known():
    with pytest.raises(ValueError, match=r"pass_rates\.weight must be a known name .*Did you mean 'paced'\?"):
        weigh([EIGHTHS], Settings(weight="pace"))


# --- normalisation, batches, order


@pytest.mark.parametrize("mode", ["dataset_mean", "batch_mean", "sample"])
def test_what_is_trained_on_has_mean_1(mode):
    found = weigh([EIGHTHS], Settings(normalise=mode)).weight
    kept = found[found > 0]
    np.testing.assert_allclose(kept.mean(), 1, rtol=1e-12)
    np.testing.assert_allclose(found, raw(EIGHTHS) / raw(EIGHTHS)[1:8].mean(), rtol=1e-12)


def test_the_mean_of_a_batch_leaves_out_rows_that_only_fill_it():
    found = batches.batch_mean(np.array([1.0, 3.0, 9.0]), np.array([True, True, False]))
    np.testing.assert_allclose(found, [0.5, 1.5, 0])
    np.testing.assert_array_equal(batches.batch_mean(np.zeros(3), np.ones(3, bool)), 0)
    np.testing.assert_array_equal(batches.batch_mean(np.ones(2), np.zeros(2, bool)), 0)
    weight, loss = np.array([1.0, 3.0]), np.array([5.0, 7.0])
    whole = batches.batch_mean(weight, np.ones(2, bool))
    np.testing.assert_allclose(np.mean(whole * loss), np.sum(weight * loss) / np.sum(weight))


def test_the_curriculum_begins_with_what_is_easy():
    order = batches.easiest_first(np.array([1.0, 8, 0, 4, 1]), np.array([8.0, 8, 0, 8, 8]))
    assert order.tolist() == [1, 3, 0, 4, 2]
    shares = [batches.paced_fraction(step, 100) for step in (0, 25, 50, 99)]
    np.testing.assert_allclose(shares, [0.3, 0.65, 1, 1])


# --- what it comes to


def test_the_summary_counts_and_the_table_says_it():
    of = rates([0, 1, 4, 8, 0], [8, 8, 8, 8, 0], undecided=[0, 0, 0, 0, 8], truncated=[4, 0, 0, 0, 8])
    found = weigh([of], Settings())
    said = found.summary
    assert [said[name] for name in ("problems", "judged", "never_solved", "always_solved", "kept")] == [5, 4, 1, 1, 2]
    assert said["kept_fraction"] == 0.4
    assert said["mean_raw_weight"] == pytest.approx((7 / 64 + 16 / 64) / 4)
    assert said["answers"] == {"right": 13, "tried": 32, "undecided": 8, "truncated": 12}
    lines = {line["rate"]: line for line in said["histogram"]}
    assert list(lines) == [*(f"{k}/8" for k in range(9)), "unjudged"]
    assert lines["0/8"] == {"rate": "0/8", "problems": 1, "truncated": 0.5, "weight": 0.0}
    assert lines["unjudged"] == {"rate": "unjudged", "problems": 1, "truncated": 1.0, "weight": 0.0}
    assert lines["4/8"]["weight"] == pytest.approx(found.weight[2])
    assert sum(line["problems"] for line in lines.values()) == 5
    text = paced.table(said)
    assert len(text) == 1 + 10 + 3
    assert text[1].split() == ["0/8", "1", "50.0%", "0.000"]
    assert text[-3] == "kept 2 of 5 problems (40.0%): 1 are never solved, 1 always"
    assert text[-2] == "weight 'paced' of the estimator 'raw', normalise 'dataset_mean' (mean over: kept)"
    json.dumps(said, allow_nan=False)


def test_the_histogram_of_unequal_numbers_of_answers_has_tenths():
    of = rates([0, 1, 1, 9, 10, 3, 7], [3, 10, 11, 10, 10, 10, 9])
    lines = {line["rate"]: line["problems"] for line in paced.histogram(of, np.ones(7))}
    assert len(lines) == 12
    assert {name: n for name, n in lines.items() if n} == {
        "0": 1, "0.0-0.1": 1, "0.1-0.2": 1, "0.3-0.4": 1, "0.7-0.8": 1, "0.9-1.0": 1, "1": 1,
    }  # fmt: skip


def test_the_file_comes_back(tmp_path):
    of = rates([0, 2, 4], 8)
    want = weigh([of], Settings())
    manifest = write_weights(tmp_path, want, {"pass_rates": "abc"})
    lines = [json.loads(line) for line in (tmp_path / "weights.jsonl").read_text().splitlines()]
    assert lines[0] == {"id": "0", "right": 0, "tried": 8, "weight": 0.0}
    assert lines[1] == {"id": "1", "right": 2, "tried": 8, "weight": want.weight[1]}
    assert (manifest["basis"], manifest["normalise"]) == ({"pass_rates": "abc"}, "dataset_mean")
    assert manifest["summary"] == want.summary
    back = load_weights(tmp_path)
    assert back.by_id() == want.by_id() == dict(zip("012", want.weight, strict=True))
    assert (back.ids, back.normalise, back.summary, back.notes) == (
        want.ids,
        want.normalise,
        json.loads(json.dumps(want.summary)),
        want.notes,
    )


@pytest.mark.parametrize("weight", [-1.0, 0.0, None])
def test_files_that_hold_no_weights(tmp_path, weight):
    line = {"id": "a", "right": 1, "tried": 2, "weight": weight}
    write_lines(tmp_path, "weights", [line], {"normalise": "none", "summary": {}, "notes": []})
    with pytest.raises(ValueError, match=r"weights(\.jsonl)? must"):
        load_weights(tmp_path)
