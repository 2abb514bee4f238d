"""Another cache in the way, headers that cannot be, records that do not fit: refused, with what to do."""

import dataclasses

import cache_problems as problems
import numpy as np
import pytest
from cache_problems import contents, shard_files

from kdjax.teacher.cache import CacheWriter, Header, create_or_open, open_cache, rows_digest

OTHERS = {
    "teacher": "9a",
    "tokenizer": "00",
    "vocab_size": 999,
    "kind": "ghost_tail",
    "entries": 12,
    "power": 0.5,
    "seed": 1,
    "tau": 2.0,
    "dtype": "bfloat16",
    "seq_len": 8,
    "entropy": False,
    "label_logp": False,
    "rows_per_shard": 5,
}


@pytest.mark.parametrize("field", OTHERS)
def test_another_cache_is_refused_and_left_alone(tmp_path, field):
    problem = problems.make_problem()
    problem.write(tmp_path)
    before = contents(tmp_path)
    old, new = getattr(problem.header, field), OTHERS[field]
    wanted = rf"holds another cache: {field} is {old!r} in the cache and {new!r} here. Set what differs as it was, or"
    with pytest.raises(ValueError, match=wanted):
        problem.open(tmp_path, **{field: new})
    assert contents(tmp_path) == before


def test_all_differences_are_named(tmp_path):
    problem = problems.make_problem()
    problem.write(tmp_path)
    with pytest.raises(ValueError, match=r"superset is 0.0 .* and 0.4 here; student is '' in the cache and '5d' here"):
        problem.open(tmp_path, superset=0.4, student="5d")
    fields = {field.name for field in dataclasses.fields(Header)}
    assert fields == {*OTHERS, "superset", "student", "rows", "rows_digest", "format", "made"}


def test_other_rows_are_refused(tmp_path):
    problem = problems.make_problem()
    problem.write(tmp_path)
    ids, hashes = problem.keys
    for other in ((ids, hashes ^ np.uint64(1)), (ids[::-1], hashes[::-1]), (ids + 1, hashes), (ids[:9], hashes[:9])):
        with pytest.raises(ValueError, match=r"rows_digest is '\w+' in the cache and '\w+' here"):
            create_or_open(tmp_path, problems.make_header(other), *other)


def test_rows_that_are_not_the_headers(tmp_path):
    problem = problems.make_problem()
    with pytest.raises(ValueError, match="header.rows and header.rows_digest must be those of the rows, got 10 and"):
        create_or_open(tmp_path, problem.header, problem.keys[0], problem.keys[1][::-1])


@pytest.mark.parametrize("ids", [[1, 1], [-1, 2]])
def test_rows_without_a_name_of_their_own(ids):
    with pytest.raises(ValueError, match="row_ids must be distinct and at least 0, got"):
        rows_digest(np.int32(ids), np.uint64([1, 2]))


def test_keys_have_their_types():
    with pytest.raises(ValueError, match="row_ids must be integers and row_hashes uint64, got int32 and int64"):
        rows_digest(np.int32([1]), np.int64([1]))


def test_no_rows():
    with pytest.raises(ValueError, match=r"row_ids and row_hashes must be \[R\] with R >= 1, got \(0,\) and \(0,\)"):
        rows_digest(np.zeros(0, np.int32), np.zeros(0, np.uint64))


def test_shards_without_a_header(tmp_path):
    problem = problems.make_problem()
    problem.write(tmp_path)
    (tmp_path / "header.json").unlink()
    with pytest.raises(
        ValueError, match=r"must hold a whole cache or none, got 3 shards without header.json; whose they"
    ):
        problem.open(tmp_path)


