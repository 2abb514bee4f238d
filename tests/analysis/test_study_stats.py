"""Means over seeds, paired differences and verdicts against scipy; the tables made of them by hand."""

import math
import re

import numpy as np
import pytest
import scipy.stats

from kdjax.analysis import study_table
from kdjax.analysis.study_stats import BETTER, NONE_SEEN, UNKNOWN, WORSE, Mean, mean, paired, ratio, t_quantile, verdict

NAN = math.nan


@pytest.mark.parametrize("df", [*range(1, 31), 57, 100, 1001])
@pytest.mark.parametrize("level", [0.95, 0.5, 0.999])
def test_quantiles_of_students_t(df, level):
    assert t_quantile(df, level) == pytest.approx(scipy.stats.t.ppf((1 + level) / 2, df), rel=1e-9)


def test_a_sample_of_one_has_no_t():
    with pytest.raises(ValueError, match=r"^df must be at least 1, got 0\.$"):
        t_quantile(0)


def test_the_interval_of_a_mean():
    values = np.random.default_rng(0).normal(300, 20, 7)
    found = mean(values.tolist())
    low, high = scipy.stats.t.interval(0.95, 6, loc=values.mean(), scale=scipy.stats.sem(values))
    assert (found.n, found.value) == (7, pytest.approx(values.mean()))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_few_values():
    assert mean([]).n == 0
    assert math.isnan(mean([]).value)
    one = mean([3.0, NAN])
    assert (one.n, one.value) == (1, 3.0)
    assert math.isnan(one.low)


def test_a_paired_difference_is_the_t_test_of_pairs():
    rng = np.random.default_rng(1)
    base = rng.normal(300, 50, 5)
    arm = base - rng.normal(4, 2, 5)
    found = paired(dict(enumerate(arm)), dict(enumerate(base)) | {9: 1e6})  # a seed that has no pair counts for nothing
    interval = scipy.stats.ttest_rel(arm, base).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert found.n == 5
    assert verdict(found, lower_is_better=True) == BETTER
    # The spread between seeds hides it from the means alone.
    assert mean(arm.tolist()).low < base.mean() < mean(arm.tolist()).high


def test_ratios_pair_by_seed_too():
    found = ratio({0: 3.0, 1: 8.0, 2: 1.0}, {0: 10.0, 1: 20.0, 3: 5.0})
    assert (found.n, found.value) == (2, pytest.approx(0.35))
    assert ratio({0: 1.0}, {0: 0.0}).n == 0


@pytest.mark.parametrize(
    ("low", "high", "lower", "said"),
    [
        (-3.0, -1.0, True, BETTER),
        (-3.0, -1.0, False, WORSE),
        (1.0, 3.0, True, WORSE),
        (1.0, 3.0, False, BETTER),
        (-1.0, 3.0, True, NONE_SEEN),
        (0.0, 3.0, True, NONE_SEEN),
        (NAN, NAN, True, UNKNOWN),
        (-2.0, -2.0, True, UNKNOWN),
    ],
)
def test_verdicts(low, high, lower, said):
    assert verdict(Mean(3, (low + high) / 2, low, high), lower) == said


# --- tables

FIGURES = {"perplexity": 300.0, "kl": 2.5, "agreement": 0.25, "accuracy": 0.15, "ece": 0.05, "nll": 5.7}


def record(name, seed, seconds, preparation=0.0, attempts=1, whole=200.0, **figures):
    cells = {
        key: {"value": value, "low": 0.9 * value, "high": 1.1 * value} for key, value in (FIGURES | figures).items()
    }
    costs = {
        "steps": 100,
        "tokens_covered": 51200 * (1 + 3 * name.endswith("@time")),
        "tokens_of_text": 51200,
        "tokens_trained": 51200,
        "targets_supervised": 50000,
        "seconds_per_step": seconds / 100,
        "preparation_seconds": preparation,
        "steps_seconds": seconds,
        "total_seconds": preparation + seconds,
        "whole_seconds": whole,
        "processor_seconds": whole,
        "resident_bytes": 2**30,
        "temporary_bytes": 2**29,
        "argument_bytes": None,
        "cache_bytes": 512000 if preparation else None,
    }
    phase = {"seconds": whole, "processor_seconds": whole, "resident_bytes": 2**30, "attempts": attempts}
    arm, timed = name.removesuffix("@time"), name.endswith("@time")
    curve = [{"step": 0, "perplexity": 1e6}, {"step": 100, "perplexity": cells["perplexity"]["value"]}]
    teacher = {"perplexity": {"value": 26.4, "low": 20.0, "high": 30.0}}
    said = {"arm": arm, "name": name, "seed": seed, "timed": timed, "figures": cells, "teacher": teacher}
    said |= {"hardware": "2 CPU cores" if seed < 5 else "4 CPU cores", "versions": {}}
    return said | {"heldout_tokens": 4000, "costs": costs, "phases": {"train": phase}, "curve": curve}


