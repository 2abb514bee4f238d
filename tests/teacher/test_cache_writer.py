"""Writing: whole files or none, resumed without writing again, by any number of writers; what it refuses."""

import concurrent.futures
import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import pathlib
import resource
import signal
import subprocess
import sys
import threading
import zlib

import cache_problems as problems
import numpy as np
import pytest
from cache_problems import assert_whole, contents, shard_files

from kdjax.teacher.cache import Header, files, open_cache, rows_digest, shards

ROOT = pathlib.Path(__file__).parents[2]


# --- what is on the disk


def stored(path, problem):
    """Bytes of the shards, and how many different ids each stored position has."""
    problem.write(path)
    distinct = np.concatenate([(record.codes > 0).sum(1) for record in problem.records])
    return sum(file.stat().st_size for file in path.glob("*.kdc")), distinct


def test_bytes_of_ids_from_anywhere_are_near_the_least_possible(tmp_path):
    vocab_size, rng = 151936, np.random.default_rng(0)
    problem = problems.make_problem(
        rows=40, seq_len=256, vocab_size=vocab_size, entropy=False, label_logp=False, rows_per_shard=16
    )
    for record in problem.records:
        somewhere = rng.integers(0, vocab_size, record.ids.shape)
        record.ids[:] = np.sort(np.where(record.codes > 0, somewhere, vocab_size), 1)
    size, distinct = stored(tmp_path, problem)
    assert 10 < distinct.mean() < 20  # as in the paper and on text for 50 draws
    # One of the sets of k among V ids has log2(V over k) bits, a count the entropy of the counts.
    sets = (distinct * np.log2(vocab_size)).sum() - sum(math.lgamma(k + 1) for k in distinct.tolist()) / math.log(2)
    share = np.bincount(np.concatenate([record.codes[record.codes > 0] for record in problem.records]))
    share = share[share > 0] / share.sum()
    counts = -distinct.sum() * (share * np.log2(share)).sum()
    assert sets / 8 < size < 1.1 * (sets + counts) / 8
    assert size <= 0.75 * 3 * distinct.sum()


def test_bytes_of_likely_ids_are_fewer(tmp_path):
    problem = problems.make_problem(rows=40, seq_len=256, vocab_size=151936, label_logp=False, rows_per_shard=16)
    rng = np.random.default_rng(0)
    for record in problem.records:
        record.ids[:], record.codes[:] = problems.text_like(rng, len(record.ids), 151936, 50)
    size, distinct = stored(tmp_path, problem)
    assert 10 < distinct.mean() < 20
    # On text a cache has 0.57 of the plain bytes. Here is room for another zlib, but not for ids without their steps.
    assert size <= 0.65 * (3 * distinct + 1).sum()


def test_draws_that_are_not_merged_take_less_than_plain_merged_ones(tmp_path):
    problem = problems.make_problem(rows=40, seq_len=64, power=0.5, label_logp=False, entropy=False, rows_per_shard=40)
    rng, n = np.random.default_rng(0), 0
    for record in problem.records:
        ids, counts = problems.drawn(rng, len(record.ids), 1000, 50)
        for at in range(len(ids)):
            record.ids[at] = np.repeat(ids[at], counts[at])
            record.codes[at] = np.repeat(rng.integers(1, 65536, 50), counts[at])
            n += (counts[at] > 0).sum()
    size, _ = stored(tmp_path, problem)
    # Of 50 words of 5 bytes a dozen are new; the others are runs in each plane, for which deflate has a word.
    assert size < 5 * n < 0.4 * 50 * 5 * problem.eligible.sum()


