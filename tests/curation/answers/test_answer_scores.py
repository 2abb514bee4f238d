"""Scores of answers: vectors and invariants of SCAS, its rivals against the formulas written out, and who has none."""

import math
import random
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.curation.answers.scores import SCORES, Context, lark_weights, rate

FAMILY = (
    "scas", "scas_no_diag", "c_aa", "c_aa_no_diag", "c_aq", "nll_weight", "similarity", "similarity_no_diag", "grape"
)  # fmt: skip


def from_states(a, q, d_a, d_q):
    """Figures by their definition: means of cosines over all pairs."""
    a, q = (np.asarray(side, float) / np.linalg.norm(side, axis=1, keepdims=True) for side in (a, q))
    pairs = {"sim_aa": np.mean(a @ a.T), "sim_aq": np.mean(a @ q.T), "sim_qq": np.mean(q @ q.T)}
    return {"n_answer": float(len(a)), "answer_nll": d_a, "question_nll": d_q} | {k: float(v) for k, v in pairs.items()}


def one(name, figures, **context):
    return rate(name, [figures], Context(**context))[0]


VECTORS = {  # the first two vectors of the method's reference
    "one": (
        ([[1, 0], [0, 1]], [[1, 0]], 2.0, 1.0),
        {"scas": 1.5, "scas_no_diag": 0.5, "c_aa": 2, "c_aa_no_diag": 0, "c_aq": 1, "nll_weight": 3, "similarity": 0.5,
         "similarity_no_diag": 0.25, "grape": 2},
    ),
    "two": (
        ([[3, 4], [-3, -4]], [[4, 3]], 1.5, 0.5),
        {"scas": 0, "scas_no_diag": -1.125, "c_aa": 0, "c_aa_no_diag": -2.25, "c_aq": 0, "nll_weight": 1.5,
         "similarity": 0, "similarity_no_diag": -0.5, "grape": 1.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("vector", VECTORS)
def test_vectors(vector):
    given, want = VECTORS[vector]
    figures = from_states(*given)
    assert {name: one(name, figures) for name in FAMILY} == pytest.approx(want, abs=1e-12)


numbers = st.floats(0.01, 6)


@st.composite
def answers(draw):
    """A question's answers from random states; the question is the same for all."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    width = draw(st.integers(1, 4))
    q, d_q = rng.normal(size=(draw(st.integers(1, 4)), width)), draw(numbers)
    return [
        from_states(rng.normal(size=(draw(st.integers(2, 5)), width)), q, draw(numbers), d_q)
        for _ in range(draw(st.integers(1, 6)))
    ]


@settings(max_examples=60)
@given(answers(), st.floats(0, 1))
def test_invariants_of_scas(question, share):
    scored = {name: rate(name, question, Context(share)) for name in FAMILY}
    for at, f in enumerate(question):
        d_a, d_q = f["answer_nll"], f["question_nll"]
        s = scored["scas"][at]
        assert -share * d_a * d_q - 1e-9 <= s <= scored["nll_weight"][at] + 1e-9
        assert s == pytest.approx((1 - share) * scored["c_aa"][at] + share * scored["c_aq"][at], abs=1e-10)
        n, off = f["n_answer"], scored["c_aa_no_diag"][at] / d_a**2
        assert (1 + (n - 1) * off) / n == pytest.approx(f["sim_aa"], abs=1e-10)
        assert -1e-12 <= f["sim_aa"] <= 1 + 1e-12
    assert rate("scas", question, Context(0.0)) == pytest.approx(scored["c_aa"], abs=1e-12)
    assert rate("scas", question, Context(1.0)) == pytest.approx(scored["c_aq"], abs=1e-12)
    whole = [  # ||d_A mu_A + d_Q mu_Q||^2
        c_aa + 2 * c_aq + f["question_nll"] ** 2 * f["sim_qq"]
        for c_aa, c_aq, f in zip(scored["c_aa"], scored["c_aq"], question, strict=True)
    ]
    two_thirds = rate("scas", question, Context(2 / 3))
    assert np.diff(whole) == pytest.approx(3 * np.diff(two_thirds), abs=1e-9)


def test_similarities_alone_order_answers_of_a_head_of_zeros():
    rng, log_v = np.random.default_rng(0), math.log(50)
    q = rng.normal(size=(4, 3))
    question = [from_states(rng.normal(size=(n, 3)), q, log_v, log_v) for n in (2, 5, 9)]
    for share in (0.0, 0.3, 1.0):
        similar = rate("similarity", question, Context(share))
        assert rate("scas", question, Context(share)) == pytest.approx([log_v**2 * s for s in similar], rel=1e-12)


def test_one_token_and_no_diagonal():
    figures = from_states([[1.0, 2.0]], [[1.0, 0.0]], 2.0, 1.0)
    assert one("c_aa", figures) == pytest.approx(4)
    for name in ("scas_no_diag", "c_aa_no_diag", "similarity_no_diag"):
        with pytest.warns(UserWarning, match=rf"answers\.score='{name}' is 0 in the part of the answer alone"):
            found = one(name, figures)
        share = {"scas_no_diag": 0.5 * 2 * 1, "c_aa_no_diag": 0, "similarity_no_diag": 0.5}[name]
        assert found == pytest.approx(share / math.sqrt(5))


def test_gradients_of_logits_and_their_bounds():
    """||d L_A / d logits||^2 = n^-2 sum ||e_t||^2, and sqrt(V / (V - 1)) (1 - p) <= ||e|| <= sqrt 2 min(1 - p, NLL)."""
    rng, v, n = np.random.default_rng(4), 11, 40
    with jax.enable_x64(True):
        logits, labels = jnp.asarray(rng.normal(0, 4, (n, v))), jnp.asarray(rng.integers(0, v, n))
        nll = lambda x: jnp.log(jnp.exp(x).sum(1)) - x[jnp.arange(n), labels]  # noqa: E731
        gradient = np.asarray(jax.grad(lambda x: nll(x).mean())(logits))
        each = np.asarray(jax.jacrev(lambda x: nll(x))(logits))[np.arange(n), np.arange(n)]
        losses = np.asarray(nll(logits))
    size, missed = np.linalg.norm(each, axis=1), 1 - np.exp(-losses)
    figures = {"brier": np.mean(size**2), "el2n": np.mean(size), "logit_norm": np.sum(size**2) / n**2, "n_answer": n}
    assert one("logit_norm", figures) == pytest.approx(np.sum(gradient**2), rel=1e-12)
    assert one("logit_norm", figures) * n == pytest.approx(one("brier", figures), rel=1e-12)
    assert one("el2n", figures) == pytest.approx(np.mean(size), rel=1e-12)
    assert (size >= math.sqrt(v / (v - 1)) * missed - 1e-12).all()
    assert (size <= math.sqrt(2) * np.minimum(missed, losses) + 1e-12).all()


def test_rank_surprisal():
    nll, ranks = np.array([0.5, 4.0, 9.0]), np.array([1, 30, 5000])
    figures = {"n_answer": 3.0, "answer_nll": nll.mean(), "rank_sum": float(np.minimum(ranks, 100).sum())}
    assert one("rsr", figures) == pytest.approx(131 / 13.5)
    assert one("rsr", figures | {"rank_sum": 3.0}) == pytest.approx(3 / nll.sum())  # all ranks 1: n / sum
    assert one("rsr", figures | {"answer_nll": 0.0}) == pytest.approx(131e12)
    assert SCORES["rsr"].lower


def test_head_scores():
    figures = {"head_norm": 2.5, "head_cross": -0.5, "n_answer": 4.0, "head_diagonal": 1.0, "gradient_norm": 7.0}
    want = {"head_norm": 2.5, "head_norm_tokens": 10.0, "head_norm_cross": 1.5, "head_diagonal": 1.0, "grand": 7.0}
    assert {name: one(name, figures) for name in want} == want


def test_lark_reads_a_whole_question():
    losses, briers = [0.5, 1.0, 2.5], [0.4, 0.5, 1.0]
    question = [{"answer_nll": x, "top_brier": y} for x, y in zip(losses, briers, strict=True)]
    total, mean = 4.0, 1.9 / 4.0
    want = [0.5 / total * (2 * 0.8 - mean), 1.0 / total * (2 * 0.5 - mean), 2.5 / total * (2 * 0.4 - mean)]
    assert rate("lark", question) == pytest.approx(want, rel=1e-12)
    unscored = [question[0], None, {"answer_nll": math.nan, "top_brier": 1.0}, *question[1:]]
    assert [x for x in rate("lark", unscored) if math.isfinite(x)] == pytest.approx(want, rel=1e-12)
    certain = rate("lark", [{"answer_nll": 0.0, "top_brier": 0.0}] * 2)
    assert np.isnan(certain).all()
    assert not SCORES["lark"].lower


def test_weights_of_lark():
    assert lark_weights([0.1, 0.9, 0.5, 0.3, 0.2], top=3) == pytest.approx([0, 0.7 / 1.1, 0.3 / 1.1, 0.1 / 1.1, 0])
    drawn = random.Random(3)
    for _ in range(50):
        scores = [drawn.gauss(0, 1) for _ in range(drawn.randint(4, 9))]
        weights, top = lark_weights(scores, 3), sorted(scores)[-3:]
        assert sum(weights) == pytest.approx(1)
        floor = sorted(scores)[-4]
        want = [(x - floor) / (3 * (statistics.mean(top) - floor)) if x in top else 0 for x in scores]
        assert weights == pytest.approx(want)
    assert lark_weights([0.5, 0.5, 0.5, 0.5], 2) == [0.5, 0.5, 0, 0]
    assert lark_weights([0.2, math.nan, 0.8], 3) == pytest.approx([0, 0, 1], abs=1e-7)
    assert lark_weights([0.4], 3) == [1.0]
    assert lark_weights([math.nan], 3) == [0.0]
    assert lark_weights([], 3) == []


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("missing", [None, math.nan, math.inf, "absent"])
def test_without_a_figure_there_is_no_score(name, missing):
    needs = SCORES[name].needs
    whole = dict.fromkeys(needs, 2.0)
    context = Context(first_share_slope=0.5)
    alone = rate(name, [whole, whole], context)
    assert np.isfinite(alone).all()
    for figure in needs:
        broken = {key: value for key, value in whole.items() if key != figure}
        if missing != "absent":
            broken[figure] = missing
        found = rate(name, [whole, broken, None, {}, whole], context)
        assert np.isnan(found[1:4]).all(), figure
        assert [found[0], found[4]] == alone, "the others keep theirs"


def test_scores_that_look_at_steps():
    figures = {"answer_nll": 1.5, "first_share": 0.2, "rest_logp": -1.1, "local_logp": -0.7}
    assert one("aslec_casl", figures, first_share_slope=-2.0) == pytest.approx(-1.5 + 0.4)
    assert (one("aslec_drop", figures), one("lalp", figures)) == (-1.1, -0.7)
    assert not any(SCORES[name].lower for name in ("aslec_casl", "aslec_drop", "lalp"))


def test_what_is_refused():
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=rf"answers\.question_share must be in \[0, 1\], got {share}"):
            Context(share)
    with pytest.raises(ValueError, match=r"answers\.score must be a known name .* Did you mean 'scas'\?"):
        rate("scaas", [])
    with pytest.raises(ValueError, match=r"answers\.score='aslec_casl' must have a slope, got none"):
        rate("aslec_casl", [])
    assert rate("scas", []) == []
