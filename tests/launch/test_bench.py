"""python -m launch.bench --suite=kernels: what it prints and writes, on a tiny shape and one absent chip."""

import csv
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from kdjax import aot
from kdjax.kernels import linear_stats, shapes
from kdjax.kernels.shapes import Shape, Side
from tests.launch import launched

ROOT = pathlib.Path(__file__).parents[2]
TINY = Shape(40, 300, Side(24, padding=5), Side(12, tied=False), entries=4)


@pytest.fixture
def bench(monkeypatch, capsys, tmp_path):
    """bench(*arguments): (what was printed, the lines of the CSV)."""
    monkeypatch.setattr(shapes, "SHAPES", {"tiny": TINY})

    def run(*arguments):
        typed = ["--suite=kernels", "--shape=tiny", "--compile_shape=tiny", f"--out={tmp_path / 'out'}", *arguments]
        launched.run("bench", *typed)
        (path,) = (tmp_path / "out").glob("*.csv")
        assert re.fullmatch(r"kernels-\d{4}-\d\d-\d\d\.csv", path.name)
        with path.open(newline="") as file:
            return capsys.readouterr().out, list(csv.DictReader(file))

    return run


def test_everything_is_timed_next_to_the_naive_path(bench):
    out, lines = bench("--rounds=2", "--chip=none")
    assert {line["op"] for line in lines} == set(shapes.CASES)
    for op in shapes.CASES:
        by = {line["implementation"]: line for line in lines if line["op"] == op}
        assert set(by) == {"naive", "reference", "xla"}
        assert float(by["naive"]["ratio_to_naive"]) == float(by["naive"]["temp_ratio_to_naive"]) == 1
        for line in by.values():
            assert line["status"] == "measured"
            assert line["target"] == "cpu"
            sizes = [line[name] for name in ("shape", "rows", "vocab", "width", "teacher_width", "dtype")]
            assert sizes == ["tiny", "40", "300", "24", "12", "float32"]
            assert float(line["milliseconds"]) > 0
            assert float(line["matmul_share"]) > 0
            assert float(line["least_gflop"]) == shapes.flops(op, TINY) / 1e9
        assert (by["reference"]["rounds"], by["xla"]["rounds"]) == ("1", "2")
    assert re.search(r"^linear_stats +xla +tiny 40 x 300 x 24( +[\d.]+){5}$", out, re.MULTILINE)
    assert {line["jax"] for line in lines} == {jax.__version__}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", line["date"]) for line in lines)


def test_absent_chips_are_compiled_for_and_not_run(bench):
    reason = aot.unavailable("v5e")
    if reason is not None:
        pytest.skip(reason)
    out, lines = bench("--notime", "--chip=v5e", "--op=linear_divergence+grad,linear_stats")
    assert {(line["op"], line["implementation"]) for line in lines} == {
        (op, name)
        for op in ("linear_stats", "linear_divergence+grad")
        for name in set(shapes.CASES[op].implementations) & {"xla", "pallas_tpu"}
    }
    for line in lines:
        assert line["status"] == "compiled, not run"
        assert (line["target"], line["dtype"]) == ("v5e", "bfloat16")
        assert line["milliseconds"] == line["ratio_to_naive"] == ""
        assert int(line["argument_bytes"]) > 0
        assert (line["on_chip_bytes"] != "") == line["implementation"].startswith("pallas")
        assert float(line["gflop"]) >= float(line["least_gflop"])
    assert out.count("compiled, not run") == len(lines)


def test_what_cannot_be_compiled_is_said(bench, monkeypatch):
    def broken(*arguments, **options):
        raise NotImplementedError("no lowering for this\nand a long story")

    def declined(*arguments, **options):
        raise ValueError("implementation of linear_stats must be one that runs here, got 'xla' for v5e; why not.")

    monkeypatch.setattr(aot, "unavailable", lambda chip: "libtpu is on holiday" if chip == "v4" else None)
    monkeypatch.setattr(aot, "trace_on", lambda chip, function, *args: jax.eval_shape(function, *args))
    monkeypatch.setitem(linear_stats.IMPLEMENTATIONS, "xla", broken)
    monkeypatch.setitem(linear_stats.PAIR_IMPLEMENTATIONS, "xla", declined)
    monkeypatch.setattr(shapes, "least_bytes", lambda op, shape: 1)
    out, lines = bench("--notime", "--chip=v4,v5e", "--op=linear_stats,linear_pair_stats")
    assert "v4: nothing is compiled, libtpu is on holiday" in out
    status = {line["op"]: line["status"] for line in lines if line["implementation"] == "xla"}
    assert status == {
        "linear_stats": "does not compile: no lowering for this",
        "linear_pair_stats": "declined: implementation of linear_stats must be one that runs here, got 'xla' for v5e; "
        "why not.",
    }


def test_an_implementation_that_fails_here_is_a_line(bench, monkeypatch):
    def broken(*arguments, **options):
        raise NotImplementedError("not on this platform")

    monkeypatch.setitem(linear_stats.IMPLEMENTATIONS, "xla", broken)
    monkeypatch.setattr(shapes, "least_bytes", lambda op, shape: 1)  # it calls xla, too
    _, lines = bench("--rounds=1", "--chip=none", "--op=linear_stats")
    status = {line["implementation"]: line["status"] for line in lines}
    assert status == {
        **dict.fromkeys(("naive", "reference"), "measured"),
        "xla": "does not compile: not on this platform",
    }


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--op=linear_stat", "op must be .*got 'linear_stat'.*'linear_stats'"),
        ("--shape=tinny", "shape must be .*got 'tinny'.*'tiny'"),
        ("--compile_shape=tinny", "shape must be .*got 'tinny'.*'tiny'"),
        ("--chip=v5", "chip must be .*got 'v5'"),
    ],
)
def test_unknown_names_are_refused(bench, argument, message):
    with pytest.raises(ValueError, match=message):
        bench("--notime", argument)


def test_help_lists_the_flags_and_loads_nothing():
    typed = [sys.executable, "-X", "importtime", "-m", "launch.bench", "--help"]
    done = subprocess.run(typed, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    for name in ("suite", "rounds", "batch", "fraction", "op", "shape", "compile_shape", "chip", "out"):
        assert re.search(rf"^ +--{name}: \S", done.stdout, re.MULTILINE), done.stdout
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "absl" in imported
    assert not imported & {"jax", "jaxlib", "numpy", "flax", "optax"}
