"""What every entry of SIGNALS must keep, found through the table; the statistics and the noise that they read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.selection import SIGNALS, token_stats
from kdjax.selection.signals import View, position_noise
from kdjax.selection.stats import PAIR, STUDENT, SUMS, TEACHER
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


EVERYWHERE = jnp.ones((B, T), bool)


def scored(signal, noise, eligible=EVERYWHERE, **stats):
    return signal.score(View(TokenStats(**stats), eligible, jnp.asarray(noise)))


@every_signal
def test_reads_only_what_it_declares(name):
    """The rest may be NaN or, as in the step, not there at all; so may the noise of a signal that is not noisy."""
    signal, stats = SIGNALS[name], random_stats()
    assert set(signal.needs) <= set(NAMES)
    clean = noise(range(B)) if signal.noisy else np.full((B, T), np.nan, np.float32)
    kept = {field: stats[field] for field in signal.needs}
    poison = {field: jnp.full((B, T), jnp.nan) for field in NAMES if field not in signal.needs}
    score = scored(signal, clean, **kept, **poison)
    assert (score.shape, score.dtype) == ((B, T), jnp.float32)
    assert np.isfinite(score).all()
    np.testing.assert_array_equal(score, scored(signal, clean, **kept))


@every_signal
def test_reads_all_that_it_declares(name):
    """What is declared is computed: a pass over a vocabulary that nobody reads would be waste."""
    signal, stats = SIGNALS[name], random_stats()
    plain = scored(signal, noise(range(B)), **stats)
    for field in signal.needs:
        other = scored(signal, noise(range(B)), **{**stats, field: stats[field][::-1]})
        assert not np.array_equal(plain, other), field
    assert signal.noisy == (not np.array_equal(plain, scored(signal, noise(range(B), seed=1), **stats)))


@every_signal
def test_positions_are_scored_by_themselves(name):
    """Rows may move together: a score depends on its own row."""
    signal, stats, order = SIGNALS[name], random_stats(), np.array([2, 0, 1])
    plain = scored(signal, noise(range(B)), **stats)
    moved = {field: values[order] for field, values in stats.items()}
    eligible = EVERYWHERE[order]
    got = scored(signal, noise(range(B))[order], eligible, **moved)
    np.testing.assert_array_equal(got, np.asarray(plain)[order])


@every_signal
def test_what_is_not_eligible_moves_no_score(name):
    """Nor does a NaN there, also where a score is relative to its row."""
    signal, stats, draws = SIGNALS[name], random_stats(), noise(range(B))
    eligible = np.arange(B * T).reshape(B, T) % 3 > 0
    clean = np.asarray(scored(signal, draws, jnp.asarray(eligible), **stats))
    junk = {field: jnp.where(eligible, values, jnp.nan) for field, values in stats.items()}
    dirty = np.asarray(scored(signal, draws, jnp.asarray(eligible), **junk))
    np.testing.assert_array_equal(dirty[eligible], clean[eligible])
    assert np.isfinite(clean).all()
    flat = {field: jnp.full((B, T), 2.0) for field in stats}  # nothing to scale by, nowhere to look
    assert np.isfinite(scored(signal, draws, jnp.zeros((B, T), bool), **flat)).all()


def test_vectors():
    """sekd 9.1, 9.3 and 9.20; both sums with the entropy in nats, as the paper has them."""
    logits, eye = {"student": [0.5, 1.5, -0.5, 0, -1], "teacher": [2.0, 1, 0, -1, -2]}, Head(jnp.eye(5), 5)
    student, teacher = ((jnp.array([[logits[side]]]), eye) for side in ("student", "teacher"))
    want = {
        "kl": 0.4778198667,
        "reverse_kl": 0.4621568362,
        "ce_ratio": 0.4080533911,
        "ce_ratio_plus_entropy": 0.4080533911 + 1.2441059105,
        "ce_ratio_times_entropy": 0.3154279092 * np.log(5),
        "unc": 0.765878,
    }
    for name, value in want.items():
        stats = token_stats(SIGNALS[name].needs, student, teacher, jnp.array([[1]]))
        score = SIGNALS[name].score(View(stats, jnp.ones((1, 1), bool), jnp.zeros((1, 1))))
        np.testing.assert_allclose(score, [[value]], rtol=2e-6, err_msg=name)


def standardised(values):
    rows = values.reshape(B, T)
    return (rows - rows.mean(1, keepdims=True)) / rows.std(1, keepdims=True)


def in_unit_range(values):
    rows = values.reshape(B, T)
    return (rows - rows.min(1, keepdims=True)) / np.ptp(rows, 1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Entropies, cross-entropies, distances, [B*T] in float64; norm: ||q - onehot||; p_y: the teacher's label."""

    h: np.ndarray
    teacher_h: np.ndarray
    ce: np.ndarray
    teacher_ce: np.ndarray
    kl: np.ndarray
    reverse_kl: np.ndarray
    norm: np.ndarray
    p_y: np.ndarray
    hellinger: np.ndarray