def test_the_bytes_depend_on_the_records_alone(tmp_path):
    problem = problems.make_problem()
    problem.write(tmp_path / "a")
    for process in (1, 0):
        writer = problem.open(tmp_path / "b", made={"process": process})
        for shard in reversed(writer.missing(process, 2)):
            writer.write(shard, [problem.records[at] for at in writer.rows(shard)])
    assert shard_files(tmp_path / "a") == ["shard-000000.kdc", "shard-000001.kdc", "shard-000002.kdc"]
    for name in shard_files(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_empty_entries_are_dropped_wherever_they_are(tmp_path):
    problem = problems.make_problem()
    want = problem.write(tmp_path / "a").directory / "shard-000000.kdc"
    problem.records = [
        dataclasses.replace(
            record,
            ids=np.insert(record.ids, [0, 1, 50], -7, axis=1),  # what an empty entry's id is does not matter
            codes=np.insert(record.codes, [0, 1, 50], 0, axis=1),
        )
        for record in problem.records
    ]
    problem.write(tmp_path / "b", [0])
    assert (tmp_path / "b/shard-000000.kdc").read_bytes() == want.read_bytes()


def test_the_header_is_there_before_the_first_shard_and_can_be_read(tmp_path):
    problem = problems.make_problem()
    problem.open(tmp_path, made={"version": "0.4", "command": "x"})
    assert len(list(tmp_path.iterdir())) == 2
    values = json.loads((tmp_path / "header.json").read_text())
    assert values["made"] == {"version": "0.4", "command": "x"}
    assert values["rows_digest"] == rows_digest(*problem.keys)
    assert Header(**values) == problem.header
    assert problem.open(tmp_path, made={"command": "y"}).header.made["command"] == "x"


def test_the_digest_of_the_rows_by_hand():
    raw = b"".join(n.to_bytes(8, "little") for n in (5, 2**64 - 1, 3, 7))
    assert rows_digest(np.int32([5, 3]), np.uint64([2**64 - 1, 7])) == hashlib.sha256(raw).hexdigest()


def test_rows_of_a_shard_and_size_of_its_file(tmp_path):
    problem = problems.make_problem()
    writer = problem.open(tmp_path)
    assert [writer.rows(shard).tolist() for shard in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert writer.write(2, problem.records[8:]) == (tmp_path / "shard-000002.kdc").stat().st_size
    with pytest.raises(ValueError, match=r"shard must be in 0..2, got 3"):
        writer.rows(3)


# --- going on


def test_what_is_missing_is_dealt_to_processes(tmp_path):
    problem = problems.make_problem(rows=40)
    writer = problem.write(tmp_path, [0, 3, 9])
    assert writer.missing() == [1, 2, 4, 5, 6, 7, 8]
    assert [writer.missing(p, 3) for p in range(3)] == [[6], [1, 4, 7], [2, 5, 8]]
    with pytest.raises(ValueError, match=r"process_index must be in 0..2, got 3"):
        writer.missing(3, 3)


def test_a_damaged_shard_is_missing_and_written_again(tmp_path):
    problem = problems.make_problem()
    problem.write(tmp_path)
    before = contents(tmp_path)
    file = tmp_path / "shard-000001.kdc"
    for damaged in (before[file.name][0][:-1], before[file.name][0][:-1] + b"\xff", b""):
        assert damaged != before[file.name][0]
        file.write_bytes(damaged)
        writer = problem.open(tmp_path)
        assert writer.missing() == [1]
        assert "shard-000001.kdc is damaged: " in writer.damaged[1]
        assert writer.missing(0, 2) == []
        writer.write(1, problem.records[4:8])
        assert writer.damaged == {}
        assert writer.missing() == []
        after = contents(tmp_path)
        assert after[file.name][0] == before[file.name][0]
        assert {**after, file.name: 0} == {**before, file.name: 0}


def test_missing_without_reading_shards_whole(tmp_path):
    problem = problems.make_problem()
    writer = problem.write(tmp_path)
    file = tmp_path / "shard-000001.kdc"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert writer.missing(verify=False) == []
    assert writer.missing() == [1]
    file.write_bytes(content[:-1])
    assert writer.missing(verify=False) == [1]


KILLED = """
import os, sys, time
sys.path.insert(0, sys.argv[2])
import cache_problems
problem = cache_problems.make_problem()
writer = problem.write(sys.argv[1], [0, 1])
def stuck(descriptor):
    print("writing", flush=True)
    time.sleep(600)
os.fsync = stuck
writer.write(2, problem.records[8:])
"""


def test_a_killed_writer_leaves_what_was_finished_and_nothing_half(tmp_path):
    problem = problems.make_problem()
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(pathlib.Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        try:
            assert process.stdout.readline() == b"writing\n"
            (temporary,) = tmp_path.glob("*.tmp")
            before = contents(tmp_path)
            writer = problem.open(tmp_path)  # somebody else starts while it lives
            assert temporary.exists()
            assert writer.missing() == [2]
        finally:
            process.send_signal(signal.SIGKILL)
    with pytest.raises(ValueError, match=r"1 of its 3 shards are missing \(2\)"):
        open_cache(tmp_path)
    assert temporary.exists()
    writer = problem.open(tmp_path)
    assert not temporary.exists()
    assert writer.missing() == [2]
    writer.write(2, problem.records[8:])
    after = contents(tmp_path)
    del before[temporary.name], after["shard-000002.kdc"]
    assert after == before
    assert_whole(tmp_path, problem)


@pytest.mark.parametrize("cleaner", ["is at it", "was there"])
def test_a_cleaner_that_is_faster_than_the_lock(tmp_path, monkeypatch, cleaner):
    problem = problems.make_problem()
    writer = problem.open(tmp_path)
    flock = fcntl.flock
    seen = []

    def late(descriptor, how):
        if not seen:
            seen.extend(tmp_path.glob("*.tmp"))
            seen[0].unlink()
            if cleaner == "is at it":
                raise BlockingIOError
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    writer.write(0, problem.records[:4])
    assert len(seen) == 1
    assert writer.missing() == [1, 2]
    assert not list(tmp_path.glob("*.tmp"))


def test_temporary_files_where_there_are_no_locks_go_by_age(tmp_path, monkeypatch):
    def without(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    problem = problems.make_problem()
    problem.open(tmp_path)
    old, new = tmp_path / "shard-000000.kdc.a.tmp", tmp_path / "shard-000000.kdc.b.tmp"
    for file in (old, new):
        file.write_bytes(b"half")
    day = 24 * 3600
    os.utime(old, (old.stat().st_mtime - day - 60,) * 2)
    os.utime(new, (new.stat().st_mtime - day + 600,) * 2)
    problem.write(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)
    assert_whole(tmp_path, problem)


# --- two writers


def test_two_writers_with_the_same_bytes(tmp_path):
    problem = problems.make_problem()
    problem.write(tmp_path)
    before = contents(tmp_path)
    problem.write(tmp_path)
    assert contents(tmp_path) == before


def test_two_writers_with_other_builds_of_zlib(tmp_path, monkeypatch):
    problem = problems.make_problem()
    monkeypatch.setattr(shards, "STRATEGY", zlib.Z_DEFAULT_STRATEGY)
    problem.write(tmp_path / "a")
    before = contents(tmp_path / "a")
    monkeypatch.setattr(shards, "LEVEL", 1)
    problem.write(tmp_path / "b")
    for name in shard_files(tmp_path / "a"):
        assert (tmp_path / "b" / name).read_bytes() != before[name][0]
    problem.write(tmp_path / "a")
    assert contents(tmp_path / "a") == before
    for path in (tmp_path / "a", tmp_path / "b"):
        assert_whole(path, problem)


def another(record, name):
    if name == "eligible":
        return dataclasses.replace(record, eligible=record.eligible - 1)
    value = getattr(record, name).copy()
    value[-1] = 0 if name == "entropy" else value[-1][::-1]
    return dataclasses.replace(record, **{name: value})


@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize("name", ["entropy", "ids", "codes", "eligible"])
def test_two_writers_that_disagree(tmp_path, name, row):
    problem = problems.make_problem(superset=0.4, student="5d", power=0.5, entries=2)
    problem.write(tmp_path)
    before = contents(tmp_path)
    writer = problem.open(tmp_path)
    records = problem.records[:4]
    records[row] = another(records[row], name)
    with pytest.raises(
        ValueError, match=r"shard-000000.kdc must be the same whoever writes it, got other rows from two"
    ):
        writer.write(0, records)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("links", [True, False])
def test_many_writers_at_once(tmp_path, monkeypatch, links):
    if not links:

        def without(*_):
            raise OSError(errno.EPERM, "this file system has no links")

        monkeypatch.setattr(os, "link", without)
    problem = problems.make_problem()
    start = threading.Barrier(4)

    def write(_):
        start.wait()
        return problem.write(tmp_path)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(write, range(4)))) == 4
    assert not list(tmp_path.glob("*.tmp"))
    assert_whole(tmp_path, problem)


def test_a_faster_writer_is_seen_between_the_look_and_the_rename(tmp_path, monkeypatch):
    problem, other = problems.make_problem(), problems.make_problem()
    other.records[0] = dataclasses.replace(other.records[0], entropy=other.records[0].entropy * 0)
    writer = problem.open(tmp_path)
    link = os.link

    def slow(source, target):
        monkeypatch.setattr(os, "link", link)
        other.write(tmp_path, [0])
        link(source, target)

    monkeypatch.setattr(os, "link", slow)
    with pytest.raises(ValueError, match="got other rows from two writers"):
        writer.write(0, problem.records[:4])


# --- a full disk


def test_a_disk_that_fills_up_while_a_shard_is_written(tmp_path):
    problem = problems.make_problem()
    writer = problem.write(tmp_path, [0])
    before = contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"shard-000001.kdc could not be written: File too large. It needs 0.0 MB, "
        ) as e:
            writer.write(1, problem.records[4:8])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "MB are free on its disk. Shards that are finished stand; run the same command again, it goes on" in str(
        e.value
    )
    assert contents(tmp_path) == before
    problem.write(tmp_path, problem.open(tmp_path).missing())
    assert_whole(tmp_path, problem)


@pytest.mark.parametrize("when", ["fsync", "link", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_only_at_the_end(tmp_path, monkeypatch, when, code):
    def full(*_):
        raise OSError(code, "no room")

    problem = problems.make_problem()
    writer = problem.write(tmp_path, [0])
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        if when == "replace":
            patch.setattr(files, "NO_LINKS", (code,))
            patch.setattr(os, "link", full)
        patch.setattr(os, when, full)
        with pytest.raises(
            OSError, match=r"shard-000001.kdc could not be written: no room. It needs .*once there is room"
        ):
            writer.write(1, problem.records[4:8])
    assert contents(tmp_path) == before
    assert writer.missing() == [1, 2]


def test_no_room_for_the_header(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no room")

    problem = problems.make_problem()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"rows-.*npy could not be written: no room. It needs"):
            problem.open(tmp_path)
    assert list(tmp_path.iterdir()) == []
    problem.write(tmp_path)
    assert_whole(tmp_path, problem)


def test_another_failure_of_the_disk(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "input/output error")

    problem = problems.make_problem()
    writer = problem.open(tmp_path)
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match=r"could not be written: .*input/output error. Shards .* when that is repaired"):
        writer.write(0, problem.records[:4])
    assert shard_files(tmp_path) == []
