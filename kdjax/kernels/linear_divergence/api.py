"""What a divergence is to the kernel."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from kdjax.types import Array


class Pair(NamedTuple):
    """What a term sees of one tile, elementwise: teacher p, student q, both at the term's temperature.

    logp, p are None for a term that does not read the teacher. is_label is True at the label's column. p and q may be 0
    where they underflow; logp and logq are finite.
    """

    logp: Any
    logq: Array
    p: Any
    q: Array
    is_label: Array


@dataclasses.dataclass(frozen=True)
class Term:
    """One divergence, summed over the vocabulary by the kernel.

    value(pair): elementwise; it must be finite where p or q is 0. JAX differentiates it in logq (and in q = exp logq).
    teacher: reads logp or p (else the teacher's head is not evaluated for it).
    tempered: both sides are softened by tau and the value counts tau^2 times; else temperature 1.
    gradient_sum: c = sum_v dvalue/dlogq_v if it is the same for all rows (-1 for any -sum p log q): one reduction less.
    """

    value: Callable[[Pair], Array]
    teacher: bool = True
    tempered: bool = True
    gradient_sum: float | None = None
