"""The state of rows part-way through the vocabulary, as all tilings of the columns keep and combine it.

With z' = z - max z and e = exp(z'), the state of one side is, the sums over all columns but the label's,

    S = sum e        T = sum e z'        U = sum e^2        and max z, its lowest column, the label's logit.

To another maximum it moves, with d = old - new, by S e^d, (T + d S) e^d, U e^2d. A pair has besides

    A = sum e_p (z'_p - z'_q)        B = sum e_q (z'_p - z'_q)        G = sum (e_q - e_p)

which move by (A + (d_p - d_q) S_p) e^d_p, B likewise, G e^d_q + S_p (e^d_q - e^d_p). The label's own terms are added
last: so the Brier term has no cancellation. Nor is a logit ever compared with a log-normaliser, which at 1e4 has lost
its decimals. G is S_q - S_p without the roundings of two large sums: where p and q are nearly equal, KL = A / S_p +
log(1 + G / S_p) is ten times as exact for it (rms error 1e-8 nats at KL 1e-3, entropy 6, V 50k; 8e-8 from S alone).
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kdjax.kernels.linear_stats.api import LinearStats, PairStats

State = dict[str, Array]  # "top0", "S1", ...: side 0 is the student (q), 1 the teacher (p); "A", "B", "G" of a pair
SUMS = ("label", "S", "T", "U")


def names(sides: int) -> list[str]:
    """Of the numbers in the state of one side or of two."""
    own = [f"{name}{side}" for side in range(sides) for name in ("top", "column", *SUMS)]
    return [*own, "A", "B", "G"] if sides == 2 else own


def moved(state: State, tops: list[Array]) -> State:
    """The state as it is if `tops` are what is subtracted from the logits."""
    shifts = [state[f"top{side}"] - top for side, top in enumerate(tops)]
    scales = [jnp.exp(shift) for shift in shifts]
    result = dict(state)
    for side, (top, shift, scale) in enumerate(zip(tops, shifts, scales, strict=True)):
        s, t, u = (state[f"{name}{side}"] for name in "STU")
        result |= {
            f"top{side}": top,
            f"S{side}": s * scale,
            f"T{side}": (t + shift * s) * scale,
            f"U{side}": u * (scale * scale),
        }
    if len(tops) == 2:
        between = shifts[1] - shifts[0]
        result["A"] = (state["A"] + between * state["S1"]) * scales[1]
        result["B"] = (state["B"] + between * state["S0"]) * scales[0]
        result["G"] = state["G"] * scales[0] + state["S1"] * (scales[0] - scales[1])
    return result


def folded(
    state: State,
    highest: Callable[[Array], Array],
    lowest: Callable[[Array], Array],
    total: Callable[[State], State],
) -> State:
    """One state of many, which lie along an axis that the three functions reduce."""
    sides = 2 if "A" in state else 1
    tops = [highest(state[f"top{side}"]) for side in range(sides)]
    parts = moved(state, [jnp.broadcast_to(top, state["top0"].shape) for top in tops])
    result = total({name: value for name, value in parts.items() if not name.startswith(("top", "column"))})
    for side, top in enumerate(tops):
        column = state[f"column{side}"]
        result[f"top{side}"] = top
        result[f"column{side}"] = lowest(jnp.where(state[f"top{side}"] == top, column, jnp.full_like(column, 2**30)))
    return result


def stats(state: State, known: Bool[Array, "N"]) -> LinearStats:
    """Of a state of one side after all columns; known: where the label is a column at all."""
    return _finished(state, 0, known)[0]


def pair_stats(state: State, known: Bool[Array, "N"]) -> PairStats:
    """Of a state of two sides after all columns."""
    student, label_eq, label_zq, sq = _finished(state, 0, known)
    teacher, label_ep, label_zp, sp = _finished(state, 1, known)
    label_gap = label_zp - label_zq
    log_ratio = _log_ratio(sp, sq, label_ep - label_eq - state["G"])
    kl = (state["A"] + label_ep * label_gap) / sp - log_ratio
    return PairStats(student, teacher, kl, reverse_kl=log_ratio - (state["B"] + label_eq * label_gap) / sq)


def _finished(state: State, side: int, known: Bool[Array, "N"]) -> tuple[LinearStats, Array, Array, Array]:
    """The statistics of a side; exp(z') and z' of the label, 0 if it is none; the sum of exp(z'), label and all."""
    top, column, label, s, t, u = (state[f"{name}{side}"] for name in ("top", "column", *SUMS))
    x = jnp.where(known, label - top, 0.0)
    e = jnp.where(known, jnp.exp(x), 0.0)
    total = s + e
    log_total = jnp.log(total)
    result = LinearStats(
        logz=top + log_total,
        entropy=log_total - (t + e * x) / total,
        label_logp=x - log_total,
        sum_p_sq=(u + e * e) / (total * total),
        max_logp=-log_total,
        argmax=column,
        brier=u / (total * total) + jnp.square(s / total),
    )
    return result, e, x, total


def _log_ratio(a: Float[Array, "N"], b: Float[Array, "N"], difference: Float[Array, "N"]) -> Float[Array, "N"]:
    """log(a / b), near a = b as exact as difference = a - b."""
    excess = difference / b
    near = jnp.abs(excess) < 0.5
    return jnp.where(near, jnp.log1p(jnp.where(near, excess, 0.0)), jnp.log(a) - jnp.log(b))
