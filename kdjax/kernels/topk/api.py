"""Results of the op."""

import flax.struct

from kdjax.types import Array


@flax.struct.dataclass
class TopK:
    """Per row the K most likely vocabulary entries, best first, the lower id first on ties.

    ids: int32 [N, K]. logp: float32 [N, K], log-probabilities over the whole vocabulary.
    """

    ids: Array
    logp: Array
