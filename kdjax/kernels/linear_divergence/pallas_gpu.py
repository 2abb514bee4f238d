"""Mosaic GPU (Hopper): logits stay in registers; their gradient is formed in the forward pass, in bfloat16.

Passes of tiles over the vocabulary (`_gpu.vocab_pass`), each a product with the student's head, the teacher's or both:
  1 normalisers  per side: max and log-sum of the logits of each row, at the temperatures in use.
  2 values       each term's value per row; with a gradient also c = sum_v slope_v, where it is no constant.
  3 gradient     for some rows at a time, [C, V] in bfloat16, from which XLA's (cuBLAS's) matrix products make d_hidden
                 and d_weight, added up over the rows. If c is a constant of all terms, this gives the values, not 2.
C is such that [C, V] has about `CHUNK_BYTES`: enough rows for the products to outweigh the additions to d_weight.

Counted, not measured. Matrix products of N x D x V per call (E: the teacher's width): 2 D + 2 E for the value alone,
with gradient 4 D + 2 E if c is a constant, else 5 D + 3 E. xla.py has D + E and 3 D + E, and moves all logits in
float32, some 50 B per (row, column); here it is 6 B, of the gradient. With 295 FLOP per B on an H100, 2 (D + E) FLOP
against 44 B pay up to D + E of about 6000; 2 (2 D + 2 E) FLOP, where c is not a constant, up to about 3000.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kdjax.kernels import _gpu, _gpu_block_sizes
from kdjax.kernels._gpu import MASKED, START, along
from kdjax.kernels._gpu_block_sizes import GROUP, SLICE
from kdjax.kernels.linear_divergence.api import Pair, Term
from kdjax.kernels.linear_divergence.row_scalars import row_scalars
from kdjax.kernels.tiles import formed_gradients, head_width, split_rows, sum_over_axis
from kdjax.types import Head

CHUNK_BYTES = 256 * 2**20  # of the gradient of the logits: 768 rows at V = 151936

declines = _gpu.declines

# All that has no gradient: teacher_hidden, teacher_head, labels, weight, coefficients, tau, row scalars.
Rest = tuple[Array | None, Head | None, Array, Array, Array, Array, tuple[Array, ...]]
Numbers = dict[str, Array]  # of each row [N], by name; in a kernel [64]


def linear_divergence(
    hidden: Float[Array, "N D"],
    head: Head,
    teacher_hidden: Float[Array, "N E"] | None,
    teacher_head: Head | None,
    labels: Int[Array, "N"],
    weight: Float[Array, "N"],
    terms: tuple[Term, ...],
    coefficients: Float[Array, "M"],
    tau: Float[Array, ""],
    given: Float[Array, "N"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, "M N"]]:
    """See the package."""
    if hidden.shape[0] == 0:
        return jnp.zeros((), jnp.float32), jnp.zeros((len(terms), 0), jnp.float32)
    scalars = row_scalars(terms, *lax.stop_gradient((hidden, head)), teacher_hidden, teacher_head, labels, tau, given)
    rest = (teacher_hidden, teacher_head, labels, weight, coefficients, tau, scalars)
    total, values = _divergence(terms, hidden, head, rest)
    return total, lax.stop_gradient(values)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(terms: tuple[Term, ...], hidden: Array, head: Head, rest: Rest) -> tuple[Array, Array]:
    return _passes(terms, hidden, head, rest, False)[:2]


def _forward(terms: tuple[Term, ...], hidden: Array, head: Head, rest: Rest) -> tuple[Any, Any]:
    total, values, d_hidden, d_weight = _passes(terms, hidden, head, rest, True)
    return (total, values), (d_hidden.astype(hidden.dtype), d_weight.astype(head.weight.dtype), head, rest)


def _backward(terms: tuple[Term, ...], kept: Any, cotangents: Any) -> tuple[Array, Head, Any]:
    return formed_gradients(kept, cotangents[0])


_divergence.defvjp(_forward, _backward)


def _passes(
    terms: tuple[Term, ...], hidden: Array, head: Head, rest: Rest, differentiate: bool
) -> tuple[Array, Array, Array, Array]:
    """(total, values [M, N], d_hidden [N, D], d_weight); without differentiation both gradients are 0."""
    teacher_hidden, teacher_head, labels, weight, coefficients, tau, asked = rest
    sides = [("q", hidden, head)]
    if teacher_hidden is not None and teacher_head is not None:
        sides.append(("p", teacher_hidden, teacher_head))
    temperatures = jnp.stack([tau if term.tempered else jnp.ones_like(tau) for term in terms])
    scalars = {"limit": _gpu.local_columns(head), "tau": 1.0 / tau}
    scalars |= {
        f"scale{m}": coefficients[m] * temperatures[m] for m in range(len(terms))
    }  # tau^2, and 1/tau of the chain
    numbers = {"label": _gpu.local_labels(head, labels), "weight": weight.astype(jnp.float32)}
    for m, found in enumerate(asked):
        numbers |= {f"row{m}.{k}": found[:, k] for k in range(found.shape[1])}
    for name, x, w in sides:
        reads = {term.tempered for term in terms if name == "q" or term.teacher}
        numbers |= _normalisers(name, x, w, sorted(reads), scalars)

    run = partial(_pass, terms, sides=sides, scalars=scalars)
    asks = [m for m, term in enumerate(terms) if term.gradient_sum is None]  # whose c has to be summed up first
    d_hidden = d_weight = jnp.zeros((), jnp.float32)
    values: list[Array] = []
    if not differentiate or asks:
        sums, _ = run(numbers, values=True, slopes=asks if differentiate else [], gradient=False)
        values = sums[: len(terms)]
        numbers |= {f"c{m}": c for m, c in zip(asks, sums[len(terms) :], strict=False)}
    if differentiate:
        from_here, d_hidden, d_weight = _gradients(run, numbers, sides, values=not asks)
        values = values or from_here
    stacked = jnp.stack(values)
    scales = coefficients * temperatures * temperatures
    total = jnp.sum(jnp.where(weight != 0, weight * jnp.sum(scales[:, None] * stacked, 0), 0.0))
    return total, stacked, d_hidden, d_weight


def _normalisers(name: str, hidden: Array, head: Head, temperings: list[bool], scalars: Numbers) -> Numbers:
    """max z, and per temperature log sum exp((z - max z) / t), of each row; over all devices."""
    names = [f"log{name}{int(tempered)}" for tempered in temperings]

    def start() -> Numbers:
        return {"top": jnp.full(GROUP, START, jnp.float32)} | {key: jnp.zeros(GROUP, jnp.float32) for key in names}

    def tile(
        state: Numbers, logits: list[Array], column: Array, rows: list[Array], known: list[Array], _: Any
    ) -> Numbers:
        z = jnp.where(column < known[0].astype(jnp.int32), logits[0], MASKED)
        top = jnp.maximum(state["top"], jnp.max(z, 1))
        moved = {"top": top}
        for key, tempered in zip(names, temperings, strict=True):
            by = known[1] if tempered else 1.0
            moved[key] = state[key] * jnp.exp((state["top"] - top) * by)
        for at in range(0, z.shape[1], SLICE):
            x = z[:, at : at + SLICE]
            x = x - along(top, x)
            for key, tempered in zip(names, temperings, strict=True):
                moved[key] += jnp.sum(jnp.exp(x * known[1] if tempered else x), 1)
        return moved

    known = jnp.stack([scalars["limit"], scalars["tau"]])
    nothing = jnp.zeros((1, hidden.shape[0]), jnp.float32)
    parts, _ = _gpu.vocab_pass([(hidden, head)], nothing, known, start, tile, name="linear_divergence_normalisers")
    state = dict(zip(sorted(["top", *names]), jnp.moveaxis(parts, 1, 0), strict=True))
    top = jnp.max(state["top"], 0)
    if head.vocab_axis is not None:
        top = lax.pmax(top, head.vocab_axis)
    found = {f"top{name}": top}
    for key, tempered in zip(names, temperings, strict=True):
        by = scalars["tau"] if tempered else 1.0
        sums = jnp.sum(state[key] * jnp.exp((state["top"] - top[None, :]) * by), 0)
        found[key] = jnp.log(sum_over_axis(sums, head.vocab_axis))
    return found


def _pass(
    terms: tuple[Term, ...],
    numbers: Numbers,
    *,
    sides: Sequence[tuple[str, Array, Head]],
    scalars: Numbers,
    values: bool,
    slopes: list[int],
    gradient: bool,
) -> tuple[list[Array], Array]:
    """Per row the terms' values, if wanted, and sums of slopes of the terms `slopes`; d total / d product [M, W]."""
    head, axis = sides[0][2], sides[0][2].vocab_axis
    wanted = [f"value{m}" for m in range(len(terms)) if values] + [f"slope{m}" for m in slopes]
    row_names, scalar_names = list(numbers), list(scalars)

    def start() -> Numbers:
        return {name: jnp.zeros(GROUP, jnp.float32) for name in wanted}

    def tile(
        sums: Numbers, logits: list[Array], column: Array, rows: list[Array], known: list[Array], store: Any
    ) -> Numbers:
        row, scalar = dict(zip(row_names, rows, strict=True)), dict(zip(scalar_names, known, strict=True))
        for at in range(0, column.shape[1], SLICE):
            columns = column[:, at : at + SLICE]
            pieces = [z[:, at : at + SLICE] for z in logits]
            counts = columns < scalar["limit"].astype(jnp.int32)
            masked = [jnp.where(counts, z, MASKED) for z in pieces]
            found, derivative = _evaluate(terms, masked, columns, row, scalar, values or bool(slopes), gradient)
            sums = {name: total + jnp.sum(found[name], 1) for name, total in sums.items()}
            if derivative is not None:
                live = counts & (along(row["weight"], columns) != 0.0)
                derivative = derivative * along(row["weight"], derivative) * head.logit_scale
                if head.soft_cap > 0.0:
                    derivative = derivative * (1.0 - jnp.square(pieces[0] * (1.0 / head.soft_cap)))
                store(at, jnp.where(live, derivative, 0.0))
        return sums

    parts, derivative = _gpu.vocab_pass(
        [(hidden, w) for _, hidden, w in sides],
        jnp.stack([numbers[name] for name in row_names]),
        jnp.stack([scalars[name] for name in scalar_names]),
        start,
        tile,
        name="linear_divergence_gradient" if gradient else "linear_divergence_values",
        gradient=gradient,
    )
    sums = dict(zip(sorted(wanted), jnp.moveaxis(jnp.sum(parts, 0), 0, 0), strict=True))
    return sum_over_axis([sums[name] for name in wanted], axis), derivative


