"""The figures of answers to questions, from forward passes of the student: one for a question and several answers.

d_A, d_Q: mean NLL over A and over Q but its first token. With u_t the tapped state and mu = mean u_t / ||u_t||, the
mean cosine of all pairs of two sides is the product of their means: sim_aa = ||mu_A||^2, sim_aq = <mu_A, mu_Q>; no pair
is ever formed. What concerns the head (H, its product with the question's gradient, Brier terms, ranks) is exact, see
kernels/head_gradient. Float32 on the device whatever the student's dtype, nats.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from kdjax import config, registry
from kdjax.curation.answers.encode import Encoded, EncodedAnswer
from kdjax.curation.answers.layout import GROUP, AnswerBatch, Group, Shape, arrays_of, groups_of
from kdjax.data import fed_places, on_mesh
from kdjax.kernels.head_gradient import HeadGradient, answer_gradient, implementation_of
from kdjax.kernels.linear_stats import linear_stats
from kdjax.models.shared_prefix import DEFAULT, TAPS
from kdjax.sharding import Rules
from kdjax.step import LanguageModel, side_specs
from kdjax.types import Array, Batch, Head, Params, gather_slots

ROOM = 2048  # tokens of a call on one device: enough rows for efficient products
RANKS = 100  # a rank counts as this at most
TOP = 50  # entries of top_brier
TINY = 1e-12  # the least norm of a state

# name -> what it is; A, Q the answer's and the question's tokens that count, e = softmax - onehot, h the final state
FIGURES: dict[str, str] = {
    "n_answer": "tokens in A",
    "n_question": "tokens in Q; without any, sim_aq, sim_qq, question_nll and head_cross are 0",
    "answer_nll": "d_A, mean over A, nats",
    "question_nll": "d_Q, mean over Q without the first token of the text, nats",
    "sim_aa": "mean cosine of the tapped states, A x A, each with itself included",
    "sim_aq": "the same, A x Q",
    "sim_qq": "the same, Q x Q",
    "brier": "mean over A of ||e||^2",
    "el2n": "mean over A of ||e||",
    "logit_norm": "sum over A of ||e||^2, over n^2: of the gradient in the logits, squared",
    "head_diagonal": "sum over A of ||e||^2 ||h||^2, over n^2",
    "head_norm": "H = ||grad_head d_A||^2",
    "head_cross": "<grad_head d_A, grad_head d_Q>",
    "head_question": "||grad_head d_Q||^2",
    "rank_sum": f"sum over A of min(rank, {RANKS}); 1 is the most likely token",
    "top_brier": f"mean over A of ||e||^2 with the {TOP} most likely entries, renormalised, for softmax; costs a pass",
}
SIMILARITIES = ("sim_aa", "sim_aq", "sim_qq")
USUAL = tuple(name for name in FIGURES if name != "top_brier")


def usual_figures(model: LanguageModel) -> tuple[str, ...]:
    """What a pass gives at no cost worth naming; of a model whose layers kdjax does not know, no similarities."""
    return tuple(name for name in USUAL if model.shared is not None or name not in SIMILARITIES)


OnCall = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFigures:
    """Of the tokens in A, each [n_answer]: nll in nats, brier = ||e||^2, rank, share of H; the shares sum to it."""

    nll: np.ndarray
    brier: np.ndarray
    rank: np.ndarray
    share: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """An answer's figures by name, all NaN with an error (a key of encode.REASONS)."""

    id: str
    row: str
    teacher: str
    figures: dict[str, float]
    error: str = ""
    tokens: TokenFigures | None = None


AnswerScorer = Callable[..., Iterator[Scored]]  # (student_params, questions, on_call=None)


