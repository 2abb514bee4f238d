"""Results of the op."""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Float

from kdjax.kernels.topk.api import TopK
from kdjax.types import Array, Head


@flax.struct.dataclass
class LinearStats:
    """Per row [N], q = softmax(logits): float32 in nats, argmax int32.

    logz: log-normaliser. entropy: -sum q log q. label_logp: log q[label]. sum_p_sq: sum q^2. max_logp: log-probability
    of the arg-max. argmax: the lower index on ties.
    brier: sum_v (q_v - [v = label])^2 = sum q^2 - 2 q[label] + 1, formed without that cancellation, so that it is exact
    to rounding for labels of probability near 1, too.
    top: the top_k most likely entries, ids and log-probabilities [N, top_k]; None if they were not asked for.
    """

    logz: Array
    entropy: Array
    label_logp: Array
    sum_p_sq: Array
    max_logp: Array
    argmax: Array
    brier: Array
    top: TopK | None = None

    @property
    def token_gradient_norm(self) -> Array:
        """||d(-log q[label]) / d logits|| = ||q - onehot||, [N]."""
        return jnp.sqrt(self.brier)


@flax.struct.dataclass
class PairStats:
    """Both sides, and kl = KL(teacher || student), reverse_kl = KL(student || teacher) per row [N] in nats."""

    student: LinearStats
    teacher: LinearStats
    kl: Array
    reverse_kl: Array


def head_gradient_norm(stats: LinearStats, hidden: Float[Array, "N D"], head: Head) -> Float[Array, "N"]:
    """||d(-log q[label]) / d head.weight||, Frobenius, per row: the gradient is (q - onehot) outer hidden.

    Exact for any logit scale; a soft cap breaks the outer product, hence ValueError.
    """
    if head.soft_cap > 0.0:
        raise ValueError(
            f"head.soft_cap must be 0, got {head.soft_cap}; with a cap the gradient of the head has no closed form in "
            "these statistics. Use token_gradient_norm, the gradient on the capped logits."
        )
    size = jnp.linalg.norm(hidden.astype(jnp.float32), axis=-1)
    return stats.token_gradient_norm * size * abs(head.logit_scale)
