"""attention: every implementation against loops over queries in float64; who runs; what is refused; what is skipped."""

import contextlib
import dataclasses
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo  # where JAX asks which cuDNN there is
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kdjax.kernels import _dispatch, attention
from kdjax.kernels.attention import block_sizes, cudnn, pallas_tpu, xla
from tests.kernels import oracle

V5E, H100 = ("TPU v5 lite", "tpu"), ("NVIDIA H100 80GB HBM3", "cuda")


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows, length, heads, kv heads, head size; lengths of the segments of every row, padding behind them."""

    sizes: tuple[int, int, int, int, int]
    segments: tuple[tuple[int, ...], ...]
    window: int = 0
    soft_cap: float = 0.0


CASES = {
    "plain": Case((1, 256, 2, 2, 128), ((256,),)),
    "short": Case((2, 9, 2, 1, 8), ((3, 4), ())),  # padding; the second row is all padding
    "packed_grouped": Case((2, 300, 4, 2, 64), ((1, 130, 169), (290, 10))),
    "window_padded_one_kv_head": Case((1, 400, 3, 1, 64), ((290, 90),), window=130),
    "window_of_one": Case((1, 130, 2, 2, 8), ((130,),), window=1),
    "all": Case((2, 260, 4, 2, 128), ((100, 160), (260,)), window=100, soft_cap=2.0),
}
WITH_CUDNN = ("packed_grouped", "window_padded_one_kv_head")  # it takes its mask from the reference


class Problem(NamedTuple):
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    ids: np.ndarray
    cotangent: np.ndarray


def make_problem(case, dtype=np.float32):
    b, t, n, g, h = case.sizes
    draw = np.random.default_rng(5)
    scale = 2 * h**-0.25  # scores of a standard deviation of 4: some weights are nearly 1, some nearly 0
    q, k, v, cotangent = (draw.standard_normal((b, t, heads, h)) for heads in (n, g, g, n))
    ids = np.zeros((b, t), np.int32)
    for row, lengths in enumerate(case.segments):
        filled = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        ids[row, : len(filled)] = filled
    arrays = (np.asarray(jnp.asarray(x, dtype)) for x in (q * scale, k * scale, v, cotangent))
    return Problem(*list(arrays)[:3], ids, np.asarray(jnp.asarray(cotangent, dtype)))


def expected(problem, case):
    """(mixed, (dq, dk, dv)) of the total of mixed * cotangent, one query of one head at a time."""
    q, k, v, cotangent = (oracle.f64(x) for x in (problem.q, problem.k, problem.v, problem.cotangent))
    mixed, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    rows, length, heads, kv_heads, _ = case.sizes
    for b, n, t in np.ndindex(rows, heads, length):
        g = n * kv_heads // heads
        seen = [s for s in range(t + 1) if problem.ids[b, s] == problem.ids[b, t]]
        seen = [s for s in seen if t - s < case.window] if case.window else seen
        scores, slope = k[b, seen, g] @ q[b, t, n], 1.0
        if case.soft_cap:
            squashed = np.tanh(scores / case.soft_cap)
            scores, slope = case.soft_cap * squashed, 1 - squashed**2
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        mixed[b, t, n] = weights @ v[b, seen, g]
        upward = v[b, seen, g] @ cotangent[b, t, n]
        downward = weights * (upward - weights @ upward) * slope
        dq[b, t, n] = downward @ k[b, seen, g]
        dk[b, seen, g] += np.outer(downward, q[b, t, n])
        dv[b, seen, g] += np.outer(weights, cotangent[b, t, n])
    return mixed, (dq, dk, dv)


def run(function, problem, case):
    """The same of an implementation."""

    @jax.jit
    def both(q, k, v, ids, cotangent):
        def mix(q, k, v):
            return function(q, k, v, ids, window=case.window, soft_cap=case.soft_cap)

        mixed, pull = jax.vjp(mix, q, k, v)
        return mixed, pull(cotangent)

    return both(*(jnp.asarray(x) for x in problem))


def by_name(name):
    return lambda *args, **options: attention.attention(*args, **options, implementation=name)


def cudnn_by_xla(monkeypatch):
    """cuDNN's arguments, computed by jax.nn's own path: what is tested is what it is asked for."""
    real = jax.nn.dot_product_attention
    asked = []

    def fake(*args, implementation, **options):
        asked.append(implementation)
        return real(*args, **options, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", fake)
    return asked


def check(got, wanted, atol):
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(oracle.f64(ours), theirs, rtol=0, atol=atol * max(1.0, np.abs(theirs).max()))


@pytest.mark.parametrize("name", CASES)
def test_oracle(name, monkeypatch):
    case = CASES[name]
    problem = make_problem(case)
    wanted = expected(problem, case)
    for implementation in ("reference", "xla", "pallas_tpu"):
        got = run(by_name(implementation), problem, case)
        assert got[0].dtype == jnp.float32
        check(got, wanted, 3e-6)
    if name in WITH_CUDNN:
        asked = cudnn_by_xla(monkeypatch)
        check(run(cudnn.attention, problem, case), wanted, 3e-6)
        assert asked == ["cudnn"]


@pytest.mark.parametrize(("name", "last"), [("short", 4), ("window_padded_one_kv_head", 135), ("all", 1)])
def test_queries_of_the_last_places(name, last):
    """135 queries are two blocks that begin at no multiple of a block."""
    case = CASES[name]
    problem = make_problem(case)
    wanted, _ = expected(problem, case)
    options = {"window": case.window, "soft_cap": case.soft_cap}
    for implementation in ("reference", "xla"):
        given = jnp.asarray(problem.q[:, -last:]), *map(jnp.asarray, problem[1:4])
        got = by_name(implementation)(*given, **options)
        check(got, wanted[:, -last:], 3e-6)


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_bfloat16(implementation):
    """Results in bfloat16, the softmax not: the error is that of rounded weights and results."""
    case = CASES["short"]
    problem = make_problem(case, jnp.bfloat16)
    got = run(by_name(implementation), problem, case)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    check(got, expected(problem, case), 1e-2)


def test_split_over_rows_and_heads():
    """As the models call it: in a shard_map, heads of q and of k and v divided alike."""
    case = CASES["packed_grouped"]
    problem = make_problem(case)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    split, rows = P("data", None, "model", None), P("data", None)

    def function(q, k, v, ids, **options):
        def local(q, k, v, ids):
            return attention.attention(q, k, v, ids, **options, implementation="xla")

        specs = {"in_specs": (split, split, split, rows), "out_specs": split}
        return jax.shard_map(local, mesh=mesh, **specs, check_vma=False)(q, k, v, ids)

    with jax.set_mesh(mesh):
        placed = (jax.device_put(x, jax.NamedSharding(mesh, split)) for x in (problem.q, problem.k, problem.v))
        given = Problem(
            *placed,
            jax.device_put(problem.ids, jax.NamedSharding(mesh, rows)),
            jax.device_put(problem.cotangent, jax.NamedSharding(mesh, split)),
        )
        got = run(function, given, case)
    check(got, expected(problem, case), 3e-6)


# --- what is skipped


def abstract(length, heads=4, kv_heads=2, width=64, dtype=jnp.bfloat16, rows=1):
    arrays = [jax.ShapeDtypeStruct((rows, length, n, width), dtype) for n in (heads, kv_heads, kv_heads)]
    return (*arrays, jax.ShapeDtypeStruct((rows, length), jnp.int32))


def kernels(function, *args):
    """(name, grid) of every Pallas kernel in the traced program, in order."""
    found = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                found.append((equation.params["name"], equation.params["grid_mapping"].grid))
            for part in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns")):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return found


def test_splash_visits_only_blocks_in_the_window():
    def grids(window):
        def both(q, k, v, ids):
            return jax.vjp(lambda *qkv: pallas_tpu.attention(*qkv, ids, window=window), q, k, v)[1](q)

        return [grid[-3:] for _, grid in kernels(both, *abstract(2048))]

    assert block_sizes.choose(2048, 64, 2) == 512
    assert grids(0) == [(4, 4, 4)] * 3
    assert grids(513) == [(4, 4, 2)] * 3


def test_xla_has_no_scores_outside_the_window():
    def largest(window):
        program = jax.jit(lambda *a: xla.attention(*a, window=window)).lower(*abstract(2048, width=8)).compile()
        return oracle.largest_shape(program.as_text())[0]

    assert largest(0) == 4 * 256 * 2048
    assert largest(128) == 4 * 256 * (256 + 128)


@pytest.mark.parametrize(
    ("start", "window", "first"), [(512, 0, 0), (512, 1, 512), (512, 128, 384), (512, 130, 256), (0, 5, 0)]
)
def test_the_first_key_of_a_block(start, window, first):
    assert xla.first_key(start, window) == first


@pytest.mark.parametrize(
    ("length", "width", "itemsize", "block"),
    [
        (2048, 128, 2, 512),
        (2048, 64, 4, 512),
        (1000, 128, 2, 512),  # 24 more
        (700, 128, 2, 256),  # 68 more, where 512 would add 324
        (300, 128, 2, 128),
        (7, 128, 2, 128),
        (4096, 512, 4, 256),
        (4096, 4096, 4, None),
    ],
)
def test_blocks(length, width, itemsize, block):
    assert block_sizes.choose(length, width, itemsize) == block


# --- who runs


@contextlib.contextmanager
def traced_for(kind, platform):
    """As under the mesh of a chip that is not here."""
    device = jax.sharding.AbstractDevice(kind, 1, platform)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(_dispatch, "_warned", set())


class Version:
    """As of a process with the library."""

    @staticmethod
    def cudnn_get_version():
        return 91100


@pytest.fixture
def with_cudnn(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", Version)


def program(arrays, where, **options):
    with traced_for(*where):
        return str(jax.make_jaxpr(lambda *a: attention.attention(*a, **options))(*arrays))


def kind_of(text):
    marks = {"pallas_tpu": "splash_mha", "cudnn": "dot_product_attention"}
    return next((name for name, mark in marks.items() if mark in text), "xla")


@pytest.mark.parametrize("options", [{}, {"window": 100}, {"soft_cap": 5.0}])
def test_splash_is_the_default_on_tpu(options, recwarn):
    assert kind_of(program(abstract(300), V5E, **options)) == "pallas_tpu"
    assert not recwarn.list


def test_cudnn_is_the_default_on_gpu(with_cudnn, recwarn):
    assert kind_of(program(abstract(300), H100, window=100)) == "cudnn"
    assert not recwarn.list


def test_xla_is_the_default_on_cpu():
    assert kind_of(str(jax.make_jaxpr(attention.attention)(*abstract(300)))) == "xla"


NO_CUDNN = "JAX says of it: cuDNN (not found|is not detected)"


@pytest.mark.parametrize(
    ("name", "where", "arrays", "options", "reason"),
    [
        ("pallas_tpu", V5E, {"dtype": jnp.float16}, {}, "it reads bfloat16 and float32, not float16"),
        ("pallas_tpu", V5E, {"width": 8192}, {}, "no block of heads of 8192 bfloat16 fits into 16 MiB"),
        ("cudnn", H100, {"dtype": jnp.float32}, {}, "it reads bfloat16 and float16, not float32"),
        ("cudnn", H100, {}, {"soft_cap": 1.0}, "it has no soft cap"),
        ("cudnn", H100, {"length": 301}, {}, "rows of even length with a mask, not of 301"),
        ("cudnn", H100, {"width": 512}, {}, "JAX says of it: The head dim must be"),
    ],
)
def test_a_declined_default_is_xla_with_one_reason(name, where, arrays, options, reason, fresh, with_cudnn):
    given = abstract(**{"length": 300} | arrays)
    with pytest.warns(UserWarning, match=f"attention: {name} is passed over on {where[0]}; .*{reason}") as told:
        assert kind_of(program(given, where, **options)) == "xla"
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program(given, where, **options)  # said once
    with pytest.raises(ValueError, match=f"implementation of attention .* got '{name}' for {where[0]}; .*{reason}"):
        program(given, where, **options, implementation=name)


def test_cudnn_is_passed_over_where_it_is_not_installed(fresh, monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", None)
    with pytest.warns(UserWarning, match=NO_CUDNN):
        assert kind_of(program(abstract(302), H100)) == "xla"


@pytest.mark.parametrize(("name", "where"), [("cudnn", V5E), ("pallas_tpu", H100)])
def test_the_other_platform_is_refused(name, where):
    with pytest.raises(ValueError, match=f"got '{name}' for .*(for TPUs|NVIDIA's GPUs)"):
        program(abstract(300), where, implementation=name)


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"heads": 4, "kv_heads": 3}, {}, r"^heads of q must be a multiple of the 3 heads of k and v, got 4; "),
        ({}, {"window": -1}, r"^window must be a number of keys, got -1\. Set it to 0"),
        ({}, {"soft_cap": -2.0}, r"^soft_cap must be positive or 0, got -2\.0\. Set it to 0"),
        ({}, {"implementation": "splash"}, r"implementation of attention must be .*got 'splash'"),
    ],
)
def test_bad_arguments(arrays, options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *a: attention.attention(*a, **options), *abstract(16, **arrays))


def test_mixed_dtypes_are_refused():
    q, k, v, ids = abstract(16)
    with pytest.raises(ValueError, match="one floating-point dtype, got bfloat16, float32 and bfloat16"):
        jax.eval_shape(attention.attention, q, jax.ShapeDtypeStruct(k.shape, jnp.float32), v, ids)


def test_a_window_of_the_whole_row_is_none():
    assert program(abstract(256), V5E, window=256) == program(abstract(256), V5E)
    assert program(abstract(256), V5E, window=255) != program(abstract(256), V5E)


# --- under jax.checkpoint


def test_the_gradient_is_the_same_under_a_checkpoint_that_keeps_the_residuals():
    """What is kept and how often kernels run is read off compiled programs, in tests/aot/test_attention.py."""

    def layer(x):
        q = jnp.stack([x, 0.5 * x], 2)
        return jnp.tanh(x + pallas_tpu.attention(q, q[:, :, :1], 2 * q[:, :, :1], ids).sum(2))

    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 30, 8)), jnp.float32)
    ids = jnp.asarray(np.arange(30) > 12, jnp.int32)[None]
    policy = jax.checkpoint_policies.save_only_these_names(attention.RESIDUALS)
    wrapped = jax.checkpoint(layer, policy=policy)
    kept, plain = (jax.jit(jax.grad(lambda x, f=f: jnp.sum(f(x) ** 2)))(x) for f in (wrapped, layer))
    assert np.abs(plain).max() > 0.1
    np.testing.assert_allclose(kept, plain, rtol=1e-5, atol=1e-6)
