"""Shapes of real models, and what each op is called with, costs at least and may be compared with at them.

From CASES the bench times every op (launch/bench_kernels.py) and the tests compile it for every chip (tests/aot).
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from kdjax import registry
from kdjax.kernels import head_gradient, linear_divergence, linear_sample, linear_stats, sparse_divergence, topk
from kdjax.types import Array, Head


@dataclasses.dataclass(frozen=True)
class Side:
    """A model's head: its width; tied, it is the embedding [V, D], else [D, V]; its padding columns; its soft cap."""

    width: int
    tied: bool = True
    padding: int = 0
    soft_cap: float = 0.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """N rows of a student and a teacher with one vocabulary, K stored entries of the teacher per row."""

    rows: int
    vocab: int
    student: Side
    teacher: Side
    entries: int = 64
    dtype: str = "float32"


SHAPES = {
    # SmolLM2: 135M, and 360M from 1.7B. Widths 576 and 960 are no multiples of 128, as usual with small models.
    "smollm2": Shape(1024, 49152, Side(576), Side(576)),
    "smollm2_360m": Shape(1024, 49152, Side(960), Side(2048)),
    # GPT-2, small from medium: a vocabulary that no tile size divides.
    "gpt2": Shape(1024, 50257, Side(768), Side(1024)),
    # Llama 3: 3.2 1B from 3.1 8B; a student as wide whose head is its own; 8B from 70B.
    "llama3": Shape(2048, 128256, Side(2048), Side(4096, tied=False)),
    "llama3_untied": Shape(2048, 128256, Side(2048, tied=False), Side(4096, tied=False)),
    "llama3_8b": Shape(2048, 128256, Side(4096, tied=False), Side(8192, tied=False)),
    # Qwen2.5 0.5B from 7B, whose embedding has 128 rows more; Qwen3 0.6B from 8B.
    "qwen2.5": Shape(512, 151936, Side(896), Side(3584, tied=False, padding=128)),
    "qwen2.5_self": Shape(512, 151936, Side(896), Side(896)),
    "qwen3": Shape(2048, 151936, Side(1024), Side(4096, tied=False)),
    # Gemma 2 2B from 9B caps its logits at 30; Gemma 3 270M from 4B, whose embedding has 64 rows more, does not.
    "gemma2": Shape(1024, 256000, Side(2304, soft_cap=30.0), Side(3584, soft_cap=30.0)),
    "gemma3": Shape(1024, 262144, Side(640), Side(2560, padding=64)),
}


@flax.struct.dataclass
class Arguments:
    """Whatever an op may be called with; None is what this op does not read. Shapes as in the op's docstring."""

    hidden: Any  # arrays, or ShapeDtypeStructs, as all below
    head: Any
    teacher_hidden: Any = None
    teacher_head: Any = None
    labels: Any = None
    weight: Any = None
    ids: Any = None
    probs: Any = None
    uniforms: Any = None
    entries: int = flax.struct.field(pytree_node=False, default=0)


@dataclasses.dataclass(frozen=True)
class Case:
    """One op as it is timed and compiled.

    module: has IMPLEMENTATIONS (or what `table` names) and DECLINES. call(arguments, implementation): its results.
    reads: the fields of Arguments besides hidden and head. products(shape): matrix products of the head that it cannot
    do without, as (student's, teacher's), each 2 N V width FLOPs.
    gradient: the total is differentiated in hidden and head.weight, two products of the student's more.
    """

    module: ModuleType
    call: Callable[[Arguments, str | None], Any]
    reads: tuple[str, ...] = ()
    products: tuple[int, int] = (1, 0)
    gradient: bool = False
    table: str = "IMPLEMENTATIONS"

    @property
    def implementations(self) -> Mapping[str, Callable[..., Any]]:
        """The op's own table."""
        return getattr(self.module, self.table)

    def build(self, implementation: str | None) -> Callable[[Arguments], Any]:
        """A function of the arguments: the op's results, or (results, (d_hidden, d_weight))."""
        if not self.gradient:
            return lambda arguments: self.call(arguments, implementation)

        def function(arguments: Arguments) -> Any:
            def total(hidden: Array, weight: Array) -> Any:
                head = dataclasses.replace(arguments.head, weight=weight)
                return self.call(dataclasses.replace(arguments, hidden=hidden, head=head), implementation)

            run = jax.value_and_grad(total, (0, 1), has_aux=True)
            return run(arguments.hidden, arguments.head.weight)

        return function


