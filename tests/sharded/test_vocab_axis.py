"""Heads whose columns are split over a mesh axis: the same numbers as with the whole head, and nothing large moves."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.kernels import linear_divergence as divergence_op
from kdjax.kernels import linear_stats as stats_op
from kdjax.kernels.linear_divergence import Term
from kdjax.types import Head
from tests.kernels import oracle

MESH = (2, 4)
# One term whose gradient sum is known, one whose is not, one that asks for a number of each row first, one of labels.
TERMS = (
    Term(lambda pair: pair.p * (pair.logp - pair.logq), gradient_sum=-1.0),
    Term(lambda pair: jnp.square(pair.p - pair.q)),
    Term(
        lambda pair: pair.row[:, 0:1] * jnp.abs(pair.p - pair.q),
        row_scalars=lambda pair, vocab_sum: vocab_sum(jnp.square(pair.p)),
    ),
    Term(lambda pair: jnp.where(pair.is_label, -pair.logq, 0.0), False, False, gradient_sum=-1.0),
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """TPU kernels interpreted; several chunks of columns on each device."""
    for op in (divergence_op, stats_op):
        monkeypatch.setattr(op.xla, "COLUMNS", 8)
    with pltpu.force_tpu_interpret_mode(True):
        yield


def divergence(implementation, x, head, y, teacher_head, labels, weight, summed):
    total, values = divergence_op.linear_divergence(
        x, head, y, teacher_head, labels, weight, TERMS, (0.7, 2.0, 1.5, 0.3), 1.7, implementation=implementation
    )
    return summed(total), values.T


def stats(implementation, x, head, y, teacher_head, labels, weight, summed, top_k=0):
    one = stats_op.linear_stats(x, head, labels, top_k=top_k, implementation=implementation)
    return jnp.zeros(()), one


def pair_stats(implementation, x, head, y, teacher_head, labels, weight, summed, top_k=0):
    both = stats_op.linear_pair_stats(x, head, y, teacher_head, labels, top_k=top_k, implementation=implementation)
    return jnp.zeros(()), both


# op -> (function of rows and heads -> (total summed over all rows, differentiable; tree of [N, ...]), its table).
# An op needs only a line here.
OPS = {
    "linear_divergence": (divergence, divergence_op.IMPLEMENTATIONS),
    "linear_stats": (stats, stats_op.IMPLEMENTATIONS),
    "linear_pair_stats": (pair_stats, stats_op.PAIR_IMPLEMENTATIONS),
}
# pallas_gpu takes no float32 and is not interpreted here.
CASES = [(op, name) for op, (_, table) in OPS.items() for name in sorted({*table} - {"pallas_gpu"})]


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows and heads; `padded` columns on all devices together, of which the first `vocab` count."""

    rows: int
    vocab: int
    padded: int
    vocab_major: bool = True
    width: int = 3
    teacher_width: int = 2

    def make(self):
        """(arrays of the sharded call, arrays of the call with the whole heads, how a weight is split)."""
        draw = np.random.default_rng(self.vocab)
        x, y = (draw.normal(size=(self.rows, width)) for width in (self.width, self.teacher_width))
        heads = [draw.normal(size=(self.padded, width)) for width in (self.width, self.teacher_width)]
        for head in heads:
            head[self.vocab :] = 50.0  # padding that would win if it were looked at
        labels = draw.integers(self.vocab, size=self.rows)
        weight = draw.uniform(0.5, 2.0, size=self.rows)
        weight[::4] = 0.0

        def arrays(heads):
            w, u = (jnp.asarray(head if self.vocab_major else head.T, jnp.float32) for head in heads)
            x32, y32, weight32 = (jnp.asarray(a, jnp.float32) for a in (x, y, weight))
            return x32, w, y32, u, jnp.asarray(labels, jnp.int32), weight32

        whole = arrays([head[: self.vocab] for head in heads])
        return arrays(heads), whole, P("model", None) if self.vocab_major else P(None, "model")


