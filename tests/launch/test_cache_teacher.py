"""The offline teacher as a user types it: curate, cache, train; what is the same, what survives, what is refused."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import kdjax.build

ROOT = pathlib.Path(__file__).parents[2]
VALUES = {
    "teacher.path": "synthetic",
    "student.init.layers": 1,
    "data.seq_len": 32,
    "data.max_train_tokens": 0,
    "samples.fraction": 0.5,
    "classes.entries": 20,
    "cache.rows_per_shard": 8,
    "train.batch_size": 4,
    "train.steps": 4,
    "train.log_every": 1,
    "optim.warmup": 1,
    "eval.rows": 4,
    "eval.completions": 0,
    "checkpoint.every": 2,
    "log.tensorboard": False,
}


def typed(workdir, text, **changes):
    """The arguments of a command; `rows__a=b` is --config.rows.a=b."""
    values = VALUES | {"data.path": text} | {name.replace("__", "."): value for name, value in changes.items()}
    return [
        f"--config={ROOT}/configs/se_kd_3x.py",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    lines = [{"text": f"{i} bottles of beer on the wall, {i % 7} of milk; take {i % 5} down."} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def shards(cache):
    return {path.name: path.read_bytes() for path in sorted(cache.glob("shard-*"))}


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def made(call, text, tmp_path):
    """A workdir with its rows chosen and the teacher cached."""
    arguments = typed(tmp_path / "run", text)
    call("curate", *arguments)
    out = call("cache_teacher", *arguments)
    return tmp_path / "run", arguments, out


def test_from_text_to_a_student_without_its_teacher(call, made, monkeypatch):
    workdir, arguments, out = made
    rows = json.loads((workdir / "samples/manifest.json").read_text())["kept"]
    assert f"{workdir}/cache: {rows} rows, " in out
    assert f"next: python -m launch.train {' '.join(arguments)}" in out
    loaded, load_model = [], kdjax.build.load_model

    def load(path, keep=None, **more):
        loaded.append(keep)
        return load_model(path, keep=keep, **more)

    monkeypatch.setattr(kdjax.build, "load_model", load)
    out = call("train", *arguments)
    assert loaded == [(0,)]  # of the teacher's file no more than the layer that the student is cut from
    assert "KL to the teacher" in out
    lines = metrics(workdir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["cache_misses"] == 0 for line in lines)
    assert all(np.isfinite(line["loss"]) and line["selected_fraction"] < 0.3 for line in lines)
    report = json.loads((workdir / "report_data.json").read_text())
    assert report["summary"]["teacher"] == "synthetic, not loaded: sampled entries from a cache"
    assert re.search(rf", the {rows} of \d+ rows with the highest student entropy$", report["summary"]["data"])
    loaded.clear()
    table = call("evaluate", f"--workdir={workdir}")
    assert loaded == [None]  # to compare with it, it is loaded
    assert re.search(r"KL to the teacher, nats +\d+\.\d+ \[", table)


def test_the_bytes_do_not_depend_on_batch_size_devices_or_processes(call, made, text, tmp_path):
    workdir, _, _ = made
    expected = shards(workdir / "cache")
    assert len(expected) > 2
    runs = {"batch": {"train__batch_size": 2}, "devices": {"mesh__preset": "dp", "train__batch_size": 8}}
    for name, changes in runs.items():
        arguments = typed(tmp_path / name, text, **changes)
        shutil.copytree(workdir / "samples", tmp_path / name / "samples")
        call("cache_teacher", *arguments)
        assert shards(tmp_path / name / "cache") == expected, name
    arguments = typed(tmp_path / "two", text)
    shutil.copytree(workdir / "samples", tmp_path / "two/samples")
    for index in (1, 0):
        out = call("cache_teacher", *arguments, f"--process_index={index}", "--process_count=2")
        assert ("NOT WHOLE" in out) == (index == 1)
        assert ("next:" in out) == (index == 0)
    assert shards(tmp_path / "two/cache") == expected


def test_a_killed_pass_goes_on_where_it_was(call, made, text, tmp_path):
    """kill -9 between two shards: what is finished stays as it is, the rest comes out the same."""
    workdir, _, _ = made
    other = tmp_path / "killed"
    shutil.copytree(workdir / "samples", other / "samples")
    arguments = typed(other, text)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch.cache_teacher", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list((other / "cache").glob("shard-*.kdc")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in (other / "cache").glob("shard-*.kdc")}
    assert before
    if len(before) < len(list((workdir / "cache").glob("shard-*.kdc"))):  # it is killed on time as a rule
        with pytest.raises(ValueError, match="shards are missing"):
            call("train", *arguments)
    call("cache_teacher", *arguments)
    after = {path.name: path.stat().st_mtime_ns for path in (other / "cache").glob("shard-*.kdc")}
    assert {name: after[name] for name in before} == before
    assert shards(other / "cache") == shards(workdir / "cache")
    assert "nothing to do, all " in call("cache_teacher", *arguments)


def test_inspect_says_what_is_there_and_verify_runs_the_teacher_again(call, made):
    workdir, _, _ = made
    out = call("cache_teacher", f"--inspect={workdir}/cache", "--verify=20")
    assert re.search(r"bytes \(and [\d,]+ of headers\): \d+\.\d\d a position, \d+\.\d\d a token of the whole", out)
    assert re.search(r"distinct ids a position: mean \d+\.\d\d, quantiles 0\.05: \d+, ", out)
    assert re.search(r"bias 0; variance of a target, summed over the vocabulary: 0\.\d+", out)
    assert re.search(r"^  entries +20$", out, re.MULTILINE)
    assert "every byte of" in out
    rows, same, total, share = re.search(
        r"(\d+) rows run again: ([\d,]+) of ([\d,]+) positions have the same entries \((.*)%\)", out
    ).groups()
    assert int(rows) >= 20
    assert (same, float(share)) == (total, 100)


def test_verify_finds_a_cache_of_other_draws(call, made, monkeypatch):
    """A header can be copied; what the teacher says cannot."""
    from kdjax import offline

    workdir, _, _ = made
    recorder = offline.make_recorder

    def other(*arguments):
        made = recorder(*arguments)

        def shifted(rows):
            for record in made(rows):
                record.ids[:, 0] = (record.ids[:, 0] + 1) % 7
                yield record

        return shifted

    monkeypatch.setattr(offline, "make_recorder", other)
    out = call("cache_teacher", f"--inspect={workdir}/cache", "--verify=8")
    assert "WRONG: this is not what the teacher says" in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes__seed": 3}, "seed is 0 in the cache and 3 here"),
        ({"classes__entries": 21}, "entries is 20 in the cache and 21 here"),
        ({"loss__tau": 2.0}, "tau is 1.0 in the cache and 2.0 here"),
        (
            {"teacher__dtype": "bfloat16"},
            "the initial student is",
        ),  # its layers are the teacher's, as they are in memory
        ({"samples__fraction": 0.4}, "samples.fraction is 0.5 there and 0.4 here"),
        ({"data__seed": 1}, "the data (text, split, data.seq_len or packing) is"),
        ({"samples__fraction": 1.0}, "must be in the cache"),
    ],
)
def test_another_config_than_that_of_the_cache_is_refused(call, made, text, changes, message):
    workdir, _, _ = made
    with pytest.raises(ValueError, match=re.escape(message)):
        call("train", *typed(workdir, text, **changes))


def test_another_teacher_and_another_tokenizer_are_refused(call, made, text, monkeypatch):
    workdir, arguments, _ = made
    fingerprint = kdjax.build.fingerprint
    monkeypatch.setattr(kdjax.build, "fingerprint", lambda path: "0" * 64)
    with pytest.raises(ValueError, match="teacher is '[0-9a-f]{64}' in the cache and '0000"):
        call("train", *arguments)
    monkeypatch.setattr(kdjax.build, "fingerprint", fingerprint)
    monkeypatch.setattr(kdjax.build.tokenizers, "fingerprint", lambda tokenizer: "1" * 64)
    with pytest.raises(ValueError, match="the tokenizer is [0-9a-f]{12} there and 111111111111 here"):
        call("train", *arguments)
    with pytest.raises(ValueError, match="tokenizer is '[0-9a-f]{64}' in the cache and '1111"):
        call("train", *typed(workdir, text, samples__fraction=1.0))


def test_a_damaged_shard_stops_training_and_is_written_again(call, made, text):
    workdir, _, _ = made
    arguments = typed(workdir, text, train__steps=20)  # every row is read in so many
    path = min((workdir / "cache").glob("shard-*.kdc"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=f"{path.name} is damaged: it is truncated"):
        call("train", *arguments)
    flipped = bytearray(whole)
    flipped[len(whole) - 40 :] = bytes(40)
    path.write_bytes(bytes(flipped))
    with pytest.raises(ValueError, match=f"{path.name} is damaged: the checksum of its row"):
        call("train", *arguments)
    assert "written anew: " in call("cache_teacher", *arguments)
    assert path.read_bytes() == whole


def test_a_live_teacher_needs_no_cache(call, text, tmp_path):
    with pytest.raises(ValueError, match="teacher.source must be 'cache', got 'live'"):
        call("cache_teacher", *typed(tmp_path / "run", text, teacher__source="live"))


def test_a_superset_is_smaller_and_says_what_it_misses(call, made, text, tmp_path):
    workdir, _, _ = made
    part = tmp_path / "part"
    shutil.copytree(workdir / "samples", part / "samples")
    arguments = typed(part, text, cache__superset=0.3)
    call("cache_teacher", *arguments)
    sizes = [sum(map(len, shards(run / "cache").values())) for run in (part, workdir)]
    assert sizes[0] < 0.6 * sizes[1]
    call("train", *arguments)
    first, *_, last = metrics(part)
    assert first["cache_misses"] == 0  # the untrained student chose them
    assert 0 <= last["cache_misses"] < 1


def test_rows_are_chosen_anew_while_the_student_learns(call, text, tmp_path):
    """Every second step; going on from a checkpoint in between ends in the same run."""
    changes = {"teacher__source": "live", "samples__rescore_every": 2, "train__steps": 6, "checkpoint__every": 3}
    workdir = tmp_path / "run"
    arguments = typed(workdir, text, **changes)
    call("curate", *arguments)
    call("train", *arguments)
    overlaps = [line["kept_overlap"] for line in metrics(workdir) if "kept_overlap" in line]
    assert len(overlaps) == 2
    assert all(0 < overlap <= 1 for overlap in overlaps)
    lines = [line for line in metrics(workdir) if "loss" in line]
    shutil.rmtree(workdir / "checkpoints/6")
    shutil.rmtree(workdir / "rescored/step-4")
    call("train", *arguments)
    again = [line for line in metrics(workdir) if "loss" in line]
    for line, same in zip(lines, again, strict=True):
        assert {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} == {
            k: v for k, v in same.items() if k not in ("seconds", "tokens_per_second")
        }
