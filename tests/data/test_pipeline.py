"""Batches: no row lost or repeated, exact resume, the same global order for any number of processes."""

import itertools

import jax
import numpy as np
import pytest

from kdjax.data import heldout_batches, make_rows, take, to_batch, train_iterator
from kdjax.data.encode import Encoded
from kdjax.sharding import make_rules
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
def test_state_restores_exactly_across_epoch_borders(done):
    rows = some_rows(7)  # 4 to a batch: batches 1, 3, 5 and 6 cross a border
    straight = train_iterator(rows, 4, 3)
    some_batches(straight, done)
    state = straight.get_state()
    want = some_batches(straight, 5)
    fresh = train_iterator(rows, 4, 3)
    some_batches(fresh, 2)  # what it prefetched before must not come back
    fresh.set_state(state)
    assert_same(some_batches(fresh, 5), want)
    assert fresh.get_state() == straight.get_state()


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_yield_the_batches_of_one(processes):
    rows = some_rows(7)
    whole = some_batches(train_iterator(rows, 8, 1), 5)
    parts = [
        some_batches(train_iterator(rows, 8, 1, process_index=p, process_count=processes), 5) for p in range(processes)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_a_state_may_be_restored_under_another_number_of_processes():
    rows = some_rows(7)
    one = train_iterator(rows, 4, 1)
    some_batches(one, 3)
    second = train_iterator(rows, 4, 1, process_index=1, process_count=2)
    second.set_state(one.get_state())
    np.testing.assert_array_equal(next(second)["row_id"], next(one)["row_id"][2:])


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
    rules = make_rules("dp", jax.device_count())
    split = to_batch(columns, rules)
    assert split.tokens.sharding.shard_shape(split.tokens.shape) == (8 // jax.device_count(), 4)
    for name, column in columns.items():
        for batch in (plain, split):
            assert getattr(batch, name).dtype == column.dtype
            np.testing.assert_array_equal(np.asarray(getattr(batch, name)), column)


def test_bad_sizes_are_errors():
    rows = some_rows(4)
    with pytest.raises(
        ValueError, match=r"train\.batch_size must be a multiple of the number of processes, got 6 rows"
    ):
        train_iterator(rows, 6, 0, process_index=1, process_count=4)
    with pytest.raises(ValueError, match="for process 2 of 2"):
        train_iterator(rows, 4, 0, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        train_iterator(rows, 0, 0)
    with pytest.raises(ValueError, match="rows must not be empty"):
        train_iterator(take(rows, slice(0, 0)), 2, 0)
    with pytest.raises(ValueError, match="limit at least 0, got 2 and -1"):
        heldout_batches(rows, 2, -1)