def make_answer_scorer(
    model: LanguageModel,
    answers: config.Answers,
    seq_len: int,
    rules: Rules = Rules(),
    *,
    figures: Collection[str] = USUAL,
    tokens: bool = False,
    room: int = ROOM,
) -> AnswerScorer:
    """scorer(student_params, questions, on_call=None) -> a `Scored` of every answer, as calls come back, in any order.

    questions: an iterable of `Encoded`, read as calls are filled; what is held is a few calls, and the rows that wait
    for their like. Calls differ in shape by powers of two alone. The figures depend neither on these shapes nor on
    neighbours, order or mesh, but for rounding. figures: those wanted, keys of FIGURES. tokens: whether each answer
    comes with its `TokenFigures`. room: tokens of a call on each device. on_call(answers, places computed): after each.
    Raises ValueError for unknown figures and taps, and for similarities of a model whose layers kdjax does not know.
    """
    for name in figures:
        registry.lookup(FIGURES, name, "figures")
    registry.lookup(TAPS, answers.tap or DEFAULT, "answers.tap")
    shared = model.shared is not None
    if not shared and any(name in SIMILARITIES for name in figures):
        raise ValueError(
            f"answers.score must not need {', '.join(SIMILARITIES)} with a student of a Flax module; kdjax does not "
            "know its layers, so no states can be tapped. Set it to 'head_norm' or 'grape'."
        )
    step = make_answer_step(model, answers, rules, figures, tokens)
    largest = GROUP if shared else 1

    def scorer(student_params: Params, questions: Iterable[Encoded], on_call: OnCall | None = None) -> Iterator[Scored]:
        pending: tuple[Shape, list[Group], Any] | None = None

        def fetched(shape: Shape, groups: list[Group], sent: Any) -> Iterator[Scored]:
            found = list(_scored(groups, jax.device_get(sent), figures, tokens))
            if on_call is not None:
                on_call(len(found), shape.tokens * shape.rows * rules.batch_shards)
            yield from found

        for call in _calls(questions, seq_len, room, largest, rules.batch_shards):
            if isinstance(call, Encoded):
                yield from (_refused(call, each, each.error, figures) for each in call.answers if each.error)
                continue
            shape, groups = call
            host = arrays_of(groups, shape, shape.rows * rules.batch_shards, shared)
            sent = step(student_params, _placed(host, rules))
            if pending is not None:
                yield from fetched(*pending)  # while the device works on the next call
            pending = shape, groups, sent
        if pending is not None:
            yield from fetched(*pending)

    return scorer


