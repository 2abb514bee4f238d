"""Reading: what was written comes back for any rows in any order; whatever is not right is an error that says what."""

import concurrent.futures
import dataclasses
import json

import cache_problems as problems
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdjax.teacher.cache import open_cache, reader, records, shards, writer
from kdjax.types import CachedTeacher

CACHES = {
    "counts": {},
    "counts alone": {"entropy": False, "label_logp": False},
    "one draw": {"entries": 1},
    "qwen": {"vocab_size": 151936},
    "2^18 ids": {"vocab_size": 2**18, "entries": 63},
    "more ids": {"vocab_size": 2**18 + 1},
    "64 draws": {"entries": 64},
    "weights": {"power": 0.5, "entries": 7},
    "top-k": {"kind": "ghost_tail", "entries": 7, "label_logp": False},
    "top-k of few": {"kind": "renormalised", "entries": 7, "vocab_size": 5},
    "draws of few": {"power": 2.0, "entries": 7, "vocab_size": 5},
    "superset": {"superset": 0.4, "student": "5d"},
    "superset of weights": {"superset": 0.4, "student": "5d", "power": 0.5, "entries": 7, "seq_len": 21},
}


def read(cache, problem, at):
    ids, hashes = problem.keys
    return cache.columns(ids[at], hashes[at], problem.eligible[at])


def assert_rows(columns, problem, at):
    wanted = [problem.wanted(place) for place in at]
    assert set(columns) == set(wanted[0])
    for name, column in columns.items():
        expected = np.stack([row[name] for row in wanted])
        assert column.shape == expected.shape
        if name == "entropy":
            half_step = np.log(problem.header.vocab_size) / 510
            np.testing.assert_allclose(column, expected, rtol=0, atol=half_step + 1e-5)
        elif name == "label_logp":
            np.testing.assert_allclose(column, expected, rtol=2**-11)
        else:
            np.testing.assert_array_equal(column, expected)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("caches") / "whole"
    problem = problems.make_problem()
    problem.write(path)
    return problem, path


@pytest.mark.parametrize("changes", CACHES.values(), ids=CACHES)
def test_what_was_written_comes_back(changes, tmp_path):
    problem = problems.make_problem(rows=9, **changes)
    problem.write(tmp_path)
    cache = open_cache(tmp_path)
    for at in ([3], [8, 0, 4, 1], list(range(9)), [2, 2]):
        columns = read(cache, problem, np.array(at))
        assert_rows(columns, problem, at)
    types = {"ids": np.int32, "codes": np.uint16, "stored": np.bool_, "entropy": np.float32, "label_logp": np.float32}
    assert {name: column.dtype for name, column in columns.items()} == {name: types[name] for name in columns}


def test_the_columns_are_the_fields_of_the_contract(whole):
    problem, path = whole
    assert set(read(open_cache(path), problem, np.arange(2))) == {f.name for f in dataclasses.fields(CachedTeacher)}


def test_a_shard_by_an_independent_reader(tmp_path):
    for name, changes in CACHES.items():
        problem = problems.make_problem(rows=5, **changes)
        problem.write(tmp_path / name)
        for shard, rows in ((0, range(4)), (1, range(4, 5))):
            number, found = problems.parse_shard(
                (tmp_path / name / f"shard-{shard:06d}.kdc").read_bytes(), problem.header
            )
            assert number == shard
            for at, (places, _, labels, positions) in zip(rows, found, strict=True):
                record = problem.records[at]
                assert [[c for c in codes if c] for codes in record.codes.tolist()] == [
                    [code for _, code in position] for position in positions
                ]
                kept = [ids[codes > 0].tolist() for ids, codes in zip(record.ids, record.codes, strict=True)]
                assert kept == [[token for token, _ in position] for position in positions]
                if places is not None:
                    assert places == record.places.tolist()
                if labels:
                    assert np.frombuffer(labels, "<f2").tolist() == record.label_logp.astype(np.float16).tolist()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 12))
def test_a_batch_is_its_rows_whatever_its_size_and_order(whole, at, padding):
    problem, path = whole
    cache = open_cache(path)
    ids, hashes = problem.keys
    fill = np.full(padding, -1, np.int32)
    columns = cache.columns(
        np.concatenate([ids[at], fill]),
        np.concatenate([hashes[at], fill.astype(np.uint64)]),
        np.pad(problem.eligible[at], ((0, padding), (0, 0))),
    )
    assert_rows({name: column[: len(at)] for name, column in columns.items()}, problem, at)
    assert not any(column[len(at) :].any() for column in columns.values())


