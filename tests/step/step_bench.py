"""A tiny teacher and student, a ragged batch, and a way to build steps from config overrides."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.config import Experiment, default_config, from_config_dict
from kdjax.models import ModelConfig
from kdjax.step import StepParts, init_state, make_train_step
from kdjax.types import Batch

STUDENT = ModelConfig("llama", 97, 32, 2, 4, 2, 8, 48, tied=True)
TEACHER = ModelConfig("llama", 101, 40, 3, 4, 2, 12, 64, tied=False)


def experiment(**overrides) -> Experiment:
    """The default experiment with {"data__seq_len": 16}-style overrides."""
    config = default_config()
    config.teacher.path = config.student.path = "unused"
    config.optim.warmup = 0
    config.optim.schedule = "constant"
    config.train.batch_size = 8
    for name, value in overrides.items():
        *path, last = name.split("__")
        at = config
        for part in path:
            at = at[part]
        at[last] = value
    return from_config_dict(config)


def ragged_batch(rows: int = 8, length: int = 24, seed: int = 0) -> Batch:
    """Rows of one to three segments, different lengths of padding, some masked targets, one empty row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, STUDENT.vocab_size, (rows, length))
    segments, positions = np.zeros((rows, length), int), np.zeros((rows, length), int)
    for row in range(rows - 1):
        cuts = np.sort(rng.choice(np.arange(2, length), 2, replace=False))
        ends = [*cuts, length if row % 2 else length - 3]
        start = 0
        for segment, end in enumerate(ends, start=1):
            end = max(start, end)
            segments[row, start:end], positions[row, start:end] = segment, np.arange(end - start)
            start = end
    mask = (rng.random((rows, length)) < 0.8) & (segments > 0)
    return Batch(
        tokens=jnp.asarray(tokens, jnp.int32),
        segment_ids=jnp.asarray(segments, jnp.int32),
        positions=jnp.asarray(positions, jnp.int32),
        loss_mask=jnp.asarray(mask),
        row_id=jnp.arange(rows, dtype=jnp.int32),
        epoch=jnp.zeros(rows, jnp.int32),
        weight=jnp.asarray(rng.uniform(0.5, 2.0, rows), jnp.float32),
    )


def micro_batches(batch: Batch, count: int) -> Batch:
    """[B, ...] -> [count, B / count, ...]."""
    return jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), batch)


@dataclasses.dataclass
class Bench:
    """One step to poke at."""

    parts: StepParts
    params: dict
    teacher_params: dict

    def state(self):
        return init_state(self.parts, jax.tree.map(jnp.copy, self.params), seed=3)

    def run(self, batch: Batch, steps: int = 1):
        """(state, reports) after `steps` steps on the same batch [B, ...]."""
        step, state, reports = jax.jit(make_train_step(self.parts)), self.state(), []
        for _ in range(steps):
            state, report = step(state, self.teacher_params, micro_batches(batch, self.parts.accumulate))
            reports.append(report)
        return state, reports
