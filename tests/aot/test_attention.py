"""attention, compiled for chips that are not here: memory, how often kernels run under `jax.checkpoint`, who is chosen.

Compiled, not run: values are those of tests/kernels/test_attention_values.py.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo  # where JAX asks which cuDNN there is
from jax.sharding import PartitionSpec as P

from kdjax import aot
from kdjax.kernels import _dispatch, attention
from kdjax.kernels.attention import block_sizes
from tests.kernels import oracle

TPUS = [chip for chip, entry in aot.CHIPS.items() if entry.platform == "tpu"]
KERNEL = "tpu_custom_call"
# rows, T, query heads, kv heads, head size
QWEN3, SMOLLM2 = (2, 2048, 16, 8, 128), (2, 2048, 9, 3, 64)  # 1.7B and 135M


def needs(chip):
    reason = aot.unavailable(chip)
    if reason is not None:
        pytest.skip(reason)


def abstract(sizes, dtype=jnp.bfloat16):
    rows, length, heads, kv_heads, width = sizes
    arrays = [jax.ShapeDtypeStruct((rows, length, n, width), dtype) for n in (heads, kv_heads, kv_heads)]
    return (*arrays, jax.ShapeDtypeStruct((rows, length), jnp.int32))


def forward(implementation=None, **options):
    return lambda *arrays: attention.attention(*arrays, **options, implementation=implementation)


def gradient(implementation=None, **options):
    """(dq, dk, dv) with q for the cotangent, which has the shape."""

    def function(q, k, v, ids):
        return jax.vjp(lambda *qkv: forward(implementation, **options)(*qkv, ids), q, k, v)[1](q)

    return function


def compiled(chip, function, sizes, dtype=jnp.bfloat16):
    needs(chip)
    return aot.compile_on(chip, function, *abstract(sizes, dtype))


def check_memory(program, sizes):
    """A quarter of the scores' bytes at most (v5p keeps little in VMEM), and no array of an eighth of their number."""
    rows, length, heads, _, _ = sizes
    scores = rows * heads * length * length
    assert program.memory_analysis().temp_size_in_bytes < 4 * scores / 4
    elements, shape = oracle.largest_shape(program.as_text())
    assert elements <= scores / 8, shape


@pytest.mark.parametrize("sizes", [QWEN3, SMOLLM2], ids=["qwen3", "smollm2"])
@pytest.mark.parametrize("chip", TPUS)
def test_splash_compiles_without_the_scores(chip, sizes):
    alone = ((forward("pallas_tpu"), 1),) if chip == "v5e" else ()  # a gradient has it inside, on all chips
    for function, runs in (*alone, (gradient("pallas_tpu"), 3)):
        program = compiled(chip, function, sizes)
        assert program.as_text().count(f'custom_call_target="{KERNEL}"') == runs
        check_memory(program, sizes)


@pytest.mark.parametrize(
    ("sizes", "dtype", "options"),
    [
        ((1, 2048, 4, 1, 256), jnp.bfloat16, {"window": 512}),  # Gemma 3 1B
        ((1, 1024, 2, 1, 256), jnp.float32, {"window": 200, "soft_cap": 50.0}),  # nearly all of 16 MiB of VMEM
        ((1, 1000, 2, 1, 80), jnp.bfloat16, {}),  # rows and heads that no tile divides
    ],
)
def test_splash_compiles_where_vmem_is_small(sizes, dtype, options):
    program = compiled("v4", gradient("pallas_tpu", **options), sizes, dtype)
    assert program.as_text().count(f'custom_call_target="{KERNEL}"') == 3


def test_the_table_of_blocks_is_filled_to_the_brim_somewhere():
    """One of the cases above is on the edge: a wider head takes smaller blocks."""
    assert [block_sizes.choose(1024, width, 4) for width in (256, 384)] == [512, 256]


def test_xla_on_tpu_has_scores_of_a_block():
    """What splash is for; of a short row, since the program of a long one takes the compiler half a minute."""
    sizes = (1, 256, 2, 1, 128)
    program = compiled("v5e", gradient("xla"), sizes)
    assert KERNEL not in program.as_text()
    assert oracle.largest_shape(program.as_text())[0] >= 2 * 128 * 256


