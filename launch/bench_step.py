"""How fast a step is against what the machine can do: the suite "step" of launch/bench.py.

Times one KD step at SmolLM2's shapes, its parts (teacher trunk, student trunk, heads and loss, optimiser) and, in turn
with them, a plain float32 matrix product of the same process: that of the head, the largest product of the step.
Prints for each the median time, its model FLOPs and the median over rounds of its rate divided by the product's: shared
machines drift, ratios within a round do not. Model FLOPs are those of the matrix products, a multiply and an add each,
attention's lower triangle only, nothing recomputed. Weights are random: the speed does not depend on them.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import flags

if TYPE_CHECKING:
    from kdjax.models import ModelConfig
    from kdjax.step import StepParts
    from kdjax.types import Batch

PRODUCT, STEP = "plain product", "whole step"


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled call and its model FLOPs."""

    run: Callable[[], Any]
    flops: float


def run(rounds: int) -> None:
    """Build, time in turn, print."""
    import jax

    programs = _programs()
    times: dict[str, list[float]] = {name: [] for name in programs}
    for program in programs.values():
        jax.block_until_ready(program.run())
    for _ in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program.run())
            times[name].append(time.perf_counter() - start)
    print(f"{jax.devices()[0].device_kind}, {flags.FLAGS.batch} rows of {flags.FLAGS.seq_len} tokens, float32")
    print(f"{'':44}{'ms':>9}{'GFLOP':>9}{'GFLOP/s':>10}{'of the product':>16}")
    product = [programs[PRODUCT].flops / t for t in times[PRODUCT]]
    for name, program in programs.items():
        rates = [program.flops / t for t in times[name]]
        ratio = statistics.median(rate / best for rate, best in zip(rates, product, strict=True))
        figures = f"{program.flops / 1e9:9.1f}{statistics.median(rates) / 1e9:10.1f}{ratio:16.2f}"
        print(f"{name:44}{1e3 * statistics.median(times[name]):9.1f}{figures if program.flops else ''}")
    print(f"{flags.FLAGS.batch * flags.FLAGS.seq_len / statistics.median(times[STEP]):,.0f} tokens/s")


def _programs() -> dict[str, Program]:
    """The plain product, the parts of the step, the whole step."""
    import jax
    import jax.numpy as jnp

    from kdjax import models
    from kdjax.build import build_parts
    from kdjax.config import default_config, from_config_dict
    from kdjax.models import ModelConfig
    from kdjax.sharding import Rules
    from kdjax.step import init_state, make_train_step

    options, config = flags.FLAGS, default_config()
    config.selection.policy = "all" if options.fraction == 1.0 else "top_fraction"
    config.selection.fraction = options.fraction
    config.train.batch_size = options.batch
    teacher = ModelConfig("llama", 49152, 576, 30, 9, 3, 64, 1536, rope_theta=1e5, norm_eps=1e-5, tied=True)
    student = dataclasses.replace(teacher, layers=options.student_layers)
    parts = build_parts(from_config_dict(config), student, teacher, Rules())
    teacher_params, params = (models.init_params(cfg, jax.random.key(0)) for cfg in (teacher, student))
    batch = _batch(options.batch, options.seq_len, teacher.vocab_size)
    programs, total = _parts(parts, student, teacher, params, teacher_params, batch)
    state = [init_state(parts, jax.tree.map(jnp.copy, params), 0)]
    step = jax.jit(make_train_step(parts), donate_argnums=0)
    micro = jax.tree.map(lambda a: a[None], batch)

    def whole() -> Any:
        state[0], report = step(state[0], teacher_params, micro)
        return report

    return programs | {STEP: Program(whole, total)}


