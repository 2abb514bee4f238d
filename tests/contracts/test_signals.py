"""What every entry of SIGNALS must keep, found through the table; the statistics and the noise that they read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.selection import SIGNALS, token_stats
from kdjax.selection.signals import position_noise
from kdjax.selection.stats import FIELDS
from kdjax.types import Batch, Head, TokenStats
from tests.kernels import oracle

B, T = 3, 7
NAMES = [field.name for field in dataclasses.fields(TokenStats)]
DRAW = jax.jit(position_noise, static_argnums=2)
every_signal = pytest.mark.parametrize("name", SIGNALS)


def random_stats(seed=0):
    numbers = np.random.default_rng(seed)
    return {name: jnp.asarray(numbers.uniform(0.1, 5.0, size=(B, T)), jnp.float32) for name in NAMES}


def batch(row_id, epoch=None, positions=T):
    row_id = jnp.asarray(row_id, jnp.int32)
    zeros = jnp.zeros((len(row_id), positions), jnp.int32)
    epoch = jnp.zeros_like(row_id) if epoch is None else jnp.full_like(row_id, epoch)
    return Batch(zeros, zeros, zeros, zeros.astype(bool), row_id, epoch, jnp.ones(len(row_id)))


def noise(row_id, *, epoch=0, positions=T, seed=0, purpose=1):
    return np.asarray(DRAW(jax.random.key(seed), batch(row_id, epoch, positions), purpose))


@every_signal
def test_reads_only_what_it_declares(name):
    """The rest may be NaN or, as in the step, not there at all; so may the noise of a signal that is not noisy."""
    signal, stats = SIGNALS[name], random_stats()
    assert set(signal.needs) <= set(NAMES)
    clean = noise(range(B)) if signal.noisy else np.full((B, T), np.nan, np.float32)
    kept = {field: stats[field] for field in signal.needs}
    poison = {field: jnp.full((B, T), jnp.nan) for field in NAMES if field not in signal.needs}
    score = signal.score(TokenStats(**kept, **poison), jnp.asarray(clean))
    assert (score.shape, score.dtype) == ((B, T), jnp.float32)
    assert np.isfinite(score).all()
    np.testing.assert_array_equal(score, signal.score(TokenStats(**kept), jnp.asarray(clean)))


@every_signal
def test_reads_all_that_it_declares(name):
    """What is declared is computed: a pass over a vocabulary that nobody reads would be waste."""
    signal, stats = SIGNALS[name], random_stats()
    plain = signal.score(TokenStats(**stats), jnp.asarray(noise(range(B))))
    for field in signal.needs:
        other = signal.score(TokenStats(**{**stats, field: stats[field][::-1]}), jnp.asarray(noise(range(B))))
        assert not np.array_equal(plain, other), field
    assert signal.noisy == (
        not np.array_equal(plain, signal.score(TokenStats(**stats), jnp.asarray(noise(range(B), seed=1))))
    )


@every_signal
def test_positions_are_scored_by_themselves(name):
    """Rows may move together: a score depends on its own row."""
    signal, stats, order = SIGNALS[name], random_stats(), np.array([2, 0, 1])
    plain = signal.score(TokenStats(**stats), jnp.asarray(noise(range(B))))
    moved = {field: values[order] for field, values in stats.items()}
    np.testing.assert_array_equal(
        signal.score(TokenStats(**moved), jnp.asarray(noise(range(B))[order])), np.asarray(plain)[order]
    )


SCORES = {
    "student_entropy": lambda student, teacher, labels: oracle.statistics(student, labels)["entropy"],
    "teacher_entropy": lambda student, teacher, labels: oracle.statistics(teacher, labels)["entropy"],
    "student_ce": lambda student, teacher, labels: -oracle.statistics(student, labels)["label_logp"],
    "random": None,
}


def sides(seed=0):
    """Student and teacher of different widths, and labels."""
    numbers = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(numbers.normal(size=shape), jnp.float32)

    student, teacher = (normal(B, T, 5), Head(normal(5, 11), 9)), (normal(B, T, 8), Head(normal(10, 8), 9, True))
    return student, teacher, jnp.asarray(numbers.integers(9, size=(B, T)), jnp.int32)


def logits(side):
    hidden, head = side
    weight = oracle.f64(head.weight)
    return (oracle.f64(hidden) @ (weight.T if head.vocab_major else weight))[:, :, :9].reshape(B * T, 9)


@every_signal
def test_score_is_what_its_name_says(name):
    """From hidden states and heads, at temperature 1, against float64."""
    if name not in SCORES:
        pytest.fail(f"the signal {name!r} has no oracle: add its formula to SCORES in {__file__}", pytrace=False)
    if SCORES[name] is None:
        return
    student, teacher, labels = sides()
    got = SIGNALS[name].score(token_stats(SIGNALS[name].needs, student, teacher, labels), jnp.zeros((B, T)))
    want = SCORES[name](logits(student), logits(teacher), np.asarray(labels).reshape(-1))
    np.testing.assert_allclose(np.asarray(got).reshape(-1), want, rtol=1e-5)


@every_signal
def test_no_gradient(name):
    """Nothing is trained through a signal (sekd 9.23)."""
    student, teacher, labels = sides()

    def total(student, teacher):
        stats = token_stats(SIGNALS[name].needs, student, teacher, labels)
        return jnp.sum(SIGNALS[name].score(stats, jnp.asarray(noise(range(B)))))

    gradients = jax.tree.leaves(jax.grad(total, (0, 1))(student, teacher))
    assert not any(gradient.any() for gradient in gradients)


# --- the statistics


def test_every_statistic_has_a_source():
    assert set(FIELDS) == set(NAMES)


@pytest.mark.parametrize("needs", [(), ("student_ce",), ("teacher_ce", "student_entropy"), tuple(NAMES)])
def test_token_stats(needs):
    """What is asked for, [B, T] in nats, and nothing else."""
    student, teacher, labels = sides()
    stats = token_stats(needs, student, teacher, labels)
    flat = np.asarray(labels).reshape(-1)
    want = {"student": oracle.statistics(logits(student), flat), "teacher": oracle.statistics(logits(teacher), flat)}
    for name in NAMES:
        got = getattr(stats, name)
        if name not in needs:
            assert got is None
            continue
        model, kind = name.split("_")
        values = want[model]["entropy"] if kind == "entropy" else -want[model]["label_logp"]
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, values.reshape(B, T), rtol=1e-5)


@pytest.mark.parametrize(("side", "field"), [("student", "teacher_entropy"), ("teacher", "student_ce")])
def test_a_side_that_nobody_needs_may_be_missing(side, field):
    student, teacher, labels = sides()
    here = {"student": student, "teacher": teacher, side: None}
    whole = token_stats([field], student, teacher, labels)
    np.testing.assert_array_equal(
        getattr(token_stats([field], here["student"], here["teacher"], labels), field), getattr(whole, field)
    )
    own = f"{side}_entropy"
    with pytest.raises(ValueError, match=f"^selection.signal must not need '{own}', .* no {side} here. Choose another"):
        token_stats([own], here["student"], here["teacher"], labels)


# --- the noise


def test_noise_belongs_to_the_row():
    """Not to its place in the batch, the size of the batch, its neighbours or the length of the rows."""
    whole = noise([4, 9, 2, 7, 30000])
    assert (whole.dtype, whole.shape) == (np.float32, (5, T))
    np.testing.assert_array_equal(noise([7, 2]), whole[[3, 2]])
    np.testing.assert_array_equal(noise([30000])[0], whole[4])
    np.testing.assert_array_equal(noise([9], positions=3 * T)[0, :T], whole[1])


def test_noise_differs_otherwise():
    """Rows, epochs, seeds, purposes and positions all have their own; epoch and row are not interchangeable."""
    draws = [
        noise([1, 2, 3], positions=50),
        noise([1, 2, 3], epoch=1, positions=50),
        noise([1, 2, 3], epoch=2, positions=50),
        noise([1, 2, 3], seed=1, positions=50),
        noise([1, 2, 3], purpose=2, positions=50),
    ]
    numbers = np.concatenate([draw.reshape(-1) for draw in draws])
    assert len(np.unique(numbers)) > 0.999 * len(numbers)


def test_noise_is_uniform():
    draws = noise(range(400), positions=50)
    assert 0.0 <= draws.min() < 0.001 < 0.999 < draws.max() < 1.0
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    expected = draws.size / 20
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    by_position = draws.mean(0)
    assert np.abs(by_position - 0.5).max() < 5 / np.sqrt(12 * 400)
    assert abs(np.corrcoef(draws[:, :-1].reshape(-1), draws[:, 1:].reshape(-1))[0, 1]) < 0.04
