"""The competence tracker: the reference's numbers, its invariants, and the contest against the discounted counter."""

import itertools
import math

import numpy as np
import pytest

from kdjax.config import PassRates as Settings
from kdjax.curation.competence import LEVELS, fit, track, transition
from kdjax.curation.paced import weigh
from kdjax.curation.pass_rates import PassRates, estimate


def column(*values):
    return np.array(values)[:, None]


def test_s1_two_levels():
    found = track(column(1, 0, 1, 1), column(1, 1, 1, 1), 0.1, 0.02, (0.2, 0.9), (0.7, 0.3))
    np.testing.assert_allclose(found.filtered[:, 0, 1], [0.658537, 0.209505, 0.641335, 0.899070], atol=1e-6)
    np.testing.assert_allclose(found.smoothed[:, 0, 1], [0.602402, 0.617734, 0.854390, 0.899070], atol=1e-6)
    assert found.log_score.sum() == pytest.approx(-3.344086, abs=1e-6)
    coming = found.filtered[:, 0] @ transition(2, 0.1, 0.02) @ [0.2, 0.9]
    np.testing.assert_allclose(coming, [0.675659, 0.399055, 0.665062, 0.823827], atol=1e-6)


def test_against_all_paths_written_out():
    right, tried, up, down = column(1, 0, 4), column(3, 0, 5), 0.3, 0.1
    theta, move = np.array([0.2, 0.5, 0.8]), transition(3, up, down)
    weights = {}
    for path in itertools.product(range(3), repeat=3):
        weight = 1 / 3 * move[path[0], path[1]] * move[path[1], path[2]]
        for z, k, n in zip(path, right[:, 0], tried[:, 0], strict=True):
            weight *= math.comb(n, k) * theta[z] ** k * (1 - theta[z]) ** (n - k)
        weights[path] = weight
    found = track(right, tried, up, down, theta)
    total = sum(weights.values())
    for t, level in itertools.product(range(3), range(3)):
        want = sum(w for path, w in weights.items() if path[t] == level) / total
        assert found.smoothed[t, 0, level] == pytest.approx(want, rel=1e-12)
    assert found.log_score.sum() == pytest.approx(math.log(total), rel=1e-12)
    assert found.log_score[1, 0] == pytest.approx(0, abs=1e-12), "a round without answers says nothing"


def test_invariants():
    np.testing.assert_allclose(transition(5, 0.3, 0.1).sum(1), 1)
    assert transition(5, 0.3, 0.1)[[0, 4], [0, 4]].tolist() == pytest.approx([0.7, 0.9])
    none = np.zeros((400, 1), int)
    last = track(none, none, 0.2, 0.1, (0.2, 0.5, 0.8)).filtered[-1, 0]
    np.testing.assert_allclose(last, np.array([1, 2, 4]) / 7, rtol=1e-9)  # the stationary law
    many = track(column(3100), column(10_000), 0.2, 0.1).filtered[0, 0]
    assert many[LEVELS.index(0.3)] == pytest.approx(1, abs=1e-6)
    rng = np.random.default_rng(0)
    right = rng.integers(0, 9, (6, 30))
    found = track(right, np.full((6, 30), 8), 0.2, 0.1)
    np.testing.assert_allclose(found.smoothed[-1], found.filtered[-1])
    for at in range(6):
        more = right.copy()
        more[at] = np.minimum(more[at] + 1, 8)
        assert (
            track(more, np.full((6, 30), 8), 0.2, 0.1).filtered[-1] @ LEVELS >= found.filtered[-1] @ LEVELS - 1e-12
        ).all()
    with pytest.raises(ValueError, match=r"up and down must be probabilities that sum to at most 1, got 0\.8 and 0\.3"):
        transition(3, 0.8, 0.3)


