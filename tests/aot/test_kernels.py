"""Every vocabulary kernel, compiled for TPUs that are not here: real shapes, memory, and who is chosen where.

Compiled, not run: what is proven is that the compiler takes it, that no [N, V] array exists, and that the head is read
as it lies in memory. Values are tests/kernels' business.
"""

import dataclasses
import re
import warnings

import jax
import pytest

from kdjax import aot
from kdjax.kernels import _dispatch, shapes
from tests.kernels import oracle

ROWS = {"pallas_tpu": 1024, "xla": 4096, "reference": 4096}  # many tiles of each; more only take longer to compile
TPUS = [chip for chip, entry in aot.CHIPS.items() if entry.platform == "tpu"]
WITH_MOSAIC = [op for op, case in shapes.CASES.items() if "pallas_tpu" in case.implementations]
# Stored ids are sorted, and the TPU compiler takes seconds for a sort: their value alone is compiled for one chip.
GRADIENT = [op for op in WITH_MOSAIC if op != "sparse_divergence"]
QUICK = [op for op in GRADIENT if op not in ("linear_divergence", "sparse_divergence+grad")]

# smollm2: D = 576 is no multiple of 128, so [V, D] lies in memory with V last. gpt2: a ragged vocabulary. qwen2.5: the
# teacher's head is [E, V] and has padding. llama3_untied: so is the student's. gemma2: soft caps.
MOSAIC = [
    *(("v4", "smollm2", "bfloat16", op) for op in WITH_MOSAIC),
    *((chip, "smollm2", "bfloat16", op) for chip in ("v5e", "v5p", "tpu7x") for op in GRADIENT),
    *(("v6e", "smollm2", "float32", op) for op in GRADIENT),
    *(("v4", "gpt2", "float32", op) for op in QUICK),
    *(("v5e", "qwen2.5", "bfloat16", op) for op in QUICK),
    *(("v5p", "llama3_untied", "bfloat16", op) for op in QUICK),
    *(("v6e", "gemma2", "bfloat16", op) for op in QUICK),
    *(("tpu7x", "qwen2.5", "bfloat16", op) for op in QUICK),
]
# What a chip falls back to: all ops on one, the two that every run calls on the others.
USUAL = ("linear_stats", "linear_divergence+grad")
XLA = [
    *(("v5e", "smollm2", "bfloat16", op) for op in shapes.CASES if op != "sparse_divergence"),
    *(("v4", "smollm2", "float32", op) for op in USUAL),
    *(("v5p", "qwen2.5", "bfloat16", op) for op in USUAL),
    *(("v6e", "smollm2", "bfloat16", op) for op in USUAL),
    *(("tpu7x", "gpt2", "bfloat16", op) for op in USUAL),
]
# Where Mosaic kernels are declined, and what the reason says: float16 anywhere, and blocks that v4's VMEM is too small
# for, which a chip with more takes.
TOO_WIDE = r"fit into (its )?16 MiB of VMEM"
DECLINED = [
    *(("v5e", op, "smollm2", "float16", "it reads bfloat16 and float32, not float16") for op in WITH_MOSAIC),
    ("v4", "linear_pair_stats", "llama3_untied", "float32", TOO_WIDE),
]


def shape(name, dtype, implementation="pallas_tpu"):
    return dataclasses.replace(shapes.SHAPES[name], rows=ROWS[implementation], dtype=dtype)


def needs(chip):
    reason = aot.unavailable(chip)
    if reason is not None:
        pytest.skip(reason)


def compiled(chip, op, name, dtype, implementation):
    """The program and the arguments it was compiled for."""
    needs(chip)
    arguments = shapes.abstract_arguments(op, shape(name, dtype, implementation))
    return aot.compile_on(chip, shapes.CASES[op].build(implementation), arguments), arguments


def size(array):
    return array.size * array.dtype.itemsize


