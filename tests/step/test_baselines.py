"""AT-KD and AdaKD as they were published, through the whole step: against numpy on whole logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.step import make_supervise
from kdjax.types import targets_of
from tests.kernels import oracle

AT_KD = {"selection__signal": "unc", "loss__terms": (("at_kd", 1.0),)}
ADAKD = {"selection__policy": "adaptive", "selection__signal": "hellinger", "selection__fraction": 0.1}


def logits_of(bench, params, batch):
    """(teacher logits, student logits, labels) at the eligible positions, row by row, in float64."""
    sides = []
    for model, weights in ((bench.parts.teacher, bench.teacher_params), (bench.parts.student, params)):
        hidden, head = oracle.f64(model.hidden(weights, batch)), model.head(weights)
        matrix = oracle.f64(head.weight).T if head.vocab_major else oracle.f64(head.weight)
        sides.append(hidden @ matrix[:, : head.vocab_size])
    labels, eligible = (np.asarray(a) for a in targets_of(batch))
    return (*(side[eligible] for side in sides), labels[eligible])


def unit_weights(batch):
    return dataclasses.replace(batch, weight=jnp.ones_like(batch.weight))


def supervised(bench, batch, policy_state=None):
    """(loss, next policy state) of one micro-batch."""
    supervise, state = make_supervise(bench.parts), bench.state()
    policy_state = state.policy_state if policy_state is None else policy_state
    output, after, _ = jax.jit(supervise)(
        bench.params, bench.teacher_params, batch, policy_state, state.key, state.step
    )
    return float(output.total / output.count), after


# --- AT-KD


def parts_of_kl(p, q, labels):
    """KL of (label, rest) and KL among the rest, by renormalising probabilities."""
    p, q, rows = np.exp(oracle.log_softmax(p)), np.exp(oracle.log_softmax(q)), np.arange(len(p))
    py, qy = p[rows, labels], q[rows, labels]
    against = py * np.log(py / qy) + (1 - py) * np.log((1 - py) / (1 - qy))
    rest = np.arange(p.shape[1])[None] != labels[:, None]
    hats = [np.where(rest, side / (1 - label)[:, None], 1.0) for side, label in ((p, py), (q, qy))]
    return against, np.where(rest, hats[0] * np.log(hats[0] / hats[1]), 0.0).sum(1), 1 - py


@pytest.mark.parametrize(("policy", "fraction"), [("easy_hard", 0.5), ("easy_hard_means", 0.3)])
def test_at_kd(bench, batch, policy, fraction):
    """sekd 6.2: the ceil(f n) positions of the micro-batch that the teacher finds hardest learn all, the others the
    rest; weighed 0.8 and 0.2, as sums over all positions or as means of each kind."""
    batch = unit_weights(batch)
    made = bench(**AT_KD | {"selection__policy": policy, "selection__fraction": fraction})
    against, among, unc = parts_of_kl(*logits_of(made, made.params, batch))
    hard = np.zeros(len(unc), bool)
    hard[np.argsort(-unc, kind="stable")[: math.ceil(fraction * len(unc))]] = True
    easy_sum, hard_sum = among[~hard].sum(), (against + among)[hard].sum()
    if policy == "easy_hard":
        want = (0.2 * easy_sum + 0.8 * hard_sum) / len(unc)
    else:
        want = 0.2 * easy_sum / max(1, (~hard).sum()) + 0.8 * hard_sum / hard.sum()
    assert supervised(made, batch)[0] == pytest.approx(want, rel=2e-5)


@pytest.mark.parametrize(("loss", "word"), [("at_kd", "hardness"), ("adakd_forward_kl", "temperature")])
def test_a_loss_that_no_policy_informs(bench, loss, word):
    message = f"^selection.policy must say the {word} of each position, which the loss '{loss}' reads, got 'all'. Set"
    with pytest.raises(ValueError, match=message):
        bench(selection__policy="all", loss__terms=((loss, 1.0),))


# --- AdaKD


def adakd(teacher, student, share, scale, kl):
    """The published loss of a micro-batch: its hardest tokens, each at its own temperature, a mean over them."""
    gap = np.exp(0.5 * oracle.log_softmax(teacher)) - np.exp(0.5 * oracle.log_softmax(student))
    score = np.sqrt(0.5 * (gap**2).sum(1))
    kept = np.argsort(-score, kind="stable")[: max(1, math.floor(share * len(score)))]
    median = np.sort(score[kept])[(len(kept) - 1) // 2]
    t = np.exp(-scale * np.tanh(np.log(score[kept] / median)))[:, None]
    return np.mean(t[:, 0] ** 2 * kl(teacher[kept] / t, student[kept] / t))


@pytest.mark.parametrize(("loss", "share", "scale"), [("adakd_forward_kl", 0.37, 0.6), ("adakd_reverse_kl", 1.0, -0.5)])
def test_adakd(bench, batch, loss, share, scale):
    batch = unit_weights(batch)
    made = bench(**ADAKD, loss__terms=((loss, 1.0),), selection__temperature_scale=scale)
    kl = oracle.kl if loss == "adakd_forward_kl" else lambda p, q: oracle.kl(q, p)
    state = dataclasses.replace(made.state().policy_state, share=jnp.float32(share))
    teacher, student, _ = logits_of(made, made.params, batch)
    value, after = supervised(made, batch, state)
    assert value == pytest.approx(adakd(teacher, student, share, scale, kl), rel=2e-5)
    assert (float(after.average), float(after.share), int(after.seen)) == (pytest.approx(value), float(state.share), 1)
