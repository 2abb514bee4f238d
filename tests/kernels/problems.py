"""Rows and heads in all the shapes that kernels must take."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from kdjax.types import Head
from tests.kernels.oracle import HeadOracle


@dataclasses.dataclass(frozen=True)
class Shape:
    """N rows and a head; the teacher's head is of another width, orientation and padding."""

    rows: int
    vocab: int
    width: int = 6
    padding: int = 0
    vocab_major: bool = False
    teacher_width: int = 9
    teacher_padding: int = 0
    logit_scale: float = 1.0
    soft_cap: float = 0.0


SHAPES = {
    "empty": Shape(0, 5),
    "one_row": Shape(1, 8, vocab_major=True),
    "one_column": Shape(3, 1, padding=2),
    "tied": Shape(7, 13, vocab_major=True),
    "untied_padded": Shape(7, 13, padding=3, teacher_padding=19),
    "tied_padded_capped": Shape(7, 11, padding=5, vocab_major=True, logit_scale=2.0, soft_cap=4.0),
    "tiles": Shape(300, 37, teacher_padding=3),
    "tiles_tied_padded_capped": Shape(300, 21, padding=11, vocab_major=True, logit_scale=0.25, soft_cap=0.9),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """The same numbers for the kernel and for the oracle."""

    hidden: jnp.ndarray
    head: Head
    teacher_hidden: jnp.ndarray
    teacher_head: Head
    labels: jnp.ndarray
    weight: jnp.ndarray
    oracle: HeadOracle
    teacher_oracle: HeadOracle


def make_problem(shape: Shape, dtype=jnp.float32, seed: int = 0) -> Problem:
    draw = np.random.default_rng(seed)

    def side(width, padding, vocab_major, scale, cap):
        hidden = jnp.asarray(draw.normal(size=(shape.rows, width)), dtype)
        weight = draw.normal(size=(shape.vocab + padding, width))
        weight[shape.vocab :] = 50.0  # padding that would win if it were looked at
        weight = jnp.asarray(weight if vocab_major else weight.T, dtype)
        head = Head(weight, shape.vocab, vocab_major, scale, cap)
        return hidden, head, HeadOracle(np.asarray(weight.astype(jnp.float32)), shape.vocab, vocab_major, scale, cap)

    student = side(shape.width, shape.padding, shape.vocab_major, shape.logit_scale, shape.soft_cap)
    teacher = side(shape.teacher_width, shape.teacher_padding, not shape.vocab_major, 1.0, 0.0)
    labels = jnp.asarray(draw.integers(shape.vocab, size=shape.rows), jnp.int32)
    weight = draw.uniform(0.1, 2.0, size=shape.rows)
    weight[2::5] = 0.0
    weight[3::7] *= -1.0  # only 0 is special
    return Problem(*student[:2], *teacher[:2], labels, jnp.asarray(weight, jnp.float32), student[2], teacher[2])