def test_threads_share_a_reader_with_few_open_shards(whole, monkeypatch):
    monkeypatch.setattr(reader, "OPEN_SHARDS", 2)
    problem, path = whole
    cache = open_cache(path)
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 10, 4) for _ in range(60)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for at, columns in zip(batches, pool.map(lambda at: read(cache, problem, at), batches), strict=True):
            assert_rows(columns, problem, at.tolist())
    assert len(cache._open) == 2


# --- what is not right


def test_a_row_that_is_not_there(whole):
    problem, path = whole
    with pytest.raises(ValueError, match=r"row 99 must be in the cache .*it holds 10 rows. Train on the rows"):
        open_cache(path).columns(
            np.int32([problem.keys[0][0], 99]), problem.keys[1][:2], np.zeros((2, 16), bool) | problem.eligible[:2]
        )
    with pytest.raises(ValueError, match="row 12345 must be in the cache"):
        open_cache(path).columns(np.int32([12345]), problem.keys[1][:1], problem.eligible[:1])


def test_a_row_with_other_content(whole):
    problem, path = whole
    ids, hashes = problem.keys
    with pytest.raises(ValueError, match=rf"row {ids[1]} must be what it was when the cache .* was written, got other"):
        open_cache(path).columns(ids[:2], hashes[[0, 2]], problem.eligible[:2])


def test_other_eligible_positions(whole):
    problem, path = whole
    ids, hashes = problem.keys
    eligible = problem.eligible[:1].copy()
    n = int(eligible.sum())
    eligible[0, np.flatnonzero(eligible[0])[0]] = False
    with pytest.raises(ValueError, match=rf"row {ids[0]} must have the {n} eligible positions .* got {n - 1}"):
        open_cache(path).columns(ids[:1], hashes[:1], eligible)


def test_places_of_a_superset_must_be_eligible(tmp_path):
    problem = problems.make_problem(superset=0.4, student="5d")
    problem.write(tmp_path)
    moved = np.roll(problem.eligible[:1], 1, 1)
    assert (problem.wanted(0)["stored"] & ~moved[0]).any()
    with pytest.raises(ValueError, match=r"must be those that the cache was written for; places are stored that are"):
        open_cache(tmp_path).columns(problem.keys[0][:1], problem.keys[1][:1], moved)


PLAIN = {"entropy": False, "label_logp": False}
UNFIT = [
    (PLAIN, 5, slice(-2), r"\d+ bytes are no 5 positions"),
    (PLAIN | {"label_logp": True}, 5, slice(4), "4 bytes are no 5 positions"),
    (PLAIN, 5, slice(0), "counts sum to 0 at 5 positions"),
    (PLAIN, 6, slice(None), "counts sum to 250 at 6 positions"),
    (PLAIN, 4, slice(None), "counts sum to 250 at 4 positions"),
    (PLAIN | {"power": 0.5}, 5, slice(-5), "249 entries at 5 positions"),
    (PLAIN | {"power": 0.5}, 6, slice(None), "250 entries at 6 positions"),
]


@pytest.mark.parametrize(("changes", "positions", "part", "message"), UNFIT)
def test_bytes_that_are_of_other_positions(changes, positions, part, message):
    header = problems.make_header(problems.row_keys(1), **changes)
    record = problems.make_row(header, np.random.default_rng(0), np.arange(16) < 5)
    row = np.frombuffer(b"".join(records.encode_row(header, record, 7)), np.uint8)[part]
    with pytest.raises(ValueError, match=f"must be those that the cache was written for; {message}. The data or how"):
        records.decode_rows(header, [row], np.arange(16)[None] < positions)


def test_counts_that_do_not_end_with_a_position():
    header = problems.make_header(problems.row_keys(1), **PLAIN)
    for counts in ([49, 2, 49], [50, 49]):
        row = np.array([[7] * len(counts), [0] * len(counts), [count << 2 for count in counts]], np.uint8).reshape(-1)
        with pytest.raises(ValueError, match=rf"counts sum to {sum(counts)} at 2 positions"):
            records.decode_rows(header, [row], np.arange(16)[None] < 2)