def _evaluate(
    terms: tuple[Term, ...],
    logits: list[Array],
    columns: Array,
    row: Numbers,
    scalar: Numbers,
    sums: bool,
    gradient: bool,
) -> tuple[Numbers, Array | None]:
    """In a kernel: values and slopes of the terms on a piece of a tile, and d total / d student logits / row weight."""
    logs: dict[tuple[str, bool], Array] = {}

    def log_probability(side: int, tempered: bool) -> Array:
        name = "qp"[side]
        if (name, tempered) not in logs:
            x = logits[side] - along(row[f"top{name}"], columns)
            x = x * scalar["tau"] if tempered else x
            logs[name, tempered] = x - along(row[f"log{name}{int(tempered)}"], columns)
        return logs[name, tempered]

    is_label = columns == along(row["label"].astype(jnp.int32), columns)
    found: Numbers = {}
    derivative: Array | None = None
    for m, term in enumerate(terms):
        logq = log_probability(0, term.tempered)
        logp = log_probability(1, term.tempered) if term.teacher and len(logits) == 2 else None
        q, p = jnp.exp(logq), None if logp is None else jnp.exp(logp)
        asked = _gpu.RowNumbers([along(row[name], columns) for name in row if name.startswith(f"row{m}.")])

        def both(logq: Array, q: Array, term: Term = term, logp: Any = logp, p: Any = p, asked: Any = asked) -> Any:
            def value(logq: Array, q: Array) -> Array:
                return term.value(Pair(logp, logq, p, q, is_label, asked))

            return jax.jvp(value, (logq, q), (jnp.ones_like(logq), q))

        found[f"value{m}"], slope = _gpu.lowerable(both)(logq, q)
        found[f"slope{m}"] = slope
        if gradient:
            c = term.gradient_sum if term.gradient_sum is not None else along(row[f"c{m}"], columns)
            part = (slope - q * c) * scalar[f"scale{m}"]
            derivative = part if derivative is None else derivative + part
    return found, derivative


