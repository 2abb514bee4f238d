"""linear_stats: what one pass over the vocabulary says about hidden @ head, without ever keeping [N, V].

Needed by every signal and by evaluation. Under stop-gradient: selection and metrics are not trained through.
"""

from jax import lax
from jaxtyping import Array, Float, Int

from kdjax.kernels import _dispatch
from kdjax.kernels.linear_stats import reference, xla
from kdjax.kernels.linear_stats.api import LinearStats, PairStats
from kdjax.types import Head

__all__ = ["IMPLEMENTATIONS", "LinearStats", "PairStats", "linear_pair_stats", "linear_stats"]

IMPLEMENTATIONS = {"reference": reference.linear_stats, "xla": xla.linear_stats}
PAIR_IMPLEMENTATIONS = {"reference": reference.linear_pair_stats, "xla": xla.linear_pair_stats}


def linear_stats(
    hidden: Float[Array, "N D"], head: Head, labels: Int[Array, "N"], *, implementation: str | None = None
) -> LinearStats:
    """Statistics of softmax(hidden @ head) per row, float32, nats, at temperature 1; no gradient."""
    chosen = _dispatch.choose(IMPLEMENTATIONS, implementation, "xla", "linear_stats")
    # At the entrance, not only of the results: else differentiation around the call would carry tangents through it.
    return chosen(*lax.stop_gradient((hidden, head)), labels)


def linear_pair_stats(
    hidden: Float[Array, "N D"],
    head: Head,
    teacher_hidden: Float[Array, "N E"],
    teacher_head: Head,
    labels: Int[Array, "N"],
    *,
    implementation: str | None = None,
) -> PairStats:
    """`linear_stats` of student and teacher and the two KL divergences between them, in one pass; no gradient.

    Both heads must have the same `vocab_size`, else ValueError; their weights may differ in padding columns.
    """
    if teacher_head.vocab_size != head.vocab_size:
        raise ValueError(
            f"teacher_head.vocab_size must equal the student's {head.vocab_size}, got {teacher_head.vocab_size}; a sum "
            "over the vocabulary needs one vocabulary. Set both to the number of ids that the tokenizer can emit."
        )
    chosen = _dispatch.choose(PAIR_IMPLEMENTATIONS, implementation, "xla", "linear_pair_stats")
    return chosen(*lax.stop_gradient((hidden, head, teacher_hidden, teacher_head)), labels)