@pytest.mark.parametrize("chip", TPUS)
def test_splash_is_the_default(chip):
    needs(chip)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced = aot.trace_on(chip, forward(), *abstract(SMOLLM2))
    assert "splash_mha" in str(traced.jaxpr)


POLICIES = jax.checkpoint_policies
KEPT = POLICIES.save_only_these_names(attention.RESIDUALS)


@pytest.mark.parametrize(
    ("policy", "forward_runs", "kinds"),
    [
        (POLICIES.dots_saveable, 2, 1),
        (POLICIES.save_from_both_policies(POLICIES.dots_saveable, KEPT), 1, 2),
    ],
    ids=["dots", "dots_and_residuals"],
)
def test_the_forward_kernel_runs_once_where_its_residuals_are_kept(policy, forward_runs, kinds):
    """As the models have it: in a shard_map, in a layer of one of `kinds`, in a scan."""
    needs("v5e")
    grid = aot.mesh("v5e")
    rows, length, heads, kv_heads, width = 1, 512, 2, 1, 64
    mixes = [
        jax.shard_map(
            functools.partial(attention.attention, window=window, implementation="pallas_tpu"),
            mesh=grid,
            in_specs=P(),
            out_specs=P(),
            check_vma=False,
        )
        for window in (0, 100)[:kinds]
    ]

    def loss(x, weights, ids, local):
        def layer(x, inputs):
            q = (x @ inputs[0]).reshape(rows, length, heads, width)
            qkv = q, q[:, :, :kv_heads], 2 * q[:, :, :kv_heads]
            mixed = jax.lax.cond(inputs[1], *mixes, *qkv, ids) if kinds == 2 else mixes[0](*qkv, ids)
            return x + mixed.reshape(x.shape), None

        wrapped = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        return jnp.sum(jax.lax.scan(wrapped, x, (weights, local))[0])

    layers, features = 3, heads * width
    shapes = {"x": (rows, length, features), "weights": (layers, features, features), "ids": (rows, length)}
    dtypes = {"ids": jnp.int32, "local": jnp.bool_}
    placed = [
        jax.ShapeDtypeStruct(shape, dtypes.get(name, jnp.float32), sharding=jax.NamedSharding(grid, P()))
        for name, shape in (shapes | {"local": (layers,)}).items()
    ]
    with jax.set_mesh(grid):
        text = jax.jit(jax.grad(loss, (0, 1))).lower(*placed).compile().as_text()
    calls = [line.split(" = ")[0] for line in text.splitlines() if KERNEL in line]
    assert sum("_fwd_" in call for call in calls) == forward_runs * kinds
    assert len(calls) == (forward_runs + 2) * kinds


# --- GPU


class Version:
    """As of a process with the library: programs need none of it before they run."""

    @staticmethod
    def cudnn_get_version():
        return 91100


@pytest.mark.gpu_compiler
@pytest.mark.parametrize("sizes", [QWEN3, SMOLLM2], ids=["qwen3", "smollm2"])
def test_cudnn_compiles_with_one_mask_for_all_heads(sizes, monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", Version)
    program = compiled("h100", gradient(), sizes)
    text = program.as_text()
    assert text.count('custom_call_target="__cudnn$fmhaScaleBiasSoftmax"') == 1
    assert text.count('custom_call_target="__cudnn$fmhaScaleBiasSoftmaxBackward"') == 1
    rows, length, heads, _, width = sizes
    mask, q = rows * length * length, rows * length * heads * width
    assert program.memory_analysis().temp_size_in_bytes < 2 * 2 * mask + 4 * 2 * q  # the mask and its gradient
    assert oracle.largest_shape(text)[0] <= max(mask, q)


@pytest.mark.gpu_compiler
def test_xla_compiles_for_a_gpu_without_cudnn(monkeypatch):
    needs("h100")
    monkeypatch.setattr(_dispatch, "_warned", set())
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", None)
    with pytest.warns(UserWarning, match="attention: cudnn is passed over on NVIDIA H100 .* cuDNN is not detected"):
        program = compiled("h100", gradient(), (1, 256, 2, 1, 64))
    assert "cudnn$fmha" not in program.as_text()