def _parts(
    parts: "StepParts", student: "ModelConfig", teacher: "ModelConfig", params: Any, teacher_params: Any, batch: "Batch"
) -> tuple[dict[str, Program], float]:
    """The product and the parts, and the FLOPs of the whole step."""
    import jax
    import jax.numpy as jnp
    import optax

    from kdjax.kernels.linear_divergence import linear_divergence
    from kdjax.selection import token_stats

    tokens, slots = batch.tokens.size, batch.tokens.shape[0] * parts.chooser.policy.slots(batch.tokens.shape[1])
    head = 2.0 * tokens * student.width * student.vocab_size
    if parts.teacher is None:
        raise ValueError("parts must have a teacher.")
    teacher_trunk, student_trunk = jax.jit(parts.teacher.hidden), jax.jit(parts.student.hidden)
    hidden, teacher_hidden = student_trunk(params, batch), teacher_trunk(teacher_params, batch)

    def loss(student_side: Any, teacher_side: Any) -> Any:
        x, y = (side[0].reshape(tokens, -1)[:slots] for side in (student_side, teacher_side))
        heads = parts.student.head(student_side[1]), parts.teacher.head(teacher_side[1])  # type: ignore[union-attr]
        labels, weight = jnp.zeros(slots, jnp.int32), jnp.ones(slots, jnp.float32)
        terms = list(parts.objective.terms.values())
        return linear_divergence(x, heads[0], y, heads[1], labels, weight, terms, [1.0])[0]

    def update(gradient: Any, opt_state: Any, params: Any) -> Any:
        updates, opt_state = parts.optimiser.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    backward = jax.jit(jax.grad(lambda p, batch, c: jnp.sum(parts.student.hidden(p, batch) * c)))
    gradient, updated = jax.jit(jax.grad(loss)), jax.jit(update)
    signal = jax.jit(lambda h, p: token_stats(("student_entropy",), (h, parts.student.head(p)), None, batch.tokens))
    plain = jax.jit(lambda a, b: a @ b.T)
    opt_state = parts.optimiser.init(params)
    flops = _trunk_flops(teacher, batch.tokens.shape), 3 * _trunk_flops(student, batch.tokens.shape)
    programs = {
        PRODUCT: Program(lambda: plain(hidden.reshape(tokens, -1), params["embed"]), head),
        f"teacher trunk, {teacher.layers} layers": Program(lambda: teacher_trunk(teacher_params, batch), flops[0]),
        f"student trunk, {student.layers} layers, with gradient": Program(
            lambda: backward(params, batch, hidden), flops[1]
        ),
        f"heads and loss at {slots} slots, with gradient": Program(
            lambda: gradient((hidden, params), (teacher_hidden, teacher_params)), 4 * head * slots / tokens
        ),
        "optimiser": Program(lambda: updated(params, opt_state, params), 0.0),
    }
    if parts.chooser.signal is not None:
        programs["student entropy at all positions"] = Program(lambda: signal(hidden, params), head)
    return programs, sum(program.flops for name, program in programs.items() if name != PRODUCT)


def _batch(rows: int, length: int, vocab: int) -> "Batch":
    import jax
    import jax.numpy as jnp

    from kdjax.types import Batch

    shape = (rows, length)
    return Batch(
        tokens=jax.random.randint(jax.random.key(1), shape, 0, vocab),
        segment_ids=jnp.ones(shape, jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], shape),
        loss_mask=jnp.ones(shape, bool),
        row_id=jnp.arange(rows, dtype=jnp.int32),
        epoch=jnp.zeros(rows, jnp.int32),
        weight=jnp.ones(rows, jnp.float32),
    )


def _trunk_flops(cfg: "ModelConfig", shape: tuple[int, ...]) -> float:
    """Of a forward pass over `shape` = (rows, tokens a row)."""
    rows, length = shape
    projections = cfg.width * cfg.head_dim * (2 * cfg.heads + 2 * cfg.kv_heads)
    attention = 2 * cfg.heads * cfg.head_dim * (length + 1) / 2  # scores and mixing
    return 2.0 * cfg.layers * rows * length * (projections + 3 * cfg.width * cfg.mlp + attention)