PADDINGS = {
    "no padding": Case(10, 40, 40),
    "on the last device": Case(10, 37, 40, vocab_major=False),
    "whole devices": Case(10, 21, 48),
}


def program(function, implementation, case, axis, summed):
    """(total, (tree, d total / d x, d total / d head weight)) of the arrays of `Case.make`."""

    def total(x, w, y, u, labels, weight):
        head, teacher = (Head(a, case.vocab, case.vocab_major, vocab_axis=axis) for a in (w, u))
        return function(implementation, x, head, y, teacher, labels, weight, summed)

    return total


def differentiated(total):
    def run(*arrays):
        (value, tree), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(*arrays)
        return value, tree, *gradients

    return jax.jit(run)


def on_mesh(function, implementation, case, arrays, spec):
    """(program, arrays placed): the call inside a shard_map, differentiated outside of it."""
    mesh = jax.make_mesh(MESH, ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    specs = (P("data", None), spec, P("data", None), spec, P("data"), P("data"))

    inside = program(function, implementation, case, "model", lambda part: jax.lax.psum(part, "data"))
    outside = jax.shard_map(inside, mesh=mesh, in_specs=specs, out_specs=(P(), P("data")), check_vma=False)
    placed = [jax.device_put(array, NamedSharding(mesh, where)) for array, where in zip(arrays, specs, strict=True)]
    return differentiated(outside), placed


def same(got, want):
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("op", "name"), CASES)
def test_as_with_the_whole_head(op, name, padding):
    case, function = PADDINGS[padding], OPS[op][0]
    arrays, whole, spec = case.make()
    want = differentiated(program(function, name, case, None, lambda part: part))(*whole)
    run, placed = on_mesh(function, name, case, arrays, spec)
    value, tree, d_hidden, d_weight = run(*placed)
    same((value, tree, d_hidden), want[:3])
    real, padded = np.split(np.asarray(d_weight), [case.vocab], axis=0 if case.vocab_major else 1)
    same(real, want[3])
    assert not padded.any()


@pytest.mark.parametrize(("op", "name"), [case for case in CASES if case[0] != "linear_divergence"])
def test_top_k(op, name):
    case, function = PADDINGS["whole devices"], functools.partial(OPS[op][0], top_k=15)  # more than a device has
    arrays, whole, spec = case.make()
    _, want, *_ = differentiated(program(function, name, case, None, lambda part: part))(*whole)
    run, placed = on_mesh(function, name, case, arrays, spec)
    _, got, *_ = run(*placed)
    assert len(jax.tree.leaves(got)) == {"linear_stats": 9, "linear_pair_stats": 20}[op]
    same(got, want)


def collectives(text):
    """(kind, elements of its largest array) of each in an HLO text."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    lines = (re.match(rf".* = (.*?) ({kinds})(?:-start)?\(.*", line) for line in text.splitlines())
    return [(match[2], oracle.largest_shape(match[0])[0]) for match in lines if match]


@pytest.mark.parametrize(("op", "name"), CASES)
def test_nothing_large_moves(op, name):
    """No all-gather; no collective on V elements. D = 3 of 4 devices: the gradient of a part of the head is smaller."""
    case = Case(8, 2000, 2048)
    arrays, _, spec = case.make()
    run, placed = on_mesh(OPS[op][0], name, case, arrays, spec)
    found = collectives(run.lower(*placed).compile().as_text())
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert max(elements for _, elements in found) < case.vocab


def test_the_scan_sees_collectives():
    text = """
  %a = f32[8,16]{1,0} all-reduce(%b), replica_groups={{0,1}}
  %c = (f32[4]{0}, f32[7,9]{1,0}) all-gather-start(f32[4]{0} %d)
  %e = f32[3]{0} add(%f, %all-reduce.1)
"""
    assert collectives(text) == [("all-reduce", 128), ("all-gather", 63)]
