"""Held-out figures of a student and its teacher: a pure step that gives per-row sums, and the loop over batches.

Everything behind the trunks is local to a row and comes from one pass over the vocabulary; nothing of shape [B, T, V]
exists. Per-row sums leave the device, so that rows can be drawn again for intervals (`bootstrap.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.evals.bootstrap import RESAMPLES
from kdjax.evals.evaluation import BINS, Evaluation, summarise
from kdjax.kernels.linear_stats import LinearStats, linear_pair_stats, linear_stats
from kdjax.sharding import Rules
from kdjax.step import LanguageModel, side_specs
from kdjax.types import Array, Batch, Head, Params, targets_of

RowSums = dict[str, Array]
EvalStep = Callable[[Params, Params, Batch], RowSums]


def make_eval_step(student: LanguageModel, teacher: LanguageModel | None = None, rules: Rules = Rules()) -> EvalStep:
    """The jitted (student_params, teacher_params, batch) -> per-row sums over the eligible positions, float32.

    "count" [B]; for m in student, teacher: "m_nll", "m_correct", "m_entropy" [B], "m_bins" [B, 15, 3] (count, sum of
    confidences, correct, by confidence of the top token); with a teacher "kl" (teacher || student), "agreement" [B].
    Without a teacher `teacher_params` is not read. Under a mesh the sums are whole on every device.
    """

    def eval_step(student_params: Params, teacher_params: Params, batch: Batch) -> RowSums:
        sides = [(student.hidden(student_params, batch), student.head(student_params))]
        specs = [side_specs(student, rules)]
        if teacher is not None:
            sides.append((teacher.hidden(teacher_params, batch), teacher.head(teacher_params)))
            specs.append(side_specs(teacher, rules))

        def local(sides: list[tuple[Array, Head]], batch: Batch) -> RowSums:
            return _row_sums(rules.with_heads(sides, specs), batch, rules.kernels)

        batch_specs = jax.tree.map(lambda a: rules.batch_spec(a.ndim), batch)
        sums = rules.rowwise(local, in_specs=(specs, batch_specs), out_specs=rules.batch_spec(1))(sides, batch)
        if rules.mesh is None:
            return sums
        whole = NamedSharding(rules.mesh, P())
        return {name: jax.sharding.reshard(rows, whole) for name, rows in sums.items()}

    return jax.jit(eval_step)


def evaluate(
    eval_step: EvalStep,
    student_params: Params,
    teacher_params: Params,
    batches: Iterable[Batch],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Evaluation:
    """Figures and 95 % intervals over all rows of `batches`, which should have one shape (one compilation).

    Rows without an eligible position do not count, so a last batch may be filled up with empty rows. Raises ValueError
    if there is nothing to measure.
    """
    collected = [jax.device_get(eval_step(student_params, teacher_params, batch)) for batch in batches]
    if not collected:
        raise ValueError("held-out batches must not be empty, got none. Set data.heldout_fraction or eval.rows higher.")
    rows = {name: np.concatenate([part[name] for part in collected]) for name in collected[0]}
    return summarise(rows, resamples=resamples, seed=seed)


def _row_sums(sides: list[tuple[Array, Head]], batch: Batch, implementation: str | None) -> RowSums:
    labels, eligible = targets_of(batch)
    flat = [(hidden.reshape(-1, hidden.shape[-1]), head) for hidden, head in sides]

    def total(values: Array) -> Array:
        return jnp.sum(jnp.where(eligible, values.reshape(labels.shape), 0), 1, dtype=jnp.float32)

    if len(flat) == 1:
        alone = linear_stats(*flat[0], labels.reshape(-1), implementation=implementation)
        return {"count": total(eligible), **_model_sums("student", alone, labels, eligible)}
    pair = linear_pair_stats(*flat[0], *flat[1], labels.reshape(-1), implementation=implementation)
    return {
        "count": total(eligible),
        "kl": total(pair.kl),
        "agreement": total(pair.student.argmax == pair.teacher.argmax),
        **_model_sums("student", pair.student, labels, eligible),
        **_model_sums("teacher", pair.teacher, labels, eligible),
    }


def _model_sums(name: str, stats: LinearStats, labels: Array, eligible: Array) -> RowSums:
    """Sums over T of what is known of one model; its statistics are flat [B*T]."""
    stats = jax.tree.map(lambda a: a.reshape(labels.shape), stats)
    correct = stats.argmax == labels
    confidence = jnp.exp(stats.max_logp)
    bins = jnp.clip((confidence * BINS).astype(jnp.int32), 0, BINS - 1)
    inside = (bins[:, :, None] == jnp.arange(BINS)[None, None]) & eligible[:, :, None]  # [B, T, 15]
    columns = (jnp.ones_like(confidence), confidence, correct)
    binned = [jnp.sum(jnp.where(inside, column[:, :, None], 0), 1, dtype=jnp.float32) for column in columns]

    def total(values: Array) -> Array:
        return jnp.sum(jnp.where(eligible, values, 0), 1, dtype=jnp.float32)

    return {
        f"{name}_nll": total(-stats.label_logp),
        f"{name}_correct": total(correct),
        f"{name}_entropy": total(stats.entropy),
        f"{name}_bins": jnp.stack(binned, -1),
    }
