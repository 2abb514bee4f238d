"""The class axis: which entries of the teacher's distribution p the student is shown, as codes that a cache can hold.

kind           entries of a position                                what the student is compared with
sampled        N draws from p, with replacement (RS-KD, sekd 2.5)   counts / N, whose mean is p
               ... from p^power, power not 1                        p / (proposal N) for each draw, whose mean is p
renormalised   the K most likely                                    p_k / sum p
zero_tail      the same                                             p_k, nothing for the rest
ghost_tail     the same                                             p_k, and one class for the rest: 1 - sum p_k

The live step and the cache writer draw with the same function, and both see a number through its 16-bit code: a cached
position and a live one are the same targets. Draws depend on (classes.seed, row_id, epoch, position) alone.

An id comes with a code; code 0 is an empty entry. Counts are their own code and sum to N in every position. Any other
number w, a probability or an importance weight, has the code 1 + round((8 - log w) 2048), clipped to 1..65535:
e^8 = 2981 down to e^-24 = 4e-11, with a relative error of at most 2.5e-4.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt16

from kdjax import registry
from kdjax.config import Classes
from kdjax.kernels.linear_sample import implementation_of, linear_sample
from kdjax.kernels.topk import topk
from kdjax.types import Head, SparseTargets

CODE_TOP, CODE_STEPS, LAST_CODE = 8.0, 2048.0, 65535  # the largest log w, codes per nat


@flax.struct.dataclass
class Drawn:
    """Entries of N positions: ids int32 [N, K], codes uint16 [N, K], entropy float32 [N] of p at tau, nats.

    Where hidden states are not finite all ids are -1: the loss kernel makes NaN of that, a cache has no word for it.
    """

    ids: Array
    codes: Array
    entropy: Array


@dataclasses.dataclass(frozen=True)
class ClassSampler:
    """One kind of targets.

    kind: its name in `kernels.sparse_divergence`. entries: K, of every position. counts: codes are counts that sum to
    `entries`, in ascending order of the ids, each once, empty entries last; else every entry is used.
    draw(hidden [N, E], head, row_id [N], epoch [N], position [N], tau, *, implementation=None) -> Drawn, of the
    teacher's p at temperature tau; jit-able, also in tau. position counts from 0 in the row.
    """

    kind: str
    entries: int
    counts: bool
    draw: Callable[..., Drawn]

    def probs(self, codes: UInt16[Array, "*shape"] | UInt16[np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
        """What the codes stand for: float32, 0 for an empty entry."""
        codes = jnp.asarray(codes)
        if self.counts:
            return codes.astype(jnp.float32) / self.entries
        return decode(codes)

    def targets(
        self,
        ids: Int[Array, "*slots K"],
        codes: UInt16[Array, "*slots K"],
        entropy: Float[Array, "*slots"] | None,
    ) -> SparseTargets:
        """Targets of slots, as they were drawn or as a cache holds them.

        The tail of "ghost_tail" is 1 - sum of the numbers as they are after rounding, so that student and teacher are
        compared as distributions; 0 if they exceed 1.
        """
        probs = self.probs(codes)
        tail = jnp.maximum(1.0 - jnp.sum(probs, -1), 0.0) if self.kind == "ghost_tail" else None
        return SparseTargets(ids=ids, probs=probs, tail=tail, entropy=entropy, kind=self.kind)


def make_class_sampler(config: Classes, vocab_size: int) -> ClassSampler:
    """The sampler that `classes.*` asks for. ValueError for an unknown kind and for settings that do not go with it."""
    return registry.lookup(CLASSES, config.kind, "classes.kind")(config, vocab_size)


def sampled(config: Classes, vocab_size: int) -> ClassSampler:
    """RS-KD: `classes.entries` draws from p^power."""
    entries, power = config.entries, config.power
    if entries > LAST_CODE:
        raise ValueError(
            f"classes.entries must be at most {LAST_CODE}, got {entries}; a count is stored in 16 bits. Set "
            "classes.kind to 'all' for the teacher's whole distribution."
        )

    def draw(
        hidden: Float[Array, "N D"],
        head: Head,
        row_id: Int[Array, "N"],
        epoch: Int[Array, "N"],
        position: Int[Array, "N"],
        tau: Float[Array, ""] | float,
        *,
        implementation: str | None = None,
    ) -> Drawn:
        uniforms = uniform_numbers(config.seed, row_id, epoch, position, entries)
        chosen = implementation_of(implementation)
        sample = linear_sample(hidden, head, uniforms, tau, power, implementation=chosen)
        ids = _or_unknown(sample.ids, sample.entropy)
        if power == 1:
            return Drawn(*merge(ids), sample.entropy)
        # log of p / (p^power / sum p^power) / N
        weight = (1.0 - power) * sample.logp + sample.log_power_sum[:, None] - math.log(entries)
        ids, codes = lax.sort((ids, encode(weight)), dimension=1, is_stable=True, num_keys=1)
        return Drawn(ids, codes, sample.entropy)

    return ClassSampler("sampled", entries, power == 1, draw)


def largest(kind: str, config: Classes, vocab_size: int) -> ClassSampler:
    """The `classes.entries` most likely entries, or all if there are fewer; best first."""
    if config.power != 1:
        raise ValueError(
            f"classes.power must be 1 with classes.kind {kind!r}, got {config.power}; it is the power of the "
            "distribution that is drawn from, and nothing is drawn. Set it to 1, or classes.kind to 'sampled'."
        )
    entries = min(config.entries, vocab_size)

    def draw(
        hidden: Float[Array, "N D"],
        head: Head,
        row_id: Int[Array, "N"],
        epoch: Int[Array, "N"],
        position: Int[Array, "N"],
        tau: Float[Array, ""] | float,
        *,
        implementation: str | None = None,
    ) -> Drawn:
        top = topk(hidden, head, entries, implementation=implementation)
        # Which they are and how far apart their logits are does not depend on tau; the normaliser does.
        uniforms = jnp.zeros((hidden.shape[0], 0), jnp.float32)
        softened = linear_sample(hidden, head, uniforms, tau, implementation=implementation_of(implementation))
        logp = softened.max_logp[:, None] + (top.logp - top.logp[:, :1]) / tau
        return Drawn(_or_unknown(top.ids, softened.entropy), encode(logp), softened.entropy)

    return ClassSampler(kind, entries, False, draw)


CLASSES: dict[str, Callable[[Classes, int], ClassSampler]] = {
    "sampled": sampled,
    "renormalised": functools.partial(largest, "renormalised"),
    "ghost_tail": functools.partial(largest, "ghost_tail"),
    "zero_tail": functools.partial(largest, "zero_tail"),
}


def uniform_numbers(
    seed: int, row_id: Int[Array, "N"], epoch: Int[Array, "N"], position: Int[Array, "N"], count: int
) -> Float[Array, "N {count}"]:
    """`count` numbers in [0, 1) for each position; a row's depend on nothing of the other rows."""
    # By name: a cache must not change with the default generator of the process.
    root = jax.random.key(seed, impl="threefry2x32")

    def one(row: Array, epoch: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(root, row), epoch), position)
        return jax.random.uniform(key, (count,), jnp.float32)

    return jax.vmap(one)(row_id, epoch, position)


