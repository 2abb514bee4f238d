"""launch.curate on prompts as a user types it: what it says, and kill -9 in the middle of its stages."""

import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from kdjax import loop
from kdjax.curation.paced import load_weights

ROOT = pathlib.Path(__file__).parents[2]
# A verdict that is neither all right nor all wrong for random answers; slow enough to be killed in between.
VERIFIER = """
import hashlib, os, time
from kdjax.verifiers import Finding, Verdict
asked = []
def judge(response, prompt):
    time.sleep(float(os.environ.get("JUDGING_TAKES", 0)))
    asked.append(prompt.id)
    even = hashlib.md5((response + prompt.id).encode()).digest()[0] % 2 == 0
    return Finding(Verdict.RIGHT if even else Verdict.WRONG, response)
"""


def typed(workdir, text, **changes):
    values = {
        "teacher.path": "synthetic",
        "student.init.layers": 1,
        "data.path": text,
        "data.seq_len": 128,
        "prompts.path": text.with_name("prompts.jsonl"),
        "prompts.verifier": "slow_verifier:judge",
        "generation.samples": 4,
        "generation.new_tokens": 4,
        "generation.batch_size": 4,
        "pass_rates.weight": "paced",
    }
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    return ["--config=configs/quickstart.py", f"--workdir={workdir}", *flags]