def test_a_header_of_a_later_version(tmp_path):
    problem = problems.make_problem()
    problem.write(tmp_path)
    file = tmp_path / "header.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    for act in (lambda: problem.open(tmp_path), lambda: open_cache(tmp_path)):
        with pytest.raises(
            ValueError, match=r"header.json must be the header .*; its format is 2, this version .* reads 1"
        ):
            act()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 2**24 + 1}, "vocab_size of a cache must be in 2..16777216, got 16777217; an id has 24 bits"),
        ({"vocab_size": 1}, "vocab_size of a cache must be in 2..16777216, got 1"),
        ({"entries": 0}, "entries of a cache must be in 1..65535, got 0"),
        ({"entries": 65536}, "entries of a cache must be in 1..65535, got 65536; a count has 16 bits"),
        ({"tau": 0.0}, "tau of a cache must be positive, got 0.0"),
        ({"power": -1.0}, "power of a cache must be positive, got -1.0"),
        ({"superset": 1.5, "student": "5d"}, r"superset of a cache must be in \[0, 1\], got 1.5"),
        ({"superset": 0.5}, "student of a cache must be a fingerprint, got ''; it chooses the superset"),
        ({"student": "5d"}, "student of a cache must be '', got '5d'"),
        ({"rows_per_shard": 0}, "rows_per_shard of a cache must be at least 1, got 0"),
        ({"seq_len": 0}, "seq_len of a cache must be at least 1, got 0"),
        ({"format": 2}, "format of a cache must be 1, got 2"),
    ],
)
def test_headers_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        problems.make_header(problems.row_keys(3), **changes)


# --- records


def edited(name, at, value):
    def edit(record):
        array = getattr(record, name).copy()
        array[at] = value
        return dataclasses.replace(record, **{name: array})

    return edit


def replaced(**changes):
    return lambda record: dataclasses.replace(record, **changes)


RECORDS = [
    ({}, edited("codes", (2, 0), 51), "codes are counts that sum to 50, got .* at its stored position 2"),
    ({}, edited("codes", 3, 0), "codes are counts that sum to 50, got 0 at its stored position 3"),
    ({}, edited("ids", (1, 0), 1000), r"ids must be in 0..999, got 1000"),
    ({}, edited("ids", (1, 0), -1), r"ids must be in 0..999, got -1"),
    ({}, lambda r: dataclasses.replace(r, eligible=r.eligible + 1), r"and all of them are to be stored"),
    ({}, lambda r: dataclasses.replace(r, eligible=17), r"it has 17 eligible positions, a row has 16 places"),
    ({}, replaced(entropy=None), "entropy must be given, the header says so"),
    ({}, replaced(places=np.arange(3, dtype=np.int32)), "places must be None, the header says so"),
    ({"label_logp": False}, replaced(label_logp=np.zeros(3, np.float32)), "label_logp must be None"),
    ({}, replaced(label_logp=np.zeros(3, np.float32)), r"label_logp must have \d+ values, .*, got \(3,\)"),
    ({}, edited("entropy", 0, 9.9), r"entropy must be in \[0, ln 1000\] nats"),
    ({}, edited("label_logp", 0, -np.inf), "label_logp must be finite"),
    ({}, lambda r: dataclasses.replace(r, codes=r.codes[:, :3]), r"ids and codes must both be \[n, K\], got"),
    ({}, lambda r: dataclasses.replace(r, codes=r.codes.astype(np.int32)), "codes uint16, got int32 and int32"),
    ({"power": 0.5}, edited("codes", (2, 0), 0), "every position has 50 entries, got 49 at its stored position 2"),
    ({"superset": 0.5, "student": "5d"}, edited("places", 0, 16), r"places must be ascending and in 0..15"),
    ({"superset": 0.5, "student": "5d"}, lambda r: dataclasses.replace(r, eligible=1), "and only 1 eligible positions"),
]


@pytest.mark.parametrize(("changes", "edit", "message"), RECORDS)
def test_records_that_do_not_fit(tmp_path, changes, edit, message):
    problem = problems.make_problem(**changes)
    writer = problem.open(tmp_path)
    records = problem.records[:4]
    records[1] = edit(records[1])
    with pytest.raises(ValueError, match=rf"the record of row {problem.keys[0][1]} must fit the cache; .*{message}"):
        writer.write(0, records)
    assert shard_files(tmp_path) == []


def test_a_shard_takes_all_its_rows(tmp_path):
    problem = problems.make_problem()
    writer = problem.open(tmp_path)
    assert isinstance(writer, CacheWriter)
    with pytest.raises(ValueError, match="shard 0 must get 4 records, got 3"):
        writer.write(0, problem.records[:3])


def test_a_shard_too_large_for_its_offsets(tmp_path, monkeypatch):
    monkeypatch.setattr("kdjax.teacher.cache.shards.MAX_BODY", 1000)
    problem = problems.make_problem()
    with pytest.raises(
        ValueError, match=r"cache.rows_per_shard must give shards of less than 4 GiB, got \d+ bytes in 4"
    ):
        problem.write(tmp_path)
