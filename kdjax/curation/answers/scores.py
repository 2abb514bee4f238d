"""What an answer costs the student, from its figures: one number per answer, for `answers.score`.

Figures are those of `scorer.py`, over the answer's positions A and the question's Q: d_A, d_Q mean NLL (`answer_nll`,
`question_nll`, nats), s_AA, s_AQ mean cosine of tapped states (`sim_aa`, `sim_aq`), H the exact squared norm of the
head's gradient (`head_norm`), e_t = softmax - onehot at a position. Three more come from `steps.py`: `local_logp`,
`rest_logp`, `first_share`; `gradient_norm` from `gradients.py`.

S (`scas`) is a heuristic: mean NLL squared times a mean cosine, plus a part with the question. It is no gradient norm;
H, the norm of the logits' gradient and `gradient_norm` are.

To add one: its formula and the figures that it reads, as a line in SCORES.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence

from kdjax import registry

Figures = Mapping[str, float | None]
Usable = Mapping[str, float]
SMALLEST = 1e-12


@dataclasses.dataclass(frozen=True)
class Context:
    """What a score reads besides figures.

    question_share: lambda of SCAS, in [0, 1]. first_share_slope: gamma of ASLEC-CASL, from `steps.fit_casl`.
    """

    question_share: float = 0.5
    first_share_slope: float = math.nan

    def __post_init__(self) -> None:
        if not 0 <= self.question_share <= 1:
            raise ValueError(
                f"answers.question_share must be in [0, 1], got {self.question_share}; it is the weight of the "
                "answer's part with the question. Set it to 0.5."
            )


@dataclasses.dataclass(frozen=True)
class AnswerScore:
    """of(figures of the usable answers to ONE question, context) -> their scores, in the same order.

    needs: the figures that are read; an answer without one of them has no score. lower: whether the answer of the
    lowest score is preferred.
    """

    of: Callable[[Sequence[Usable], Context], list[float]]
    needs: tuple[str, ...]
    lower: bool = True


def _each(of: Callable[..., float], *needs: str, lower: bool = True) -> AnswerScore:
    """A score of one answer by itself: of(its figures in the order of `needs`)."""
    return AnswerScore(lambda question, _: [of(*(f[name] for name in needs)) for f in question], needs, lower)


def _shared(of: Callable[..., float], *needs: str) -> AnswerScore:
    """As `_each`, of(lambda of SCAS, figures)."""
    return AnswerScore(
        lambda question, context: [of(context.question_share, *(f[name] for name in needs)) for f in question], needs
    )


def off_diagonal(sim_aa: float, n_answer: float) -> float:
    """The mean of cos_ij over i != j from that over all i, j: (n s_AA - 1) / (n - 1), and 0 for a single token."""
    return (n_answer * sim_aa - 1) / (n_answer - 1) if n_answer > 1 else 0.0


def _scas(share: float, d_a: float, d_q: float, s_aa: float, s_aq: float) -> float:
    """S = (1 - lambda) d_A^2 s_AA + lambda d_A d_Q s_AQ (arXiv 2605.26872)."""
    return (1 - share) * d_a**2 * s_aa + share * d_a * d_q * s_aq


def _no_diag(share: float, d_a: float, d_q: float, s_aa: float, s_aq: float, n: float) -> float:
    return _scas(share, d_a, d_q, off_diagonal(s_aa, n), s_aq)


def _rsr(ranks: float, d_a: float, n: float) -> float:
    """Sum over A of min(rank, 100), over the sum of the NLLs: surprising tokens that still rank high are cheap."""
    return ranks / max(d_a * n, SMALLEST)


def _lark(question: Sequence[Usable], _: Context) -> list[float]:
    """(L_k / sum L) (2 rho_k - sum rho_i L_i / sum L), rho = B / L of a question's answers (arXiv 2605.30651).

    L: mean NLL, B: mean Brier term of the 50 most likely entries, renormalised. NaN if all L are 0.
    """
    total = sum(f["answer_nll"] for f in question)
    if not total > 0:
        return [math.nan] * len(question)
    mean = sum(f["top_brier"] for f in question if f["answer_nll"] > 0) / total  # rho L = B
    ratios = [f["top_brier"] / f["answer_nll"] if f["answer_nll"] > 0 else 0.0 for f in question]
    return [f["answer_nll"] / total * (2 * rho - mean) for f, rho in zip(question, ratios, strict=True)]


def _casl(question: Sequence[Usable], context: Context) -> list[float]:
    """Mean log-probability - gamma * share of first tokens of steps (arXiv 2604.06834)."""
    return [-f["answer_nll"] - context.first_share_slope * f["first_share"] for f in question]


_SIMS = ("answer_nll", "question_nll", "sim_aa", "sim_aq")

SCORES: dict[str, AnswerScore] = {
    "scas": _shared(_scas, *_SIMS),  # S
    "scas_no_diag": _shared(_no_diag, *_SIMS, "n_answer"),  # S without the pairs of a token with itself
    "c_aa": _each(lambda d_a, s: d_a**2 * s, "answer_nll", "sim_aa"),  # S at lambda = 0
    "c_aa_no_diag": _each(lambda d_a, s, n: d_a**2 * off_diagonal(s, n), "answer_nll", "sim_aa", "n_answer"),
    "c_aq": _each(lambda d_a, d_q, s: d_a * d_q * s, "answer_nll", "question_nll", "sim_aq"),  # S at lambda = 1
    "nll_weight": _shared(lambda share, a, q: _scas(share, a, q, 1.0, 1.0), "answer_nll", "question_nll"),
    "similarity": _shared(lambda share, aa, aq: _scas(share, 1.0, 1.0, aa, aq), "sim_aa", "sim_aq"),
    "similarity_no_diag": _shared(
        lambda share, aa, aq, n: _no_diag(share, 1.0, 1.0, aa, aq, n), "sim_aa", "sim_aq", "n_answer"
    ),
    "grape": _each(lambda d_a: d_a, "answer_nll"),  # the most likely answer, 2502.04194
    "head_norm": _each(lambda h: h, "head_norm"),  # H = ||grad_head L_A||^2, exact
    "head_norm_tokens": _each(lambda h, n: h * n, "head_norm", "n_answer"),  # without the decay in 1 / n of a mean
    "head_norm_cross": _each(lambda h, aq: h + 2 * aq, "head_norm", "head_cross"),  # of L_A + L_Q, but a constant
    "head_diagonal": _each(lambda h: h, "head_diagonal"),  # H without pairs of different tokens
    "logit_norm": _each(lambda e: e, "logit_norm"),  # ||grad_logits L_A||^2
    "el2n": _each(lambda e: e, "el2n"),  # mean ||e_t||, 2107.07075
    "brier": _each(lambda e: e, "brier"),  # mean ||e_t||^2
    "grand": _each(lambda g: g, "gradient_norm"),  # ||grad L_A|| of all parameters, by a backward pass, 2107.07075
    "rsr": _each(_rsr, "rank_sum", "answer_nll", "n_answer"),  # 2601.14249
    "lark": AnswerScore(_lark, ("answer_nll", "top_brier"), lower=False),
    "lalp": _each(lambda m: m, "local_logp", lower=False),  # 2510.03988
    "aslec_drop": _each(lambda m: m, "rest_logp", lower=False),  # 2604.06834
    "aslec_casl": AnswerScore(_casl, ("answer_nll", "first_share"), lower=False),
}


def rate(name: str, question: Sequence[Figures | None], context: Context = Context()) -> list[float]:
    """The score `name` of each answer to one question; NaN where a figure that it needs is absent or not finite.

    None in place of figures: the answer could not be scored. What has no score takes no part in the others' scores, and
    never gets a number. Warns where a score without diagonal meets answers of one token: they lose that part of the
    cost. Raises ValueError for an unknown score, and for aslec_casl without its slope.
    """
    score = registry.lookup(SCORES, name, "answers.score")
    if name == "aslec_casl" and not math.isfinite(context.first_share_slope):
        raise ValueError(
            "answers.score='aslec_casl' must have a slope, got none; it is fitted over all answers. Fit it with "
            "steps.fit_casl and give it as Context.first_share_slope."
        )
    usable = [at for at, figures in enumerate(question) if figures is not None and _has(figures, score.needs)]
    chosen = [{key: float(question[at][key]) for key in score.needs} for at in usable]  # type: ignore[index, arg-type]
    if name.endswith("_no_diag") and any(figures["n_answer"] <= 1 for figures in chosen):
        warnings.warn(
            f"answers.score={name!r} is 0 in the part of the answer alone for an answer of one token, which is then "
            "preferred. Use the score with the diagonal.",
            stacklevel=2,
        )
    found = [math.nan] * len(question)
    for at, value in zip(usable, score.of(chosen, context), strict=True):
        found[at] = value if math.isfinite(value) else math.nan
    return found


def _has(figures: Figures, names: Sequence[str]) -> bool:
    values = [figures.get(name) for name in names]
    return all(value is not None and math.isfinite(value) for value in values)


def lark_weights(scores: Sequence[float], top: int = 3) -> list[float]:
    """What LARK trains on of K answers with what weight: q_k = (e_k - e_{top+1}) / (top (mean e - e_{top+1})).

    e: scores, the mean over the `top` highest; all others weigh 0, and the weights sum to 1. With K <= top, e_{top+1}
    is the lowest score less 1e-8, as released. Chosen scores that are all equal to it weigh the same. NaN is never
    chosen; all NaN: all weights are 0.
    """
    order = sorted((at for at, value in enumerate(scores) if math.isfinite(value)), key=lambda at: -scores[at])
    weights = [0.0] * len(scores)
    chosen = order[:top]
    if not chosen:
        return weights
    floor = scores[order[top]] if len(order) > top else scores[chosen[-1]] - 1e-8
    above = sum(scores[at] - floor for at in chosen)
    for at in chosen:
        weights[at] = (scores[at] - floor) / above if above > SMALLEST else 1 / len(chosen)
    return weights
