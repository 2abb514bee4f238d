"""What a divergence is to the kernel."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from kdjax.types import Array

VocabSum = Callable[[Array], Array]  # [C, V] -> [C, 1], over the whole vocabulary


class Pair(NamedTuple):
    """What a term sees of one tile [C, V], elementwise: teacher p, student q, both at the term's temperature.

    logp, p are None for a term that does not read the teacher. is_label is True at the label's column. p and q may be 0
    where they underflow and both are 0 in padding columns; logp and logq are finite. row: [C, R], what the term's
    `row_scalars` said of each row; R = 0 for a term without.
    """

    logp: Any
    logq: Array
    p: Any
    q: Array
    is_label: Array
    row: Any = None


@dataclasses.dataclass(frozen=True)
class Term:
    """One divergence, summed over the vocabulary by the kernel.

    value(pair): elementwise; it must be finite where p or q is 0, and 0 where both are (so must its slope). JAX
    differentiates it in logq (and in q = exp logq), never in pair.row.
    teacher: reads logp or p (else the teacher's head is not evaluated for it).
    tempered: both sides are softened by tau and the value counts tau^2 times; else temperature 1.
    linear: its gradient on the logits is linear in p, so that an unbiased estimate of p gives an unbiased gradient.
    gradient_sum: c = sum_v dvalue/dlogq_v if it is the same for all rows (-1 for any -sum p log q): one reduction less.
    row_scalars(pair, vocab_sum) -> [C, R]: numbers of a whole row that `value` needs, such as a threshold; from the
    whole vocabulary, before the pass that evaluates `value`, under stop-gradient. `pair.row` is None there, and sums
    over columns must go through `vocab_sum`: a tile may hold one device's columns only. `value` reads number k of them
    as pair.row[:, k : k + 1].
    given: what the caller must say of each row, in a word; `row_scalars` finds that number as `pair.row` [C, 1].
    sampled: takes the label for a draw from the student as it is now; nothing to the kernel.
    For the chips' kernels `value` may use what Mosaic lowers: arithmetic, exp, log, log1p, tanh, logistic, where, ...
    """

    value: Callable[[Pair], Array]
    teacher: bool = True
    tempered: bool = True
    linear: bool = False
    gradient_sum: float | None = None
    row_scalars: Callable[[Pair, VocabSum], Array] | None = None
    given: str = ""
    sampled: bool = False
