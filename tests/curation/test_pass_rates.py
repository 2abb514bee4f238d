"""Pass rates: what is counted, what is merged, what is refused, and what is believed of a rate."""

import json

import numpy as np
import pytest

from kdjax.config import PassRates as Settings
from kdjax.curation import pass_rates as module
from kdjax.curation.pass_rates import PassRates, count, estimate, load_pass_rates, merge, write_pass_rates
from kdjax.generation.store import Rollout

BASIS = {"student": "a" * 64, "sampling": {"temperature": 1.0, "top_p": 1.0}, "verifier": "numeric"}
LETTER = {"r": "right", "w": "wrong", "?": "undecided", "u": "undecided"}


def rolled(answers):
    """{"a": "rw?"} -> rollouts and verdicts; upper case = cut off, "u" so and undecided, "f" = failed."""
    rollouts, verdicts = [], {}
    for name, letters in answers.items():
        for sample, letter in enumerate(letters):
            finish = "failed" if letter == "f" else "length" if letter in "RWu" else "stop"
            rollouts.append(Rollout(name, sample, "", finish))
            if letter != "f":
                verdicts[name, sample] = LETTER[letter.lower()]
    return rollouts, verdicts


def rates_of(answers, seed=0, basis=BASIS):
    return count(list(answers), *rolled(answers), basis, seed)


def columns(rates):
    return [getattr(rates, name).tolist() for name in module.COUNTS]


def test_right_wrong_undecided_truncated_and_failed_answers():
    rates = rates_of({"a": "rrww", "b": "r??w", "c": "????", "d": "WRwf", "e": "ffff", "f": "u?r"})
    assert rates.ids == ("a", "b", "c", "d", "e", "f")
    assert columns(rates) == [[2, 1, 0, 1, 0, 1], [4, 2, 0, 3, 0, 2], [0, 2, 4, 0, 0, 1], [0, 0, 0, 2, 0, 1]]


def test_a_prompt_without_answers_is_listed_and_the_order_of_the_rollouts_does_not_matter():
    rollouts, verdicts = rolled({"a": "rw", "c": "ww"})
    for order in (rollouts, rollouts[::-1]):
        rates = count(list("abc"), order, verdicts, BASIS, 0)
        assert columns(rates)[:2] == [[1, 0, 0], [2, 0, 2]]


@pytest.mark.parametrize(
    ("answers", "change", "why"),
    [
        ({"x": "r"}, lambda r, v: (r, v), r"got 'x' sample 0; no such prompt"),
        ({"a": "rr"}, lambda r, v: (r, {("a", 0): "right"}), r"got 'a' sample 1; no verdict"),
        ({"a": "rr"}, lambda r, v: (r + r[:1], v), r"got 'a' sample 0; it is there twice"),
    ],
)
def test_answers_that_cannot_be_counted(answers, change, why):
    with pytest.raises(ValueError, match=rf"rollouts must be answers to the prompts, .*{why}\. Run launch\.curate"):
        count(["a"], *change(*rolled(answers)), BASIS, 0)


# --- several runs


def test_runs_of_other_seeds_add_up():
    first, second, third = (
        rates_of({"a": a, "b": b}, seed) for seed, a, b in [(3, "rw", "WW"), (1, "r?", "rr"), (2, "", "r")]
    )
    both = merge([first, second])
    assert both.seeds == (1, 3)
    assert columns(both) == [[2, 2], [3, 4], [1, 0], [0, 2]]
    for left, right in [(merge([both, third]), merge([first, merge([third, second])])), (merge([first]), first)]:
        assert columns(left) == columns(right)
        assert left.seeds == right.seeds
    assert columns(first) == [[1, 0], [2, 2], [0, 0], [0, 2]], "the parts are as they were"


def test_runs_of_something_else_are_refused_by_name():
    changed = {"student": "b" * 64, "sampling": {"temperature": 0.7, "top_p": 1.0}}
    message = (
        r"got others: sampling\.temperature is 0\.7 there and 1\.0 here; student is b{12} there and a{12} here; "
        r"verifier is None there and 'numeric' here\."
    )
    with pytest.raises(ValueError, match=message):
        merge([rates_of({"a": "r"}), rates_of({"a": "r"}, 1, changed)])
    with pytest.raises(ValueError, match=r"got others: the problems are not the same"):
        merge([rates_of({"a": "r"}), rates_of({"b": "r"}, 1)])
    with pytest.raises(ValueError, match=r"got generation\.seed=0 in two of them; equal seeds give equal answers"):
        merge([rates_of({"a": "r"}), rates_of({"a": "w"})])
    with pytest.raises(ValueError, match=r"runs must not be empty"):
        merge([])


# --- the file


