"""The commands of the README as a user types them: train, evaluate, export, and what they say to bad input.

One run in a process of its own, on which the other scripts are called here; mistakes that are found before JAX is
imported cost a tenth of a second and get a process each.
"""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import models
from kdjax.models import ModelConfig, synthetic
from kdjax.models.hf_io import save_hf
from kdjax.models.io import load_model

ROOT = pathlib.Path(__file__).parents[2]
SMALL = {
    "teacher.path": "synthetic",
    "student.init.layers": 1,
    "data.seq_len": 32,
    "loss.terms": "(('forward_kl',1.0),('cross_entropy',0.1))",
    "train.steps": 4,
    "train.log_every": 1,
    "optim.warmup": 1,
    "optim.learning_rate": 0.002,
    "eval.rows": 4,
    "eval.completions": 2,
    "eval.new_tokens": 4,
}
LABELS = ["perplexity", "KL to the teacher, nats", "top-1 agreement", "next-token accuracy", "calibration error"]


def overrides(values):
    return [f"--config.{name}={value}" for name, value in values.items()]


def command(script, *arguments, within=120):
    """The finished process of `python -m launch.<script>`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    typed = [sys.executable, "-m", f"launch.{script}", *map(str, arguments)]
    return subprocess.run(typed, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=within, check=False)


@dataclasses.dataclass(frozen=True)
class Trained:
    workdir: pathlib.Path
    arguments: list[str]
    done: subprocess.CompletedProcess

    def lines(self, name):
        return [json.loads(line) for line in (self.workdir / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps from the command line."""
    root = tmp_path_factory.mktemp("scripts")
    lines = [
        {"text": f"{i} bottles of <b>beer</b> & {i % 7} of milk on the wall, all of them green."} for i in range(60)
    ]
    (root / "some text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = {"data.path": root / "some text.jsonl"}
    arguments = ["--config=configs/quickstart.py", f"--workdir={root / 'run'}", *overrides(SMALL | data)]
    return Trained(root / "run", arguments, command("train", *arguments))


def cells(table, line):
    """The three estimates (value, low, high) of one line of the printed table; None for -."""
    (found,) = [entry for entry in table.splitlines() if entry.startswith(line + "  ")]
    parts = re.findall(r"(\S+ \[\S+ \S+\]|-)(?=\s|$)", found[len(line) :])
    assert len(parts) == 3, found
    return [
        None if part == "-" else [float(n.strip("[],").replace(",", "")) for n in part.split(" ")] for part in parts
    ]


def estimate(record):
    return [record[key] for key in ("value", "low", "high")]


# --- train


def test_training_says_what_it_does_and_ends_with_the_table(trained):
    assert trained.done.returncode == 0, trained.done.stderr
    assert "Traceback" not in trained.done.stderr
    assert re.search(r"^step 4/4  loss \S+  \S+ tokens/s  ETA 0s$", trained.done.stderr, re.MULTILINE)
    out = trained.done.stdout.splitlines()
    assert re.fullmatch(r"held out: \d+ tokens +student before +student after +teacher", out[0])
    assert [line[:28].strip() for line in out[1:6]] == LABELS
    assert out[-1] == f"report: {trained.workdir / 'report.html'}"
    assert {"config.json", "metrics.jsonl", "evals.jsonl", "report.html", "tensorboard", "checkpoints"} <= {
        path.name for path in trained.workdir.iterdir()
    }


def test_the_printed_figures_are_those_of_the_evaluations(trained):
    before, after = trained.lines("evals.jsonl")
    assert (before["step"], after["step"]) == (0, 4)
    for label, name in zip(LABELS, ("perplexity", "kl", "agreement", "accuracy", "ece"), strict=True):
        pair = name in ("kl", "agreement")
        expected = [estimate(record[name] if pair else record["student"][name]) for record in (before, after)]
        expected.append(None if pair else estimate(after["teacher"][name]))
        for shown, wanted in zip(cells(trained.done.stdout, label), expected, strict=True):
            assert shown == (
                wanted if wanted is None else pytest.approx(wanted, abs=0.051 if name == "perplexity" else 6e-4)
            )
    assert after["kl"]["value"] < before["kl"]["value"]


def test_the_log_has_every_step_and_both_losses(trained):
    lines = trained.lines("metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["loss"] == pytest.approx(line["forward_kl"] + 0.1 * line["cross_entropy"], rel=1e-5)
    rates = [line["learning_rate"] for line in lines]
    assert rates[0] == 0
    assert rates[1] == pytest.approx(0.002)


def test_the_report_holds_table_text_page_and_completions(trained):
    page = (trained.workdir / "report.html").read_text()
    assert "<h2>Held-out figures</h2>" in page
    assert re.findall(r"<th>(Student before|Student after|Teacher)</th>", page) == [
        "Student before",
        "Student after",
        "Teacher",
    ]
    (text,) = re.findall(r'<div class="page">(.*?)</div>', page, re.DOTALL)
    plain = re.sub(r"<[^>]*>", "", text)
    assert re.match(r"\d+ bottles of &lt;b&gt;beer&lt;/b&gt; &amp; \d", plain)  # one held-out row, escaped
    assert 0 < text.count(' sel"') < text.count("<span")
    assert page.count('<div class="prompt">') == 2
    for who in ("before", "after", "teacher"):
        assert page.count(f'<div class="answer {who}">') == 2
    assert "forward KL + cross entropy" in page
    assert "layers 0 of the teacher" in page


def test_the_report_holds_a_command_that_a_shell_takes(trained):
    said = json.loads((trained.workdir / "report_data.json").read_text())["command"]
    assert shlex.split(said) == ["python", "-m", "launch.train", *trained.arguments]


def test_the_same_command_again_has_nothing_to_do(trained, call):
    before = (trained.workdir / "evals.jsonl").read_text()
    assert call("train", *trained.arguments) == trained.done.stdout
    assert (trained.workdir / "evals.jsonl").read_text() == before


# --- evaluate


def test_evaluate_finds_the_figures_of_the_run(trained, call):
    out = call("evaluate", f"--workdir={trained.workdir}")
    first, *table = out.splitlines()
    assert first == f"{trained.workdir}, step 4"
    assert table == trained.done.stdout.splitlines()[:-1]


def test_evaluate_takes_a_step_and_other_rows(trained, call):
    out = call("evaluate", f"--workdir={trained.workdir}", "--step=best", "--rows=2")
    two = int(re.search(r"held out: (\d+) tokens", out)[1])
    assert 0 < two < int(re.search(r"held out: (\d+) tokens", trained.done.stdout)[1])


# --- export


def tree_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture(scope="module")
def weights(trained):
    """The student of the last checkpoint, read without the scripts."""
    from kdjax import loop
    from kdjax.build import build, load_experiment

    built = build(load_experiment(trained.workdir))
    state, _ = loop.restore(built, trained.workdir)
    return built.student_cfg, state.params


def test_an_export_is_the_student_bit_by_bit_for_us_and_for_transformers(trained, call, weights, tmp_path):
    out = tmp_path / "student"
    assert (
        call("export_hf", f"--workdir={trained.workdir}", f"--out={out}")
        == f"{out}: the student of {trained.workdir} at step 4\n"
    )
    cfg, params = weights
    loaded = load_model(out)
    tree_equal(loaded.params, params)
    assert dataclasses.replace(loaded.cfg, initializer_range=0.0) == dataclasses.replace(cfg, initializer_range=0.0)

    torch = pytest.importorskip("torch", reason="the other half compares with transformers on torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "99 bottles, ünder a <wall>"
    ids = tokenizer(text)["input_ids"]
    assert ids == synthetic.make_tokenizer()(text)["input_ids"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False).startswith(
        "<|im_start|>user"
    )
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out)(torch.tensor([ids])).logits[0].numpy()
    tokens = jnp.asarray([ids], jnp.int32)
    hidden = models.hidden(cfg, params, tokens, jnp.ones_like(tokens), jnp.arange(len(ids))[None])
    np.testing.assert_allclose(np.asarray(hidden[0]) @ np.asarray(params["embed"]).T, theirs, atol=1e-4)


def test_an_export_in_bfloat16(trained, call, weights, tmp_path):
    call(
        "export_hf", f"--workdir={trained.workdir}", f"--out={tmp_path}", "--dtype=bfloat16", "--step=4"
    )  # empty: fine
    loaded = load_model(tmp_path, dtype=jnp.bfloat16)
    tree_equal(loaded.params, jax.tree.map(lambda a: a.astype(jnp.bfloat16), weights[1]))
    assert loaded.source.endswith("in bfloat16")


def test_an_export_overwrites_nothing(trained, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    done = command("export_hf", f"--workdir={trained.workdir}", f"--out={tmp_path}")
    assert (
        refusal(done)
        == f"--out must be a new or empty directory, got {str(tmp_path)!r}, which has content. Set another."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_other_scripts_leave_alone_what_a_run_may_be_writing(trained, call, tmp_path):
    half = trained.workdir / "checkpoints" / "6.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "part").write_text("written at this moment")
    call("export_hf", f"--workdir={trained.workdir}", f"--out={tmp_path / 'out'}")
    assert (half / "part").is_file()
    shutil.rmtree(half)


def test_a_run_that_failed_before_its_first_checkpoint_may_be_started_otherwise(trained, tmp_path):
    from kdjax import loop
    from kdjax.build import load_experiment

    experiment = load_experiment(trained.workdir)
    other = dataclasses.replace(experiment, optim=dataclasses.replace(experiment.optim, learning_rate=0.5))
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir(parents=True)
    shutil.copy(trained.workdir / "config.json", tmp_path)
    loop.claim_workdir(tmp_path, other)
    (tmp_path / "checkpoints" / "4").mkdir()
    with pytest.raises(ValueError, match="--workdir must be empty or of the same config"):
        loop.claim_workdir(tmp_path, other)


# --- bad input


def refusal(done):
    """The one line that a script ends with when its input is bad."""
    assert (done.returncode, done.stdout) == (2, ""), done
    assert re.fullmatch(r"error: .*\n", done.stderr), done.stderr
    return done.stderr.removeprefix("error: ").rstrip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config.train.stepz=3"],
            r"config has no field 'train\.stepz'\. Did you mean 'steps'\? Known: accumulate, .*steps\.",
        ),
        (
            ["--config.trian.steps=3"],
            r"config has no field 'trian\.steps'\. Did you mean 'train'\? Known: answers, cache, checkpoint, .*",
        ),
        (["--noconfig.log.wandbb"], r"config has no field 'log\.wandbb'\. Did you mean 'wandb'\? .*"),
        (["--config.train.steps.x=3"], r"config has no field 'train\.steps\.x'; train\.steps is one value\."),
        (
            ["--config.student.init.keep[0]=1"],
            r"config has no field 'student\.init\.keep\[0\]'\. Did you mean 'keep'\? .*",
        ),
        (["--config.train.steps=abc"], r"train\.steps must be int, got 'abc'\."),
        (["--config.train.steps", "2.5"], r"train\.steps must be int, got '2\.5'\."),
        (["--config.optim.clip=off"], r"optim\.clip must be float, got 'off'\."),
        (["--config.log.wandb=maybe"], r"log\.wandb must be bool, got 'maybe'\."),
        (["--config.train=3"], r"train must be a group of fields, got '3'\."),
        (["--config.loss.tau=warm"], r"loss\.tau must be float or tuple, got 'warm' \(str\)\."),
        (["--config.selection.fraction=20"], r"selection\.fraction must be in \(0, 1\], got 20\.0; .*"),
        (["--wrokdir=x"], r"Unknown command line flag 'wrokdir'\. Did you mean: workdir\? See --help\."),
        (["train"], r"options must start with --, got 'train'\. See --help\."),
        ([], r"--workdir must be set, got nothing\. See --help\."),
        (["--workdir=gs://bucket/run"], r"--workdir must be a directory, got 'gs://bucket/run'; .* Mount it, and .*"),
    ],
)
def test_bad_flags_of_train(arguments, message):
    assert re.fullmatch(message, refusal(command("train", "--config=configs/quickstart.py", *arguments)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"--config must be set, got nothing\. See --help\."),
        (
            ["--config=configs/quikstart.py"],
            r"--config must be .*, got 'configs/quikstart\.py'; .* Did you mean 'configs/quickstart\.py'\? Known: .*",
        ),
        (
            ["--config=configs/paper/se_kd/llama31_8b_to_32_1b.py:gls"],
            r"the row after the config file's colon must be a known name .*, got 'gls'\. Known: full_kd, .*",
        ),
        (
            ["--config", "nix.py", "--config.train.steps=3"],
            r"--config must be a file of configs/, got 'nix\.py'; there is no such file\. .*",
        ),
        (
            ["--config.train.steps=3", "--config=configs/quickstart.py"],
            r"--config must come before what overrides it, got --config\.train\.steps=3 first\. .*",
        ),
    ],
)
def test_a_config_that_is_not_there(arguments, message, tmp_path):
    assert re.fullmatch(message, refusal(command("train", f"--workdir={tmp_path / 'run'}", *arguments)))
    assert not (tmp_path / "run").exists()


