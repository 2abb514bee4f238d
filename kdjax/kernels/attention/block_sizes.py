"""Queries and keys a block of splash attention: by arithmetic and compiled, not measured (no chip was at hand).

One number for both and for all three kernels. Against a block of b queries a kernel reads 2 H elements of each key and
does 4 b H FLOP for them: b FLOP a byte of bfloat16. So 512 is past the FLOP per byte of HBM of v4, v5e, v5p and tpu7x
(166 to 313, see linear_stats/block_sizes.py) and near v6e's 560. Larger blocks skip less of what causality and the
window empty: at T = 2048, 10 of 16 blocks of 512 are visited, and 3 of 4 of 1024.
"""

from kdjax.kernels._tpu import LANES

BLOCKS = (512, 256, 128)  # best first; splash wants multiples of 128
VMEM = 16 * 2**20  # what every chip grants to a kernel that does not ask for more; splash does not
WASTE = 8  # padding of at most T / WASTE is worth a larger block


def choose(length: int, width: int, itemsize: int) -> int | None:
    """Queries and keys a block for rows of T = length and heads of H = width; None if no block fits."""
    fitting = [block for block in BLOCKS if needed(block, width, itemsize) <= VMEM]
    if not fitting:
        return None
    return next((block for block in fitting if -length % block <= length // WASTE), fitting[-1])


def needed(block: int, width: int, itemsize: int) -> int:
    """Bytes of VMEM of the hungriest kernel, that of dk and dv. E.g. 512, H = 128, bfloat16: 1.5 + 1 + 0.5 + 5 MiB."""
    rows = block * -(-width // LANES) * LANES
    moved = 2 * 6 * rows * itemsize  # two of each block of q, k, v, do, dk, dv
    sums = 2 * 2 * rows * 4  # of dk and dv, which are outputs to the compiler
    ids = 2 * block * LANES * 4  # a segment id takes a row of lanes
    scores = 5 * block * block * 4  # scores, weights, the gradients of both, one of them as the matrix unit wants it
    return moved + sums + ids + scores