def large_arrays(program, arguments):
    """Arrays of half of N x V elements and more, besides the heads with and without their padding."""
    heads = set()
    for head in (arguments.head, arguments.teacher_head):
        if head is not None:
            width = head.weight.shape[1 if head.vocab_major else 0]
            heads |= {head.weight.size, head.vocab_size * width}
    most = arguments.hidden.shape[0] * arguments.head.vocab_size // 2
    found = oracle.hlo_shapes(program.as_text())
    return {array: elements for array, elements in found.items() if elements >= most and elements not in heads}


def own_temporary(program, arguments, gradient):
    """Temporary bytes without the float32 gradients, of which a program may keep one each."""
    gradients = 4 * (arguments.head.weight.size + arguments.hidden.size) if gradient else 0
    return program.memory_analysis().temp_size_in_bytes - gradients


@pytest.mark.parametrize(("chip", "name", "dtype", "op"), MOSAIC)
def test_mosaic_kernels_compile_without_a_copy_of_the_head(chip, name, dtype, op):
    program, arguments = compiled(chip, op, name, dtype, "pallas_tpu")
    assert "tpu_custom_call" in program.as_text()
    assert not large_arrays(program, arguments)
    # Gradients are written where they are wanted, so there is no place for a copy of either head.
    assert program.memory_analysis().temp_size_in_bytes < size(arguments.head.weight) / 2
    assert 0 < aot.vmem_bytes(program) <= 128 * 2**20


@pytest.mark.parametrize(("chip", "name", "dtype", "op"), XLA)
def test_tiled_xla_compiles(chip, name, dtype, op):
    program, arguments = compiled(chip, op, name, dtype, "xla")
    assert "tpu_custom_call" not in program.as_text()
    assert not large_arrays(program, arguments)
    # One [N, V] in float32; the dense path keeps several.
    whole = 4 * arguments.hidden.shape[0] * arguments.head.vocab_size
    assert own_temporary(program, arguments, shapes.CASES[op].gradient) < whole


def test_the_scan_sees_whole_logits_and_a_copy_of_the_head():
    op, name, dtype = "linear_divergence", "smollm2", "float32"
    program, arguments = compiled("v5e", op, name, dtype, "reference")
    assert set(large_arrays(program, arguments).values()) >= {ROWS["reference"] * arguments.head.vocab_size}
    # [V, 576] lies with V last; what must have D last copies it.
    rows = aot.compile_on("v5e", lambda a: jax.numpy.reshape(a.head.weight, (-1, 128)).sum(1), arguments)
    assert own_temporary(rows, arguments, False) > size(arguments.head.weight)
    assert aot.vmem_bytes(rows) is None


def default(chip, op, arguments):
    """Whether the default is a Mosaic kernel, and the warnings on the way."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        traced = aot.trace_on(chip, shapes.CASES[op].build(None), arguments)
    return "pallas_call" in str(traced.jaxpr), [str(warning.message) for warning in told]


@pytest.mark.parametrize("chip", TPUS)
def test_the_default_is_mosaic(chip):
    needs(chip)
    for op in shapes.CASES:
        arguments = shapes.abstract_arguments(op, shape("smollm2", "bfloat16"))
        assert default(chip, op, arguments) == (op in WITH_MOSAIC, []), op


@pytest.mark.parametrize(("chip", "op", "name", "dtype", "reason"), DECLINED)
def test_the_default_is_xla_with_one_reason_where_mosaic_declines(chip, op, name, dtype, reason, monkeypatch):
    needs(chip)
    monkeypatch.setattr(_dispatch, "_warned", set())
    arguments = shapes.abstract_arguments(op, shape(name, dtype))
    with pytest.raises(ValueError, match=rf"^implementation of .* got 'pallas_tpu' for TPU .*{reason}"):
        aot.trace_on(chip, shapes.CASES[op].build("pallas_tpu"), arguments)
    mosaic, told = default(chip, op, arguments)
    assert not mosaic
    assert len(told) == 1
    assert re.search(reason, told[0])
    assert default(chip, op, arguments) == (False, [])  # said once


def test_another_generation_takes_what_one_declines():
    needs("v5e")
    arguments = shapes.abstract_arguments("linear_pair_stats", shape("llama3_untied", "float32"))
    assert default("v5e", "linear_pair_stats", arguments) == (True, [])
