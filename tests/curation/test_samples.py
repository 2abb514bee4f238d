"""The file of a choice: what is in it, what it refuses by name, and what a kill or a full disk leaves."""

import dataclasses
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import run_log
from kdjax.config import Mesh, Samples
from kdjax.curation import (
    SCORES,
    Basis,
    basis,
    kept_rows,
    load_samples,
    params_fingerprint,
    positions_of,
    reusable,
    write_samples,
)
from kdjax.data import take
from kdjax.sharding import make_rules

BASIS = Basis("kl", 0.2, 0.5, 7, "student" * 3, "teacher" * 3, "tokenizer" * 3, "data" * 5)
KEPT = np.array([2, 5, 11, 20])


def scores_of(rows):
    found = np.random.default_rng(1).normal(size=len(rows))
    found[3] = -np.inf
    return found


@pytest.fixture
def written(small, tmp_path):
    """The workdir with a choice of four rows."""
    write_samples(tmp_path, BASIS, small.rows, scores_of(small.rows), KEPT, {"seconds": 1.5})
    return tmp_path


def archive(workdir):
    (found,) = (workdir / "samples").glob("*.npz")
    return found


# --- what is written


def test_a_choice_comes_back_whole(small, written):
    found = load_samples(written, BASIS)
    np.testing.assert_array_equal(found.scores, scores_of(small.rows).astype(np.float32))
    np.testing.assert_array_equal(found.row_id, small.rows.row_id)
    np.testing.assert_array_equal(found.kept, KEPT)
    np.testing.assert_array_equal(found.row_hash, small.rows.row_hash[KEPT])
    assert found.row_hash.dtype == np.uint64
    record = json.loads((written / "samples" / "manifest.json").read_text())
    assert record == found.manifest
    assert record | dataclasses.asdict(BASIS) == record
    assert (record["format"], record["rows"], record["kept"], record["made"]) == (1, 21, 4, {"seconds": 1.5})
    assert {path.name for path in (written / "samples").iterdir()} == {"manifest.json", record["file"]}


def test_the_kept_rows_keep_ids_weights_and_hashes(small, written):
    found = kept_rows(small.rows, written, BASIS)
    for name, column in dataclasses.asdict(found).items():
        np.testing.assert_array_equal(column, getattr(small.rows, name)[KEPT], err_msg=name)


def test_kept_rows_are_found_by_id_in_any_order(small, written):
    order = np.random.default_rng(2).permutation(len(small.rows))
    moved = take(small.rows, order)
    found = positions_of(load_samples(written), moved)
    assert set(moved.row_id[found].tolist()) == set(KEPT.tolist())
    assert (np.diff(found) > 0).all()


def test_rows_of_another_text_are_refused(small, written):
    changed = dataclasses.replace(small.rows, row_hash=small.rows.row_hash + np.uint64(1))
    message = r"^the kept rows must be rows of this text, got 4 of 4 that are not in it or .* the first is row 2\."
    with pytest.raises(ValueError, match=message):
        positions_of(load_samples(written), changed)
    with pytest.raises(ValueError, match=r"got 1 of 4 that are not in it .* the first is row 20\."):
        positions_of(load_samples(written), take(small.rows, slice(0, 20)))


# --- what does not fit


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"score": "ce_ratio"}, ["samples.score is 'kl' there and 'ce_ratio' here"]),
        ({"fraction": 0.5}, ["samples.fraction is 0.2 there and 0.5 here"]),
        ({"positions": 1.0}, ["samples.positions is 0.5 there and 1.0 here"]),
        ({"seed": 8}, ["samples.seed is 7 there and 8 here"]),
        ({"student": "another"}, ["the initial student is studentstude there and another here"]),
        ({"teacher": "another"}, ["the teacher is teacherteach there and another here"]),
        ({"tokenizer": "another"}, ["the tokenizer is tokenizertok there and another here"]),
        ({"data": "x"}, ["the data (text, split, data.seq_len or packing) is datadatadata there and x here"]),
        (
            {"fraction": 0.5, "student": "s", "data": "d"},
            ["samples.fraction is 0.2 there and 0.5 here", "the initial student is", "the data (text"],
        ),
    ],
)
def test_each_difference_is_named_with_the_command(written, changes, said):
    with pytest.raises(ValueError, match="must hold rows that were chosen for this experiment") as refused:
        load_samples(written, dataclasses.replace(BASIS, **changes))
    message = str(refused.value)
    for part in said:
        assert part in message
    assert message.count(" there and ") == len(said)
    assert f"Run `python -m launch.curate --config=... --workdir={written}` to choose anew" in message


def test_a_teacher_that_is_not_loaded_is_not_compared(written):
    assert load_samples(written, dataclasses.replace(BASIS, teacher=None)).manifest["teacher"] == BASIS.teacher


def test_a_choice_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"got no manifest\.json; they are not there yet\. Run `python -m launch\.cur"):
        load_samples(tmp_path, BASIS)
    assert reusable(tmp_path, BASIS) == (None, "")


