"""Results of the op."""

import flax.struct

from kdjax.types import Array


@flax.struct.dataclass
class LinearStats:
    """Per row [N], q = softmax(logits): float32 in nats, argmax int32.

    logz: log-normaliser. entropy: -sum q log q. label_logp: log q[label]. sum_p_sq: sum q^2 (so the Brier term and the
    token gradient norm sqrt(sum q^2 - 2 q_y + 1) are closed forms). max_logp: log-probability of the arg-max.
    argmax: the lower index on ties.
    """

    logz: Array
    entropy: Array
    label_logp: Array
    sum_p_sq: Array
    max_logp: Array
    argmax: Array


@flax.struct.dataclass
class PairStats:
    """Both sides, and kl = KL(teacher || student), reverse_kl = KL(student || teacher) per row [N] in nats."""

    student: LinearStats
    teacher: LinearStats
    kl: Array
    reverse_kl: Array
