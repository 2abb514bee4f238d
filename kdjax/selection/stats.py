"""Statistics of both sides at all positions: one pass over each vocabulary, no gradient, only what is asked for."""

from collections.abc import Callable, Iterable

from jaxtyping import Array, Float, Int

from kdjax.kernels.linear_stats import LinearStats, PairStats, linear_pair_stats, linear_stats
from kdjax.types import Head, TokenStats

Side = tuple[Float[Array, "B T _"], Head]  # the two sides may have different widths

# TokenStats field -> what it is of one side's statistics, or of both
STUDENT: dict[str, Callable[[LinearStats], Array]] = {
    "student_entropy": lambda stats: stats.entropy,
    "student_ce": lambda stats: -stats.label_logp,
    "student_gradient_norm": lambda stats: stats.token_gradient_norm,
}
TEACHER: dict[str, Callable[[LinearStats], Array]] = {
    "teacher_entropy": lambda stats: stats.entropy,
    "teacher_ce": lambda stats: -stats.label_logp,
}
PAIR: dict[str, Callable[[PairStats], Array]] = {
    "kl": lambda pair: pair.kl,
    "reverse_kl": lambda pair: pair.reverse_kl,
}
NEEDS_TEACHER = frozenset(TEACHER) | frozenset(PAIR)


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
    both = any(name in PAIR for name in needs)
    sides = {}
    for name, side, fields in (("student", student, STUDENT), ("teacher", teacher, TEACHER)):
        wanted = [field for field in needs if field in fields or field in PAIR]
        if wanted and side is None:
            raise ValueError(
                f"selection.signal must not need {wanted[0]!r}, got one that does; there is no {name} here. "
                f"Choose another signal or set {name}.path."
            )
        if wanted and side is not None:
            hidden, head = side
            sides[name] = hidden.reshape(-1, hidden.shape[-1]), head
    flat, made = labels.reshape(-1), {}
    if both:
        pair = linear_pair_stats(*sides["student"], *sides["teacher"], flat, implementation=implementation)
        alone = {"student": pair.student, "teacher": pair.teacher}
        made = {name: of(pair) for name, of in PAIR.items() if name in needs}
    else:
        alone = {name: linear_stats(*side, flat, implementation=implementation) for name, side in sides.items()}
    for name, fields in (("student", STUDENT), ("teacher", TEACHER)):
        made |= {field: of(alone[name]) for field, of in fields.items() if field in needs}
    return TokenStats(**{name: values.reshape(labels.shape) for name, values in made.items()})
