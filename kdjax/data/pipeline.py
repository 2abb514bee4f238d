"""Rows to batches: an endless shuffled grain iterator for training, a plain one for evaluation."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.config import Experiment
from kdjax.data.packing import Rows, eligible, take
from kdjax.sharding import Rules
from kdjax.types import Batch, CachedTeacher, TeacherText

if TYPE_CHECKING:
    import grain

Columns = dict[str, Any]  # the fields of `types.Batch`, by name; "teacher": those of `CachedTeacher` or `TeacherText`
# (row_id [B], row_hash [B], eligible [B, T]) -> the fields of one of them
TeacherColumns = Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, np.ndarray]]

NO_ROW = -1  # row_id of a row that only fills the last batch


def train_iterator(
    rows: Rows,
    batch_size: int,
    seed: int,
    *,
    phase: int = 0,
    start: int = 0,
    fed: np.ndarray | None = None,
    teacher: TeacherColumns | None = None,
    choose: Callable[[int], np.ndarray] | None = None,
    weigh: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> grain.DatasetIterator[Columns]:
    """Batches without end; every epoch holds each row once, in a new order that depends on `seed` and `phase` alone.

    The epochs follow one another without a gap, so a batch may hold rows of two of them. start: batches that were taken
    already; it is all that a resumed run needs to know. fed: the places in the global batch whose rows are wanted here
    (`fed_places`), None = all; which row has which place depends on neither processes nor devices. phase: counts the
    choices of rows. teacher: reads what a cache holds for the rows; it runs, like the rest, in threads ahead of the
    step. choose: (number of the batch, from 0) -> its rows, instead of all of them in turn. weigh: (weights of the rows
    of a whole batch, whether each has a target) -> those that they have in it.
    """
    import grain

    if batch_size < 1 or start < 0:
        raise ValueError(f"batch_size must be at least 1 and start at least 0, got {batch_size} and {start}.")
    if not len(rows):
        raise ValueError("rows must not be empty; there is nothing to iterate over.")
    places = np.arange(batch_size) if fed is None else fed
    # grain shuffles epoch e with seed + e. A hash keeps the second epoch of seed 0 apart from the first of seed 1.
    name = f"shuffle {seed}" + (f" phase {phase}" if phase else "")
    digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
    order = grain.MapDataset.range(len(rows)).shuffle(seed=int.from_bytes(digest, "little")).repeat(None)
    real = np.asarray(eligible(rows).any(1))

    def batch(step: int) -> Columns:
        if choose is None:
            wanted = step * batch_size + (np.arange(batch_size) if weigh else places)
            index = np.array([order[int(at)] for at in wanted])
            epoch = wanted // len(rows)
        else:
            index = choose(step)
            epoch = np.full(batch_size, step)
        if weigh is not None or choose is not None:
            weight = rows.weight[index] if weigh is None else weigh(rows.weight[index], real[index])
            index, epoch, weight = index[places], epoch[places], weight[places]
        else:
            weight = rows.weight[index]
        columns = _columns(rows, index, epoch) | {"weight": weight.astype(np.float32)}
        if teacher is not None:
            part = take(rows, index)
            columns["teacher"] = teacher(part.row_id, part.row_hash, eligible(part))
        return columns

    steps = grain.MapDataset.range(start, sys.maxsize // batch_size).map(batch)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def fed_places(rules: Rules, rows: int, accumulate: int = 1) -> np.ndarray:
    """int64 [n], ascending: the places in a batch of `rows` whose rows this process has to feed to its devices.

    The batch is `accumulate` micro-batches, one after the other, each of them split over the mesh. A row may be fed by
    several processes, if the mesh repeats it. Raises ValueError if the rows do not divide, or no device is this
    process's.
    """
    size = rows // accumulate
    if rows % accumulate or size % rules.batch_shards:
        raise ValueError(
            f"rows must be a multiple of accumulate times the {rules.batch_shards} parts that the mesh cuts a batch "
            f"into, got {rows} and {accumulate}. Change train.batch_size or mesh.shape."
        )
    shards = _local_shards(rules)
    within = (shards[:, None] * (size // rules.batch_shards) + np.arange(size // rules.batch_shards)).reshape(-1)
    return (np.arange(accumulate)[:, None] * size + within).reshape(-1)


def on_mesh(array: np.ndarray, rules: Rules, axis: int = 0) -> jax.Array:
    """The array whose `axis` is split over the mesh, from this process's part of it in the order of `fed_places`."""
    if rules.mesh is None:
        return jax.device_put(array)
    shards = _local_shards(rules)
    size = array.shape[axis] // len(shards)
    shape = (*array.shape[:axis], size * rules.batch_shards, *array.shape[axis + 1 :])

    def part(index: Any) -> np.ndarray:
        first, stop, _ = index[axis].indices(shape[axis])
        at = int(np.searchsorted(shards, first // size)) * size
        return array[(*index[:axis], slice(at, at + stop - first), *index[axis + 1 :])]

    sharding = NamedSharding(rules.mesh, P(*[None] * axis, *rules.batch_spec(array.ndim - axis)))
    return jax.make_array_from_callback(shape, sharding, part)


def _local_shards(rules: Rules) -> np.ndarray:
    """int64, ascending: which parts of a batch are on devices of this process."""
    count, sharding = rules.batch_shards, rules.batch(1)
    if sharding is None:
        return np.arange(1)
    found = sharding.addressable_devices_indices_map((count,)).values()
    starts = sorted({index[0].indices(count)[0] for index in found if index is not None})
    if not starts:
        raise ValueError(
            "mesh.shape must take devices of every process, got a mesh without those of process "
            f"{jax.process_index()}. Raise its sizes until all devices are used; -1 takes what is left."
        )
    return np.array(starts)


def heldout_batches(rows: Rows, batch_size: int, limit: int = 0) -> Iterator[Columns]:
    """The first `limit` rows (0 = all) in order, in batches of exactly `batch_size`.

    The last batch is filled with empty rows: segment 0, nothing in `loss_mask`, weight 0, row_id -1.
    """
    if batch_size < 1 or limit < 0:
        raise ValueError(f"batch_size must be at least 1 and limit at least 0, got {batch_size} and {limit}.")
    count = min(limit or len(rows), len(rows))
    return (_padded(rows, start, min(start + batch_size, count), batch_size) for start in range(0, count, batch_size))


def to_batch(columns: Mapping[str, np.ndarray], rules: Rules = Rules()) -> Batch:
    """The batch on the devices; under a mesh split by rows. `columns` are those of all its rows, in every process."""
    if rules.mesh is None:
        return as_batch(columns, jnp.asarray)
    fed = fed_places(rules, len(columns["row_id"]))
    return as_batch(columns, lambda column: on_mesh(column[fed], rules))


def as_batch(columns: Mapping[str, Any], put: Callable[[np.ndarray], jax.Array]) -> Batch:
    """The batch of `columns`, each of them brought to the devices by `put`."""
    placed = jax.tree.map(put, dict(columns))
    teacher = placed.pop("teacher", None)
    if teacher is None:
        return Batch(**placed)
    return Batch(**placed, teacher=TeacherText(**teacher) if "index" in teacher else CachedTeacher(**teacher))


def abstract_batch(experiment: Experiment, rules: Rules, vocab_size: int, teacher_room: int = 0) -> Batch:
    """Shapes of a step's batch, [A, B, ...], rows split over the mesh; with what a cache brings along, if one does.

    teacher_room: how much longer the rows are that a privileged teacher reads in place of the student's.
    """
    e = experiment
    rows, length = e.train.batch_size // e.train.accumulate, e.data.seq_len

    def column(dtype: Any, *shape: int) -> Any:
        sharding = None
        if rules.mesh is not None:
            sharding = NamedSharding(rules.mesh, P(None, *rules.batch_spec(len(shape))))
        return jax.ShapeDtypeStruct((e.train.accumulate, *shape), dtype, sharding=sharding)

    tokens, ids = column(jnp.int32, rows, length), column(jnp.int32, rows)
    mask, weight = column(jnp.bool_, rows, length), column(jnp.float32, rows)
    teacher: CachedTeacher | TeacherText | None = None
    if e.teacher.privileged:
        longer = column(jnp.int32, rows, length + teacher_room)
        teacher = TeacherText(longer, longer, longer, index=tokens)
    if e.teacher.source == "cache":
        entries, figure = min(e.classes.entries, vocab_size), column(jnp.float32, rows, length)
        teacher = CachedTeacher(
            ids=column(jnp.int32, rows, length, entries),
            codes=column(jnp.uint16, rows, length, entries),
            stored=mask,
            entropy=figure if e.cache.entropy else None,
            label_logp=figure if e.cache.label_logp else None,
        )
    return Batch(tokens, tokens, tokens, mask, row_id=ids, epoch=ids, weight=weight, teacher=teacher)


def _columns(rows: Rows, index: np.ndarray, epoch: np.ndarray) -> Columns:
    return {
        "tokens": rows.tokens[index],
        "segment_ids": rows.segment_ids[index],
        "positions": rows.positions[index],
        "loss_mask": rows.loss_mask[index],
        "row_id": rows.row_id[index],
        "epoch": epoch.astype(np.int32),
        "weight": rows.weight[index],
    }


def _padded(rows: Rows, start: int, stop: int, batch_size: int) -> Columns:
    columns = _columns(rows, np.arange(start, stop), np.zeros(stop - start))
    empty = batch_size - (stop - start)
    filled = {name: np.pad(c, [(0, empty)] + [(0, 0)] * (c.ndim - 1)) for name, c in columns.items()}
    filled["row_id"][stop - start :] = NO_ROW
    return filled
