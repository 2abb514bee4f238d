"""python -m launch.bench --suite=answers: what it prints, on a tiny student; and FLOPs of traced programs."""

import math

import jax
import jax.numpy as jnp
import pytest

from kdjax.models import ModelConfig
from launch import bench_answers

TINY = ModelConfig("llama", 97, 32, 2, 4, 2, 8, 48, tied=True)


@pytest.fixture
def tiny(monkeypatch):
    """Calls are of one question of 32 tokens with its 8 answers."""
    monkeypatch.setattr("kdjax.curation.answers.scorer.ROOM", 9 * 32)
    monkeypatch.setattr(bench_answers, "student_of", lambda layers: TINY)


def trunk(shared):
    """FLOPs of the layers for a question and 8 answers of 32 tokens: projections, and both products of attention."""
    c, length = TINY, 32
    projections = 2 * c.width * (c.head_dim * (2 * c.heads + 2 * c.kv_heads) + 3 * c.mlp)
    pairs = length**2 + 8 * length * 2 * length if shared else 8 * (2 * length) ** 2
    return c.layers * ((9 if shared else 16) * length * projections + 4 * pairs * c.heads * c.head_dim)


def test_what_is_timed_and_counted(call, tiny, monkeypatch):
    """Scoring is the layers, the head's gradient and a product for the tap."""
    made, real = [], bench_answers._programs
    monkeypatch.setattr(bench_answers, "_programs", lambda *args: made.append(real(*args)) or made[0])
    out = call("bench", "--suite=answers", "--rounds=3", "--lengths=32", "--answers=8")
    title, _, *lines = out.splitlines()
    assert "8 answers a question, each as long as it; 2 layers of 32, vocabulary 97, float32, 3 rounds in turn" in title
    shared, alone, gradient, stats = names = list(made[0])
    assert [line[:28].strip() for line in lines] == names
    cells = [line[28:].replace(",", "").split() for line in lines]
    assert all(each[0] == "32" and float(each[1]) > 0 for each in cells)
    assert [len(each) for each in cells] == [7, 3, 7, 3]
    for ratio, _, low, high in (map(float, cells[at][3:]) for at in (0, 2)):
        assert 0 < low <= ratio <= high

    flops = {name: each.flops for name, each in made[0].items()}
    tap = 2 * TINY.width * TINY.mlp * 32
    assert flops[shared] == pytest.approx(trunk(True) + flops[gradient] + 9 * tap, rel=0.02)
    assert flops[stats] == 2 * 9 * 32 * TINY.width * 97
    assert flops[alone] > trunk(False) + 16 * tap + flops[stats]
    assert float(cells[0][4]) == pytest.approx(flops[shared] / flops[alone], abs=0.006)
    assert flops[shared] <= 0.6 * flops[alone], "9/16 of the places"


def test_products_in_loops_and_branches():
    a, b = jnp.ones((3, 5)), jnp.ones((5, 7))

    def count(function, *arguments):
        return bench_answers.matmul_flops(jax.make_jaxpr(function)(*arguments).jaxpr)

    one = 2 * 3 * 5 * 7
    assert count(lambda a, b: a @ b, a, b) == one
    assert count(lambda a, b: jnp.einsum("nab,nbc->nac", jnp.stack([a] * 4), jnp.stack([b] * 4)), a, b) == 4 * one
    assert count(jax.jit(lambda a, b: jax.lax.map(lambda _: a @ b, jnp.arange(6))), a, b) == 6 * one
    assert count(jax.grad(lambda a, b: jnp.sum((a @ b) ** 2)), a, b) == 2 * one
    branches = lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: jnp.sum(a @ b), lambda: 0.0)  # noqa: E731
    assert count(branches, a, b) == one
    turning = jax.lax.while_loop
    assert math.isnan(count(lambda a, b: turning(lambda x: x[0, 0] < 9, lambda x: x + jnp.sum(a @ b), a), a, b))
    assert count(lambda a, b: turning(lambda x: x[0, 0] < 9, lambda x: x + 1, a), a, b) == 0


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--lengths=64,1", "^--lengths must be numbers of at least 2, got '1'"),
        ("--lengths=x", "^--lengths must be numbers of at least 2, got 'x'"),
        ("--answers=6", "^--answers must be a power of two, got 6"),
    ],
)
def test_what_cannot_be_timed_is_refused(call, tiny, argument, message):
    with pytest.raises(ValueError, match=message):
        call("bench", "--suite=answers", argument)