def test_eligible_has_the_shape_of_the_batch(whole):
    problem, path = whole
    with pytest.raises(ValueError, match=r"eligible must be \[2, 16\], got \[2, 15\]; data.seq_len"):
        open_cache(path).columns(problem.keys[0][:2], problem.keys[1][:2], problem.eligible[:2, 1:])


def test_padding_has_no_eligible_positions(whole):
    problem, path = whole
    with pytest.raises(ValueError, match="a row with id -1 is padding and must not have eligible positions, got"):
        open_cache(path).columns(np.int32([-1]), np.uint64([0]), problem.eligible[:1])


def test_the_cache_of_another_run_names_every_difference(whole):
    _, path = whole
    assert open_cache(path, {"teacher": "3f", "tau": 1}).header.teacher == "3f"
    with pytest.raises(ValueError, match=r"was written for something else: ") as error:
        open_cache(path, {"teacher": "9a", "tokenizer": "00", "rows_digest": "no", "tau": 2.0, "seed": 0})
    message = str(error.value)
    assert "teacher is '3f' in the cache and '9a' here; tokenizer is '7c' in the cache and '00' here" in message
    assert "rows_digest is" in message
    assert "tau is 1.0 in the cache and 2.0 here" in message
    assert "seed" not in message
    with pytest.raises(ValueError, match=r"header has no field 'techer' to compare. Did you mean 'teacher'"):
        open_cache(path, {"techer": "9a"})


def test_no_cache(tmp_path):
    with pytest.raises(ValueError, match=r"cache.path must be a teacher cache, got .*none; there is no header.json"):
        open_cache(tmp_path / "none")


def test_a_cache_that_is_not_whole(tmp_path):
    problem = problems.make_problem(rows=40)
    problem.write(tmp_path, [4])
    missing = r"9 of its 10 shards are missing \(0, 1, 2, 3, 5, 6, 7, 8, ...\). Run the same launch.cache_teacher"
    with pytest.raises(ValueError, match=missing):
        open_cache(tmp_path)
    cache = open_cache(tmp_path, partial=True)
    assert_rows(read(cache, problem, np.arange(16, 20)), problem, range(16, 20))
    with pytest.raises(ValueError, match=r"must be in a finished shard, got shard-000000.kdc of .*is missing"):
        read(cache, problem, np.arange(3))


def one_shard(path):
    problem = problems.make_problem(rows=3, seq_len=8, entries=5)
    problem.write(path)
    return problem, path / "shard-000000.kdc"


def test_a_flipped_bit_anywhere_in_a_shard_is_found(tmp_path):
    problem, file = one_shard(tmp_path)
    content = file.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"shard-000000.kdc is .*Delete it and run launch.cache_teacher again; only"
        ):
            read(open_cache(tmp_path), problem, np.arange(3))  # the head when it is opened, rows when they are read
    assert len(content) > 200


def test_a_row_that_is_no_deflate_stream(tmp_path, monkeypatch):
    problem = problems.make_problem(rows=3, seq_len=8, entries=5)
    for name, change in (("cut", lambda raw: raw[:-1]), ("not deflated", lambda raw: b"\xff" * len(raw))):
        with monkeypatch.context() as patch:
            patch.setattr(writer, "deflate", lambda parts, change=change: change(shards.deflate(parts)))
            problem.write(tmp_path / name)
        cache = open_cache(tmp_path / name)
        cache.verify()
        with pytest.raises(ValueError, match=r"shard-000000.kdc is damaged: its row 0 is no deflate stream: .*Delete"):
            read(cache, problem, np.arange(3))


def test_a_flipped_bit_in_a_row_is_found_when_the_shard_is_verified(tmp_path):
    _, file = one_shard(tmp_path)
    open_cache(tmp_path).verify()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="shard-000000.kdc is damaged: its SHA-256 is wrong"):
        open_cache(tmp_path).verify()


def test_a_shard_of_any_other_length_is_found(tmp_path):
    _, file = one_shard(tmp_path)
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match="shard-000000.kdc is damaged: it is truncated: "):
            open_cache(tmp_path)
    file.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="shard-000000.kdc is damaged: it is too long: "):
        open_cache(tmp_path)


def test_a_shard_under_another_number_is_found(tmp_path):
    problems.make_problem(rows=8).write(tmp_path)
    (tmp_path / "shard-000001.kdc").write_bytes((tmp_path / "shard-000000.kdc").read_bytes())
    with pytest.raises(ValueError, match=r"shard-000001.kdc is misplaced: it is shard 0 with 4 rows, and not shard 1"):
        open_cache(tmp_path)