@pytest.fixture
def text(tmp_path, monkeypatch):
    (tmp_path / "slow_verifier.py").write_text(VERIFIER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "slow_verifier", raising=False)
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} bottles of beer on the wall."}) + "\n" for i in range(40)))
    asked = [{"id": str(i), "prompt": f"{i} + {i} = ?", "answer": str(2 * i)} for i in range(20)]
    path.with_name("prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    return path


def lines(path):
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def killed(arguments, file, at_least, folder):
    """Start it, and kill -9 as soon as `file` has `at_least` more lines."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "JUDGING_TAKES": "0.1"}
    wanted, command = lines(file) + at_least, [sys.executable, "-m", "launch.curate", *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
        deadline = time.monotonic() + 300
        while run.poll() is None and lines(file) < wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        assert run.poll() is None, run.stdout.read().decode()
        run.send_signal(signal.SIGKILL)


def digests(workdir):
    """What has to be the same however often it was killed; rollouts.jsonl may have another order."""
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in workdir.glob("[pw]*.json*")}
    found["verified.jsonl"] = sorted((workdir / "verified.jsonl").read_text().splitlines())
    return found | {"answers": [answer | {"logp": 0.0} for answer in answers(workdir)]}


def answers(workdir):
    """Rollouts by prompt and number. Of one that began later log-probabilities are summed in another order."""
    found = [json.loads(line) for line in (workdir / "rollouts" / "rollouts.jsonl").read_text().splitlines()]
    return sorted(found, key=lambda answer: (answer["id"], answer["sample"]))


def test_a_kill_in_the_answers_and_one_in_the_verdicts_change_nothing(call, text, tmp_path):
    out = call("curate", *typed(tmp_path / "whole", text)).splitlines()
    whole = digests(tmp_path / "whole")
    summary = load_weights(tmp_path / "whole").summary
    prompts = summary["problems"]
    assert 0 < summary["kept"] <= prompts <= 20
    assert out[0].split() == ["pass", "rate", "problems", "truncated", "weight"]
    assert out[6].startswith(f"kept {summary['kept']} of {prompts} problems")
    assert out[9].startswith("4 answers a prompt, ")
    assert out[9].endswith(f"pass rates {whole['pass_rates.jsonl'][:12]}")
    assert out[-1].startswith("next: python -m launch.train --config=configs/quickstart.py --workdir=")

    import slow_verifier

    workdir = tmp_path / "killed"
    killed(typed(workdir, text), workdir / "rollouts" / "rollouts.jsonl", 5, tmp_path)
    assert 5 <= lines(workdir / "rollouts" / "rollouts.jsonl") < 4 * prompts
    assert not (workdir / "weights.jsonl").exists()
    killed(typed(workdir, text), workdir / "verified.jsonl", 5, tmp_path)
    judged = lines(workdir / "verified.jsonl")
    assert 5 <= judged < 4 * prompts
    slow_verifier.asked.clear()
    assert call("curate", *typed(workdir, text)).splitlines()[:-2] == out[:-2]
    assert len(slow_verifier.asked) == prompts + 4 * prompts - judged  # each prompt is looked at before all else
    assert digests(workdir) == whole
    calm, hurt = ([answer["logp"] for answer in answers(tmp_path / name)] for name in ("whole", "killed"))
    assert hurt == pytest.approx(calm, rel=1e-5)


def test_runs_of_one_student_may_share_its_answers(call, text, tmp_path):
    shared = {"pass_rates__rollouts": "../shared"}
    call("curate", *typed(tmp_path / "a", text, **shared))
    before = (tmp_path / "shared" / "rollouts.jsonl").read_bytes()
    assert before
    shared |= {"pass_rates__weight": "hard_filter", "generation__samples": 2}
    assert "\n4 answers a prompt, " in call("curate", *typed(tmp_path / "b", text, **shared))  # that are there
    assert (tmp_path / "shared" / "rollouts.jsonl").read_bytes() == before
    assert not (tmp_path / "b" / "rollouts").exists()
    a, b = ((tmp_path / name / "pass_rates.jsonl").read_bytes() for name in "ab")
    assert a == b


def test_another_seed_is_added_and_other_settings_of_the_answers_are_refused(call, text, tmp_path):
    call("curate", *typed(tmp_path / "a", text))
    with pytest.raises(ValueError, match=r"temperature is 0\.5, there it is 1\.0"):
        call("curate", *typed(tmp_path / "a", text, generation__temperature=0.5))
    out = call("curate", *typed(tmp_path / "b", text, generation__seed=1), f"--add={tmp_path / 'a'}")
    assert "generation.seed 0, 1;" in out
    assert "--add" not in out.splitlines()[-1]
    assert [line.split()[0] for line in out.splitlines()[1:10]] == [f"{k}/8" for k in range(9)]


def test_training_takes_the_weights_of_its_own_student_prompts_and_settings_alone(call, text, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(loop, "run", lambda of, workdir: built.append(of) or loop.Outcome(0, True, None))
    workdir = tmp_path / "a"
    out = call("curate", *typed(workdir, text, prompts__instruction=" Now."))
    assert out.endswith(", with prompts.answers or on_policy.fraction set: no answers are trained on yet\n")
    shared = {"prompts__answers": workdir / "rollouts", "prompts__instruction": " Now."}
    call("train", *typed(workdir, text, **shared))
    by_id = load_weights(workdir).by_id()
    assert [by_id[prompt.id] for prompt in built[0].asked.train] == pytest.approx(built[0].asked.weight.tolist())
    for changes, message in [
        ({"generation__temperature": 0.3}, r"got others: temperature is 1\.0 there and 0\.3 here\. Run launch\.curate"),
        ({"generation__seed": 9}, r"got others: generation\.seed is 0 there and 9 here\. Run launch\.curate"),
        ({"prompts__instruction": " Quick!"}, r"got others: prompts is \w{12} there and \w{12} here\. Run"),
        ({"student__init__layers": 2}, r"^student\.\* must give the student whose pass rates there are, \w{12}, got"),
        (
            {"prompts__answers": ""},
            r"^pass_rates\.weight must be 'uniform' without answers to prompts to train on, got",
        ),
        (
            {"prompts__answers": "", "pass_rates__weight": "uniform", "teacher__privileged": "{question}{answer}"},
            r"^teacher\.privileged must be '' without answers to prompts to train on, got '\{question\}",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call("train", *typed(workdir, text, **shared | changes))
    assert len(built) == 1


def test_misspelt_names_are_said_before_anything_is_asked(call, text, tmp_path):
    for name, value in {"weight": "pacd", "estimator": "rau"}.items():
        with pytest.raises(ValueError, match=rf"^pass_rates\.{name} must be a known name .*, got '{value}'"):
            call("curate", *typed(tmp_path / "a", text, **{f"pass_rates__{name}": value}))
    assert not (tmp_path / "a").exists()


def test_gradients_are_measured_per_pass_rate(call, text, tmp_path):
    changes = {"prompts__answers": "gold", "teacher__privileged": "{question} It is {answer}."}
    out = call("curate", *typed(tmp_path / "a", text, **changes), "--snr=3").splitlines()
    measured = [json.loads(line) for line in (tmp_path / "a" / "snr.jsonl").read_text().splitlines()]
    summary = load_weights(tmp_path / "a").summary
    want = {line["rate"]: min(3, line["problems"]) for line in summary["histogram"] if line["problems"]}
    assert {line["name"]: line["problems"] for line in measured} == want
    at = next(i for i, line in enumerate(out) if "SNR" in line)
    assert [line.split()[0] for line in out[at + 1 : at + 1 + len(want)]] == list(want)
    assert out[at + 1 + len(want)].startswith("one small step with these weights gains ")
    page = (tmp_path / "a" / "snr.html").read_text()
    assert f"the SNR as a picture: {tmp_path / 'a' / 'snr.html'}" in out[at + 2 + len(want)]
    assert all(f"<tr><th>{line['rate']}</th><td>{line['problems']}</td>" in page for line in summary["histogram"])
    assert (tmp_path / "a" / "snr.svg").read_text().startswith("<svg ")
    assert all(line["noise"][0] > 0 for line in measured if line["problems"] > 1)
    with pytest.raises(ValueError, match=r"prompts\.answers must be set with --snr, got ''"):
        call("curate", *typed(tmp_path / "b", text), "--snr=3")
