"""The Mosaic GPU kernels, lowered for Hopper without anything of NVIDIA's, and compiled where the compiler is.

Compiled, not run: values are those of tests/kernels/test_pallas_gpu.py, in an interpreter.
"""

import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from kdjax import aot
from kdjax.config import Loss
from kdjax.kernels import _dispatch, shapes, topk
from kdjax.kernels.linear_divergence import pallas_gpu
from kdjax.kernels.sparse_divergence import pallas_gpu as sparse_gpu
from kdjax.kernels.sparse_divergence import sparse_divergence
from kdjax.kernels.topk import pallas_gpu as topk_gpu
from kdjax.losses import LOSSES
from kdjax.types import Head
from tests.kernels import oracle

H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
SPARSE = ("sparse_divergence", "sparse_divergence+grad")
OPS = ("linear_stats", "linear_pair_stats", "linear_divergence", "linear_divergence+grad", "topk", *SPARSE)
KERNEL = "mosaic_gpu"


def arguments(op, name, rows, dtype="bfloat16"):
    return shapes.abstract_arguments(op, dataclasses.replace(shapes.SHAPES[name], rows=rows, dtype=dtype))


@contextlib.contextmanager
def traced_for(kind, devices=1):
    """As under the mesh of GPUs that are not here."""
    device = jax.sharding.AbstractDevice(kind, 132, "gpu")
    mesh = jax.sharding.AbstractMesh((devices,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield mesh


def lowered(kind, function, *args):
    with traced_for(kind):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("op", OPS)
def test_the_default_lowers_on_hopper(op, recwarn):
    """The smallest width there is, a ragged vocabulary, and a teacher's head of the other order with padding."""
    shape = shapes.Shape(
        301, 1003, shapes.Side(64, padding=5), shapes.Side(128, tied=False, padding=21), dtype="bfloat16"
    )
    text = lowered(H100, shapes.CASES[op].build(None), shapes.abstract_arguments(op, shape))
    assert KERNEL in text
    assert not recwarn.list


@pytest.mark.parametrize(
    ("kind", "name", "dtype", "reason"),
    [
        (A100, "smollm2", "bfloat16", "wgmma, which only Hopper has"),
        (H100, "smollm2", "float32", "not float32"),
        (H100, "gpt2", "bfloat16", "tiles of 8, and there are 50257: pad the weight"),
    ],
)
def test_the_default_is_xla_with_one_reason_elsewhere(kind, name, dtype, reason, monkeypatch):
    for op in OPS:
        monkeypatch.setattr(_dispatch, "_warned", set())
        given = arguments(op, name, 512, dtype)
        with pytest.warns(UserWarning, match=f"pallas_gpu is passed over on {kind}; .*{reason}") as told:
            text = lowered(kind, shapes.CASES[op].build(None), given)
        assert KERNEL not in text
        assert len(told) == 1
        with traced_for(kind), pytest.raises(ValueError, match=f"got 'pallas_gpu' for {kind}; .*{reason}"):
            jax.eval_shape(shapes.CASES[op].build("pallas_gpu"), given)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_lowers(name):
    """Its slope too, and what it asks of a row: in one kernel of values and gradient."""
    term = LOSSES[name](Loss())
    hidden, head = jnp.zeros((64, 64), jnp.bfloat16), Head(jnp.zeros((128, 64), jnp.bfloat16), 128, True)
    names = (
        "label",
        "weight",
        "topq",
        "topp",
        "logq0",
        "logq1",
        "logp0",
        "logp1",
        "c0",
        *(f"row0.{at}" for at in range(4)),
    )

    def run(hidden, weight, row):
        own = dataclasses.replace(head, weight=weight)
        return pallas_gpu._pass(
            (term,),
            dict.fromkeys(names, row),
            sides=[("q", hidden, own), ("p", hidden, own)],
            scalars=dict.fromkeys(("limit", "tau", "scale0"), row[0]),
            values=True,
            slopes=[0],
            gradient=True,
        )

    assert KERNEL in lowered(H100, run, hidden, head.weight, jnp.zeros(64))


def moved_between_devices(call):
    """(gathered, reduced): the types of what four devices that share a head of 50257 columns tell each other.

    call(hidden [64, 64], head)
    """

    def local(hidden, weight):
        return call(hidden, Head(weight, 50257, True, vocab_axis="data"))

    with traced_for(H100, devices=4) as mesh:
        specs = {"in_specs": (P(), P("data", None)), "out_specs": P()}
        run = jax.jit(jax.shard_map(local, mesh=mesh, **specs, check_vma=False))
        arrays = (jax.ShapeDtypeStruct((rows, 64), jnp.bfloat16) for rows in (64, 50432))
        text = run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert KERNEL in text
    assert not re.search("collective_permute|all_to_all|reduce_scatter", text)
    gathered = re.findall(r'"stablehlo\.all_gather".*: \((tensor<.*>)\) -> ', text)
    return gathered, re.findall(r'"stablehlo\.all_reduce".*?\n    *\}\) : \((.*?)\) ->', text, re.DOTALL)


def test_a_split_head_stays_split():
    """Devices tell each other the K best of each row, its maximum and its sum."""
    gathered, reduced = moved_between_devices(lambda hidden, head: topk.topk(hidden, head, 16))
    assert sorted(gathered) == ["tensor<64x16xf32>", "tensor<64x16xi32>"]
    assert reduced == ["tensor<64x1xf32>"] * 2


def test_a_split_head_stays_split_with_a_gradient():
    """Devices tell each other the logits at a row's entries, the maximum and the sum of its tail."""

    def call(hidden, head):
        def total(hidden, weight):
            stored = jnp.arange(64 * 16, dtype=jnp.int32).reshape(64, 16), jnp.ones((64, 16)), jnp.ones(64)
            return sparse_divergence(hidden, dataclasses.replace(head, weight=weight), *stored, "ghost_tail")[0]

        return jax.grad(total, (0, 1))(hidden, head.weight)

    gathered, reduced = moved_between_devices(call)
    assert not gathered
    # Of whole blocks of 128 rows; the last is the cotangent.
    assert sorted(reduced) == ["tensor<128x16xf32>", "tensor<128xf32>", "tensor<128xf32>", "tensor<f32>"]


def needs_compiler():
    reason = aot.unavailable("h100")
    if reason is not None:
        pytest.skip(reason)


def temporary(op, name, rows):
    """(temporary bytes of the compiled program, its arguments, its text)."""
    given = arguments(op, name, rows)
    program = aot.compile_on("h100", shapes.CASES[op].build("pallas_gpu"), given)
    return program.memory_analysis().temp_size_in_bytes, given, program.as_text()


@pytest.mark.gpu_compiler
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("linear_stats", "gemma3"),  # V = 262144
        ("linear_pair_stats", "smollm2"),  # [V, D] with D = 576
        ("linear_pair_stats", "gemma2"),  # soft caps
        ("linear_pair_stats", "llama3_untied"),  # [D, V]
        ("linear_divergence", "qwen2.5"),  # D = 896, heads of two orders and of two paddings
    ],
)
def test_compiles_without_a_copy_of_the_head(op, name):
    needs_compiler()
    bytes_, given, text = temporary(op, name, 4096)
    assert KERNEL in text
    assert bytes_ < given.head.weight.size / 4  # an eighth of it, in bytes
    heads = [head.weight.size for head in (given.head, given.teacher_head) if head is not None]
    assert oracle.largest_shape(text)[0] <= max(heads)