def test_the_file_says_the_integers_and_comes_back(tmp_path):
    rates = rates_of({"a": "rWw?", "c": "r"}, 7)
    manifest = write_pass_rates(tmp_path, rates, {"at": "noon"})
    assert [json.loads(line) for line in (tmp_path / "pass_rates.jsonl").read_text().splitlines()] == [
        {"id": "a", "right": 1, "tried": 3, "undecided": 1, "truncated": 1},
        {"id": "c", "right": 1, "tried": 1, "undecided": 0, "truncated": 0},
    ]
    assert json.loads((tmp_path / "pass_rates.manifest.json").read_text()) == manifest
    assert (manifest["basis"], manifest["seeds"], manifest["lines"]) == (BASIS, [7], 2)
    back = load_pass_rates(tmp_path)
    assert (back.ids, back.basis, back.seeds) == (rates.ids, rates.basis, rates.seeds)
    assert columns(back) == columns(rates)


def damage_lines(folder):
    (folder / "pass_rates.jsonl").write_text("{}\n")


def damage_manifest(folder):
    (folder / "pass_rates.manifest.json").write_text('{"format": 9}')


def remove_manifest(folder):
    (folder / "pass_rates.manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_lines, r"a damaged one; the SHA-256 of pass_rates\.jsonl is not the one in pass_rates\.manifest\.json"),
        (damage_manifest, r"a damaged one; its format is 9, this version reads 1"),
        (remove_manifest, r"must hold pass_rates\.jsonl and pass_rates\.manifest\.json, got no such files"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path, damage, message):
    write_pass_rates(tmp_path, rates_of({"a": "r"}))
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_pass_rates(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"id": "a", "right": 3, "tried": 2, "undecided": 0, "truncated": 0},
            r"right must be in 0\.\.tried, got 3 of 2",
        ),
        ({"id": "a", "right": 3}, r"must hold pass rates, got other lines; KeyError\('tried'\)"),
    ],
)
def test_lines_that_are_no_pass_rates(tmp_path, line, message):
    module.write_lines(tmp_path, "pass_rates", [line], {"basis": {}, "seeds": [0]})
    with pytest.raises(ValueError, match=message):
        load_pass_rates(tmp_path)


def test_a_full_disk_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"pass_rates\.jsonl could not be written to .*Free disk space"):
        write_pass_rates(tmp_path / "file", rates_of({"a": "r"}))


# --- estimators


def of_counts(right, tried):
    none = np.zeros(len(right), np.int64)
    ids = tuple(map(str, range(len(right))))
    return PassRates(ids, np.array(right), np.array(tried), none, none, {}, (0,))


def test_estimators():
    rounds = [of_counts([8, 0, 4, 0], [8, 8, 8, 0]), of_counts([2, 0, 0, 0], [8, 8, 0, 0])]

    def believed(name, **settings):
        return [side.tolist() for side in estimate(rounds, Settings(estimator=name, **settings))]

    assert believed("raw") == [[2, 0, 0, 0], [8, 8, 0, 0]], "the newest round, in integers"
    assert believed("laplace") == [[3, 1, 0, 0], [10, 10, 0, 0]], "nothing is believed of what was not tried"
    assert believed("laplace", prior=0.5) == [[2.5, 0.5, 0, 0], [9, 9, 0, 0]]
    # (((1 g + 8) g) + 2) of (((2 g + 8) g) + 8)
    assert believed("discounted", discount=0.5) == [[6.25, 0.25, 2.25, 0], [12.5, 12.5, 4.5, 0]]
    assert believed("discounted", discount=1.0) == [[11, 1, 5, 0], [18, 18, 10, 0]], "1 forgets nothing"
    assert believed("discounted", discount=0.0) == [[2, 0, 0, 0], [8, 8, 0, 0]], "0 is the newest round alone"


def test_laplace_is_the_posterior_mean():
    p = (np.arange(20000) + 0.5) / 20000
    for k, n in [(0, 4), (3, 8), (8, 8)]:
        density = p**k * (1 - p) ** (n - k)
        a, trials = estimate([of_counts([k], [n])], Settings(estimator="laplace"))
        np.testing.assert_allclose(a / trials, np.sum(p * density) / np.sum(density), rtol=1e-6)


@pytest.mark.parametrize("rounds", [[], [of_counts([1], [2]), of_counts([1, 1], [2, 2])], [of_counts([], [])]])
def test_rounds_of_other_problems(rounds):
    with pytest.raises(ValueError, match=r"rounds must be pass rates of the same problems"):
        estimate(rounds, Settings())


def test_an_estimator_that_is_not_known():
    with pytest.raises(ValueError, match=r"pass_rates\.estimator must be a known name .*Did you mean 'laplace'"):
        estimate([of_counts([1], [2])], Settings(estimator="laplac"))
