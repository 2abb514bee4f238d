"""Numbers of a whole row that a term wants before it is evaluated; for implementations whose tiles do not hold a row.

A tile of rows by tile, in XLA: two products more (one if no term that asks reads the teacher). Most terms ask for none.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kdjax.kernels.linear_divergence.api import Pair, Term
from kdjax.kernels.tiles import is_label, row_tiles, split_rows, tile_logits, tile_softmax, vocab_sum
from kdjax.types import Head

ROWS = 256  # rows a tile: 148 MiB of float32 logits a side at V = 151936


def row_scalars(
    terms: tuple[Term, ...],
    hidden: Float[Array, "N D"],
    head: Head,
    teacher_hidden: Float[Array, "N E"] | None,
    teacher_head: Head | None,
    labels: Int[Array, "N"],
    tau: Float[Array, ""],
    given: Float[Array, "N"] | None = None,
) -> tuple[Float[Array, "N R"], ...]:
    """Per term what its `row_scalars` says of each row, [N, R]; R = 0 and no work for a term without. No gradient."""
    n = hidden.shape[0]
    asking = [term for term in terms if term.row_scalars is not None]
    if not asking:
        return tuple(jnp.zeros((n, 0), jnp.float32) for _ in terms)
    if not any(term.teacher for term in asking):
        teacher_hidden = None
    count, size = row_tiles(n, ROWS)
    rows = jax.tree.map(lambda a: split_rows(a, count, size), (hidden, teacher_hidden, labels, given))

    def tile(part: tuple[Array, Array | None, Array, Array | None]) -> list[Array]:
        x, y, label, said = part
        student = tile_logits(x, head)
        teacher = None if y is None or teacher_head is None else tile_logits(y, teacher_head)
        labelled = is_label(head, label)
        return [scalars_of_tile(term, student, teacher, labelled, tau, head.vocab_axis, said) for term in asking]

    found = [a.reshape(count * size, -1)[:n] for a in lax.map(tile, lax.stop_gradient(rows))]
    return tuple(found.pop(0) if term.row_scalars else jnp.zeros((n, 0), jnp.float32) for term in terms)


def scalars_of_tile(
    term: Term,
    student: Float[Array, "C V"],
    teacher: Float[Array, "C V"] | None,
    labelled: Array,
    tau: Float[Array, ""],
    axis: str | None,
    given: Float[Array, "C"] | None,
) -> Float[Array, "C R"]:
    """The same of one tile of logits, for one term."""
    if term.row_scalars is None:
        return jnp.zeros((student.shape[0], 0), jnp.float32)
    t = tau if term.tempered else jnp.ones_like(tau)
    logq, q = tile_softmax(student / t, axis)
    logp, p = tile_softmax(teacher / t, axis) if term.teacher and teacher is not None else (None, None)
    said = given[:, None] if term.given and given is not None else None
    scalars = term.row_scalars(Pair(logp, logq, p, q, labelled, said), functools.partial(vocab_sum, axis=axis))
    return lax.stop_gradient(scalars.astype(jnp.float32))
