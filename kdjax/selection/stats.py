"""Statistics of both sides at all positions: one pass over each vocabulary, no gradient, only what is asked for."""

from collections.abc import Iterable

from jaxtyping import Array, Float, Int

from kdjax.kernels.linear_stats import linear_stats
from kdjax.types import Head, TokenStats

Side = tuple[Float[Array, "B T _"], Head]  # the two sides may have different widths

# TokenStats field -> (side, what linear_stats calls it, sign)
FIELDS = {
    "student_entropy": ("student", "entropy", 1.0),
    "student_ce": ("student", "label_logp", -1.0),
    "teacher_entropy": ("teacher", "entropy", 1.0),
    "teacher_ce": ("teacher", "label_logp", -1.0),
}


def token_stats(
    needs: Iterable[str],
    student: Side | None,
    teacher: Side | None,
    labels: Int[Array, "B T"],
    *,
    implementation: str | None = None,
) -> TokenStats:
    """The fields `needs` of TokenStats, [B, T] each. A side that no field needs may be None and is not evaluated."""
    needs = tuple(needs)
    sides = {"student": student, "teacher": teacher}
    made = {}
    for name, side in sides.items():
        wanted = [field for field in needs if FIELDS[field][0] == name]
        if not wanted:
            continue
        if side is None:
            raise ValueError(
                f"selection.signal must not need {wanted[0]!r}, got one that does; there is no {name} here. "
                f"Choose another signal or set {name}.path."
            )
        hidden, head = side
        rows = hidden.reshape(-1, hidden.shape[-1])
        stats = linear_stats(rows, head, labels.reshape(-1), implementation=implementation)  # under stop-gradient
        for field in wanted:
            _, source, sign = FIELDS[field]
            made[field] = sign * getattr(stats, source).reshape(labels.shape)
    return TokenStats(**made)
