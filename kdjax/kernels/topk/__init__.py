"""topk: the K most likely entries of softmax(hidden @ head) per row, exact, without ever keeping [N, V]."""

from jax import lax
from jaxtyping import Array, Float

from kdjax.kernels import _dispatch
from kdjax.kernels.topk import pallas_gpu, pallas_tpu, reference, xla
from kdjax.kernels.topk.api import TopK
from kdjax.types import Head

__all__ = ["DECLINES", "IMPLEMENTATIONS", "TopK", "topk"]

IMPLEMENTATIONS = {
    "reference": reference.topk,
    "xla": xla.topk,
    "pallas_tpu": pallas_tpu.topk,
    "pallas_gpu": pallas_gpu.topk,
}
DECLINES: dict[str, _dispatch.Declines] = {"pallas_tpu": pallas_tpu.declines, "pallas_gpu": pallas_gpu.declines}


def topk(hidden: Float[Array, "N D"], head: Head, k: int, *, implementation: str | None = None) -> TopK:
    """The k largest of the logits hidden @ head, best first, lower id first on ties; no gradient.

    logp = logits - logsumexp(logits) over the whole vocabulary, float32, nats. The order is that of the float32 logits.
    With `head.vocab_axis`, all devices of the axis get the same result, from k candidates of each. Raises ValueError
    unless 1 <= k <= head.vocab_size.
    """
    if not 1 <= k <= head.vocab_size:
        raise ValueError(
            f"k must be between 1 and the {head.vocab_size} entries of the vocabulary, got {k}; padding is never "
            "returned. Set it to at most head.vocab_size."
        )
    chosen = _dispatch.choose("topk", IMPLEMENTATIONS, DECLINES, implementation, hidden, head, k)
    return chosen(*lax.stop_gradient((hidden, head)), k)
