"""sparse_divergence: the student's head against K stored teacher entries per row, with gradient, in tiles.

A stored target is a few (id, number) pairs of the teacher's distribution p: its top K, or draws from it. `kind` says
what is done about the rest, the tail. w_k are the stored numbers; q is the student over its *whole* vocabulary, never
renormalised on the entries (peers that do so train on conditional probabilities alone):

kind           value, nats                      gradient on the logits     next to KL(p || q)
sampled        -sum_k w_k log q_k - H(p)        q sum w - w                unbiased, for draws from p
renormalised   KL(w / sum w || q)               q - w / sum w              biased: wants no mass in the tail
zero_tail      sum_k w_k (log w_k - log q_k)    q sum w - w                biased alike; rows count by sum w
ghost_tail     KL over K + 1 classes, of which  q - w at the entries,      a lower bound; unbiased at the entries,
               the last is the tail             r (q_tail - tail) in it    blind within the tail

r is the student's softmax within the tail. With all V entries stored, each kind is KL(p || q).

Reverse KL, JSD and others that weigh columns by q need the teacher's p wherever the student has mass: on stored
entries they are biased, and there is no such kind.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kdjax import registry
from kdjax.kernels import _dispatch
from kdjax.kernels.sparse_divergence import api, pallas_gpu, pallas_tpu, reference, xla
from kdjax.kernels.sparse_divergence.api import Entries, SparseTerm
from kdjax.types import Head

__all__ = ["IMPLEMENTATIONS", "KINDS", "Entries", "SparseTerm", "sparse_divergence"]

IMPLEMENTATIONS = {
    "reference": reference.sparse_divergence,
    "xla": xla.sparse_divergence,
    "pallas_tpu": pallas_tpu.sparse_divergence,
    "pallas_gpu": pallas_gpu.sparse_divergence,
}
DECLINES: dict[str, _dispatch.Declines] = {"pallas_tpu": pallas_tpu.declines, "pallas_gpu": pallas_gpu.declines}

KINDS = {
    "sampled": SparseTerm(api.sampled),
    "renormalised": SparseTerm(api.renormalised),
    "zero_tail": SparseTerm(api.zero_tail),
    "ghost_tail": SparseTerm(api.ghost_tail),
}
BIASED = ("reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "dkd", "udkd", "at_kd", "akl", "todi")


def sparse_divergence(
    hidden: Float[Array, "N D"],
    head: Head,
    ids: Int[Array, "N K"],
    probs: Float[Array, "N K"],
    weight: Float[Array, "N"],
    kind: str,
    tau: Float[Array, ""] | float = 1.0,
    *,
    tail: Float[Array, "N"] | None = None,
    teacher_entropy: Float[Array, "N"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, "N"]]:
    """(total [], values [N]): total = sum_n weight_n tau^2 value_n, value_n the `kind` of divergence of row n.

    ids, probs: the stored entries in any order. The numbers of an id that occurs twice add up; an entry with the number
    0 is empty, whatever its id. For "sampled" they are counts / draws, or, for draws from a proposal distribution,
    p / (proposal * draws) each; for the others they are teacher probabilities. They are taken as they are: of a teacher
    at temperature tau, if tau is not 1. Only the student is softened here.
    tail: what the teacher has outside of the entries, read by "ghost_tail" only; 1 - sum probs, if not given, which is
    good to 1e-7. teacher_entropy: H(p) at temperature tau, read by "sampled" only. Without it that of the entries
    stands in for it, and the mean of the value is KL + H(p) - E H(entries): zero for identical models only with it.

    `total` is differentiable with respect to `hidden` and `head.weight` alone; `values` (nats, without tau^2) are under
    stop-gradient. Rows of weight 0 add nothing, whatever they hold. A row with no entry has value 0; one with an id
    outside of the vocabulary has value and gradient NaN.
    Raises ValueError if `kind` is none of KINDS (or "package.module:attribute", a SparseTerm).
    """
    if kind in BIASED:
        raise ValueError(
            f"kind must be one of {', '.join(sorted(KINDS))}, got {kind!r}; it needs the teacher wherever the student "
            "has mass, and K stored entries leave that out: value and gradient would be biased. Set one of these, or "
            "use linear_divergence with the teacher's hidden states."
        )
    term = registry.lookup(KINDS, kind, "kind")
    chosen = _dispatch.choose("sparse_divergence", IMPLEMENTATIONS, DECLINES, implementation, hidden, head, ids)
    ids, probs, weight, tail, teacher_entropy, tau = lax.stop_gradient(
        (ids, probs.astype(jnp.float32), weight, tail, teacher_entropy, jnp.asarray(tau, jnp.float32))
    )
    if tail is None:
        tail = jnp.maximum(1.0 - jnp.sum(probs, -1), 0.0)
    ids, probs = _merged(ids.astype(jnp.int32), probs, head.vocab_size)
    return chosen(hidden, head, ids, probs, weight, tail, teacher_entropy, term, tau)


def _merged(
    ids: Int[Array, "N K"], probs: Float[Array, "N K"], vocab_size: int
) -> tuple[Int[Array, "N K"], Float[Array, "N K"]]:
    """Each id once, with the sum of its numbers; all other places hold the id `vocab_size` and 0, or NaN.

    NaN is what an entry of an unknown id becomes. A student's column must not be counted twice in the mass of the
    entries, and log(sum of numbers) is not the sum of their logs.
    """
    live = probs != 0
    known = (ids >= 0) & (ids < vocab_size)
    probs = jnp.where(live & ~known, jnp.nan, probs)
    ids, probs = lax.sort((jnp.where(live & known, ids, vocab_size), probs), dimension=1, num_keys=1)
    sums, n, k = probs, *ids.shape
    for step in (2**power for power in range(max(k - 1, 0).bit_length())):
        # sums[k] is that of ids[k] in the next `step` places; equal ids are neighbours.
        ahead = jnp.concatenate([ids[:, step:], jnp.full((n, step), -1, ids.dtype)], 1)
        more = jnp.concatenate([sums[:, step:], jnp.zeros((n, step))], 1)
        sums = sums + jnp.where(ahead == ids, more, 0.0)
    first = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], 1)
    return jnp.where(first, ids, vocab_size), jnp.where(first, sums, 0.0)