def _stats(a: Arguments, implementation: str | None) -> Any:
    return linear_stats.linear_stats(a.hidden, a.head, a.labels, implementation=implementation)


def _pair_stats(a: Arguments, implementation: str | None) -> Any:
    sides = (a.hidden, a.head, a.teacher_hidden, a.teacher_head)
    return linear_stats.linear_pair_stats(*sides, a.labels, implementation=implementation)


# Forward KL, the usual loss; kdjax/losses has it as well, but kernels import nothing from above.
FORWARD_KL = linear_divergence.Term(lambda pair: pair.p * (pair.logp - pair.logq), gradient_sum=-1.0)


def _divergence(a: Arguments, implementation: str | None) -> Any:
    sides = (a.hidden, a.head, a.teacher_hidden, a.teacher_head)
    terms = ([FORWARD_KL], [1.0])
    return linear_divergence.linear_divergence(*sides, a.labels, a.weight, *terms, implementation=implementation)


def _sparse(a: Arguments, implementation: str | None) -> Any:
    entries = (a.ids, a.probs, a.weight, "renormalised")
    return sparse_divergence.sparse_divergence(a.hidden, a.head, *entries, implementation=implementation)


def _topk(a: Arguments, implementation: str | None) -> Any:
    return topk.topk(a.hidden, a.head, a.entries, implementation=implementation)


def _sample(a: Arguments, implementation: str | None) -> Any:
    return linear_sample.linear_sample(a.hidden, a.head, a.uniforms, implementation=implementation)


def in_answers(a: Arguments) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
    """Seven answers and one question for `head_gradient`, eighths of the rows: (hidden, labels, weights) of each."""
    size = a.hidden.shape[0] // 8
    rows = (a.hidden, a.labels, a.weight / size)
    eighths = jax.tree.map(lambda array: array[: 8 * size].reshape(8, size, *array.shape[1:]), rows)
    return jax.tree.map(lambda array: array[:7], eighths), jax.tree.map(lambda array: array[7:], eighths)


def _head_gradient(a: Arguments, implementation: str | None) -> Any:
    (hidden, labels, weights), asked = in_answers(a)
    rows = (hidden, a.head, labels, weights)
    return head_gradient.answer_gradient(*rows, question=asked, rank=True, implementation=implementation)


_STORED = ("ids", "probs", "weight")
_TEACHER = ("teacher_hidden", "teacher_head", "labels")
CASES = {
    "linear_stats": Case(linear_stats, _stats, ("labels",)),
    "linear_pair_stats": Case(linear_stats, _pair_stats, _TEACHER, (1, 1), table="PAIR_IMPLEMENTATIONS"),
    "linear_divergence": Case(linear_divergence, _divergence, (*_TEACHER, "weight"), (1, 1)),
    "linear_divergence+grad": Case(linear_divergence, _divergence, (*_TEACHER, "weight"), (1, 1), gradient=True),
    "sparse_divergence": Case(sparse_divergence, _sparse, _STORED),
    "sparse_divergence+grad": Case(sparse_divergence, _sparse, _STORED, gradient=True),
    "topk": Case(topk, _topk, ("entries",)),
    "linear_sample": Case(linear_sample, _sample, ("uniforms",)),
    "head_gradient": Case(head_gradient, _head_gradient, ("labels", "weight")),
}


def abstract_arguments(op: str, shape: Shape) -> Arguments:
    """What CASES[op] is called with at a shape, as ShapeDtypeStructs."""
    return jax.eval_shape(lambda: _arguments(op, shape, lambda size, *_: jnp.zeros(size)))