def test_flags_from_a_file_are_checked_too(tmp_path):
    (tmp_path / "flags").write_text("--config=configs/quickstart.py\n--config.train.stepz=3\n")
    assert refusal(command("train", f"--flagfile={tmp_path / 'flags'}")).startswith("config has no field 'train.stepz'")


@pytest.mark.parametrize("script", ["evaluate", "export_hf"])
def test_scripts_that_need_a_run(script, call, tmp_path):
    assert refusal(command(script)) == "--workdir must be set, got nothing. See --help."
    arguments = [f"--workdir={tmp_path}"] + ([f"--out={tmp_path / 'out'}"] if script == "export_hf" else [])
    with pytest.raises(
        ValueError, match=r"^--workdir must be the directory of a run, got .*; it has no config\.json\.$"
    ):
        call(script, *arguments)
    (tmp_path / "config.json").write_text('{"train": {"ste')
    with pytest.raises(ValueError, match=r"config\.json must be the config of a run, got a damaged file; Unterminated"):
        call(script, *arguments)
    assert not (tmp_path / "out").exists()


def test_exports_in_another_type_are_refused():
    message = "flag --dtype=f32: value should be one of <float32|bfloat16|float16>. See --help."
    assert refusal(command("export_hf", "--workdir=x", "--out=y", "--dtype=f32")) == message


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("last", r"--step must name a checkpoint, got 'last'"),
        ("3", r"step must be one of the saved ones \[4\] in .*, got 3"),
    ],
)
def test_a_step_that_was_not_saved(trained, call, step, message):
    with pytest.raises(ValueError, match=message):
        call("evaluate", f"--workdir={trained.workdir}", f"--step={step}")


