"""Rows and columns a block of the Mosaic kernels, by chip: reviewed by arithmetic, not measured (no chip was at hand).

The head streams through VMEM once per block of rows, so that R rows do 2 R FLOP per element read; 2 R / itemsize should
exceed the chip's FLOP per byte of HBM: 229 on v4, 240 on v5e, 166 on v5p, 560 on v6e, 313 on tpu7x. Columns amortise
what is done once per block. The search for entries wants blocks with few columns, for it looks at all of them to find
one; but it is a few vector operations per entry, and next to a product of width D little at any of these sizes.
"""

from kdjax.kernels._tpu import LANES, vmem_bytes

# (rows, columns), best first: the first that fits is taken. An unknown chip, and interpret mode, go by SMALL.
SMALL = ((256, 512), (256, 256), (128, 256), (128, 128), (64, 128), (32, 128), (16, 128))
LARGE = ((768, 512), (512, 512), *SMALL)
PREFERRED = {"TPU v6 lite": LARGE, "TPU7x": LARGE[1:]}


def choose(kind: str, rows: int, columns: int, width: int, entries: int, itemsize: int) -> tuple[int, int] | None:
    """(rows, columns) a block, no larger than the problem rounded up, or None if none fits. One for all passes."""
    for block in PREFERRED.get(kind, SMALL):
        r, c = min(block[0], up(rows, 16)), min(block[1], up(columns, LANES))  # a tile of bfloat16 is 16 rows
        if needed(r, c, width, entries, itemsize) <= vmem_bytes(kind):
            return r, c
    return None


def needed(rows: int, columns: int, width: int, entries: int, itemsize: int) -> int:
    """Bytes of VMEM of the hungriest pass. E.g. bf16, (256, 512), D = 2048, K = 64: 2 + 4 + 2.5 + 10 + 0.75 MiB."""
    wide, stored = up(width, LANES), up(entries, LANES)
    hidden = 2 * rows * wide * itemsize  # two of each block: one is copied while the other is used
    weight = 2 * columns * wide * itemsize
    logits = 5 * rows * columns * 4  # the block in its scratch and what is derived from it
    # Of the gradient the float32 sum, two blocks to copy out and one to cast from; d_weight has columns for rows.
    gradient = max(rows, columns) * wide * (4 + 2 * itemsize)
    gradient += columns * wide * itemsize  # the head's block with its end cut off
    numbers = 2 * rows * (2 * stored + LANES) * 4
    # A float32 product takes its operands apart into three of bfloat16.
    parts = (rows + columns) * wide * 6 if itemsize == 4 else 0
    return hidden + weight + logits + gradient + numbers + parts


def up(number: int, multiple: int) -> int:
    """Rounded up."""
    return -(-number // multiple) * multiple
