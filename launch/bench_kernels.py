"""The suite "kernels" of launch/bench.py: op x implementation x shape, timed here and compiled for absent chips.

Timed, median of the rounds: ms; the ratio to the naive dense path (kdjax/kernels/naive.py) and the share of the matmul
rate, both as the median over rounds of ratios within a round; the compiled program's temporary bytes. The share counts
the least FLOPs that the op can do, at the rate of a plain product hidden @ head of the same shape and process.
Compiled, not run: temporary and argument bytes, FLOPs by formula (the implementation's, and the least), and what the
hungriest Mosaic kernel takes on the chip: VMEM, as its compiler states it in the program, or of a GPU shared memory per
block, the sum of the buffers that the kernel declares. All sizes in MiB.
"""

import csv
import dataclasses
import datetime
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

if TYPE_CHECKING:
    from kdjax.kernels.shapes import Arguments, Shape

PRODUCT, NAIVE, REFERENCE = "plain product", "naive", "reference"
MEASURED, COMPILED = "measured", "compiled, not run"
MIB = 2**20


@dataclasses.dataclass
class Row:
    """One line of the table and of the CSV; None = does not apply or is not known."""

    op: str
    implementation: str
    shape: str
    rows: int
    vocab: int
    width: int
    teacher_width: int
    dtype: str
    target: str
    status: str
    rounds: int | None = None
    milliseconds: float | None = None
    ratio_to_naive: float | None = None
    matmul_share: float | None = None
    temp_bytes: int | None = None
    temp_ratio_to_naive: float | None = None
    argument_bytes: int | None = None
    on_chip_bytes: int | None = None
    on_chip: str = ""
    gflop: float | None = None
    least_gflop: float | None = None
    least_bytes: int | None = None


def run(rounds: int) -> None:
    """Time, compile, print, write the CSV."""
    import jax

    ops, timed, compiled, chips = _wanted()
    device = jax.devices()[0]
    today = datetime.date.today().isoformat()
    general = {"date": today, "commit": _commit(), "jax": jax.__version__, "device": device.device_kind}
    print(", ".join(f"{name} {value}" for name, value in general.items()))
    found = []
    if flags.FLAGS.time:
        found += _shown(TIMED, _timed(ops, timed, rounds, device.platform))
    found += _shown(BUILT, _compiled(ops, compiled, chips))
    path = Path(flags.FLAGS.out) / f"kernels-{today}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*general, *(field.name for field in dataclasses.fields(Row))])
        writer.writeheader()
        writer.writerows(general | dataclasses.asdict(row) for row in found)
    print(f"\n{len(found)} lines: {path}")


def _wanted() -> "tuple[list[str], dict[str, Shape], dict[str, Shape], list[str]]":
    """Ops, shapes to time and to compile, and chips that the flags name. ValueError if there is none of that name."""
    from kdjax import aot, registry
    from kdjax.kernels import shapes

    options = flags.FLAGS
    chosen = {name: registry.lookup(shapes.SHAPES, name, "shape") for name in [*options.shape, *options.compile_shape]}
    if options.rows:
        chosen = {name: dataclasses.replace(shape, rows=options.rows) for name, shape in chosen.items()}
    timed, compiled = ({name: chosen[name] for name in names} for names in (options.shape, options.compile_shape))
    # linear_divergence is both of its cases, the value alone and +grad.
    called = {op: {op, op.partition("+")[0]} for op in shapes.CASES}
    for op in options.op:
        registry.lookup(dict.fromkeys(set().union(*called.values())), op, "op")
    ops = [op for op in shapes.CASES if not options.op or called[op] & set(options.op)]
    chips = {"all": list(aot.CHIPS), "none": []}.get(",".join(options.chip), options.chip)
    for chip in chips:
        registry.lookup(aot.CHIPS, chip, "chip")
    return ops, timed, compiled, chips


# --- timed here


def _timed(ops: list[str], chosen: "dict[str, Shape]", rounds: int, platform: str) -> Iterator[Row]:
    """Every implementation of the platform's order and the naive path, in turn; the reference at the first shape."""
    import jax

    from kdjax.kernels import _dispatch, naive, shapes

    for name, shape in chosen.items():
        shape = dataclasses.replace(shape, dtype="float32" if platform == "cpu" else "bfloat16")
        for op in ops:
            case, arguments = shapes.CASES[op], shapes.random_arguments(op, shape)
            names = ([REFERENCE] if name == next(iter(chosen)) else []) + list(_dispatch.ORDER.get(platform, ("xla",)))
            here = [implementation for implementation in names if implementation in case.implementations]
            programs: dict[str, Any] = {}
            for key, function in ((PRODUCT, naive.product), (NAIVE, naive.build(op))):
                programs[key] = jax.jit(function).lower(arguments).compile()
            for key in here:
                try:
                    programs[key] = jax.jit(case.build(key)).lower(arguments).compile()
                except Exception as error:  # noqa: BLE001 as below
                    failed = _row(op, key, name, shape, platform, _failure(error))
                    yield failed
            times = _in_turn(programs, arguments, rounds)
            memory = {key: program.memory_analysis() for key, program in programs.items()}
            least = shapes.flops(op, shape) / shapes.product_flops(shape)  # in products
            for key in list(programs)[1:]:
                paired = list(zip(times[key], times[NAIVE], times[PRODUCT], strict=False))
                yield dataclasses.replace(
                    _row(op, key, name, shape, platform, MEASURED),
                    rounds=len(paired),
                    milliseconds=1e3 * statistics.median(times[key]),
                    ratio_to_naive=statistics.median(own / dense for own, dense, _ in paired),
                    matmul_share=statistics.median(least * one / own for own, _, one in paired),
                    temp_bytes=memory[key].temp_size_in_bytes,
                    temp_ratio_to_naive=memory[key].temp_size_in_bytes / max(1, memory[NAIVE].temp_size_in_bytes),
                    argument_bytes=memory[key].argument_size_in_bytes,
                )


