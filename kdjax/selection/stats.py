"""Statistics of both sides at all positions: one pass over each vocabulary, no gradient, only what is asked for."""

from collections.abc import Callable, Iterable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kdjax.kernels.linear_divergence import Pair, Term, linear_divergence
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


def _squared_hellinger(pair: Pair) -> Array:
    """1/2 sum (sqrt p - sqrt q)^2, not 1 - sum sqrt(p q), which is lost to rounding where p is near q."""
    return 0.5 * jnp.square(jnp.exp(0.5 * pair.logp) - jnp.exp(0.5 * pair.logq))


# Statistics of both that are sums of a term over the vocabulary: a pass of their own, nothing to add to the kernels.
SUMS: dict[str, tuple[Term, Callable[[Array], Array]]] = {
    "hellinger": (Term(_squared_hellinger), jnp.sqrt),
}
NEEDS_TEACHER = frozenset(TEACHER) | frozenset(PAIR) | frozenset(SUMS)


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
        wanted = [field for field in needs if field in fields or field in PAIR or field in SUMS]
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
        asked = {"student": any(name in STUDENT for name in needs), "teacher": any(name in TEACHER for name in needs)}
        alone = {
            name: linear_stats(*side, flat, implementation=implementation)
            for name, side in sides.items()
            if asked[name]
        }
    for name, fields in (("student", STUDENT), ("teacher", TEACHER)):
        made |= {field: of(alone[name]) for field, of in fields.items() if field in needs}
    for name in (name for name in needs if name in SUMS):
        term, of_sum = SUMS[name]
        weight = jnp.ones(flat.shape, jnp.float32)
        both_sides = lax.stop_gradient((*sides["student"], *sides["teacher"]))
        _, values = linear_divergence(*both_sides, flat, weight, [term], [1.0], implementation=implementation)
        made[name] = of_sum(values[0])
    return TokenStats(**{name: values.reshape(labels.shape) for name, values in made.items()})
