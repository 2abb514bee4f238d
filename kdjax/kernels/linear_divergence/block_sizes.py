"""Block sizes of the Mosaic kernels, and the VMEM that they take.

Per pass the largest blocks are wanted whose memory traffic the matrix units hide. Passes 1 and 2 keep a block of rows
and stream the heads past it: a step of `rows` x `columns` reads `columns` of the head and does `rows` multiplications
per number read, so `rows` FLOP per byte in bfloat16, against FLOP/s per B/s of 240 on v5e, 230 on v4, 170 on v5p, 560
on v6e, 310 on tpu7x. Pass 3 keeps a block of columns and streams the rows: `columns` FLOP per byte. What does not fit
takes the next smaller blocks. All counted and compiled, not measured.
"""

from typing import NamedTuple

from kdjax.kernels import _tpu


class Sizes(NamedTuple):
    """Widths of student and teacher (0: none) and bytes per number of their hidden states and heads."""

    width: int
    teacher_width: int
    bytes: int
    teacher_bytes: int


# (rows, columns) to start from: passes 1 and 2; pass 3. Exact float32 products cost six times as much per byte.
BLOCKS = {
    "TPU v4": ((512, 512), (256, 512)),
    "TPU v5 lite": ((512, 512), (256, 512)),
    "TPU v5": ((512, 512), (256, 512)),
    "TPU v6 lite": ((1024, 512), (256, 1024)),
    "TPU7x": ((512, 512), (256, 512)),
}
OTHERS = ((256, 256), (256, 256))  # unknown chips, interpret mode, float32
ROW_LADDER = ((1024, 512), (1024, 256), (512, 512), (512, 256), (256, 256), (256, 128), (128, 128), (64, 128))
COLUMN_LADDER = ((256, 1024), (256, 512), (128, 512), (128, 256), (128, 128), (64, 128))
SMALLEST = ((32, 128), (16, 128))
PASSES = ("normalisers", "values", "gradient", "weight")

# Float32 tiles [part of the rows, columns] that are alive at once, found by compiling a mixture of three terms for v5e.
TILES = {"normalisers": 3, "values": 7, "gradient": 9, "weight": 10}
HEADROOM = 0.9  # of the VMEM, for more terms than that


def vmem(which: str, sizes: Sizes, rows: int, columns: int, summed: int) -> int:
    """Bytes of VMEM that a pass takes, within about 15 %; `summed`: temperatures at which c is no constant.

    Example: gradient, D = 2048, E = 4096, bfloat16, 512 x 256, one c. Hidden and heads, twice since the next block
    arrives during the work: 2 (512 + 256) (2048 + 4096) 2 B = 18.0 MiB. A and B in float32 and d_hidden twice in
    bfloat16: 512 * 2048 (4 + 4 + 2 * 2) B = 12.0 MiB. Row numbers in and out, 128 lanes each: 1 MiB. Work on 256 rows
    at a time: 9 * 256 * 256 * 4 B = 2.2 MiB; a rearranged block of the wider head: 256 * 4096 * 2 B = 2.0 MiB.
    """
    sides = [
        (-(-width // 128) * 128, size)
        for width, size in ((sizes.width, sizes.bytes), (sizes.teacher_width, sizes.teacher_bytes))
    ]
    blocks = [(rows + columns) * width * size for width, size in sides]
    streamed = 2 * (max(blocks) if which == "normalisers" else sum(blocks))
    d, own = sides[0]
    sums = 4 if own < 4 else 0  # float32 results are summed up in place
    kept = {
        "gradient": rows * d * (sums + 4 * summed + 2 * own),
        "weight": columns * d * (sums + 2 * own),
    }.get(which, 0)
    narrow = 2 * 2 * rows * 128 * 4
    part = next((part for part in (256, 128) if rows % part == 0), rows)
    work = TILES[which] * part * columns * 4 + max(columns * width * size for width, size in sides)
    return streamed + kept + narrow + work


def block_sizes(kind: str, which: str, sizes: Sizes, summed: int) -> tuple[int, int] | None:
    """(rows, columns) of a block of a pass on a device kind, or None if not even the smallest fits."""
    start = OTHERS if sizes.bytes > 2 else BLOCKS.get(kind, OTHERS)
    top, ladder = (start[1], COLUMN_LADDER) if which == "weight" else (start[0], ROW_LADDER)
    for rows, columns in (*ladder, *SMALLEST):
        fits = vmem(which, sizes, rows, columns, summed) <= HEADROOM * _tpu.vmem_bytes(kind)
        if rows <= top[0] and columns <= top[1] and fits:
            return rows, columns
    return None


def fit(kind: str, sizes: Sizes) -> bool:
    """Whether all passes do, whatever the terms."""
    return all(block_sizes(kind, which, sizes, 2) is not None for which in PASSES)
