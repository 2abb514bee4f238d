"""launch.curate as a user types it: what it keeps, what it says, what it does not do twice, what it refuses."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import curation, models
from kdjax.data.packing import eligible
from tests.launch import launched

ROOT = pathlib.Path(__file__).parents[2]
VALUES = {
    "teacher.path": "synthetic",
    "student.init.layers": 1,
    "data.seq_len": 32,
    "train.batch_size": 8,
    "samples.fraction": 0.2,
}


def typed(workdir, text, **changes):
    values = VALUES | {"data.path": text} | {name.replace("__", "."): value for name, value in changes.items()}
    return [
        "--config=configs/quickstart.py",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]


@pytest.fixture
def curate(capsys):
    """curate(*arguments) -> (lines printed, lines of stderr): its main() in this process."""

    def run(*arguments):
        launched.run("curate", *arguments)
        said = capsys.readouterr()
        return said.out.splitlines(), said.err.splitlines()

    return run


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    lines = [{"text": f"{i} bottles of beer on the wall, {i % 7} of milk; take {i % 5} down."} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def no_model(monkeypatch):
    """From its call on, to score a row is an error."""

    def forbid():
        def scored(*_, **__):
            raise RuntimeError("a model was run")

        monkeypatch.setattr(curation, "make_scorer", scored)

    return forbid


def built_of(text, **changes):
    import ast

    from configs import quickstart
    from kdjax.build import build
    from kdjax.config import from_config_dict

    config = quickstart.get_config()
    for name, value in (VALUES | {"data.path": str(text)} | changes).items():
        *path, last = name.split(".")
        at = config
        for part in path:
            at = at[part]
        at[last] = value if not isinstance(value, str) or isinstance(at[last], str) else ast.literal_eval(value)
    return build(from_config_dict(config))


def mean_entropies(built):
    """float64 [R] from whole logits, row by row; the trunk is float32."""
    rows, found = built.data.train, []
    head = np.asarray(built.student_params["embed"], np.float64)[:264].T
    hidden = jax.jit(lambda *columns: models.hidden(built.student_cfg, built.student_params, *columns))
    for r, places in enumerate(eligible(rows)):
        columns = (jnp.asarray(column[r : r + 1]) for column in (rows.tokens, rows.segment_ids, rows.positions))
        logits = np.asarray(hidden(*columns)[0], np.float64) @ head
        logq = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        found.append(-np.sum(np.exp(logq) * logq, -1)[places].mean())
    return np.array(found)


def test_a_run_keeps_the_rows_of_highest_mean_entropy(curate, text, tmp_path, no_model):
    workdir = tmp_path / "run"
    out, err = curate(*typed(workdir, text))
    built = built_of(text)
    rows = built.data.train
    want = mean_entropies(built)
    count = len(rows) // 5
    found = curation.load_samples(workdir)
    np.testing.assert_allclose(found.scores, want, rtol=1e-5)
    np.testing.assert_array_equal(found.kept, np.sort(np.argsort(-want)[:count]))
    np.testing.assert_array_equal(found.row_hash, rows.row_hash[found.kept])

    tokens = (rows.segment_ids > 0).sum(1)
    share = tokens[found.kept].sum() / tokens.sum()
    assert out[0] == (
        f"kept {count} of {len(rows)} rows, those of highest student_entropy: {share:.1%} of {tokens.sum():,} tokens"
    )
    kept, rest = (line.split() for line in out[2:4])
    assert [kept[0], rest[0]] == ["kept", "rest"]
    chosen = np.isin(np.arange(len(rows)), found.kept)
    for said, part in ((kept, want[chosen]), (rest, want[~chosen])):
        np.testing.assert_allclose([*map(float, said[1:])], np.quantile(part, [0, 0.1, 0.5, 0.9, 1]), atol=6e-4)
    assert re.fullmatch(r"scoring took \d+\.\d s, [\d,]+ tokens/s", out[4])
    assert out[5] == f"files: {workdir / 'samples'}"
    assert out[6].startswith("next: python -m launch.train --config=configs/quickstart.py --workdir=")
    assert re.fullmatch(rf"row {len(rows)}/{len(rows)}  [\d,]+ tokens/s  ETA 0s", err[-1])

    made = found.manifest["made"]
    assert (made["tokens"], made["batch_size"]) == (tokens.sum(), 8)
    assert found.manifest["data"] == built.data.fingerprint
    assert found.manifest["student"] == curation.params_fingerprint(built.student_params)

    # Again: nothing to do. Another fraction: the scores are there. Neither runs a model.
    no_model()
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (workdir / "samples").iterdir())
    again, err = curate(*typed(workdir, text))
    assert again == [f"the rows are chosen already, nothing was scored: {workdir / 'samples'}", *out]
    assert err == []
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (workdir / "samples").iterdir()) == before
    more, _ = curate("--agreement=0", *typed(workdir, text, samples__fraction=0.5), "--batch_size", "4")
    assert re.match(r"the scores of scores-\w+\.npz hold for another fraction too; nothing was scored", more[0])
    assert more[1].startswith(f"kept {len(rows) // 2} of {len(rows)} rows")
    asked = " ".join(typed(workdir, text, samples__fraction=0.5))
    assert more[-1] == f"next: python -m launch.train {asked}", "its own flags are not handed on"
    text.write_text(text.read_text().replace("wall", "hall"))  # another text of the same name
    with pytest.raises(RuntimeError, match="a model was run"):
        curate(*typed(workdir, text))


def test_an_estimate_says_how_well_it_ranks(curate, text, tmp_path):
    out, _ = curate(*typed(tmp_path / "run", text, samples__positions=0.5), "--agreement=40", "--batch_size=16")
    (line,) = [line for line in out if line.startswith("against")]
    said = re.fullmatch(
        r"against scores at all positions, on 40 random rows: rank correlation (\S+), (\d+)% of the rows kept .*", line
    )
    correlation, same = float(said[1]), int(said[2]) / 100
    made = curation.load_samples(tmp_path / "run").manifest["made"]
    assert made["agreement"]["rows"] == 40
    assert made["agreement"]["spearman"] == pytest.approx(correlation, abs=6e-4)
    assert made["agreement"]["overlap"] == pytest.approx(same, abs=0.006)
    assert made["batch_size"] == 16
    assert 0.3 < correlation < 1


def test_a_change_is_said_and_scored_anew(curate, text, tmp_path):
    workdir = tmp_path / "run"
    curate(*typed(workdir, text, samples__score="random"))
    out, _ = curate(*typed(workdir, text, samples__score="random", samples__seed=4))
    assert out[0] == (
        "scored anew, because the choice that was there does not hold: samples.seed is 0 there and 4 here"
    )
    (workdir / "samples" / "manifest.json").write_text("{")
    out, _ = curate(*typed(workdir, text, samples__score="random"))
    assert "must hold a whole choice of rows, got a damaged one" in out[0]
    assert curation.load_samples(workdir).manifest["seed"] == 0
    assert any(re.fullmatch(r"scoring took \d+\.\d s", line) for line in out), "no tokens per second without a model"


def test_scores_of_a_live_teacher(curate, text, tmp_path):
    curate(*typed(tmp_path / "run", text, samples__score="kl"))
    built = built_of(text)
    manifest = curation.load_samples(tmp_path / "run").manifest
    assert manifest["teacher"] == built.teacher.fingerprint
    assert manifest["score"] == "kl"


def test_all_rows_need_no_choice(curate, text, tmp_path):
    out, _ = curate(*typed(tmp_path / "run", text, samples__fraction=1.0))
    assert out == ["samples.fraction is 1: all rows are used and there is nothing to choose."]
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_config_is_not_mixed_with_this_one(curate, text, tmp_path):
    curate(*typed(tmp_path, text, samples__score="random"))
    (tmp_path / "config.json").write_text('{"samples": {"fraction": 0.5}}')
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    message = r"--workdir must be empty or of the same config, got .*samples\.fraction is 0\.5 there and 0\.2 here"
    with pytest.raises(ValueError, match=message):
        curate(*typed(tmp_path, text, samples__score="random"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples__score": "entropy"}, r"samples\.score must be a known name .*Did you mean 'student_entropy'\?"),
        (
            {"samples__score": "kl", "teacher__path": "", "student__path": "synthetic", "student__init__kind": "own"},
            r"teacher\.path must be set, got ''; samples\.score='kl' reads the teacher\. Name one\.",
        ),
    ],
)
def test_scores_that_cannot_be(curate, text, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        curate(*typed(tmp_path / "run", text, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/quickstart.py"], r"--workdir must be set, got nothing\. See --help\."),
        (
            ["--config=configs/quickstart.py", "--config.samples.fraction=20"],
            r"samples\.fraction must be in \(0, 1\], .*",
        ),
        (["--config=configs/quickstart.py", "--agreement=-1"], r"flag --agreement=-1: .*See --help\."),
    ],
)
def test_bad_flags_are_one_line(arguments, message):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch.curate", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: {message}\n", done.stderr), done.stderr