def three_seeds():
    records = []
    for seed, (dense, better) in enumerate([(300.0, 290.0), (310.0, 301.0), (305.0, 294.0)]):
        nll = {"nll": 5.7 + seed / 10}
        records.append(record("dense", seed, 150.0, perplexity=dense, **nll))
        records.append(
            record("se_kd", seed, 60.0, preparation=30.0, perplexity=better, agreement=0.2 + seed / 10, **nll)
        )
        records.append(record("se_kd@time", seed, 120.0, preparation=30.0, perplexity=better - 50, **nll))
    return records


def cells(text, line):
    """The cells of every line that begins with `line`."""
    found = [row.strip("|").split("|") for row in text.splitlines() if row.startswith(f"| {line} ")]
    return [[cell.strip() for cell in row][1:] for row in found]


def test_the_tables_by_hand():
    arms = study_table.summarise(three_seeds(), "dense")
    text = study_table.text(
        "Study x", arms, "dense", three_seeds()[0]["teacher"], ["rs_kd/0: not started"], ["A note."]
    )
    # perplexity: differences -10, -9, -11: mean -10, sd 1, t(2) = 4.3027, half = 2.484
    means, differences, *_ = cells(text, "se_kd")
    assert means[:2] == ["3", "295.0 [281.2, 308.8]"]
    assert differences[:2] == ["3", "-10.0 [-12.5, -7.5] better"]
    # agreement: differences -0.05, 0.05, 0.15
    assert differences[3] == "+0.050 [-0.198, +0.298] no difference seen"
    assert differences[2] == "+0.000 [+0.000, +0.000] cannot say"
    timed = cells(text, "se_kd@time")
    assert timed[1][:2] == ["3", "-60.0 [-62.5, -57.5] better"]
    assert cells(text, "(teacher)")[0][:3] == ["", "26.4", "-"]
    assert cells(text, "work / dense") == [["1", "0.60 [0.60, 0.60]"], ["1", "1.00 [1.00, 1.00]"]]
    assert cells(text, "steps / dense") == [["1", "0.40 [0.40, 0.40]"], ["1", "0.80 [0.80, 0.80]"]]
    assert cells(text, "cache, bytes per token of the text") == [["-", "10.00"]] * 2
    assert cells(text, "temporary, MiB") == [["512", "512"]] * 2
    assert not cells(text, "arguments, MiB"), "nothing is known of it"
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Study x",
        "## Equal tokens",
        "## Equal time",
    ]
    assert text.endswith("A note.\n\nNot there:\n- rs_kd/0: not started\n")


def test_markdown_is_aligned():
    lines = study_table.markdown([["a", "b"], ["long name", "1"], ["x", "123456"]]).splitlines()
    assert lines[1] == "| --------- | -----: |"
    assert len({len(line) for line in lines}) == 1
    assert study_table.markdown([]) == ""


def test_one_seed_says_nothing_about_differences():
    records = [found for found in three_seeds() if found["seed"] == 0]
    text = study_table.text("Study x", study_table.summarise(records, "dense"), "dense", None, [], [])
    means, differences, *_ = cells(text, "se_kd")
    assert means[:2] == ["1", "290.0"]
    assert differences[1] == "-10.0 cannot say"
    assert not re.search(r"-10\.0.*(better|worse)", text)


def test_without_the_reference_there_are_no_differences():
    records = [found for found in three_seeds() if found["name"] == "se_kd"]
    text = study_table.text("Study x", study_table.summarise(records, "dense"), "dense", None, ["dense/0: gone"], [])
    assert len(cells(text, "se_kd")) == 1
    assert cells(text, "work / dense") == []


def test_notes_on_what_says_less_than_it_seems():
    assert study_table.notes_on(three_seeds()) == ["Hardware: 2 CPU cores."]
    (mixed,) = study_table.notes_on([record("dense", 0, 1.0), record("se_kd", 6, 1.0)])
    assert mixed == "Run on different machines, so that times do not compare: 2 CPU cores; 4 CPU cores."
    records = [record("dense", seed, 1.0, attempts=1 + seed, whole=None if seed else 3.0) for seed in (0, 1)]
    _, same, lost, again = study_table.notes_on(records)
    assert same.startswith("All seeds of dense gave the same figures")
    assert lost == "Killed and gone on with, so without a time of the whole command: dense/1 train."
    assert again == "Took more than one attempt, of which the time is the sum: dense/1 train."


@pytest.mark.parametrize(
    ("value", "text"), [(1234.6, "1,235"), (99.96, "100"), (12.34, "12.3"), (0.01234, "0.0123"), (0.0, "0")]
)
def test_three_significant_digits(value, text):
    assert study_table.significant(value) == text


def test_huge_perplexities_are_in_powers_of_ten():
    assert study_table.decimal(9.4e5, 1) == "9.4e+05"
    assert study_table.with_interval(mean([9e5, 9e5 + 1]), 1).startswith("9e+05 [")
