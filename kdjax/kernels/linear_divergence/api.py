"""What a divergence is to the kernel."""

import dataclasses
from collections.abc import Callable

from kdjax.types import Array


@dataclasses.dataclass(frozen=True)
class Term:
    """One divergence, summed over the vocabulary by the kernel.

    value(logp, logq, is_label): elementwise; log-probabilities of teacher and student, and True at the label's column.
      It must be finite where p or q underflow to 0; it is differentiated in logq by JAX.
    teacher: reads logp (else logp is None and the teacher's head is not evaluated for it).
    tempered: both sides are softened by tau and the value counts tau^2 times; else temperature 1.
    gradient_sum: c = sum_v dvalue/dlogq_v if it is the same for all rows (-1 for any -sum p log q): one reduction less.
    """

    value: Callable[[Array | None, Array, Array], Array]
    teacher: bool = True
    tempered: bool = True
    gradient_sum: float | None = None
