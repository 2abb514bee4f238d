"""The yardstick: exact gradients of an answer's mean loss, by a backward pass over all parameters.

Costs three forward passes and as much memory as the parameters, twice with the question's: to see what the forward-only
figures are worth, and for the scores that are made of projected gradients. On a mesh parameters, gradients and moments
stay as the rules store them.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from kdjax.config import Loss
from kdjax.curation.answers.encode import Encoded
from kdjax.curation.snr import project
from kdjax.data import fed_places, on_mesh
from kdjax.kernels.linear_divergence import linear_divergence
from kdjax.kernels.linear_stats import linear_stats
from kdjax.losses.cross_entropy import cross_entropy
from kdjax.sharding import Rules
from kdjax.step import LanguageModel, side_specs
from kdjax.types import Array, Batch, Head, Params

ROUND_UP = 32  # widths of rows, so that few programs compile
Row = tuple[np.ndarray, np.ndarray, np.ndarray]  # int32 [T] ids, bool [T] positions A, bool [T] positions Q
Value = Any  # an array of jax, on the host of numpy; None = not asked for
Leaves = dict[str, Callable[[Params], Array]]  # name -> the part of a parameter tree


@flax.struct.dataclass
class AnswerGradient:
    """float32 [] each. L_A, L_Q: mean NLL over A and over Q (nats); all norms and products are of whole gradients.

    norm: AA* = ||grad L_A||^2. cross: AQ* = <grad L_A, grad L_Q>. question_norm: QQ* = ||grad L_Q||^2. Hence
    ||grad (L_A + L_Q)||^2 = AA* + 2 AQ* + QQ*, and QQ* is the same for all answers to a question. leaves: of each named
    part, ||grad L_A||^2. projected: [D], `snr.project` of grad L_A.
    """

    answer_nll: Value
    norm: Value
    leaves: dict[str, Value]
    question_nll: Value = None
    cross: Value = None
    question_norm: Value = None
    projected: Value = None


def rows_of(encoded: Encoded) -> list[Row]:
    """The rows of a question with its answers, as the scorer reads them; answers with an error are left out."""
    q = encoded.question
    return [
        (
            np.concatenate([q.ids, each.tokens.ids]),
            np.concatenate([np.zeros(len(q.ids), bool), each.tokens.counted]),
            np.concatenate([q.counted, np.zeros(len(each.tokens.ids), bool)]),
        )
        for each in encoded.answers
        if not each.error
    ]


def last_layer(leaf: str = "w_up") -> Callable[[Params], Array]:
    """The part of our models' parameter trees that is this matrix of the last block."""
    return lambda params: params["layers"][leaf][-1]


def make_answer_gradient(
    model: LanguageModel,
    rules: Rules = Rules(),
    *,
    leaves: Leaves | None = None,
    question: bool = False,
    dimensions: int = 0,
    seed: int = 0,
) -> Callable[[Params, Array, Array, Array, Array], AnswerGradient]:
    """gradient(params, tokens, length, answer, question) of one row; tokens int32 [T] padded after `length`.

    answer, question: bool [T], the positions of A and Q; a token is predicted by the state before it, so position 0 has
    no loss. To be jitted; under `jax.vmap` over the last four it holds as many gradients as there are rows. Without
    `question` the second backward pass is left out. On a mesh each part of the batch axis has a copy of the row, which
    gives its share of the gradient: many devices make it fit, not fast. To be projected each leaf is gathered.
    """

    def gradient(params: Params, tokens: Array, length: Array, answer: Array, question_mask: Array) -> AnswerGradient:
        masks = (answer, question_mask) if question else (answer,)
        values, pull = jax.vjp(lambda p: _mean_nlls(model, rules, p, tokens, length, masks), params)
        one, zero = jnp.ones_like(values[0]), jnp.zeros_like(values[0])
        (own,) = pull((one, zero) if question else (one,))
        (other,) = pull((zero, one)) if question else (None,)
        return AnswerGradient(
            answer_nll=values[0],
            norm=_inner(own, own),
            leaves={name: _inner(part(own), part(own)) for name, part in (leaves or {}).items()},
            question_nll=values[1] if question else None,
            cross=_inner(own, other) if question else None,
            question_norm=_inner(other, other) if question else None,
            projected=project(_whole(own, rules), dimensions, seed) if dimensions else None,
        )

    return gradient


