"""How fast a step is against what the machine can do: python -m launch.bench [--config=configs/bench.py] [--rounds=5]

Times one dense KD step and its parts (teacher trunk, student trunk, head and loss, optimiser) and, in turn with them, a plain
float32 matrix product of the same process. Prints for each the median time, its model FLOPs and the median over rounds of
its rate divided by the product's: shared machines drift, ratios within a round do not. Model FLOPs count multiply and add,
matrix products only, attention's lower triangle only, nothing recomputed. Weights are random: speed does not depend on them.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from launch import app

flags.DEFINE_integer("rounds", 5, "How often everything is timed.")
flags.DEFINE_integer("batch", 4, "Rows.")
flags.DEFINE_integer("seq_len", 256, "Tokens a row.")
flags.DEFINE_integer("student_layers", 6, "Of the 135M-parameter teacher's 30.")
flags.DEFINE_float("fraction", 1.0, "Selected positions by student entropy; 1 = dense.")

WIDTH, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 576, 1536, 9, 3, 64, 49152, 30


def main() -> None:
    """Build at SmolLM2's shapes, time in turn, print."""
    import jax

    options = flags.FLAGS
    parts = _programs(options.batch, options.seq_len, options.student_layers, options.fraction)
    for run, _ in parts.values():
        jax.block_until_ready(run())
    names = list(parts)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            start = time.perf_counter()
            jax.block_until_ready(parts[name][0]())
            times[name].append(time.perf_counter() - start)
    print(f"{jax.devices()[0].device_kind}; B={options.batch} T={options.seq_len}, student {options.student_layers} layers")
    print(f"{'':44}{'ms':>9}{'GFLOP':>9}{'GFLOP/s':>10}{'of the product':>16}")
    for name in names:
        flops = parts[name][1]
        rate = [flops / t for t in times[name]]
        product = [parts[names[0]][1] / t for t in times[names[0]]]
        ratio = statistics.median(r / p for r, p in zip(rate, product, strict=True))
        figures = f"{flops / 1e9:9.1f}{statistics.median(rate) / 1e9:10.1f}{ratio:16.2f}" if flops else ""
        print(f"{name:44}{1e3 * statistics.median(times[name]):9.1f}{figures}")
    tokens = options.batch * options.seq_len
    print(f"whole step: {tokens / statistics.median(times[names[-1]]):,.0f} tokens/s")


def _programs(batch: int, seq_len: int, layers: int, fraction: float) -> dict[str, tuple[Callable[[], Any], float]]:
    """name -> (call, model FLOPs); the plain product first, the whole step last."""
    import jax
    import jax.numpy as jnp

    from kdjax import models
    from kdjax.build import build_parts
    from kdjax.config import default_config, from_config_dict
    from kdjax.models import ModelConfig
    from kdjax.sharding import Rules
    from kdjax.step import init_state, make_train_step
    from kdjax.types import Batch

    config = default_config()
    config.selection.policy = "all" if fraction == 1.0 else "top_fraction"
    config.selection.fraction = fraction
    config.train.batch_size = batch
    teacher = ModelConfig("llama", VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP, 1e5, norm_eps=1e-5, tied=True)
    student = ModelConfig("llama", VOCAB, WIDTH, layers, HEADS, KV_HEADS, HEAD_DIM, MLP, 1e5, norm_eps=1e-5, tied=True)
    parts = build_parts(from_config_dict(config), student, teacher, Rules())
    teacher_params, params = (models.init_params(cfg, jax.random.key(0)) for cfg in (teacher, student))
    shape = (batch, seq_len)
    one = Batch(
        tokens=jax.random.randint(jax.random.key(1), shape, 0, VOCAB),
        segment_ids=jnp.ones(shape, jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(seq_len, dtype=jnp.int32)[None], shape),
        loss_mask=jnp.ones(shape, bool),
        row_id=jnp.arange(batch, dtype=jnp.int32),
        epoch=jnp.zeros(batch, jnp.int32),
        weight=jnp.ones(batch, jnp.float32),
    )
    return _timed(parts, student, teacher, params, teacher_params, one, init_state, make_train_step)


def _timed(parts, student, teacher, params, teacher_params, one, init_state, make_train_step):
    import jax
    import jax.numpy as jnp
    import optax

    from kdjax.kernels.linear_divergence import linear_divergence

    rows = one.tokens.size
    kept = rows if not parts.policy.uses_signal else one.tokens.shape[0] * parts.policy.slots(one.tokens.shape[1])
    head = 2.0 * rows * WIDTH * VOCAB
    hidden = jax.jit(parts.student.hidden)(params, one)
    teacher_hidden = jax.jit(parts.teacher.hidden)(teacher_params, one)
    flat, teacher_flat = (h.reshape(rows, -1)[:kept] for h in (hidden, teacher_hidden))
    left, right = jnp.ones((rows, WIDTH)), jnp.ones((VOCAB, WIDTH))
    product = jax.jit(lambda a, b: a @ b.T)

    def loss(student_side, teacher_side):
        (x, p), (y, t) = student_side, teacher_side
        labels, weight = jnp.zeros(x.shape[0], jnp.int32), jnp.ones(x.shape[0], jnp.float32)
        terms = list(parts.objective.terms.values())
        return linear_divergence(x, parts.student.head(p), y, parts.teacher.head(t), labels, weight, terms, [1.0])[0]

    trunk = jax.jit(jax.grad(lambda p, c: jnp.sum(parts.student.hidden(p, one) * c)))
    loss_gradient = jax.jit(jax.grad(loss))
    state = jax.jit(lambda p: init_state(parts, p, 0))(params)

    def update(p, opt, gradient):
        updates, opt = parts.optimiser.update(gradient, opt, p)
        return optax.apply_updates(p, updates), opt

    update = jax.jit(update)
    step = jax.jit(make_train_step(parts), donate_argnums=0)
    stacked = jax.tree.map(lambda a: a[None], one)
    running = [jax.tree.map(jnp.copy, state)]

    def whole():
        running[0], report = step(running[0], teacher_params, stacked)
        return report

    teacher_flops, student_flops = (_trunk_flops(cfg, one.tokens.shape) for cfg in (teacher, student))
    selecting = head if parts.policy.uses_signal else 0.0
    sides = (flat, params), (teacher_flat, teacher_params)
    return {
        f"plain product [{rows}, {WIDTH}] x [{WIDTH}, {VOCAB}]": (lambda: product(left, right), head),
        f"teacher trunk, {teacher.layers} layers": (
            lambda: jax.jit(parts.teacher.hidden)(teacher_params, one),
            teacher_flops,
        ),
        f"student trunk, {student.layers} layers, with gradient": (lambda: trunk(params, hidden), 3 * student_flops),
        f"heads and loss at {kept} slots, with gradient": (lambda: loss_gradient(*sides), 4 * head * kept / rows),
        "optimiser": (lambda: update(params, state.opt_state, params), 0.0),
        "whole step": (whole, teacher_flops + 3 * student_flops + 4 * head * kept / rows + selecting),
    }


def _trunk_flops(cfg: Any, shape: tuple[int, int]) -> float:
    batch, seq_len = shape
    projections = cfg.width * cfg.head_dim * (2 * cfg.heads + 2 * cfg.kv_heads)
    matrices = projections + 3 * cfg.width * cfg.mlp
    attention = 2 * cfg.heads * cfg.head_dim * (seq_len + 1) / 2  # scores and values, lower triangle
    return 2.0 * cfg.layers * batch * seq_len * (matrices + attention)


if __name__ == "__main__":
    app.run(main)
