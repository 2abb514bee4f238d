"""Signal-to-noise of gradients: against laws that are known, against gradients written out, and what is refused."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax.build import build_chooser, build_objective
from kdjax.config import Loss, Mesh
from kdjax.config import Selection as SelectionConfig
from kdjax.curation import snr
from kdjax.data import eligible, take
from kdjax.sharding import Rules, make_rules
from kdjax.step import LanguageModel, StepParts
from kdjax.types import Head

ALL = SelectionConfig(policy="all")
DENSE = Loss()


def parts_of(small, params, loss=DENSE, selection=ALL):
    """A student whose hidden states are a fixed table, so that only its head has a gradient."""
    table = params["table"]
    student = LanguageModel(lambda _, batch: table[batch.tokens], lambda p: Head(p["head"], vocab_size=37))
    chooser, objective = build_chooser(selection), build_objective(loss)
    return StepParts(student, small.model, chooser, objective, optax.sgd(0.0), jnp.zeros_like, Rules())


def log_probs(hidden, head):
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def written_out(small, rows):
    """float64 [R, D * V]: the gradient of the mean forward KL with respect to the head, (q - p) h^T."""
    found = []
    for tokens, places in zip(rows.tokens, eligible(rows), strict=True):
        at = tokens[places]
        q, p = (np.exp(log_probs(side["table"][at], side["head"])) for side in (small.student, small.teacher))
        h = np.asarray(small.student["table"], np.float64)[at]
        found.append(np.einsum("td,tv->dv", h, q - p).reshape(-1) / len(at))
    return np.stack(found)


@pytest.fixture
def bench(small):
    with_targets = np.flatnonzero(eligible(small.rows).any(1))
    return small, take(small.rows, with_targets)


def measured(small, rows, **options):
    head = {"head": small.student["head"]}
    return snr.row_gradients(parts_of(small, small.student), head, small.teacher, rows, **options)


# --- gradients


def test_the_gradients_are_those_of_each_row_alone(bench):
    small, rows = bench
    done = []
    found = measured(small, rows, dimensions=5 * 37, on_row=done.append)  # as many places as entries: nothing is mixed
    want = written_out(small, rows)
    np.testing.assert_allclose(np.abs(found), np.abs(want), atol=1e-6)
    np.testing.assert_allclose(found @ found.T, want @ want.T, atol=1e-5)
    assert done == list(range(1, len(rows) + 1))
    assert np.ptp(rows.weight) > 0, "the weights of the rows do not matter"


def test_the_loss_and_the_positions_are_those_of_the_step(bench):
    small, rows = bench
    head = {"head": small.student["head"]}
    other = parts_of(small, small.student, Loss(terms=(("cross_entropy", 2.0),)))
    fewer = parts_of(small, small.student, selection=SelectionConfig(policy="top_fraction", fraction=0.2))
    want = measured(small, rows)
    for parts in (other, fewer):
        assert np.abs(snr.row_gradients(parts, head, small.teacher, rows) - want).max() > 1e-2


def test_the_teacher_may_read_another_text(bench):
    small, rows = bench
    shifted = {
        "tokens": np.roll(small.rows.tokens, 1, 0),
        "segment_ids": small.rows.segment_ids,
        "positions": small.rows.positions,
        "index": np.tile(np.arange(24, dtype=np.int32), (len(small.rows), 1)),
    }
    parts, read = parts_of(small, small.student), []

    def hidden(params, batch):
        read.append(type(batch.teacher).__name__)
        return params["table"][batch.teacher.tokens]

    parts = dataclasses.replace(parts, teacher=dataclasses.replace(small.model, hidden=hidden))
    found = snr.row_gradients(parts, {"head": small.student["head"]}, small.teacher, rows, text=shifted, dimensions=185)
    assert read == ["TeacherText"]
    places, at = eligible(rows)[1], int(rows.row_id[1])
    q = np.exp(log_probs(small.student["table"][rows.tokens[1][places]], small.student["head"]))
    p = np.exp(log_probs(small.teacher["table"][shifted["tokens"][at][places]], small.teacher["head"]))
    h = np.asarray(small.student["table"], np.float64)[rows.tokens[1][places]]
    want = np.einsum("td,tv->dv", h, q - p).reshape(-1) / places.sum()
    np.testing.assert_allclose(np.abs(found[1]), np.abs(want), atol=1e-6)


def test_the_rows_of_prompts_are_known_by_what_comes_before_the_answer():
    from kdjax.data.responses import Answered, answer_rows

    prompts = [(5, 6), (5,), (5, 6, 7), (9,)]
    rows, _ = answer_rows([Answered(prompts[i], (1, 2)) for i in (2, 0, 1, 0)], 8)
    assert snr.row_of_prompts(rows, prompts) == {2: 0, 0: 1, 1: 2}


def test_projected_inner_products_are_right_in_the_mean():
    rng = np.random.default_rng(0)
    first, second = ({"a": rng.normal(size=(7, 33)), "b": [rng.normal(size=5), rng.normal(size=(1, 70))]} for _ in "xy")
    first = jax.tree.map(lambda x, y: jnp.asarray(0.5 * x + y, jnp.float32), first, second)
    second = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), second)

    def inner(x, y):
        return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))

    both = jax.jit(jax.vmap(lambda seed: (snr.project(first, 64, seed), snr.project(second, 64, seed))))
    x, y = both(jnp.arange(400))
    found, scale = np.sum(x * y, 1), float(jnp.sqrt(inner(first, first) * inner(second, second)))
    assert abs(found.mean() - inner(first, second)) < 3 * found.std() / 20
    assert found.std() / scale == pytest.approx(math.sqrt(2 / 64), rel=0.5)
    assert np.abs(x - x[:1]).max() > 1, "the seed changes the signs"
    twice = snr.project(jax.tree.map(lambda a, b: a - 2 * b, first, second), 64, 3)
    np.testing.assert_allclose(twice, x[3] - 2 * y[3], atol=1e-4)


def test_a_bin_of_equal_problems_is_all_signal(bench):
    small, rows = bench
    same = take(rows, np.array([2] * 5 + [*range(5, 12)]))
    found = measured(small, same, dimensions=185)
    equal, mixed = snr.snr_by_bin(found, ["4/8"] * 5 + ["0/8"] * 7)
    want = written_out(small, rows)[2]
    assert equal.signal == pytest.approx([want @ want] * 3, rel=1e-4)
    assert abs(equal.noise[0]) < 1e-5 * equal.signal[0]
    assert mixed.noise[0] > 0.01 * mixed.signal[0]


# --- figures


def test_the_figures_of_three_problems_by_hand():
    gradients = np.array([[1.0, 0], [0, 2], [2, 2]])
    (found,) = snr.snr_by_bin(gradients, ["x"] * 3)
    assert (found.name, found.problems) == ("x", 3)
    assert found.signal[0] == pytest.approx((0 + 2 + 4) / 3)  # the three pairs
    assert found.noise[0] == pytest.approx(np.sum((gradients - gradients.mean(0)) ** 2) / 2)
    assert found.snr[0] == pytest.approx(found.signal[0] / found.noise[0])


@pytest.mark.parametrize("strength", [0.0, 0.2, 1.0])
def test_a_known_law(strength):
    rng, dims = np.random.default_rng(1), 50
    mean = np.full(dims, strength)
    found = [snr.snr_by_bin(mean + rng.normal(size=(8, dims)), ["x"] * 8, resamples=1)[0] for _ in range(300)]
    for name, want in (("signal", dims * strength**2), ("noise", dims)):
        values = np.array([getattr(each, name)[0] for each in found])
        assert abs(values.mean() - want) < 4 * values.std() / np.sqrt(300), f"{name} is not biased"
    (many,) = snr.snr_by_bin(mean + rng.normal(size=(400, dims)), ["x"] * 400)
    assert many.snr[0] == pytest.approx(strength**2, abs=0.02 + 0.1 * strength**2)
    assert many.snr[1] < strength**2 < many.snr[2]


def test_a_resample_does_not_take_the_noise_of_one_problem_for_signal():
    gradients = np.random.default_rng(2).normal(size=(20, 500))
    (found,) = snr.snr_by_bin(gradients, ["x"] * 20)
    value, low, high = found.signal
    assert low < value < high
    assert abs((low + high) / 2 - value) < 0.3 * (high - low)
    assert high < 500 / 20, "which is what a problem paired with itself would bring"


def test_bins_of_other_sizes_and_bins_that_are_too_small():
    gradients = np.random.default_rng(3).normal(size=(12, 4))
    bins = ["b"] * 8 + ["a"] * 3 + ["c"]
    found = snr.snr_by_bin(gradients, bins)
    assert [(each.name, each.problems) for each in found] == [("b", 8), ("a", 3), ("c", 1)]
    assert np.isnan(found[2].signal).all()
    assert np.isfinite(found[0].snr).all()
    assert np.isfinite(found[1].snr[0])
    assert np.isnan(found[1].snr[1:]).all(), "no interval from three problems"
    again = snr.snr_by_bin(gradients, bins)
    np.testing.assert_equal([each.snr for each in again], [each.snr for each in found])
    assert [line["snr"] for line in snr.lines_of(found)][2] == [None, None, None]
    json.dumps([*snr.lines_of(found)], allow_nan=False)
    text = snr.table(found)
    assert [line.split()[:2] for line in text[1:]] == [["b", "8"], ["a", "3"], ["c", "1"]]
    with pytest.raises(ValueError, match=r"bins must name one bin per gradient, got 2 for 12"):
        snr.snr_by_bin(gradients, ["a", "b"])


def test_what_the_weights_reach_of_the_best():
    def of(name, ratio):
        return snr.BinSnr(name, 9, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (ratio, 0.0, 0.0))

    found = [of("0", -0.1), of("1/2", 1.0), of("1", 1 / 3), of("none", math.nan)]
    problems = {"0": 5, "1/2": 2, "1": 3, "none": 7}
    weights = {"0": 0.0, "1/2": 0.5, "1": 0.25, "none": 9.0}
    assert snr.reached(found, weights, problems) == pytest.approx(1)  # in proportion to SNR / (1 + SNR)
    # (5 * 0 + 2 * 1/2 + 3 * 1/4)^2 / ((5 + 2 + 3) (2 / 4 + 3 / 16))
    assert snr.reached(found, dict.fromkeys(problems, 1.0), problems) == pytest.approx(1.75**2 / (10 * 11 / 16))
    assert math.isnan(snr.reached(found, dict.fromkeys(problems, 0.0), problems))


# --- what is refused


def test_rows_that_cannot_be_measured(small, bench):
    with pytest.raises(ValueError, match=rf"got row {small.no_target} with no position to learn from"):
        measured(small, take(small.rows, np.array([0, small.no_target])))
    broken = {"head": small.student["head"].at[0, 0].set(jnp.nan)}
    with pytest.raises(ValueError, match=r"got row 0 with a gradient that is not finite"):
        snr.row_gradients(parts_of(small, small.student), broken, small.teacher, small.rows)


def test_a_mesh_is_refused(bench):
    small, rows = bench
    parts = dataclasses.replace(parts_of(small, small.student), rules=make_rules(Mesh(preset="dp")))
    with pytest.raises(ValueError, match=r"mesh\.preset must be 'single' to measure gradients row by row"):
        snr.row_gradients(parts, {"head": small.student["head"]}, small.teacher, rows)