def make_gradient_pass(
    model: LanguageModel, rules: Rules = Rules(), *, finite: bool = True, **options: Any
) -> Callable[[Params, Iterable[Row]], Iterator[AnswerGradient]]:
    """run(params, rows) -> of each row the `AnswerGradient` on the host, one row at a time.

    options: those of `make_answer_gradient`. One program is compiled per width, a multiple of ROUND_UP. Raises
    ValueError for a row with an empty A (or an empty Q, if the question is asked for), and, with `finite`, for one with
    a gradient that is not finite.
    """
    gradient = jax.jit(make_answer_gradient(model, rules, **options))

    def run(params: Params, rows: Iterable[Row]) -> Iterator[AnswerGradient]:
        for at, (ids, answer, question) in enumerate(rows):
            asked = {"A": answer, "Q": question} if options.get("question") else {"A": answer}
            for name, mask in asked.items():
                if not mask[1:].any():
                    raise ValueError(
                        f"rows must have positions with a loss in {name}, got none in row {at} of {len(ids)} tokens. "
                        "Leave it out."
                    )
            room = -len(ids) % ROUND_UP
            padded = [np.pad(each, (0, room)) for each in (ids, answer, question)]
            found = jax.device_get(gradient(params, *_repeated((padded[0], np.int32(len(ids)), *padded[1:]), rules)))
            if finite and not np.isfinite(found.norm):
                raise ValueError(f"rows must have finite gradients, got one that is not in row {at}. Leave it out.")
            yield found

    return run


def make_gain(
    model: LanguageModel, optimiser: optax.GradientTransformation, probe: Sequence[Row], rules: Rules = Rules()
) -> Callable[[Params, Iterable[Row]], Iterator[float]]:
    """gain(params, rows) -> of each row by how much one update on it alone lowers the loss of the probe, nats.

    The loss of the probe: the mean over its rows of the mean NLL over A. The update is the optimiser's first one; it
    takes the memory of a gradient, two moments and the new parameters. One program is compiled per width of the rows.
    On a mesh the rows of the probe are split over it; of several processes all have to call. Raises ValueError for a
    probe without a row.
    """
    if not probe:
        raise ValueError("probe must hold rows, got none; a gain is measured on them. Set questions aside for it.")
    count, columns = len(probe), _padded(probe, rules.batch_shards)
    fed = fed_places(rules, len(columns[0]))
    split = tuple(on_mesh(column[fed], rules) for column in columns)

    def update(params: Params, row: tuple[Array, ...]) -> Params:
        tokens, length, answer = row
        own = jax.grad(lambda p: _mean_nlls(model, rules, p, tokens, length, (answer,))[0])(params)
        return optax.apply_updates(params, optimiser.update(own, optimiser.init(params), params)[0])

    updated, of_probe = jax.jit(update), jax.jit(functools.partial(_probe_loss, model, rules, count))

    def gain(params: Params, rows: Iterable[Row]) -> Iterator[float]:
        before = float(of_probe(params, *split))
        for row in rows:
            one = _repeated(tuple(column[0] for column in _padded([row])), rules)
            yield before - float(of_probe(updated(params, one), *split))

    return gain