def merge(ids: Int[Array, "N K"]) -> tuple[Int[Array, "N K"], UInt16[Array, "N K"]]:
    """(each id once, ascending, then zeros; how often it was there, then zeros)."""
    ids = jnp.sort(ids, axis=1)
    first = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], 1)
    place = jnp.cumsum(first, 1, dtype=jnp.int32) - 1
    row = lax.broadcasted_iota(jnp.int32, ids.shape, 0)
    counts = jnp.zeros(ids.shape, jnp.int32).at[row, place].add(1)
    # Equal ids write the same number to the same place.
    return jnp.zeros_like(ids).at[row, place].set(ids), counts.astype(jnp.uint16)


def encode(log_weight: Float[Array, "*shape"]) -> UInt16[Array, "*shape"]:
    """The code of exp(log_weight): 1 for e^8 and more, 65535 for e^-24 and less; NaN too has one that is not empty."""
    steps = jnp.round((CODE_TOP - log_weight) * CODE_STEPS)
    return jnp.nan_to_num(jnp.clip(1.0 + steps, 1.0, LAST_CODE), nan=LAST_CODE).astype(jnp.uint16)


def decode(codes: UInt16[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The number of a code, float32; 0 for 0."""
    value = jnp.exp(CODE_TOP - (codes.astype(jnp.float32) - 1.0) / CODE_STEPS)
    return jnp.where(codes > 0, value, 0.0)


def _or_unknown(ids: Int[Array, "N K"], entropy: Float[Array, "N"]) -> Int[Array, "N K"]:
    return jnp.where(jnp.isfinite(entropy)[:, None], ids, -1)
