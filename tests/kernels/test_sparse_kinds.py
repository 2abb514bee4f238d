"""What the kinds of sparse_divergence mean: equal to KL where all is stored, unbiased or by how much not, refused."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.config import Loss
from kdjax.kernels.linear_divergence import linear_divergence
from kdjax.kernels.sparse_divergence import IMPLEMENTATIONS, KINDS, sparse_divergence
from kdjax.losses.forward_kl import forward_kl
from tests.kernels import oracle
from tests.kernels.problems import SHAPES, make_problem
from tests.kernels.stored import (
    NUMPY,
    Stored,
    compare,
    expected,
    inputs,
    logits_problem,
    run,
    stored_of,
    top,
    with_gradients,
)

# pallas_gpu takes none of these small float32 shapes and has its own in test_sparse_divergence_gpu.py.
every_implementation = pytest.mark.parametrize("implementation", sorted({*IMPLEMENTATIONS} - {"pallas_gpu"}))
# A kind is a formula that they share; kernels are compared with the oracle in test_sparse_divergence.py.
each_on_the_cpu = pytest.mark.parametrize("implementation", ["reference", "xla"])


def test_every_kind_has_an_oracle():
    assert set(NUMPY) == set(KINDS)


@every_implementation
def test_all_entries_are_the_dense_kl(implementation):
    """With the whole vocabulary stored every kind is forward KL, value and gradient."""
    p = make_problem(SHAPES["untied_padded"], seed=2)

    def dense(hidden, head):
        sides = (hidden, head, p.teacher_hidden, p.teacher_head, p.labels, p.weight)
        total, values = linear_divergence(*sides, [forward_kl(Loss())], [1.0], 1.3, implementation="xla")
        return total, values[0]

    (total, values), gradients = jax.jit(jax.value_and_grad(dense, (0, 1), has_aux=True))(p.hidden, p.head)
    want = (total, values, gradients[0], gradients[1].weight)
    got = with_gradients(implementation, p, stored_of(p, k=13, tau=1.3), 1.3, tuple(KINDS))
    compare(got, dict.fromkeys(KINDS, want))


@every_implementation
@pytest.mark.parametrize(("k", "kinds"), [(13, tuple(KINDS)), (5, ("ghost_tail",))])
def test_nothing_to_learn_from_oneself(implementation, k, kinds):
    """student == teacher: value and gradient 0 with all entries stored, and for the ghost tail with any."""
    p = make_problem(SHAPES["untied_padded"], seed=4)
    p = dataclasses.replace(p, teacher_hidden=p.hidden, teacher_oracle=p.oracle)
    got = with_gradients(implementation, p, stored_of(p, k=k), kinds=tuple(KINDS))
    for kind in kinds:
        for array, limit in zip(got[kind], (1e-5, 2e-6, 2e-6, 1e-5), strict=True):
            np.testing.assert_allclose(array, 0, atol=limit, err_msg=kind)


TOY = np.array([2.0, 1, 0, -1, -2]), np.array([0.5, 1.5, -0.5, 0, -1])  # teacher and student logits (sekd 9)
SOFT = [np.exp(oracle.log_softmax(logits)) for logits in TOY]
TOY_KL, TOY_ENTROPY = 0.4778198667, 0.9999728283


def toy(ids, numbers, weight):
    """Rows that all have the toy student's logits."""
    p = dataclasses.replace(logits_problem(np.tile(TOY[1], (len(weight), 1))), weight=jnp.asarray(weight, jnp.float32))
    entropy = jnp.full(len(weight), TOY_ENTROPY, jnp.float32)
    return p, Stored(jnp.asarray(ids, jnp.int32), jnp.asarray(numbers, jnp.float32), None, entropy)


@each_on_the_cpu
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("flattening", [1.0, 0.5])
def test_sampled_is_unbiased(implementation, draws, flattening):
    """The exact mean over all outcomes: KL(p || q) and q - p, for any number of draws, from p or from p^0.5."""
    proposal = SOFT[0] ** flattening / (SOFT[0] ** flattening).sum()
    outcomes = np.array(list(itertools.product(range(5), repeat=draws)))
    chance = proposal[outcomes].prod(-1)
    numbers = (SOFT[0] / proposal)[outcomes] / draws  # 1 / draws each if the proposal is p
    total, _, d_hidden, _ = with_gradients(implementation, *toy(outcomes, numbers, chance))["sampled"]
    np.testing.assert_allclose(total, TOY_KL, rtol=1e-5)
    np.testing.assert_allclose(d_hidden.sum(0), SOFT[1] - SOFT[0], atol=1e-6)


@each_on_the_cpu
def test_the_others_are_biased(implementation):
    """Measured on the toy's top 2: how far the gradient is from that of KL, relative to it."""
    exact, bias = SOFT[1] - SOFT[0], {}
    got = with_gradients(implementation, *toy([[0, 1]], [SOFT[0][:2]], [1.0]))
    for kind in ("renormalised", "zero_tail", "ghost_tail"):
        off = oracle.f64(got[kind][2])[0] - exact
        bias[kind] = np.linalg.norm(off) / np.linalg.norm(exact)
        assert (np.abs(off[:2]).max() < 1e-6) == (kind == "ghost_tail")
    np.testing.assert_allclose(list(bias.values()), [0.250356, 0.199916, 0.107494], rtol=1e-4)
    assert 0 < got["ghost_tail"][0] < TOY_KL


@each_on_the_cpu
def test_without_the_teacher_entropy(implementation):
    """That of the entries stands in for it: 0 where they are the student's own distribution."""
    p, stored = toy([[0, 1, 2, 3, 4], [1, 1, 3, 3, 3]], [SOFT[1], [0.25, 0.25, 0.1, 0.1, 0.3]], [1.0, 1.0])
    values = run(implementation, p, dataclasses.replace(stored, teacher_entropy=None))["sampled"][1]
    want = [0.0, np.log(0.5) - 0.5 * np.log(SOFT[1][1] * SOFT[1][3])]
    np.testing.assert_allclose(values, want, rtol=1e-6, atol=1e-6)


@every_implementation
def test_ghost_tail_at_saturated_masses(implementation):
    """Tails from 1 to e^-1000 on either side: the student's is a sum, and the teacher's is what it is said to be."""
    depth = np.array([0, 5, 20, 69, 1e3])
    student, teacher = (np.zeros((25, 5)) for _ in range(2))
    student[:, 2:], teacher[:, 2:] = -np.repeat(depth, 5)[:, None], -np.tile(depth, 5)[:, None]
    student[:, 4] += 1  # within the tail, too, the student has preferences
    student = np.concatenate([student, -student])  # and all the mass in the tail
    p, stored = logits_problem(student), top(np.concatenate([teacher, teacher]), 2, tail=True)
    got = with_gradients(implementation, p, stored)
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(got))
    compare(got, expected(p, stored))
    guessed = run(implementation, p, dataclasses.replace(stored, tail=None))["ghost_tail"][1]
    # 1 - sum probs is good to a few of the last bits of 1, and each costs its share of the student's -1000 nats.
    np.testing.assert_allclose(guessed, got["ghost_tail"][1], rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd", "skew_kl"])
def test_what_would_be_biased_is_refused(kind):
    """Not silently replaced by forward KL."""
    p = make_problem(SHAPES["tied"])
    entries = inputs(p, stored_of(p))[3][:2]
    with pytest.raises(ValueError, match=f"^kind must be one of .*, got '{kind}'; .*biased. Set one of these"):
        sparse_divergence(p.hidden, p.head, *entries, p.weight, kind)