def test_a_shard_of_another_cache_is_found(tmp_path):
    problems.make_problem().write(tmp_path / "a")
    problems.make_problem(teacher="9a").write(tmp_path / "b")
    (tmp_path / "a/shard-000001.kdc").write_bytes((tmp_path / "b/shard-000001.kdc").read_bytes())
    with pytest.raises(ValueError, match=r"shard-000001.kdc is another cache's: its head names another cache. Delete"):
        open_cache(tmp_path / "a")


def test_a_flipped_bit_in_the_header_is_found(tmp_path):
    one_shard(tmp_path)
    file = tmp_path / "header.json"
    content = file.read_bytes()
    assert json.loads(content)["made"] == {}
    for place in range(content.index(b'"made"')):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 7
        file.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"header.json must be the header|is another cache's|is misplaced|rows-"
        ) as e:
            open_cache(tmp_path)
        assert str(tmp_path) in str(e.value)


def test_a_flipped_bit_in_the_keys_is_found(tmp_path):
    problem, _ = one_shard(tmp_path)
    (file,) = tmp_path.glob("rows-*.npy")
    content = file.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"rows-.*npy must hold the rows that header.json beside it speaks of"):
            open_cache(tmp_path)
    file.write_bytes(content)
    np.testing.assert_array_equal(np.load(file)["row_id"], problem.keys[0])
    file.unlink()
    with pytest.raises(ValueError, match=r"rows-.*npy must be there, got none. Run the same launch.cache_teacher"):
        open_cache(tmp_path)
    problem.open(tmp_path)
    assert file.read_bytes() == content


# --- summary


def test_the_summary_counts_what_is_on_the_disk(whole):
    problem, path = whole
    found = open_cache(path).summary()
    distinct = np.concatenate([(record.codes > 0).sum(1) for record in problem.records])
    assert found["rows"] == 10
    assert found["missing_shards"] == 0
    assert found["positions"] == found["eligible"] == problem.eligible.sum() == found["distinct"]["positions"]
    inflated = sum(3 * distinct + 1 + 2)
    assert found["bytes"]["data"] == sum(len(raw) for file in path.glob("*.kdc") for raw in problems.streams(file))
    assert 0.3 * inflated < found["bytes"]["data"] < inflated
    assert found["bytes"]["offsets"] == 3 * 96 + 10 * 12
    assert sum(found["bytes"].values()) == sum(file.stat().st_size for file in path.iterdir())
    assert found["bytes_per_position"] * len(distinct) == pytest.approx(
        sum(f.stat().st_size for f in path.glob("*.kdc"))
    )
    assert found["distinct"]["mean"] == pytest.approx(distinct.mean())
    assert found["distinct"]["histogram"] == np.bincount(distinct, minlength=51).tolist()
    wanted = np.quantile(distinct, [0.05, 0.5, 0.95], method="inverted_cdf").astype(int).tolist()
    assert [found["distinct"]["quantiles"][q] for q in ("0.05", "0.5", "0.95")] == wanted
    json.dumps(found)
    assert open_cache(path).summary(sample=2)["distinct"]["rows"] == 2


def test_the_summary_of_a_part_and_of_nothing(tmp_path):
    problem = problems.make_problem()
    problem.write(tmp_path, [2])
    found = open_cache(tmp_path, partial=True).summary()
    assert (found["shards"], found["missing_shards"], found["rows"]) == (3, 2, 2)
    assert found["positions"] == problem.eligible[8:].sum()
    problem.open(tmp_path / "none")
    found = open_cache(tmp_path / "none", partial=True).summary()
    assert (found["missing_shards"], found["rows"], found["bytes_per_position"]) == (3, 0, None)
    assert found["distinct"]["mean"] is None


def test_the_summary_of_a_superset_and_of_repeated_ids(tmp_path):
    problem = problems.make_problem(superset=0.4, student="5d", power=0.5, entries=7, vocab_size=5)
    problem.write(tmp_path)
    found = open_cache(tmp_path).summary()
    distinct = [len(set(ids)) for record in problem.records for ids in record.ids.tolist()]
    assert found["positions"] == len(distinct) < found["eligible"] == problem.eligible.sum()
    assert found["distinct"]["histogram"] == np.bincount(distinct, minlength=8).tolist()
    assert found["bytes_per_eligible"] < found["bytes_per_position"]
