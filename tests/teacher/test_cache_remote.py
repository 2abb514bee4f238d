"""A cache in a bucket, which fsspec keeps in memory here."""

import errno
import gc

import cache_problems as problems
import numpy as np
import pytest
from cache_problems import assert_whole, contents, shard_files

from kdjax.teacher.cache import open_cache


@pytest.fixture
def bucket(monkeypatch):
    """gs:// kept in memory."""
    from etils.epath import backend
    from fsspec.implementations.memory import MemoryFileSystem

    memory = MemoryFileSystem()
    monkeypatch.setattr(memory, "store", {})
    monkeypatch.setattr(memory, "pseudo_dirs", [""])
    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: memory)
    return memory


def test_a_cache_in_a_bucket(bucket, tmp_path):
    problem = problems.make_problem()
    place = "gs://bucket/some/cache"
    problem.write(place, [0, 2])
    assert problem.open(place).missing() == [1]
    with pytest.raises(ValueError, match=r"1 of its 3 shards are missing \(1\)"):
        open_cache(place)
    problem.write(place)
    problem.write(tmp_path)
    stored = {name.rsplit("/", 1)[1]: file.getvalue() for name, file in bucket.store.items()}
    assert stored == {name: content for name, (content, _) in contents(tmp_path).items()}
    assert_whole(place, problem)
    assert open_cache(place).summary() == open_cache(tmp_path).summary()
    with pytest.raises(ValueError, match="holds another cache: seed is 0 in the cache and 1 here"):
        problem.open(place, seed=1)


def test_a_shard_of_a_bucket_is_copied_once_and_checked(bucket):
    problem = problems.make_problem()
    place = "gs://bucket/cache"
    problem.write(place)
    cache = open_cache(place)
    before = cache.columns(*problem.keys, problem.eligible)
    copies = cache._copies
    assert shard_files(copies) == ["shard-000000.kdc", "shard-000001.kdc", "shard-000002.kdc"]
    (name,) = [name for name in bucket.store if name.endswith("shard-000001.kdc")]
    content = bucket.store[name].getvalue()
    bucket.pipe_file(name, content[:-3])
    cache._open.clear()
    np.testing.assert_array_equal(cache.columns(*problem.keys, problem.eligible)["ids"], before["ids"])
    with pytest.raises(ValueError, match=r"shard-000001.kdc is damaged: it is truncated"):
        open_cache(place).columns(*problem.keys, problem.eligible)
    assert problem.open(place).missing() == [1]
    problem.write(place)
    assert bucket.cat_file(name) == content
    del cache
    gc.collect()
    assert not copies.exists()


def test_a_writer_of_a_bucket_that_fails_leaves_nothing(bucket, monkeypatch):
    problem = problems.make_problem()
    writer = problem.write("gs://bucket/cache", [0])
    before = set(bucket.store)

    def broken(*_, **__):
        raise OSError(errno.EIO, "connection lost")

    monkeypatch.setattr(bucket, "rename", broken)
    with pytest.raises(OSError, match=r"gs://bucket/cache/shard-000001.kdc could not be written: .*connection lost"):
        writer.write(1, problem.records[4:8])
    assert set(bucket.store) == before


@pytest.mark.parametrize("path", ["memory://cache", "nosuch://cache"])
def test_a_scheme_that_nobody_opens(path):
    with pytest.raises(
        ValueError, match=rf"cache.path must be local or begin with gs://.*, got '{path}'; it cannot be"
    ):
        open_cache(path)