def make_answer_step(
    model: LanguageModel, answers: config.Answers, rules: Rules, figures: Collection[str], tokens: bool
) -> Callable[[Params, AnswerBatch], tuple[dict[str, Array], dict[str, Array]]]:
    """The jitted (student_params, batch) -> (figures [B, M] by name, those of tokens [B, M, A]); whole on all devices.

    The counts are not among them. Positions that do not count have figures of no meaning.
    """
    spec = side_specs(model, rules)
    computed = {*figures, "rank_sum"} if tokens else set(figures)

    def local(
        split: str | None, hidden: Array, head: Head, states: Array | None, batch: AnswerBatch
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        ((hidden, head),) = rules.with_heads([(hidden, head)], [spec])
        found, of_tokens = _head_figures(hidden, head, batch, computed, rules.kernels)
        if states is not None:
            found |= _similarities(states, batch, answers.alignment, split)
        return found, of_tokens if tokens else {}

    def answer_step(params: Params, batch: AnswerBatch) -> tuple[dict[str, Array], dict[str, Array]]:
        row = batch.tokens, batch.segment_ids, batch.positions
        states, state_spec, split = None, None, None
        if model.shared is None:
            hidden = model.hidden(params, _as_batch(batch))
        else:
            parts = {"question": batch.question_place.shape[1], "answers": batch.answer_place.shape[1]}
            hidden, states = model.shared(params, *row, **parts, tap=answers.tap)
            if not any(name in SIMILARITIES for name in figures):
                states = None
            elif rules.mesh is not None:
                state_spec = jax.typeof(states).sharding.spec
                split = state_spec[2]
        batch_specs = jax.tree.map(lambda a: rules.batch_spec(a.ndim), batch)
        out_specs = rules.batch_spec(2), rules.batch_spec(3)
        run = rules.rowwise(functools.partial(local, split), (spec[0], spec[1], state_spec, batch_specs), out_specs)
        found = run(hidden, model.head(params), states, batch)
        return jax.tree.map(lambda a: rules.reshard(a, P()), found)

    return jax.jit(answer_step)


def _head_figures(
    hidden: Array, head: Head, batch: AnswerBatch, figures: Collection[str], kernels: str | None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """What the head's kernel gives, for the rows of one device."""
    b, m, a = batch.answer_place.shape
    flat = (b, m * a)
    labels = gather_slots(batch.tokens, batch.answer_place.reshape(flat)).reshape(b * m, a)
    slots = gather_slots(hidden, batch.answer_before.reshape(flat)).reshape(b * m, a, -1)
    inside = batch.answer_in.reshape(b * m, a)
    asked = gather_slots(hidden, batch.question_before), gather_slots(batch.tokens, batch.question_place)
    weights, asked_weights = _mean_weights(inside), _mean_weights(batch.question_told)
    ranked = "rank_sum" in figures
    implementation = implementation_of(kernels)
    found = answer_gradient(
        slots, head, labels, weights, question=(*asked, asked_weights), rank=ranked, implementation=implementation
    )
    brier = jnp.where(inside, found.brier, 0.0)
    nll = jnp.where(inside, -found.label_logp, 0.0)
    asked_nll = jnp.where(batch.question_told, -_present(found.question_label_logp), 0.0)
    each = {
        "answer_nll": jnp.sum(weights * nll, 1),
        "brier": jnp.sum(weights * brier, 1),
        "el2n": jnp.sum(weights * jnp.sqrt(brier), 1),
        "logit_norm": jnp.sum(weights * weights * brier, 1),
        "head_diagonal": jnp.sum(weights * weights * jnp.where(inside, found.token_norm, 0.0), 1),
        "head_norm": found.norm,
        "head_cross": _present(found.cross),
        "question_nll": jnp.repeat(jnp.sum(asked_weights * asked_nll, 1), m),
        "head_question": jnp.repeat(_present(found.question_norm), m),
    }
    if ranked:
        each["rank_sum"] = jnp.sum(jnp.where(inside, jnp.minimum(_present(found.rank), RANKS), 0), 1)
    if "top_brier" in figures:
        top = _top_brier(slots, head, labels, kernels)
        each["top_brier"] = jnp.sum(weights * jnp.where(inside, top, 0.0), 1)
    return {name: value.reshape(b, m) for name, value in each.items()}, _of_tokens(found, (b, m, a))


def _of_tokens(found: HeadGradient, shape: tuple[int, int, int]) -> dict[str, Array]:
    each = {"nll": -found.label_logp, "brier": found.brier, "rank": found.rank, "share": found.share}
    return {name: value.reshape(shape) for name, value in each.items() if value is not None}


def _top_brier(hidden: Array, head: Head, labels: Array, kernels: str | None) -> Array:
    """[R, A]: ||p - onehot||^2 with p the TOP most likely entries, renormalised; a label beyond them has none of it."""
    r, a, width = hidden.shape
    entries = min(TOP, head.vocab_size)
    flat = labels.reshape(-1)
    top = linear_stats(hidden.reshape(r * a, width), head, flat, top_k=entries, implementation=kernels).top
    ids, logp = _present(top).ids, _present(top).logp
    p = jnp.exp(logp - logp[:, :1])
    p = p / jnp.sum(p, 1, keepdims=True)
    of_label = jnp.sum(jnp.where(ids == flat[:, None], p, 0.0), 1)
    return (jnp.sum(p * p, 1) - 2 * of_label + 1).reshape(r, a)


def _similarities(states: Array, batch: AnswerBatch, alignment: str, split: str | None) -> dict[str, Array]:
    """sim_aa, sim_aq, sim_qq [B, M] by the means of the unit vectors. split: the mesh axis that cuts their width."""
    b, m, a = batch.answer_place.shape
    read = alignment == "token"
    at = (batch.answer_place if read else batch.answer_before).reshape(b, m * a)
    asked_at = batch.question_place if read else batch.question_before
    asked_in = batch.question_in if read else batch.question_told

    def over_width(parts: Array) -> Array:
        total = jnp.sum(parts, -1)
        return jax.lax.psum(total, split) if split else total

    def mean_direction(places: Array, inside: Array) -> Array:
        """[B, X, F] of inside [B, X, N] at places [B, X N]."""
        wide = gather_slots(states, places).astype(jnp.float32).reshape(*inside.shape, -1)
        weights = _mean_weights(inside) / jnp.maximum(jnp.sqrt(over_width(wide * wide)), TINY)
        return jnp.einsum("bxn,bxnf->bxf", weights, wide, precision=jax.lax.Precision.HIGHEST)

    own, asked = mean_direction(at, batch.answer_in), mean_direction(asked_at, asked_in[:, None])
    return {
        "sim_aa": over_width(own * own),
        "sim_aq": over_width(own * asked),
        "sim_qq": jnp.broadcast_to(over_width(asked * asked), (b, m)),
    }


def _mean_weights(inside: Array) -> Array:
    """1 / n where the last axis counts, n in number; all 0 if n is 0."""
    count = jnp.sum(inside, -1, keepdims=True, dtype=jnp.float32)
    return jnp.where(inside, 1.0 / jnp.maximum(count, 1.0), 0.0)


def _present(value: Any) -> Any:
    if value is None:
        raise ValueError("head_gradient must give what it was asked for, got None.")
    return value


def _as_batch(batch: AnswerBatch) -> Batch:
    """What a model reads that takes a row as it is."""
    rows = jnp.zeros(batch.tokens.shape[0], jnp.int32)
    mask = jnp.zeros(batch.tokens.shape, bool)
    return Batch(
        batch.tokens, batch.segment_ids, batch.positions, mask, row_id=rows, epoch=rows, weight=rows.astype(jnp.float32)
    )


def _placed(host: AnswerBatch, rules: Rules) -> AnswerBatch:
    if rules.mesh is None:
        return jax.tree.map(jnp.asarray, host)
    fed = fed_places(rules, len(host.tokens))
    return jax.tree.map(lambda column: on_mesh(column[fed], rules), host)


def _calls(
    questions: Iterable[Encoded], seq_len: int, room: int, largest: int, shards: int
) -> Iterator[tuple[Shape, list[Group]] | Encoded]:
    """Each question as it comes, full calls as they come about, at the end the others."""
    waiting: dict[Shape, list[Group]] = {}
    for encoded in questions:
        yield encoded
        for shape, group in groups_of(encoded, seq_len, room, largest):
            line = waiting.setdefault(shape, [])
            line.append(group)
            if len(line) == shape.rows * shards:
                yield shape, waiting.pop(shape)
    order = sorted(waiting, key=lambda shape: (shape.tokens, shape), reverse=True)
    for number, shape in enumerate(order):
        groups = waiting[shape]
        for smaller in order[number + 1 :]:  # what is left of a call costs nothing
            taken = waiting[smaller] if shape.holds(smaller) else []
            while taken and groups and len(groups) < shape.rows * shards:
                groups.append(taken.pop())
        if groups:
            yield shape, groups


def _scored(
    groups: list[Group],
    sent: tuple[dict[str, np.ndarray], dict[str, np.ndarray]],
    figures: Collection[str],
    tokens: bool,
) -> Iterator[Scored]:
    found, of_tokens = sent
    for row, group in enumerate(groups):
        question = int(group.of.question.counted.sum())
        for number, answer in enumerate(group.answers):
            counted = answer.tokens.counted
            count = int(counted.sum())
            known: dict[str, float] = {"n_answer": count, "n_question": question}
            known |= {name: float(value[row, number]) for name, value in found.items()}
            known = {name: known[name] for name in FIGURES if name in figures}
            if not all(map(math.isfinite, known.values())):
                yield _refused(group.of, answer, "not_finite", figures)
                continue
            parts = {name: value[row, number, : len(counted)][counted] for name, value in of_tokens.items()}
            each = TokenFigures(**parts) if tokens else None
            yield Scored(group.of.id, answer.row, answer.teacher, known, "", each)


def _refused(of: Encoded, answer: EncodedAnswer, error: str, figures: Collection[str]) -> Scored:
    unknown = {name: math.nan for name in FIGURES if name in figures}
    return Scored(of.id, answer.row, answer.teacher, unknown, error)
