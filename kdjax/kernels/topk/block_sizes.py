"""Block sizes of the TPU kernel: what one grid step holds in VMEM, against what the generation has."""

import dataclasses

from kdjax.kernels._tpu import LANES

# Most entries per row that are kept in VMEM: 128 rows of them are 1 MiB, doubled by the pipeline.
LARGEST_K = 1024


@dataclasses.dataclass(frozen=True)
class Blocks:
    """rows of hidden states a block, columns of the vocabulary a block."""

    rows: int
    columns: int


# Best first. Few columns: each extraction goes over rows x columns twice, and a block of fewer columns that holds no
# new entry costs nothing but its maximum. Many rows save readings of the head, which are V * D / (rows * V * D) per
# multiplication. Not tuned on chips: compiled, not run.
CANDIDATES = (Blocks(256, 512), Blocks(128, 512), Blocks(128, 256), Blocks(64, 256), Blocks(64, 128), Blocks(16, 128))


def vmem_needed(blocks: Blocks, width: int, itemsize: int, k: int) -> int:
    """Bytes: inputs and results are double-buffered; D, which is whole in each block, is padded to 128.

    hidden 2 rows D; head 2 columns D; results 2 (values and ids [rows, K] + two [rows, 1] that take 128 lanes each);
    logits: the tile that is searched, and up to 4 temporaries of its size (product, mask, columns, the tile written).
    With float32 inputs the product at full precision splits both sides into 3 bfloat16 parts: 1.5 times their block.
    """
    width, kept = -(-width // LANES) * LANES, -(-k // LANES) * LANES
    inputs = (blocks.rows + blocks.columns) * width * itemsize
    split = inputs * 3 // 2 if itemsize == 4 else 0
    results = 2 * blocks.rows * (2 * kept + 2 * LANES) * 4
    return 2 * inputs + split + results + 5 * blocks.rows * blocks.columns * 4


def blocks_for(vmem: int, width: int, itemsize: int, k: int) -> Blocks | None:
    """The first candidate that leaves an eighth of `vmem` to the compiler; None if none does.

    Of v4's 16 MiB that is (256, 512) up to D = 896 and (128, 256) at D = 4096, both bfloat16; of 64 MiB and more
    (256, 512) at any of these.
    """
    return next((b for b in CANDIDATES if vmem_needed(b, width, itemsize, k) <= vmem // 8 * 7), None)