def _padded(rows: Sequence[Row], parts: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids [P, T], lengths [P], A [P, T]); T a multiple of ROUND_UP, P of `parts` by empty rows at the end."""
    width, room = -(-max(len(ids) for ids, *_ in rows) // ROUND_UP) * ROUND_UP, -len(rows) % parts
    ids, answers = (np.stack([np.pad(row[at], (0, width - len(row[at]))) for row in rows]) for at in (0, 1))
    lengths = np.array([len(row[0]) for row in rows])
    ids, lengths, answers = (np.pad(a, [(0, room)] + [(0, 0)] * (a.ndim - 1)) for a in (ids, lengths, answers))
    return ids.astype(np.int32), lengths.astype(np.int32), answers


def _as_batch(tokens: Array, lengths: Array) -> Batch:
    """Rows [B, T] padded after their lengths, one document each."""
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    rows = jnp.zeros(tokens.shape[0], jnp.int32)
    return Batch(
        tokens=tokens,
        segment_ids=(places < lengths[:, None]).astype(jnp.int32),
        positions=places,
        loss_mask=jnp.zeros(tokens.shape, bool),
        row_id=rows,
        epoch=rows,
        weight=jnp.ones(tokens.shape[0]),
    )


def _mean_nlls(
    model: LanguageModel, rules: Rules, params: Params, tokens: Array, length: Array, masks: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Of one row [T] the mean NLL over each mask [T], to be differentiated."""
    copies = rules.batch_shards
    labels, places = jnp.roll(tokens, -1), jnp.arange(tokens.shape[0], dtype=jnp.int32)
    weights = []
    for mask in masks:
        at = jnp.roll(mask & (places > 0) & (places < length), -1).astype(jnp.float32)
        weights.append(at / (jnp.maximum(at.sum(), 1.0) * copies))

    def spread(row: Array) -> Array:
        return rules.reshard(jnp.broadcast_to(row, (copies, *row.shape)), rules.batch_spec(row.ndim + 1))

    def local(hidden: Array, head: Head, labels: Array, weights: Array) -> Array:
        ((hidden, head),) = rules.with_heads([(hidden, head)], [specs])
        flat, term = hidden.reshape(-1, hidden.shape[-1]), cross_entropy(Loss())
        each = [
            linear_divergence(
                flat, head, None, None, labels.reshape(-1), own, [term], [1.0], implementation=rules.kernels
            )[0]
            for own in weights.transpose(1, 0, 2).reshape(len(masks), -1)
        ]
        return rules.sum_over_batch(jnp.stack(each))

    specs = side_specs(model, rules)
    batch = jax.tree.map(spread, _as_row(tokens, length))
    run = rules.rowwise(local, (*specs, rules.batch_spec(2), rules.batch_spec(3)), P())
    found = run(model.hidden(params, batch), model.head(params), spread(labels), spread(jnp.stack(weights)))
    return tuple(found[number] for number in range(len(masks)))


def _as_row(tokens: Array, length: Array) -> Batch:
    """A row [T] as a batch without its first axis."""
    return jax.tree.map(lambda column: column[0], _as_batch(tokens[None], length[None]))


def _repeated(row: Any, rules: Rules) -> Any:
    """The same on all devices; every process has it."""
    if rules.mesh is None:
        return row
    whole = NamedSharding(rules.mesh, P())
    return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, whole, lambda index: a[index]), row)


def _whole(tree: Any, rules: Rules) -> Any:
    return jax.tree.map(lambda leaf: rules.reshard(leaf, P()), tree)


def _probe_loss(
    model: LanguageModel, rules: Rules, count: int, params: Params, tokens: Array, lengths: Array, answers: Array
) -> Array:
    """The sum over rows of the mean NLL over A, by `count`; an empty row adds nothing."""

    def local(hidden: Array, head: Head, labels: Array, at: Array) -> Array:
        ((hidden, head),) = rules.with_heads([(hidden, head)], [specs])
        flat = hidden.reshape(-1, hidden.shape[-1])
        found = linear_stats(flat, head, labels.reshape(-1), implementation=rules.kernels)
        nll = -found.label_logp.reshape(labels.shape)
        means = jnp.sum(jnp.where(at, nll, 0.0), 1) / jnp.maximum(jnp.sum(at, 1), 1)
        return rules.sum_over_batch(jnp.sum(means))

    specs = side_specs(model, rules)
    hidden, head = model.hidden(params, _as_batch(tokens, lengths)), model.head(params)
    labels, at = (jnp.roll(a, -1, axis=1) for a in (tokens, answers))
    run = rules.rowwise(local, (*specs, rules.batch_spec(2), rules.batch_spec(2)), P())
    return run(hidden, head, labels, at) / count


def _inner(one: Any, other: Any) -> Float[Array, ""]:
    """<one, other> over all leaves, float32."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return sum((jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32)) for a, b in pairs), start=jnp.zeros(()))
