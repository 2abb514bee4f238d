"""A pool of answers for a student of a Flax module: figures of its head are those of a native model, others refused."""

import dataclasses
import json
import pathlib
import sys
import types

import jax
import pytest

from kdjax import models
from kdjax.config import Prompts
from kdjax.curation.answers import selected
from kdjax.curation.answers.scorer import SIMILARITIES
from kdjax.data.prompts import load_prompts, split_prompts
from kdjax.data.styles import STYLES, scripted
from kdjax.models import synthetic
from kdjax.models.hf_io import save_hf
from tests.models import flax_tiny

ROOT = pathlib.Path(__file__).parents[2]
PROMPTS = Prompts(path="arith:sum1", size=16)
VALUES = {
    "teacher.path": "synthetic",
    "student.init.kind": "own",
    "data.seq_len": 96,
    "data.chat_template": False,
    "prompts.path": PROMPTS.path,
    "prompts.size": PROMPTS.size,
    "prompts.instruction": "",
    "answers.policy": "best",
    "answers.score": "head_norm",
    "answers.rescore_every": 0,
}


@pytest.fixture
def students(tmp_path, monkeypatch):
    """{"native", "flax"}: student.path of the same weights."""
    cfg = dataclasses.replace(synthetic.config(), layers=1, width=32, heads=2, mlp=64, head_dim=16)
    params = models.init_params(cfg, jax.random.key(0))
    save_hf(tmp_path / "student", cfg, params, synthetic.make_tokenizer())
    made = types.ModuleType("bridged")
    made.student = lambda: flax_tiny.nnx_bridge(cfg, params)
    monkeypatch.setitem(sys.modules, "bridged", made)
    return {"native": tmp_path / "student", "flax": "flax:bridged:student"}


def test_a_flax_student_has_the_figures_of_the_same_weights(call, students, tmp_path):
    pool = tmp_path / "pool"
    pool.mkdir()
    questions = split_prompts(load_prompts(PROMPTS), PROMPTS)[1]
    for name in ("bare", "equation", "words"):
        rows = [{"id": q.id, "instruction": q.prompt, "teacher_output": scripted(q, STYLES[name])} for q in questions]
        (pool / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")

    def curate(who, **changes):
        """(figures by row, row by question) of what this student selects."""
        run = tmp_path / who
        values = VALUES | {"student.path": students[who], "answers.pool": f"({str(pool)!r},)"} | changes
        flags = [f"--config.{name}={value}" for name, value in values.items()]
        said = call("curate", f"--config={ROOT}/configs/scas.py", f"--workdir={run}", *flags)
        (file,) = (run / "answers").glob("scored-*.jsonl")
        figures = {line["row"]: line["figures"] for line in map(json.loads, file.read_text().splitlines())}
        return said, figures, {one.id: one.row for one in selected.read_selected(run)}

    _, wanted, chosen = curate("native")
    said, found, taken = curate("flax")
    assert f"scored now: {len(wanted)} answers" in said
    assert len(wanted) == 3 * len(questions)
    assert found.keys() == wanted.keys()
    for row, values in wanted.items():
        assert values.keys() - found[row].keys() == set(SIMILARITIES)
        assert found[row] == pytest.approx({name: values[name] for name in found[row]}, rel=5e-5, abs=1e-7)
    assert len({values["head_norm"] for values in wanted.values()}) == len(wanted)
    assert taken == chosen

    _, _, chosen_by_nll = curate("native", **{"answers.score": "grape"})
    said, _, taken_by_nll = curate("flax", **{"answers.score": "grape"})
    assert "scored now: 0 answers" in said
    assert taken_by_nll == chosen_by_nll
    assert taken_by_nll != taken
    with pytest.raises(
        ValueError, match=r"^answers\.score must not need sim_aa, sim_aq, sim_qq with a student of a Flax"
    ):
        curate("flax", **{"answers.score": "scas"})