def _gradients(
    run: Any, numbers: Numbers, sides: Sequence[tuple[str, Array, Head]], values: bool
) -> tuple[list[Array], Array, Array]:
    """(values if wanted, d_hidden, d_weight): pass 3, for some rows at a time."""
    (_, hidden, head), n = sides[0], sides[0][1].shape[0]
    width = head_width(head)
    count, size = _gpu_block_sizes.chunks(n, width, CHUNK_BYTES)
    # A row of weight 0 has gradient 0, and 0 * NaN would still poison the whole head.
    clean = jnp.where(numbers["weight"][:, None] != 0, hidden, 0)
    cut = jax.tree.map(lambda a: split_rows(a, count, size), (numbers, [x for _, x, _ in sides], clean))

    def chunk(part: Any) -> tuple[list[Array], Array, Array]:
        numbers, hiddens, clean = part
        own = [(name, x, w) for (name, _, w), x in zip(sides, hiddens, strict=True)]
        found, g = run(numbers, values=values, slopes=[], gradient=True, sides=own)
        g = g[:size, :width]
        d_hidden = _product(g, head.weight, 1, 0 if head.vocab_major else 1)
        left, right = (g, clean) if head.vocab_major else (clean, g)
        return found, d_hidden, _product(left, right, 0, 0)

    if count == 1:
        found, d_hidden, d_weight = chunk(jax.tree.map(lambda a: a[0], cut))
    else:

        def add(d_weight: Array, part: Any) -> tuple[Array, tuple[list[Array], Array]]:
            found, d_hidden, more = chunk(part)
            return d_weight + more, (found, d_hidden)

        d_weight, stacked = lax.scan(add, jnp.zeros(head.weight.shape, jnp.float32), cut)
        found, d_hidden = jax.tree.map(lambda a: a.reshape(count * size, *a.shape[2:]), stacked)
    return [value[:n] for value in found], d_hidden[:n], d_weight


def _product(left: Array, right: Array, left_axis: int, right_axis: int) -> Float[Array, "X Y"]:
    contract = (((left_axis,), (right_axis,)), ((), ()))
    return lax.dot_general(left, right, contract, preferred_element_type=jnp.float32)
