"""Tiles of the Mosaic GPU kernels on Hopper, and the arithmetic that says they fit. Compiled, not run: not tuned.

A block of the grid: 2 warpgroups x 64 rows (the height of a wgmma), so that one multiplies while the other is busy with
exponentials. 128 columns: a side's logits are then 64 of a thread's 232 registers, and two sides' 128.

Shared memory, 227 KiB at most: a stage is 128 rows x 64 and 128 columns x 64 in bf16, 16 + 16 KiB. Two sides that are
stored in different orders need two rings. A gradient tile waits in 2 x 64 x 128 bf16 = 32 KiB to be written, one of
logits in 64, float32. So: one ring 4 stages, 128 KiB, with a gradient 160, with logits 192; two rings 3 stages each,
192 KiB, with a gradient 2 each, 160 KiB.
"""

ROWS, GROUPS, GROUP = 128, 2, 64  # rows a block, in groups of
CHUNK = 64  # of the width: 128 bytes of bf16, the widest swizzle
COLUMNS = 128
SLICE = 32  # columns of a tile that are worked on at a time: what is derived of two sides fits beside their logits
PROCESSORS = 132  # of an H100 or H200 (SXM)
SHARED = 227 * 1024
SMALL = 8 * 1024  # kept free for row values, results and barriers


def choose(rings: int, stored: int) -> tuple[int, int]:
    """(columns a tile, stages a ring). stored: bytes that are written of each row and column, or 0."""
    stage = 2 * CHUNK * (ROWS + COLUMNS)
    waiting = stored * ROWS * COLUMNS
    return COLUMNS, min((SHARED - SMALL - waiting) // (stage * rings), 4)


def parts(row_blocks: int, column_blocks: int) -> int:
    """Into how many parts the columns are cut: the fewest that let the processors be done about as soon as can be."""

    def time(count: int) -> int:  # in tiles, of the processor that has most
        return -(-row_blocks * count // PROCESSORS) * -(-column_blocks // count)

    candidates = range(1, min(column_blocks, PROCESSORS) + 1)
    least = min(map(time, candidates))
    enough = next(count for count in candidates if time(count) <= 1.05 * least)
    return -(-column_blocks // -(-column_blocks // enough))  # none of them empty


def chunks(rows: int, width: int, at_most: int, stored: int = 2) -> tuple[int, int]:
    """(number, rows each), even and whole blocks, so that rows x width of `stored` bytes are about `at_most`."""
    blocks = -(-rows // ROWS)
    count = -(-blocks // max(at_most // (stored * width * ROWS), 1))
    size = -(-blocks // count)
    return -(-blocks // size), size * ROWS