def _in_turn(programs: dict[str, Any], arguments: "Arguments", rounds: int) -> dict[str, list[float]]:
    """Seconds of each program in each round; of the reference once, without a warm-up."""
    import jax

    times: dict[str, list[float]] = {key: [] for key in programs}
    for at in range(-1, rounds):
        for key, program in programs.items():
            if key == REFERENCE and at != 0:
                continue
            start = time.perf_counter()
            jax.block_until_ready(program(arguments))
            if at >= 0:
                times[key].append(time.perf_counter() - start)
    return times


# --- compiled for chips that are not here


def _compiled(ops: list[str], chosen: "dict[str, Shape]", chips: list[str]) -> Iterator[Row]:
    """Every implementation of the order of each chip; a chip that nothing can be compiled for is one line."""
    from kdjax import aot
    from kdjax.kernels import _dispatch, shapes

    for chip in chips:
        reason = aot.unavailable(chip)
        if reason is not None:
            print(f"{chip}: nothing is compiled, {reason}")
            continue
        for name, shape in chosen.items():
            shape = dataclasses.replace(shape, dtype="bfloat16")
            for op in ops:
                table = shapes.CASES[op].implementations
                for implementation in _dispatch.ORDER[aot.CHIPS[chip].platform]:
                    if implementation in table:
                        yield _compile(op, implementation, name, shape, chip)


def _compile(op: str, implementation: str, name: str, shape: "Shape", chip: str) -> Row:
    from kdjax import aot
    from kdjax.kernels import shapes

    row = _row(op, implementation, name, shape, chip, COMPILED)
    call = shapes.CASES[op].build(implementation), shapes.abstract_arguments(op, shape)
    try:
        program = aot.compile_on(chip, *call)
    except Exception as error:  # noqa: BLE001 a compiler may fail in any way, and the line says how
        return dataclasses.replace(row, status=_failure(error))
    memory, tpu = program.memory_analysis(), aot.CHIPS[chip].platform == "tpu"
    on_chip = aot.vmem_bytes(program) if tpu else aot.shared_bytes(aot.trace_on(chip, *call))
    source = "VMEM of a kernel, by its compiler" if tpu else "shared memory of a block, by the kernel's declarations"
    return dataclasses.replace(
        row,
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        on_chip_bytes=on_chip,
        on_chip="" if on_chip is None else source,
        gflop=shapes.implementation_flops(op, implementation, shape) / 1e9,
    )


def _failure(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    declined = isinstance(error, ValueError) and first.startswith("implementation of ")
    return f"{'declined' if declined else 'does not compile'}: {first}"


def _row(op: str, implementation: str, name: str, shape: "Shape", target: str, status: str) -> Row:
    from kdjax.kernels import shapes

    sizes = (shape.rows, shape.vocab, shape.student.width, shape.teacher.width, shape.dtype)
    row = Row(op, implementation, name, *sizes, target, status)
    least = shapes.flops(op, shape) / 1e9, shapes.least_bytes(op, shape)
    return dataclasses.replace(row, least_gflop=least[0], least_bytes=least[1])


# --- printed: title, characters (negative: to the left), what a line shows


def _number(field: str, form: str, unit: float = 1.0) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = getattr(row, field)
        return "-" if value is None else format(value / unit, form)

    return show


Column = tuple[str, int, Callable[[Row], str]]
WHO: list[Column] = [
    ("op", -24, lambda row: row.op),
    ("implementation", -16, lambda row: row.implementation),
    ("shape N x V x D", -34, lambda row: f"{row.shape} {row.rows} x {row.vocab} x {row.width}"),
]
TIMED: list[Column] = [
    *WHO,
    ("ms", 9, _number("milliseconds", ".1f")),
    ("of naive", 10, _number("ratio_to_naive", ".2f")),
    ("of matmul rate", 16, _number("matmul_share", ".2f")),
    ("temp MiB", 10, _number("temp_bytes", ".1f", MIB)),
    ("of naive's", 12, _number("temp_ratio_to_naive", ".3f")),
    ("", -1, lambda row: "" if row.status == MEASURED else f"  {row.status}"),
]
BUILT: list[Column] = [
    *WHO,
    ("chip", -6, lambda row: row.target),
    ("temp MiB", 10, _number("temp_bytes", ".1f", MIB)),
    ("arguments", 10, _number("argument_bytes", ".1f", MIB)),
    ("on chip", 9, _number("on_chip_bytes", ".2f", MIB)),
    ("GFLOP", 9, _number("gflop", ".1f")),
    ("least", 9, _number("least_gflop", ".1f")),
    ("", -1, lambda row: f"  {row.status}"),
]


def _shown(columns: list[Column], rows: Iterator[Row]) -> list[Row]:
    """Each as it comes; all in the end."""
    found: list[Row] = []
    for row in rows:
        if not found:
            print("\n" + _line(columns, None))
        print(_line(columns, row), flush=True)
        found.append(row)
    return found


def _line(columns: list[Column], row: Row | None) -> str:
    """A line of the table; of titles, without a row."""
    cells = ((title if row is None else show(row), size) for title, size, show in columns)
    return "".join(f"{cell:<{-size}}" if size < 0 else f"{cell:>{size}}" for cell, size in cells).rstrip()


def _commit() -> str:
    """Of this checkout, with a + if files differ from it; "" where there is none."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
