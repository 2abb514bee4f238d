"""A pool of answers as a user types it: curate, explain, train in rounds, and going on after a stop."""

import json
import pathlib
import re
import shutil

import numpy as np
import pytest

from kdjax.config import Prompts
from kdjax.curation.answers import selected
from kdjax.curation.answers.scores import SCORES
from kdjax.curation.answers.stage import read_manifest
from kdjax.data.prompts import load_prompts, split_prompts
from kdjax.data.styles import STYLES, scripted

ROOT = pathlib.Path(__file__).parents[2]
TEACHERS = ("bare", "sentence", "equation", "words", "steps")
VALUES = {
    "teacher.path": "synthetic",
    "student.init.layers": 1,
    "data.path": "",
    "data.seq_len": 96,
    "data.chat_template": False,
    "data.max_train_tokens": 0,
    "prompts.path": "arith:sum1",
    "prompts.size": 30,
    "prompts.instruction": "",
    "train.batch_size": 4,
    "train.steps": 6,
    "train.log_every": 1,
    "answers.rescore_every": 2,
    "optim.warmup": 1,
    "optim.learning_rate": 1e-3,
    "eval.rows": 2,
    "eval.prompts": 0,
    "eval.completions": 0,
    "checkpoint.every": 2,
    "checkpoint.keep": 5,
    "log.tensorboard": False,
}
QUESTIONS = split_prompts(load_prompts(Prompts(path="arith:sum1", size=30)), Prompts(path="arith:sum1", size=30))[1]