@pytest.mark.parametrize("score", SCORES)
def test_what_a_score_does_not_read_may_change(small, score):
    def of(seed=0, positions=1.0, student=small.student, teacher="t"):
        return basis(Samples(0.2, score, positions, seed=seed), student, teacher, "k", "d")

    reads_teacher = SCORES[score].needs_teacher
    assert (of(seed=1) == of()) == (score != "random")
    assert of(seed=1, positions=0.5) != of(positions=0.5)
    assert (of(positions=0.5) == of()) == (score == "random")
    assert (of(student=small.teacher) == of()) == (score == "random")
    assert (of(teacher="u") == of()) == (not reads_teacher)


# --- another fraction


def test_another_fraction_takes_the_same_scores(small, written):
    found, why = reusable(written, dataclasses.replace(BASIS, fraction=0.9))
    assert why == ""
    np.testing.assert_array_equal(found.scores, scores_of(small.rows).astype(np.float32))


def test_other_scores_are_not_taken(written):
    found, why = reusable(written, dataclasses.replace(BASIS, fraction=0.9, seed=8, data="x"))
    assert found is None
    assert why.startswith("samples.seed is 7 there and 8 here; the data (text")
    assert "fraction" not in why


# --- damage


def damage_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "what", "why"),
    [
        (damage_half, "npz", r"the SHA-256 of scores-\w+\.npz is not the one in manifest\.json"),
        (damage_bit, "npz", r"the SHA-256 of scores-\w+\.npz is not the one in manifest\.json"),
        (lambda path: path.unlink(), "npz", r"No such file .*scores-"),
        (damage_half, "json", r"(Expecting|Unterminated|Invalid)"),
        (lambda path: path.write_text("[]"), "json", r"list indices"),
        (lambda path: path.write_text('{"format": 2}'), "json", r"its format is 2, this version reads 1"),
        (
            lambda path: path.write_text(path.read_text().replace('"student"', '"studend"')),
            "json",
            r"manifest\.json does not say student",
        ),
    ],
)
def test_a_damaged_choice_is_refused(written, damage, what, why):
    damage(archive(written) if what == "npz" else written / "samples" / "manifest.json")
    with pytest.raises(
        ValueError, match=rf"must hold a whole choice of rows, got a damaged one; .*{why}.* Run `python"
    ):
        load_samples(written, BASIS)
    found, reason = reusable(written, BASIS)
    assert found is None
    assert re.search(why, reason)


def test_a_kill_while_writing_leaves_the_old_choice(small, written, monkeypatch):
    class Killed(BaseException):
        pass

    def replace(source, target):
        if str(target).endswith("manifest.json"):
            raise Killed
        os.rename(source, target)

    monkeypatch.setattr(run_log.os, "replace", replace)
    other = dataclasses.replace(BASIS, fraction=0.1)
    with pytest.raises(Killed):
        write_samples(written, other, small.rows, scores_of(small.rows), KEPT[:2], {})
    assert len(load_samples(written, BASIS).kept) == 4
    monkeypatch.undo()
    write_samples(written, other, small.rows, scores_of(small.rows), KEPT[:2], {})
    assert len(load_samples(written, other).kept) == 2
    assert len(list((written / "samples").iterdir())) == 2, "what the kill left behind is gone"


def test_a_full_disk_is_said_and_the_old_choice_stays(small, written, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_log.os, "fsync", full)
    with pytest.raises(
        OSError, match=r"^the chosen rows could not be written to .*samples: .*No space left.* Free disk"
    ):
        write_samples(written, BASIS, small.rows, scores_of(small.rows), KEPT[:2], {})
    assert len(load_samples(written, BASIS).kept) == 4


# --- fingerprints


def test_a_fingerprint_is_of_every_value_shape_type_and_name():
    params = {"a": jnp.arange(6.0), "b": [jnp.ones((2, 3)), jnp.zeros(())]}
    others = [
        {"a": jnp.arange(6.0).at[5].add(1e-6), "b": params["b"]},
        {"a": params["a"], "b": [jnp.ones((3, 2)), jnp.zeros(())]},
        {"a": params["a"].astype(jnp.bfloat16), "b": params["b"]},
        {"c": params["a"], "b": params["b"]},
        {"a": params["a"], "b": params["b"][::-1]},
        {"a": params["a"], "b": params["b"][:1]},
    ]
    found = {params_fingerprint(tree) for tree in [params, *others]}
    assert len(found) == 7
    assert all(re.fullmatch("[0-9a-f]{64}", one) for one in found)
    assert params_fingerprint(jax.tree.map(jnp.copy, params)) == params_fingerprint(params)


def test_a_fingerprint_does_not_depend_on_the_mesh():
    rules = make_rules(Mesh("fsdp"))
    params = {"a": jnp.arange(64.0).reshape(16, 4)}
    spec = jax.sharding.PartitionSpec("data")
    split = jax.device_put(params, jax.NamedSharding(rules.mesh, spec))
    assert params_fingerprint(split) == params_fingerprint(params)
