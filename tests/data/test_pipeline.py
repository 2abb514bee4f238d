"""Batches: no row lost or repeated, exact resume, the same global order for any number of processes."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from kdjax.config import Mesh
from kdjax.data import fed_places, heldout_batches, make_rows, on_mesh, take, to_batch, train_iterator
from kdjax.data.encode import Encoded
from kdjax.sharding import Rules, make_rules
from kdjax.types import Batch


def some_rows(count: int, seq_len: int = 4):
    """Row r holds the tokens 10 r + 1, ..."""
    documents = [
        Encoded(f"d{r}", np.arange(seq_len, dtype=np.int32) + 10 * r + 1, np.array([False] + [True] * (seq_len - 1)))
        for r in range(count)
    ]
    return make_rows(documents, seq_len)


def some_batches(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (8, 4), (3, 8), (1, 2)])
def test_every_epoch_holds_every_row_once_and_batches_cross_its_border(count, batch_size):
    epochs = 6
    batches = some_batches(train_iterator(some_rows(count), batch_size, 0), -(-epochs * count // batch_size))
    row_id, epoch = (np.concatenate([b[name] for b in batches])[: epochs * count] for name in ("row_id", "epoch"))
    assert epoch.tolist() == [e for e in range(epochs) for _ in range(count)]
    for e in range(epochs):
        assert sorted(row_id[epoch == e].tolist()) == list(range(count))


def test_epochs_and_seeds_are_shuffled_differently():
    def order(seed, epochs=3):
        batches = some_batches(train_iterator(some_rows(24), 24, seed), epochs)
        return [tuple(b["row_id"].tolist()) for b in batches]

    assert order(0) == order(0)
    assert len(set(order(0) + order(1) + order(2))) == 9  # the second epoch of seed 0 is not the first of seed 1


def test_columns_are_the_rows_they_name():
    rows = some_rows(7)
    for batch in some_batches(train_iterator(rows, 3, 5), 6):
        for name in ("tokens", "segment_ids", "positions", "loss_mask", "weight"):
            np.testing.assert_array_equal(batch[name], getattr(rows, name)[batch["row_id"]])
        assert (batch["tokens"][:, 0] == 10 * batch["row_id"] + 1).all()
        assert batch["row_id"].dtype == batch["epoch"].dtype == np.int32


@pytest.mark.parametrize("done", [0, 1, 2, 5, 8])
def test_a_run_that_goes_on_starts_where_it_was_across_epoch_borders(done):
    rows = some_rows(7)  # 4 to a batch: batches 1, 3, 5 and 6 cross a border
    straight = train_iterator(rows, 4, 3)
    some_batches(straight, done)
    assert_same(some_batches(train_iterator(rows, 4, 3, start=done), 5), some_batches(straight, 5))


@dataclasses.dataclass(frozen=True)
class Part(Rules):
    """The rules of a process that has only these of the devices."""

    own: tuple[int, ...] = ()

    def batch(self, ndim):
        return Own(super().batch(ndim), self.own)


@dataclasses.dataclass(frozen=True)
class Own:
    sharding: jax.sharding.Sharding
    own: tuple[int, ...]

    def addressable_devices_indices_map(self, shape):
        found = self.sharding.addressable_devices_indices_map(shape)
        return {device: index for device, index in found.items() if device.id in self.own}


def part_of(rules, own):
    return Part(**{field.name: getattr(rules, field.name) for field in dataclasses.fields(rules)}, own=tuple(own))


# Of 8 devices: halves; every other one; the rows of a grid whose columns are model shards, so that both have all rows.
SPLITS = {
    "halves": (Mesh("dp"), [range(4), range(4, 8)]),
    "interleaved": (Mesh("fsdp"), [(0, 2, 4, 6), (1, 3, 5, 7)]),
    "repeated": (Mesh("tp", "model:2,data:4"), [range(4), range(4, 8)]),
}


def test_rows_of_a_batch_may_be_chosen_and_weighed_as_a_whole():
    rows = some_rows(6)
    mask = rows.loss_mask & (rows.row_id != 5)[:, None]  # row 5 has no target
    rows = dataclasses.replace(rows, weight=np.arange(1, 7, dtype=np.float32), loss_mask=mask)
    settings = {
        "choose": lambda step: np.array([step % 6, 5, 5, 0]),
        "weigh": lambda weights, real: weights * real / weights[real].mean(),
    }
    whole = some_batches(train_iterator(rows, 4, 0, **settings), 3)
    for step, batch in enumerate(whole):
        assert batch["row_id"].tolist() == [step, 5, 5, 0]
        assert batch["tokens"][:, 0].tolist() == [10 * step + 1, 51, 51, 1]
        assert batch["epoch"].tolist() == [step] * 4
        np.testing.assert_allclose(batch["weight"], np.array([step + 1, 0, 0, 1]) / (step / 2 + 1), rtol=1e-6)
    assert_same(whole[1:], some_batches(train_iterator(rows, 4, 0, start=1, **settings), 2))
    part = some_batches(train_iterator(rows, 4, 0, fed=np.array([1, 3]), **settings), 3)
    assert_same(part, [{name: column[[1, 3]] for name, column in batch.items()} for batch in whole])
    plain = some_batches(train_iterator(rows, 4, 0, weigh=settings["weigh"]), 3)
    for batch, same in zip(plain, some_batches(train_iterator(rows, 4, 0), 3), strict=True):
        assert batch["row_id"].tolist() == same["row_id"].tolist()
        weights = same["weight"] * (same["row_id"] != 5)
        np.testing.assert_allclose(batch["weight"], weights * (np.sum(weights > 0) / weights.sum()), rtol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("split", SPLITS)
def test_processes_together_feed_the_batches_of_one(split, accumulate):
    mesh, devices = SPLITS[split]
    rows, rules, size = some_rows(7), make_rules(mesh), 16 * accumulate
    whole = some_batches(train_iterator(rows, size, 1), 3)
    joined = [{name: np.zeros_like(column) for name, column in batch.items()} for batch in whole]
    seen = np.zeros(size, int)
    for own in devices:
        fed = fed_places(part_of(rules, own), size, accumulate)
        assert fed.tolist() == sorted(fed.tolist())
        seen[fed] += 1
        for target, part in zip(joined, some_batches(train_iterator(rows, size, 1, fed=fed), 3), strict=True):
            for name, column in part.items():
                target[name][fed] = column
    assert_same(joined, whole)
    assert set(seen.tolist()) == ({2} if split == "repeated" else {1})


@pytest.mark.parametrize("mesh", [mesh for mesh, _ in SPLITS.values()], ids=str)
def test_rows_are_on_the_mesh_in_their_order(mesh):
    rules = make_rules(mesh)
    column = np.arange(2 * 16 * 3).reshape(2, 16, 3)
    placed = on_mesh(column, rules, axis=1)
    np.testing.assert_array_equal(np.asarray(placed), column)
    assert placed.sharding.shard_shape(column.shape) == (2, 16 // rules.batch_shards, 3)


def test_a_process_without_a_device_of_the_mesh_is_an_error():
    with pytest.raises(ValueError, match=r"mesh\.shape must take devices of every process, got a mesh without"):
        fed_places(part_of(make_rules(Mesh("dp")), ()), 8)


@pytest.mark.parametrize(("limit", "sizes"), [(0, [4, 4, 2]), (5, [4, 1]), (4, [4]), (99, [4, 4, 2])])
def test_heldout_batches_are_in_order_and_padded_with_rows_that_count_for_nothing(limit, sizes):
    rows = some_rows(10)
    batches = list(heldout_batches(rows, 4, limit))
    assert len(batches) == len(sizes)
    assert [b["tokens"].shape for b in batches] == [(4, 4)] * len(sizes)
    seen = np.concatenate([b["row_id"] for b in batches])
    assert seen[: sum(sizes)].tolist() == list(range(sum(sizes)))
    for batch, size in zip(batches, sizes, strict=True):
        np.testing.assert_array_equal(batch["tokens"][:size], rows.tokens[batch["row_id"][:size]])
        assert (batch["epoch"] == 0).all()
        assert (batch["row_id"][size:] == -1).all()
        for name in ("segment_ids", "loss_mask", "weight", "positions"):
            assert not batch[name][size:].any()


def test_to_batch_puts_columns_on_the_device_or_splits_them_over_the_mesh():
    (columns,) = heldout_batches(some_rows(8), 8)
    plain = to_batch(columns)
    assert isinstance(plain, Batch)
    rules = make_rules(Mesh("dp"))
    split = to_batch(columns, rules)
    assert split.tokens.sharding.shard_shape(split.tokens.shape) == (8 // jax.device_count(), 4)
    for name, column in columns.items():
        for batch in (plain, split):
            assert getattr(batch, name).dtype == column.dtype
            np.testing.assert_array_equal(np.asarray(getattr(batch, name)), column)


def test_bad_sizes_are_errors():
    rows = some_rows(4)
    rules = make_rules(Mesh("dp"))
    for size, accumulate in ((12, 1), (16, 4), (16, 3)):
        with pytest.raises(ValueError, match=rf"rows must be a multiple of .* 8 parts .* got {size} and {accumulate}"):
            fed_places(rules, size, accumulate)
    with pytest.raises(ValueError, match="batch_size must be at least 1 and start at least 0, got 0 and 0"):
        train_iterator(rows, 0, 0)
    with pytest.raises(ValueError, match="rows must not be empty"):
        train_iterator(take(rows, slice(0, 0)), 2, 0)
    with pytest.raises(ValueError, match="limit at least 0, got 2 and -1"):
        heldout_batches(rows, 2, -1)