@pytest.mark.gpu_compiler
def test_gradient_compiles_within_its_budget():
    """The gradient of the logits of some rows, the head's own in float32, and no more with twice the rows."""
    needs_compiler()
    op, name, rows = "linear_divergence+grad", "qwen2.5_self", 4096
    bytes_, given, text = temporary(op, name, rows)
    assert KERNEL in text
    own = bytes_ - 4 * (given.head.weight.size + given.hidden.size)
    assert own < pallas_gpu.CHUNK_BYTES * 1.1 + given.head.weight.size
    assert own < rows * given.head.vocab_size  # not even one byte for each


@pytest.mark.gpu_compiler
@pytest.mark.parametrize("name", ["smollm2", "llama3_untied", "gemma3"])
def test_topk_compiles_within_its_budget(name):
    """The logits of some rows and little else, however many rows there are."""
    needs_compiler()
    bytes_, given, text = temporary("topk", name, 8192)
    assert KERNEL in text
    vocab = given.head.vocab_size
    assert bytes_ < topk_gpu.CHUNK_BYTES * 1.1
    assert bytes_ < 8192 * vocab  # not even one byte for each
    assert oracle.largest_shape(text)[0] <= max(given.head.weight.size, topk_gpu.CHUNK_BYTES // 4)


@pytest.mark.gpu_compiler
@pytest.mark.parametrize(
    ("op", "name", "entries"), [(SPARSE[0], "llama3_untied", 512), (SPARSE[1], "qwen2.5_self", 64)]
)
def test_sparse_divergence_compiles_within_its_budget(op, name, entries, monkeypatch):
    """Entries in rounds, the gradient of the logits of some rows and the head's own, however many rows there are."""
    needs_compiler()
    monkeypatch.setitem(shapes.SHAPES, name, dataclasses.replace(shapes.SHAPES[name], entries=entries))
    bytes_, given, text = temporary(op, name, 8192)
    assert KERNEL in text
    # d_hidden, and arguments that are cut into chunks of rows: some [N, K] and [N, D].
    rows, weight = 8 * (given.hidden.size + 4 * given.ids.size), given.head.weight.size
    assert bytes_ < sparse_gpu.CHUNK_BYTES * 1.1 + rows + (4 * weight if "grad" in op else 0)
    assert oracle.largest_shape(text)[0] <= max(weight, sparse_gpu.CHUNK_BYTES // 2)
