"""One pass of the teacher over the rows that are kept, into a cache (`teacher/cache`).

Rows go through the teacher in groups of a fixed size, and which rows form a group depends on the cache's order of rows
alone. A device always has one whole group, so neither the number of devices nor of processes, nor where a killed pass
was resumed, changes a matrix product; the bytes written are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.data import Rows, eligible, heldout_batches, take, to_batch
from kdjax.kernels.linear_stats import linear_stats
from kdjax.selection import Chooser
from kdjax.selection.stats import token_stats
from kdjax.sharding import Rules
from kdjax.step import LanguageModel, side_specs
from kdjax.teacher import drawn_entries, live_targets
from kdjax.teacher.cache import CacheWriter, RowRecord
from kdjax.teacher.classes import ClassSampler
from kdjax.types import Array, Batch, Head, Params, gather_slots, targets_of

GROUP_TOKENS = 2048  # a device's share of a call: enough rows for efficient products, whatever their length


@dataclasses.dataclass(frozen=True)
class TeacherPass:
    """What is computed of a row: the teacher's entries, drawn by `sampler` at temperature tau.

    chooser: the positions that are stored: all, or a superset of those that training will want, by the entropy of the
    `student`, which is there then. entropy, label_logp: whether they are stored too; the latter at temperature 1, as
    signals are.
    """

    teacher: LanguageModel
    sampler: ClassSampler
    tau: float
    chooser: Chooser
    student: LanguageModel | None = None
    entropy: bool = True
    label_logp: bool = False
    rules: Rules = Rules()


def rows_of_a_group(seq_len: int) -> int:
    """How many rows go through a device at once."""
    return max(1, GROUP_TOKENS // seq_len)


def make_pass_step(of: TeacherPass) -> Callable[[Params, Params, Batch, Array], dict[str, Array]]:
    """The jitted (teacher_params, student_params, batch, key) -> arrays [B, S, ...] at the stored positions.

    "index" [B, S], "filled" bool [B, S], "ids", "codes" [B, S, K], "entropy" [B, S], and "label_logp" [B, S] if asked
    for. student_params is read if there is a student. Under a mesh the arrays are whole on every device.
    """
    rules = of.rules
    sides = [of.teacher] + ([] if of.student is None else [of.student])
    specs = [side_specs(side, rules) for side in sides]

    def local(models: list[tuple[Array, Head]], batch: Batch, key: Array) -> dict[str, Array]:
        whole = rules.with_heads(models, specs)
        labels, valid = targets_of(batch)
        student = whole[1] if len(whole) > 1 else None
        stats = token_stats(of.chooser.needs, student, None, labels, implementation=rules.kernels)
        start = jnp.zeros((), jnp.int32)
        selection, _ = of.chooser(stats, batch, valid, of.chooser.policy.init(), key, start, rules.all_rows)
        live = live_targets(*whole[0], selection.index)
        ids, codes, entropy = drawn_entries(
            of.sampler, live, selection.index, batch, jnp.float32(of.tau), rules.kernels
        )
        found = {"index": selection.index, "filled": selection.weight > 0}
        found |= {"ids": ids, "codes": codes, "entropy": entropy}
        if of.label_logp:
            slots = live.hidden.reshape(-1, live.hidden.shape[-1]), live.head
            wanted = gather_slots(labels, selection.index)
            stats_at = linear_stats(*slots, wanted.reshape(-1), implementation=rules.kernels)
            found["label_logp"] = stats_at.label_logp.reshape(wanted.shape)
        return found

    def pass_step(teacher_params: Params, student_params: Params, batch: Batch, key: Array) -> dict[str, Array]:
        every = (teacher_params, student_params)
        models = [(side.hidden(p, batch), side.head(p)) for side, p in zip(sides, every, strict=False)]
        batch_specs = jax.tree.map(lambda a: rules.batch_spec(a.ndim), batch)
        key_spec = jax.sharding.PartitionSpec()
        run = rules.rowwise(local, (specs, batch_specs, key_spec), rules.batch_spec(1))
        out: dict[str, Array] = run(models, batch, key)
        return {name: rules.reshard(rows, jax.sharding.PartitionSpec()) for name, rows in out.items()}

    return jax.jit(pass_step)


def make_recorder(
    of: TeacherPass, teacher_params: Params, student_params: Params = ()
) -> Callable[[Rows], Iterator[RowRecord]]:
    """recorder(rows) -> a `RowRecord` per row, in order; whole groups of rows give the same bytes anywhere.

    Raises ValueError that names the row if the teacher is not finite there.
    """
    step = make_pass_step(of)
    key = jax.random.key(0)  # the policies of a cache draw nothing; class draws have seeds of their own

    def recorder(rows: Rows) -> Iterator[RowRecord]:
        size = rows_of_a_group(rows.tokens.shape[1]) * of.rules.batch_shards
        counts = iter(eligible(rows).sum(1))
        pending: tuple[Any, dict[str, Array]] | None = None
        for columns in heldout_batches(rows, size):
            sent = step(teacher_params, student_params, to_batch(columns, of.rules), key)
            if pending is not None:
                yield from _records(of, *pending, counts)  # while the device works on the next rows
            pending = columns, sent
        if pending is not None:
            yield from _records(of, *pending, counts)

    return recorder


def write_shards(
    writer: CacheWriter,
    rows: Rows,
    recorder: Callable[[Rows], Iterator[RowRecord]],
    shards: list[int],
    on_row: Callable[[int], None] = lambda tokens: None,
    mine: Container[int] | None = None,
) -> None:
    """Compute and write these shards, one after the other; `on_row(its tokens)` after each row.

    rows: all rows of the cache, in its order. mine: those of the shards that this process writes, None = all; processes
    that share a mesh compute all of them. Raises OSError if the disk is full; what is finished stands.
    """
    for shard in shards:
        part = take(rows, writer.rows(shard))
        tokens = (part.segment_ids > 0).sum(1)
        records = []
        for record, count in zip(recorder(part), tokens, strict=True):
            records.append(record)
            on_row(int(count))
        if mine is None or shard in mine:
            writer.write(shard, records)


def _records(
    of: TeacherPass, columns: dict[str, Any], sent: dict[str, Array], counts: Iterator[int]
) -> Iterator[RowRecord]:
    found = jax.device_get(sent)
    for at in np.flatnonzero(columns["row_id"] >= 0):
        row = {name: array[at][found["filled"][at]] for name, array in found.items() if name != "filled"}
        if not np.isfinite(row["entropy"]).all():
            raise ValueError(
                f"teacher.path must give finite logits, got some that are not in row {columns['row_id'][at]} of the "
                "training data. Check its weights, or set teacher.dtype='float32'."
            )
        yield RowRecord(
            ids=row["ids"],
            codes=row["codes"],
            eligible=int(next(counts)),
            entropy=row["entropy"] if of.entropy else None,
            label_logp=row.get("label_logp"),
            places=None if of.student is None else row["index"],
        )
