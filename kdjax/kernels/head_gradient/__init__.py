"""head_gradient: how large the gradient of an answer's loss in the head is, by a forward pass alone.

L_r = sum_t w_t (-log q_t[label_t]) of answer r has in the head the gradient G_r = sum_t w_t e_t h_t^T, with h_t the
hidden state that predicts and e_t = q_t - onehot(label_t), times the slope of soft cap and scale. So

    ||G_r||^2 = sum_{s,t} w_s w_t <e_s, e_t> <h_s, h_t>,    <e_s, e_t> = <q_s, q_t> - q_s[x_t] - q_t[x_s] + [x_s = x_t]

With w = 1/n this is the exact head norm H, which ranks a question's answers much as their whole gradients do. Of tied
embeddings it is the head's side alone: the input's side takes a backward pass. Under stop-gradient.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kdjax.kernels import _dispatch
from kdjax.kernels.head_gradient import reference, xla
from kdjax.kernels.head_gradient.api import HeadGradient, Rows
from kdjax.types import Head

__all__ = ["DECLINES", "IMPLEMENTATIONS", "HeadGradient", "answer_gradient", "implementation_of"]

IMPLEMENTATIONS = {"reference": reference.answer_gradient, "xla": xla.answer_gradient}
DECLINES: dict[str, _dispatch.Declines] = {}


def implementation_of(kernels: str | None) -> str | None:
    """This op's implementation under a setting for all vocabulary kernels, `mesh.kernels`; None = the platform's first.

    So too for kernels that other ops have and this one lacks. A misspelt name stays, and is refused at the call.
    """
    return _dispatch.or_default(IMPLEMENTATIONS, kernels)


def answer_gradient(
    hidden: Float[Array, "R T D"],
    head: Head,
    labels: Int[Array, "R T"],
    weights: Float[Array, "R T"],
    *,
    question: Rows | None = None,
    rank: bool = False,
    implementation: str | None = None,
) -> HeadGradient:
    """||d L_r / d head.weight||^2 of R weighted losses, and its product with their question's; no gradient.

    hidden: the states that predict the labels. weights: 1/n for a mean over n positions, 0 = not part of it: what such
    a position holds does not matter to norm, share and cross. question: (hidden [P, U, D], labels [P, U], weights
    [P, U]) of P questions; R = P M and the M answers of a question are neighbours, in the questions' order.
    A label outside the vocabulary gives NaN where it is read: label_logp and brier of its position and, if its weight
    is not 0, norm, share and cross of its answer.
    Raises ValueError unless R is a multiple of P and all hidden states are as wide.
    """
    _check(hidden, question)
    chosen = _dispatch.choose("head_gradient", IMPLEMENTATIONS, DECLINES, implementation, hidden, head)
    answers, asked, head = lax.stop_gradient(((hidden, labels, weights), question, head))
    if asked is None:  # for each answer one of no positions
        asked = (answers[0][:, :0], answers[1][:, :0], answers[2][:, :0])
    count, questions = hidden.shape[0], asked[0].shape[0]
    each = count // questions if questions else 1
    grouped = tuple(a.reshape(questions, each, *a.shape[1:]) for a in answers)
    of_answers, of_questions = chosen(grouped, asked, head, rank)
    result = jax.tree.map(lambda a: a.reshape(count, *a.shape[2:]), of_answers)
    result = _without_unknown_labels(dataclasses.replace(result, **of_questions), head, labels, weights, asked)
    if question is not None:
        return result
    return dataclasses.replace(result, cross=None, question_norm=None, question_label_logp=None, question_brier=None)


def _check(hidden: Array, question: Rows | None) -> None:
    if question is None:
        return
    (count, _, width), questions = hidden.shape, question[0].shape[0]
    if count % max(1, questions) or (questions == 0) != (count == 0):
        raise ValueError(
            f"hidden must hold as many answers for each of the {questions} questions, got {count}; neighbours share a "
            "question. Fill the groups up with answers of weight 0."
        )
    if question[0].shape[2] != width:
        raise ValueError(
            f"question's hidden states must be as wide as the answers' {width}, got {question[0].shape[2]}; both are "
            "read by one head. Take both from one model."
        )


def _without_unknown_labels(
    result: HeadGradient, head: Head, labels: Array, weights: Array, asked: Rows
) -> HeadGradient:
    known, known_q = _known(labels, head), _known(asked[1], head)
    whole, whole_q = jnp.all(known | (weights == 0), -1), jnp.all(known_q | (asked[2] == 0), -1)
    both = whole & jnp.repeat(whole_q, len(whole) // len(whole_q) if len(whole_q) else 1)
    valid = {"norm": whole, "share": whole[:, None], "cross": both, "question_norm": whole_q}
    valid |= dict.fromkeys(("token_norm", "label_logp", "brier"), known)
    valid |= dict.fromkeys(("question_label_logp", "question_brier"), known_q)
    fields: dict[str, Any] = {name: jnp.where(ok, getattr(result, name), jnp.nan) for name, ok in valid.items()}
    if result.rank is not None:
        fields["rank"] = jnp.where(known, result.rank, 0)
    return dataclasses.replace(result, **fields)


def _known(labels: Int[Array, "N X"], head: Head) -> Bool[Array, "N X"]:
    return (labels >= 0) & (labels < head.vocab_size)
