"""Rows and columns a block of the Mosaic kernel, by chip: reviewed by arithmetic, not measured (no chip was at hand).

The head streams through VMEM once per block of rows, so a block of R rows does R multiply-adds, 2 R FLOP, per element
read. To be bound by the matrix unit, 2 R / itemsize must exceed the chip's FLOP per byte of HBM:

    chip     bf16 FLOP/byte    R (bf16)    VMEM (MiB)
    v4            229            256           16
    v5e           240            256          128
    v5p           166            256           64
    v6e           560            768          128
    tpu7x         313            512           64

float32 products run as six bf16 ones over twice the bytes: a third of that R would do, and the compiler keeps what the
operands are split into in VMEM besides, ten bytes an element. So 256 x 256 at most, on all chips.

Columns amortise what is done once per block (the rescaling of ten accumulators, the start of a copy) over C / 128
groups of lanes. 512 leave it at a few per cent; beyond that only VMEM and the compiler's time grow.
"""

from kdjax.kernels._tpu import LANES, vmem_bytes
from kdjax.kernels.linear_stats.moments import names

# (rows, columns), best first: the first that fits is taken; below 64 rows the plain XLA path reads less. An unknown
# chip, and interpret mode, go by SMALL.
SMALL = ((256, 512), (256, 256), (128, 256), (128, 128), (64, 128))
LARGE = ((768, 512), (512, 512), *SMALL)
FLOAT32 = SMALL[1:]
PREFERRED = {
    "TPU v4": SMALL,
    "TPU v5 lite": SMALL,
    "TPU v5": SMALL,
    "TPU v6 lite": LARGE,
    "TPU7x": LARGE[1:],
}


def choose(kind: str, rows: int, columns: int, widths: tuple[int, ...], itemsize: int) -> tuple[int, int] | None:
    """(rows, columns) a block, or None if no block fits.

    rows, columns: of the whole problem; a block is no larger than they are, rounded up. widths: D, of a pair (D, E).
    """
    for block in FLOAT32 if itemsize == 4 else PREFERRED.get(kind, SMALL):
        r = min(block[0], _up(rows, 32))
        c = min(block[1], _up(columns, LANES))
        if needed(r, c, widths, itemsize) <= vmem_bytes(kind):
            return r, c
    return None


def needed(rows: int, columns: int, widths: tuple[int, ...], itemsize: int) -> int:
    """Bytes of VMEM. E.g. bfloat16, (256, 512) rows and columns, D = 2048: 2 + 4 + 2 + 0.5 + 0.75 + 0.5 MiB."""
    sides, wide = len(widths), [_up(width, LANES) for width in widths]
    hidden = 2 * rows * sum(wide) * itemsize  # two of each block: one is copied while the other is used
    weight = 2 * columns * sum(wide) * itemsize
    # By the product, as the compiler's reports show: float32 operands in pieces, else one copy of the right side.
    spilled = (rows + columns) * max(wide) * 10 if itemsize == 4 else columns * max(wide) * 2
    logits = sides * rows * columns * 4
    state = len(names(sides)) * rows * LANES * 4
    ends = 2 * 2 * rows * LANES * 4  # labels and packed results; a column of one takes a whole row of lanes
    return hidden + weight + spilled + logits + state + ends


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