def random_arguments(op: str, shape: Shape, seed: int = 0) -> Arguments:
    """The same as arrays: hidden states and heads of normal numbers, logits of about unit variance."""
    draw = np.random.default_rng(seed)

    def normal(size: tuple[int, ...], width: int) -> Array:
        return jnp.asarray(draw.standard_normal(size, np.float32) * width**-0.25)

    return _arguments(op, shape, normal)


def _arguments(op: str, shape: Shape, normal: Callable[[tuple[int, ...], int], Array]) -> Arguments:
    reads = registry.lookup(CASES, op, "kernel op").reads
    draw = np.random.default_rng(1)
    n, v, k = shape.rows, shape.vocab, shape.entries

    def side(side: Side) -> tuple[Array, Head]:
        size = (v + side.padding, side.width) if side.tied else (side.width, v + side.padding)
        weight = normal(size, side.width).astype(shape.dtype)
        return normal((n, side.width), side.width).astype(shape.dtype), Head(weight, v, side.tied, 1.0, side.soft_cap)

    hidden, head = side(shape.student)
    arguments = Arguments(hidden, head)
    if "teacher_hidden" in reads:
        teacher_hidden, teacher_head = side(shape.teacher)
        arguments = dataclasses.replace(arguments, teacher_hidden=teacher_hidden, teacher_head=teacher_head)
    small: dict[str, Callable[[], Any]] = {
        "labels": lambda: jnp.asarray(draw.integers(v, size=n), jnp.int32),
        "weight": lambda: jnp.ones(n, jnp.float32),
        "ids": lambda: jnp.asarray(np.sort(draw.integers(v // k, size=(n, k)) + np.arange(k) * (v // k)), jnp.int32),
        "probs": lambda: jnp.asarray(draw.dirichlet(np.ones(k), size=n), jnp.float32),
        "uniforms": lambda: jnp.asarray(draw.random(size=(n, k), dtype=np.float32)),
        "entries": lambda: k,
    }
    return dataclasses.replace(arguments, **{name: make() for name, make in small.items() if name in reads})


def flops(op: str, shape: Shape) -> float:
    """The least that the op can do, its matrix products over the V real columns, a multiply and an add each."""
    case = registry.lookup(CASES, op, "kernel op")
    return _product_flops(shape, case.products[0] + 2 * case.gradient, case.products[1])


def implementation_flops(op: str, implementation: str, shape: Shape) -> float:
    """What an implementation does: more than the least where it computes tiles anew instead of keeping them."""
    return (
        _product_flops(shape, *PRODUCTS[op, implementation]) if (op, implementation) in PRODUCTS else flops(op, shape)
    )


def product_flops(shape: Shape) -> float:
    """Of one product of the rows with the student's head."""
    return _product_flops(shape, 1, 0)


# (op, implementation) -> products with the student's and the teacher's head, where they are not the least: the Mosaic
# kernels compute tiles of logits anew instead of writing and reading them. Said in the modules' docstrings.
PRODUCTS = {
    ("linear_divergence", "pallas_tpu"): (2, 2),
    ("linear_divergence", "pallas_gpu"): (2, 2),
    ("linear_divergence+grad", "pallas_tpu"): (5, 3),
    ("linear_divergence+grad", "pallas_gpu"): (4, 2),
    ("sparse_divergence+grad", "pallas_tpu"): (5, 0),
    ("sparse_divergence+grad", "pallas_gpu"): (4, 0),
}


def _product_flops(shape: Shape, student: int, teacher: int) -> float:
    return 2.0 * shape.rows * shape.vocab * (student * shape.student.width + teacher * shape.teacher.width)


def least_bytes(op: str, shape: Shape) -> int:
    """Every argument read once and every result written once."""
    arguments = abstract_arguments(op, shape)
    results = jax.eval_shape(lambda a: jax.tree.leaves(CASES[op].build("xla")(a)), arguments)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((arguments, results)))