def test_a_run_without_a_checkpoint(trained, call, tmp_path):
    shutil.copy(trained.workdir / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"^--step must name a checkpoint, got ''; .* has none such yet\.$"):
        call("evaluate", f"--workdir={tmp_path}")
    assert not (tmp_path / "checkpoints").exists()


def test_a_path_without_data_ends_a_run_with_one_line(tmp_path):
    values = {"teacher.path": "synthetic", "data.path": tmp_path / "nix.jsonl"}
    done = command("train", "--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}", *overrides(values))
    message = r"data\.path must be a built-in corpus or an existing .*, got '.*nix\.jsonl'; there is no such path\. .*"
    assert re.fullmatch(message, refusal(done))


# --- help


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        ("train", ["config", "workdir"]),
        ("evaluate", ["workdir", "step", "rows"]),
        ("export_hf", ["workdir", "out", "step", "dtype"]),
    ],
)
def test_help_is_quick_and_lists_the_flags(script, wanted):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONPROFILEIMPORTTIME": "1"}
    typed = [sys.executable, "-m", f"launch.{script}", "--help"]
    before = os.times()
    done = subprocess.run(typed, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    after = os.times()
    assert done.returncode == 0
    for name in wanted:
        assert re.search(rf"^ +--{name}: \S", done.stdout, re.MULTILINE), done.stdout
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "absl" in imported
    assert not imported & {"jax", "jaxlib", "numpy", "flax", "optax", "orbax", "grain", "transformers", "tokenizers"}
    # Processor time, because the wall time of a busy machine says nothing.
    assert after.children_user - before.children_user + after.children_system - before.children_system < 2


# --- SE-KD on models and chats of one's own


def draw(cfg, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda spec: spec.init.mean + spec.init.std * rng.standard_normal(spec.shape, np.float32),
        models.param_specs(cfg),
    )


def test_se_kd_on_directories_chats_and_eight_devices(call, tmp_path):
    ids = {"bos_id": 1, "eos_ids": (2,), "pad_id": 2, "initializer_range": 0.2}
    teacher = ModelConfig("llama", 264, 48, 2, 4, 2, 12, 64, tied=False, max_positions=128, **ids)
    student = ModelConfig("qwen3", 272, 32, 1, 2, 1, 16, 48, tied=True, max_positions=128, **ids)
    for name, cfg in (("teacher", teacher), ("student", student)):
        save_hf(tmp_path / name, cfg, draw(cfg, len(name)), synthetic.make_tokenizer())
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} + 1?"},
                {"role": "assistant", "content": f"It is {i + 1}."},
            ]
        }
        for i in range(40)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    values = {
        "teacher.path": tmp_path / "teacher",
        "student.path": tmp_path / "student",
        "data.path": tmp_path / "chats.jsonl",
    }
    few = {
        "mesh.preset": "fsdp",
        "data.seq_len": 96,
        "train.batch_size": 8,
        "train.steps": 3,
        "train.log_every": 1,
        "optim.warmup": 1,
    }
    few |= {
        "optim.learning_rate": 0.01,
        "eval.new_tokens": 4,
        "eval.completions": 1,
        "log.tensorboard": False,
        "data.heldout_fraction": 0.2,
    }
    out = call("train", "--config=configs/se_kd.py", f"--workdir={tmp_path / 'run'}", *overrides(values | few))

    before, after = (json.loads(line) for line in (tmp_path / "run" / "evals.jsonl").read_text().splitlines())
    assert after["kl"]["value"] < before["kl"]["value"]
    # Of a chat the answers and the end of each are targets: "It is 8." and <|im_end|>.
    heldout = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0.2 <= line["selected_fraction"] < 0.3 for line in heldout)  # ceil per row
    assert set(heldout[0]) >= {"forward_kl", "student_entropy"}
    assert not any("cross_entropy" in line for line in heldout)
    assert re.search(rf"held out: {before['tokens']} tokens", out)
    page = json.loads((tmp_path / "run" / "report_data.json").read_text())
    targets = "".join(token["token"] for token in page["text"] if token["eligible"])
    assert re.fullmatch(r"(It is \d+\.<\|im_end\|>)+", targets)
    assert page["completions"][0]["prompt"].startswith("<|im_start|>user\nWhat is ")


def test_fine_tuning_without_a_teacher(trained, call, tmp_path):
    text = trained.workdir.parent / "some text.jsonl"
    alone = {"teacher.path": "", "student.path": "synthetic", "student.init.kind": "own", "data.path": text}
    values = SMALL | alone | {"loss.terms": "(('cross_entropy',1.0),)", "eval.completions": 1, "log.tensorboard": False}
    out = call("train", "--config=configs/quickstart.py", f"--workdir={tmp_path}", *overrides(values))
    before, after, teacher = cells(out, "perplexity")
    assert after[0] < before[0]
    assert teacher is None
    assert cells(out, "KL to the teacher, nats") == [None, None, None]
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r"<th>(Student before|Student after|Teacher)</th>", page) == ["Student before", "Student after"]
    assert page.count('<div class="answer after">') == 1
    assert '<div class="answer teacher">' not in page
