"""What all vocabulary kernels share: how rows are cut into tiles, and the logits of one tile."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kdjax.types import Head


def row_tiles(rows: int, at_most: int) -> tuple[int, int]:
    """(number of tiles, rows per tile): even tiles of about `at_most` rows, a multiple of 8 unless it is one tile."""
    count = max(1, -(-rows // at_most))
    size = max(1, -(-rows // count))
    if count > 1:
        size = -(-size // 8) * 8
        count = -(-rows // size)  # the rounding may have emptied the last tile
    return count, size


def split_rows(array: Array, count: int, size: int) -> Array:
    """[N, ...] -> [count, size, ...], padded with zeros behind the last row."""
    padding = count * size - array.shape[0]
    if padding:
        array = jnp.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))
    return array.reshape(count, size, *array.shape[1:])


def tile_logits(hidden: Float[Array, "C D"], head: Head) -> Float[Array, "C V"]:
    """float32 logits of one tile, without the head's padding columns; scale and soft-cap applied."""
    contract = (((1,), (1 if head.vocab_major else 0,)), ((), ()))
    logits = lax.dot_general(hidden, head.weight, contract, preferred_element_type=jnp.float32)
    width = head.weight.shape[0 if head.vocab_major else 1]
    if head.vocab_size < width:
        logits = logits[:, : head.vocab_size]
    if head.logit_scale != 1.0:
        logits = logits * head.logit_scale
    if head.soft_cap > 0.0:
        logits = head.soft_cap * jnp.tanh(logits / head.soft_cap)
    return logits


def tile_gradients(
    gradient: Float[Array, "C V"], logits: Float[Array, "C V"], hidden: Float[Array, "C D"], head: Head
) -> tuple[Float[Array, "C D"], Float[Array, "X Y"]]:
    """From d loss / d logits of a tile: d loss / d hidden and d loss / d head.weight, both float32.

    A row whose gradient is 0 throughout must have finite `hidden`; its logits may be anything.
    """
    if head.soft_cap > 0.0:
        gradient = jnp.where(gradient == 0.0, 0.0, gradient * (1.0 - jnp.square(logits / head.soft_cap)))
    if head.logit_scale != 1.0:
        gradient = gradient * head.logit_scale
    width = head.weight.shape[0 if head.vocab_major else 1]
    if head.vocab_size < width:
        gradient = jnp.pad(gradient, ((0, 0), (0, width - head.vocab_size)))
    gradient = gradient.astype(hidden.dtype)
    by_vocab = (((1,), (0 if head.vocab_major else 1,)), ((), ()))
    d_hidden = lax.dot_general(gradient, head.weight, by_vocab, preferred_element_type=jnp.float32)
    left, right = (gradient, hidden) if head.vocab_major else (hidden, gradient)
    d_weight = lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return d_hidden, d_weight


def log_softmax(logits: Float[Array, "C V"]) -> Float[Array, "C V"]:
    """Over the vocabulary, in float32; finite for finite logits of any size."""
    return jax.nn.log_softmax(logits, axis=-1)


def tile_softmax(logits: Float[Array, "C V"]) -> tuple[Float[Array, "C V"], Float[Array, "C V"]]:
    """(log-probabilities, probabilities) of a tile.

    The exponentials are written once, behind a barrier: left to itself the compiler recomputes them in every reduction
    and product that reads them, and on a CPU they are the larger part of what is not a matrix product.
    """
    top = jnp.max(logits, -1, keepdims=True)
    exp = lax.optimization_barrier(jnp.exp(logits - top))
    total = jnp.sum(exp, -1, keepdims=True)
    # Not logits - (top + log total): at logits of 1e4 the sum would round off the third decimal.
    return (logits - top) - jnp.log(total), exp / total