def test_as_an_estimator_of_pass_rates():
    def of(*right):
        none = np.zeros(3, np.int64)
        return PassRates(("a", "b", "c"), np.array([*right, 0]), np.array([8, 8, 0]), none, none, {}, (0,))

    learning, still = [of(0, 1), of(4, 5), of(8, 8)], [of(4, 2)] * 3
    for rounds, lowest, highest in ((learning, 0.6, 1), (still, 0.45, 0.55)):
        a, n = estimate(rounds, Settings(estimator="tracker"))
        assert n.tolist() == [24, 24, 0]
        assert lowest < a[0] / n[0] < highest
    found = weigh(rounds, Settings(weight="paced", estimator="tracker", normalise="none")).weight
    np.testing.assert_allclose(found, [*(a[:2] / n[:2] * (1 - a[:2] / n[:2])), 0])
    one = weigh(learning[:1], Settings(weight="paced", estimator="tracker")).weight
    assert 0 < one[0] < one[1]


# --- the contest: on the logs of learners, who better tells how many of the next 8 answers will be right?


def learn(kind, seed, size=13, rounds=10, steps=40):
    """int [rounds, size^2]: of 8 answers to each a + b, the right ones, while a small network learns them by Adam."""
    rng = np.random.default_rng(seed)
    a, b = np.divmod(np.arange(size * size), size)
    labels = {"sum": a + b, "modular": (a + b) % size, "product": a * b % size}[kind]
    inputs = np.concatenate([np.eye(size)[a], np.eye(size)[b]], 1)
    params = [rng.normal(0, 0.5, (2 * size, 64)), rng.normal(0, 0.1, (64, labels.max() + 1))]
    moments = [(np.zeros_like(p), np.zeros_like(p)) for p in params]
    counts, step = [], 0

    def forward(rows):
        hidden = np.maximum(inputs[rows] @ params[0], 0)
        logits = hidden @ params[1]
        probs = np.exp(logits - logits.max(1, keepdims=True))
        return hidden, probs / probs.sum(1, keepdims=True)

    everything = np.arange(len(labels))
    for _ in range(rounds):
        counts.append(rng.binomial(8, forward(everything)[1][everything, labels]))
        for _ in range(steps):
            step += 1
            rows = rng.integers(0, len(labels), 32)
            hidden, error = forward(rows)
            error[np.arange(32), labels[rows]] -= 1
            gradients = [inputs[rows].T @ (error @ params[1].T * (hidden > 0)) / 32, hidden.T @ error / 32]
            for p, g, (m, v) in zip(params, gradients, moments, strict=True):
                m += 0.1 * (g - m)
                v += 0.01 * (g * g - v)
                p -= 0.004 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.99**step)) + 1e-8)
    return np.array(counts)


def counter_scores(right, discount, prior):
    """float64 [R - 1, N]: log of the Beta-binomial law of each next round, by the discounted counter."""
    gamma = np.vectorize(math.lgamma, otypes=[float])

    def log_beta(x, y):
        return gamma(x) + gamma(y) - gamma(x + y)

    a = np.full(right.shape[1], float(prior))
    b, found = a.copy(), []
    for k, following in itertools.pairwise(right):
        a, b = discount * a + k, discount * b + 8 - k
        ways = gamma(9.0) - gamma(following + 1.0) - gamma(9.0 - following)
        found.append(ways + log_beta(a + following, b + 8 - following) - log_beta(a, b))
    return np.array(found)


@pytest.mark.parametrize("kind", ["sum", "modular", "product"])
def test_the_tracker_beats_the_discounted_counter(kind):
    """Both are fitted on one half of the problems and scored on the other; the reference asks for this before it ships.

    The counter may choose its discount and prior, the tracker its up and down. Paired over the problems, the tracker
    has to win by more than three standard errors.
    """
    logs = learn(kind, seed=0)
    order = np.random.default_rng(1).permutation(logs.shape[1])
    seen, unseen = logs[:, order[: len(order) // 2]], logs[:, order[len(order) // 2 :]]
    settings = itertools.product((0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0), (0.5, 1, 2, 4, 8, 16))
    best = max(settings, key=lambda pair: counter_scores(seen, *pair).mean())
    up, down = fit(seen, np.full(seen.shape, 8))
    tracked = track(unseen, np.full(unseen.shape, 8), up, down).log_score[1:]
    gain = (tracked - counter_scores(unseen, *best)).mean(0)
    assert gain.mean() > 3 * gain.std() / math.sqrt(len(gain))
    assert gain.mean() > 0.02