@pytest.fixture
def typed(tmp_path):
    """typed(workdir, answers__policy=...) -> the arguments of a command; the pool and a text are there."""
    text, pool = tmp_path / "text.jsonl", tmp_path / "pool"
    text.write_text("\n".join(json.dumps({"text": f"{i} bottles of beer on the wall; take {i}."}) for i in range(40)))
    pool.mkdir()
    for name in TEACHERS:
        rows = [{"id": q.id, "instruction": q.prompt, "teacher_output": scripted(q, STYLES[name])} for q in QUESTIONS]
        if name == "words":
            rows[0]["teacher_output"] = "I would say 99."
        (pool / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")

    def arguments(workdir, *more, **changes):
        values = VALUES | {"data.path": text, "answers.pool": f"({str(pool)!r},)"}
        values |= {name.replace("__", "."): value for name, value in changes.items()}
        flags = [f"--config.{name}={value}" for name, value in values.items()]
        return [f"--config={ROOT}/configs/scas.py", f"--workdir={workdir}", *flags, *more]

    return arguments


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_pool_is_verified_scored_and_selected_once(call, typed, tmp_path, monkeypatch):
    run = tmp_path / "run"
    said = call("curate", *typed(run))
    count = len(QUESTIONS)
    assert f"pool: {5 * count} rows, {5 * count - 1} admitted; left out: 1 wrong" in said
    assert f"selected: {count} answers to {count} of {count} questions" in said
    assert f"scored now: {5 * count - 1} answers" in said
    kept = list(selected.read_selected(run))
    assert {one.id for one in kept} == {q.id for q in QUESTIONS}
    assert {one.group for one in kept} <= {1, 2}, "the cheapest group, or the next where four answers leave it empty"
    (file,) = (run / "answers").glob("scored-*.jsonl")
    figures = {line["row"]: line["figures"] for line in lines(file)}
    for one in kept:
        values = figures[one.row]
        d_a, d_q = values["answer_nll"], values["question_nll"]
        score = 0.5 * d_a**2 * values["sim_aa"] + 0.5 * d_a * d_q * values["sim_aq"]
        np.testing.assert_allclose(one.score_value, score, rtol=1e-9)

    before = file.read_bytes(), (run / "answers/selected.jsonl").read_bytes()
    again = call("curate", *typed(run, "--yardstick=3"))
    assert "scored now: 0 answers, 0 tokens" in again
    assert (file.read_bytes(), (run / "answers/selected.jsonl").read_bytes()) == before

    shared = call("curate", *typed(tmp_path / "other", answers__scored="../run"))
    assert "scored now: 0 answers" in shared, "the same student, whose figures are in the other directory"
    assert (tmp_path / "other/answers/selected.jsonl").read_bytes() == before[1]
    measured = lines(run / "answers/yardstick.jsonl")
    assert len({line["id"] for line in measured}) == 3
    assert all(line["gradient"] > 0 and abs(line["gain"]) > 0 for line in measured)
    tables = [part.splitlines() for part in again.split("against ")[1:]]
    names = {name for name in SCORES if not name.endswith("_no_diag")} | {"shortest"}
    assert names <= {line.split()[0] for line in tables[0]}
    assert names | {"gradient"} <= {line.split()[0] for line in tables[1]}
    (exact,) = (line.split() for line in tables[0] if line.startswith("grand"))
    assert exact[1:3] == ["3", "1.00"], "the same gradient"
    once = read_manifest(file)["counts"]
    call("curate", *typed(run, answers__score="lalp"))
    spent = read_manifest(file)["counts"]
    assert spent["answers"] == 2 * once["answers"] == 2 * (5 * count - 1), "all are read again for it"
    assert spent["places"] == 2 * once["places"]
    alone = {line["row"]: line["figures"] for line in lines(file) if "local_logp" in (line["figures"] or {})}
    for line in measured:
        np.testing.assert_allclose(line["figures"]["gradient_norm"], line["gradient"] ** 0.5, rtol=1e-9)
        for name, value in alone[line["row"]].items():
            pair = np.array([line["figures"][name], value], float)  # null is NaN
            np.testing.assert_allclose(*pair, rtol=1e-4, atol=1e-6, err_msg=name)
    with pytest.raises(ValueError, match=r"^--yardstick must be at most \d+, got 99; of the "):
        call("curate", *typed(run, "--yardstick=99"))


def test_policies_without_scores_run_no_student(call, typed, tmp_path, monkeypatch):
    def measure(*_, **__):
        raise RuntimeError("the student was run")

    monkeypatch.setattr("kdjax.run.answers.make_measurer", measure)
    settings = {"answers__policy": "shortest", "answers__rescore_every": 0}
    call("curate", *typed(tmp_path / "a", **settings))
    assert {one.teacher_name for one in selected.read_selected(tmp_path / "a")} == {"bare"}
    said = call("curate", *typed(tmp_path / "b", **settings | {"answers__policy": "strongest"}))
    assert "one is drawn: bare, equation, sentence, steps\n" in said, "words are wrong once"
    drawn = {one.teacher_name for one in selected.read_selected(tmp_path / "b")}
    assert drawn == {"bare", "equation", "sentence", "steps"}
    assert "bare, equation, sentence, steps" in (tmp_path / "b/answers/report.html").read_text()
    with pytest.raises(RuntimeError, match="the student was run"):
        call("curate", *typed(tmp_path / "c", answers__score="grape", answers__rescore_every=0))


@pytest.mark.parametrize(
    ("score", "figure"), [("lalp", "local_logp"), ("aslec_casl", "first_share"), ("grand", "gradient_norm")]
)
def test_scores_that_need_more_than_a_pass(call, typed, tmp_path, score, figure):
    call("curate", *typed(tmp_path / "run", answers__score=score, answers__policy="best"))
    (file,) = (tmp_path / "run/answers").glob("scored-*.jsonl")
    values = [line["figures"][figure] for line in lines(file)]
    assert np.isfinite(values).all()
    assert np.ptp(values) > 0
    assert len(list(selected.read_selected(tmp_path / "run"))) == len(QUESTIONS)

    asked, page = QUESTIONS[0].id, tmp_path / "x.html"
    command = typed(tmp_path / "run", f"--explain={asked}", f"--out={page}", answers__score=score)
    call("curate", *command)
    of = [line["figures"] for line in lines(file)]
    columns = {name: np.array([f.get(name) for f in of], float) for name in (*of[0], figure)}
    order = {
        "grand": lambda: columns["gradient_norm"],
        "lalp": lambda: -columns["local_logp"],
        "aslec_casl": lambda: columns["answer_nll"] + slope(columns) * columns["first_share"],
    }[score]()
    preferred = sorted(
        (value, line["teacher"]) for value, line in zip(order, lines(file), strict=True) if line["id"] == asked
    )
    rows = re.findall(
        r'<tr(?: class="chosen")?><td data-value="(\d*)">[^<]*</td><td class="who"><a[^>]*>(\w+)<', page.read_text()
    )
    assert rows == [*((str(at), name) for at, (_, name) in enumerate(preferred, 1)), ("", "words")]


def slope(columns):
    """Of the share of first tokens, beside the other two figures of ASLEC-CASL and a constant."""
    design = np.stack([columns["rest_logp"], columns["first_logp"], columns["first_share"], columns["answer_nll"]], 1)
    design = design[np.isfinite(design).all(1)]
    x, y = np.concatenate([design[:, :3], np.ones((len(design), 1))], 1), -design[:, 3]
    return np.linalg.solve(x.T @ x, x.T @ y)[2]


def test_a_question_is_explained(call, typed, tmp_path):
    run, page = tmp_path / "run", tmp_path / "x.html"
    call("curate", *typed(run))
    asked = QUESTIONS[0].id
    assert str(page) in call("curate", *typed(run, f"--explain={asked}", f"--out={page}"))
    text = page.read_text()
    chosen = next(one.teacher_name for one in selected.read_selected(run) if one.id == asked)
    assert f"Selected: {chosen}." in text
    assert all(name in text for name in TEACHERS)
    of_teachers = typed(
        run, f"--explain={asked}", f"--out={page}", answers__policy="best_teacher", answers__score="car"
    )
    call("curate", *of_teachers)
    assert re.search(r"ranked by scas, lowest\s+first", page.read_text()), "answers.score rates teachers here"
    with pytest.raises(ValueError, match="^--explain must be the id of a question of prompts.path, got 'sum9'"):
        call("curate", *typed(run, "--explain=sum9", f"--out={page}"))
    prompts = Prompts(path="arith:sum1", size=30)
    heldout = split_prompts(load_prompts(prompts), prompts)[0][0].id
    with pytest.raises(ValueError, match="^--explain must be the id of a question that answers.pool answers, got 'su"):
        call("curate", *typed(run, f"--explain={heldout}", f"--out={page}"))


def test_rounds_and_going_on_in_the_middle(call, typed, tmp_path):
    """Three rounds of two steps; what goes on from a checkpoint between them ends in the same figures."""
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="selected.jsonl must hold the selected answers, got none.*launch.curate"):
        call("train", *typed(run))
    call("curate", *typed(run))
    call("train", *typed(run))
    log = lines(run / "metrics.jsonl")
    rounds = [line for line in log if "answers_scored" in line]
    assert [line["step"] for line in rounds] == [2, 4]
    assert all(line["answers_scored"] == 5 * len(QUESTIONS) - 1 for line in rounds)
    assert all(0 <= line["kept_overlap"] <= 1 for line in rounds)
    assert len(list((run / "answers").glob("scored-*.jsonl"))) == 3, "one for each student"
    page = (run / "answers/report.html").read_text()
    assert all(name in page for name in TEACHERS)
    assert "the same as head_norm" in page or "the same as grape" in page or "the same as shortest" in page
    assert "the same as scas" not in page, "it is what was selected by"
    assert ">768<" in page, "two steps of four rows of 96 tokens a round"
    said = f"Distilled on selected answers (group, scas) to {len(QUESTIONS)} prompts of arith:sum1, judged on "
    assert said in (run / "report.html").read_text()
    losses = [line["loss"] for line in log if "loss" in line]
    choices = {path.name: path.read_bytes() for path in (run / "answers").glob("selected*.jsonl")}
    assert set(choices) == {"selected.jsonl", "selected-2.jsonl", "selected-4.jsonl"}
    for folder in ("4", "6"):
        shutil.rmtree(run / "checkpoints" / folder)
    (run / "answers/selected-4.jsonl").unlink()
    call("train", *typed(run))
    log = lines(run / "metrics.jsonl")
    assert [line["loss"] for line in log if "loss" in line] == losses
    assert {path.name: path.read_bytes() for path in (run / "answers").glob("selected*.jsonl")} == choices
    assert [line["answers_scored"] for line in log if "answers_scored" in line][-1] == 0, "this student has scored them"