def measured(student, teacher, labels):
    own, other = oracle.statistics(student, labels), oracle.statistics(teacher, labels)
    ce, teacher_ce = -own["label_logp"], -other["label_logp"]
    kl, reverse_kl, norm = oracle.kl(teacher, student), oracle.kl(student, teacher), np.sqrt(own["brier"])
    overlap = np.exp(0.5 * (oracle.log_softmax(student) + oracle.log_softmax(teacher))).sum(-1)
    rest = (norm, np.exp(-teacher_ce), np.sqrt(1 - overlap))
    return Measured(own["entropy"], other["entropy"], ce, teacher_ce, kl, reverse_kl, *rest)


SCORES = {
    "student_entropy": lambda m: m.h,
    "teacher_entropy": lambda m: m.teacher_h,
    "student_ce": lambda m: m.ce,
    "teacher_ce": lambda m: m.teacher_ce,
    "kl": lambda m: m.kl,
    "reverse_kl": lambda m: m.reverse_kl,
    "hellinger": lambda m: m.hellinger,
    "token_gradient_norm": lambda m: m.norm,
    "unc": lambda m: 1 - m.p_y,
    "ce_ratio": lambda m: m.ce / (m.teacher_ce + 1e-6),
    "ce_ratio_plus_entropy": lambda m: m.ce / (m.teacher_ce + 1e-6) + m.h,
    "ce_ratio_times_entropy": lambda m: m.ce / (m.teacher_ce + 1e-6) * m.h,
    "entropy_plus_kl": lambda m: m.h + m.kl,
    "composite": lambda m: standardised(m.h) + standardised(m.ce) + standardised(m.kl),
    "entropy_or_kl": lambda m: 1 - (1 - in_unit_range(m.h)) * (1 - in_unit_range(m.kl)),
    "position": lambda m: np.tile(-np.arange(T, dtype=float), B),
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
    got = SIGNALS[name].score(
        View(token_stats(SIGNALS[name].needs, student, teacher, labels), EVERYWHERE, jnp.zeros((B, T)))
    )
    want = SCORES[name](measured(logits(student), logits(teacher), np.asarray(labels).reshape(-1)))
    np.testing.assert_allclose(np.asarray(got), want.reshape(B, T), rtol=2e-5, atol=1e-5)


@every_signal
def test_no_gradient(name):
    """Nothing is trained through a signal (sekd 9.23)."""
    student, teacher, labels = sides()

    def total(student, teacher):
        stats = token_stats(SIGNALS[name].needs, student, teacher, labels)
        return jnp.sum(SIGNALS[name].score(View(stats, EVERYWHERE, jnp.asarray(noise(range(B))))))

    gradients = jax.tree.leaves(jax.grad(total, (0, 1))(student, teacher))
    assert not any(gradient.any() for gradient in gradients)


# --- the statistics


def test_every_statistic_has_a_source():
    assert [*STUDENT, *TEACHER, *PAIR, *SUMS] == NAMES


@pytest.mark.parametrize(
    "needs",
    [(), ("student_ce",), ("hellinger",), ("hellinger", "teacher_ce"), ("teacher_ce", "student_entropy"), NAMES],
)
def test_token_stats(needs):
    """What is asked for, [B, T] in nats, and nothing else."""
    student, teacher, labels = sides()
    stats = token_stats(needs, student, teacher, labels)
    m = measured(logits(student), logits(teacher), np.asarray(labels).reshape(-1))
    values = (m.h, m.ce, m.norm, m.teacher_h, m.teacher_ce, m.kl, m.reverse_kl, m.hellinger)
    want = dict(zip(NAMES, values, strict=True))
    for name in NAMES:
        got = getattr(stats, name)
        if name not in needs:
            assert got is None
            continue
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want[name].reshape(B, T), rtol=2e-5)


@pytest.mark.parametrize(("side", "field"), [("student", "teacher_entropy"), ("teacher", "student_ce")])
def test_a_side_that_nobody_needs_may_be_missing(side, field):
    student, teacher, labels = sides()
    here = {"student": student, "teacher": teacher, side: None}
    whole = token_stats([field], student, teacher, labels)
    np.testing.assert_array_equal(
        getattr(token_stats([field], here["student"], here["teacher"], labels), field), getattr(whole, field)
    )
    with pytest.raises(ValueError, match=f"^selection.signal must not need 'kl', .* there is no {side} here."):
        token_stats(["kl"], here["student"], here["teacher"], labels)
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
