"""Results of the op."""

import flax.struct

from kdjax.types import Array


@flax.struct.dataclass
class Sample:
    """Per row K draws, and what the same pass says of p = softmax(logits / tau); float32, nats.

    ids: int32 [N, K], in the order of the uniform numbers; an id may come up again. logp: [N, K], log p of the ids.
    log_power_sum: [N], log sum_v p_v^power, 0 for power 1: the proposal's log-probability of an id is
    power logp - log_power_sum. entropy: [N], of p. max_logp: [N], the largest log p of the row.
    """

    ids: Array
    logp: Array
    log_power_sum: Array
    entropy: Array
    max_logp: Array
