"""launch.generate as a user types it: who answers, what a second start does, what a kill leaves, what is refused."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kdjax import config
from kdjax.data.prompts import Prompt
from kdjax.data.responses import prompt_ids
from kdjax.generation import generate as generating
from kdjax.generation.batching import Completion, Speaker
from kdjax.generation.sampling import Sampling
from kdjax.generation.store import ROLLOUTS, Rollout, read_manifest, read_rollouts
from kdjax.models import synthetic
from kdjax.sharding import Rules

ROOT = pathlib.Path(__file__).parents[2]
TURN = {"role": "user", "content": "Sure?"}
VALUES = {
    "teacher.path": "synthetic",
    "student.path": "",
    "student.init.kind": "cut",
    "student.init.layers": 1,
    "data.seq_len": 32,
    "prompts.size": 0,
    "generation.samples": 2,
    "generation.new_tokens": 8,
    "generation.batch_size": 4,
}


@pytest.fixture
def typed(tmp_path):
    """typed(out, a__b=value) -> the arguments of a command."""
    text, prompts = tmp_path / "text.jsonl", tmp_path / "prompts.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"{i} bottles of beer on the wall; take {i}."}) for i in range(40)))
    rows = [
        {"id": f"p{i}", "prompt": f"What is {i} + {i}" + "?" * (i % 3 * 9), "answer": str(2 * i)} for i in range(12)
    ]
    prompts.write_text("\n".join(map(json.dumps, rows)))

    def arguments(out, *more, **changes):
        values = VALUES | {"data.path": text, "prompts.path": prompts}
        values |= {name.replace("__", "."): value for name, value in changes.items()}
        return [
            f"--config={ROOT}/configs/tasks/arith.py",
            f"--out={tmp_path / out}",
            *(f"--config.{name}={value}" for name, value in values.items()),
            *more,
        ]

    return arguments


def answers(folder):
    """(id, sample) -> the rest of the answer."""
    return {rollout.key: rollout for rollout in read_rollouts(folder)}


def test_a_student_answers_and_goes_on_with_more_samples_in_other_batches(call, typed, tmp_path, monkeypatch):
    said = call("generate", *typed("a"))
    first = answers(tmp_path / "a")
    prompts = {name for name, _ in first}
    assert 4 <= len(prompts) < 12, "the train prompts alone"
    assert set(first) == {(name, sample) for name in prompts for sample in range(2)}
    assert f"{len(first)} of {len(first)} answers to {len(prompts)} prompts" in said
    assert " tokens/s" in said
    assert all(len(rollout.tokens) <= 8 and rollout.logp < 0 for rollout in first.values() if rollout.tokens)
    assert len({rollout.response for rollout in first.values()}) > len(prompts)
    before = (tmp_path / "a" / ROLLOUTS).read_bytes()

    call("generate", *typed("a", "--samples=3", generation__batch_size=3))
    assert (tmp_path / "a" / ROLLOUTS).read_bytes().startswith(before)
    second = answers(tmp_path / "a")
    assert first.items() <= second.items()
    assert set(second) == {(name, sample) for name in prompts for sample in range(3)}

    call("generate", *typed("b", "--samples=3", generation__batch_size=8))
    whole = answers(tmp_path / "b")
    assert {key: (r.response, r.tokens) for key, r in second.items()} == {
        key: (r.response, r.tokens) for key, r in whole.items()
    }

    def run(*_, **__):
        raise RuntimeError("the model was run")

    monkeypatch.setattr(generating, "rollouts", run)
    assert "nothing was missing" in call("generate", *typed("a"))
    message = "--out must be empty or of the same model, prompts and settings, .*: temperature is 1.0, there it is 0.7"
    with pytest.raises(ValueError, match=message):
        call("generate", *typed("a", generation__temperature=1.0))


def test_the_teacher_answers_the_heldout_prompts(call, typed, tmp_path):
    call("generate", *typed("a", "--model=teacher", "--split=heldout", "--samples=1"))
    call("generate", *typed("b", "--model=teacher", "--split=all", "--samples=1"))
    heldout, every = answers(tmp_path / "a"), answers(tmp_path / "b")
    assert 0 < len(heldout) < len(every) == 12
    assert heldout.items() <= every.items()
    made = read_manifest(tmp_path / "a")
    assert made["made"]["model"].startswith("synthetic")
    assert made["depends"]["temperature"] == 0.7


def test_the_student_of_a_run(call, typed, tmp_path):
    run = [a for a in typed("a") if not a.startswith("--out")]
    short = {"train.steps": 1, "train.batch_size": 4, "optim.warmup": 0, "eval.rows": 4, "eval.completions": 0}
    short |= {"log.tensorboard": False, "checkpoint.every": 1}
    call("train", *run, *(f"--config.{name}={value}" for name, value in short.items()), f"--workdir={tmp_path / 'run'}")
    call("generate", *typed("a", f"--workdir={tmp_path / 'run'}", "--samples=1"))
    assert answers(tmp_path / "a")
    assert read_manifest(tmp_path / "a")["made"]["model"] == f"the student of {tmp_path / 'run'}, step 1"


def test_a_script_answers(call, typed, tmp_path):
    call("generate", *typed("a", "--model=scripted", "--style=equation", "--samples=1"))
    assert all(re.fullmatch(r"(\d+) \+ \1 = \d+", one.response) for one in answers(tmp_path / "a").values())
    assert read_manifest(tmp_path / "a")["depends"]["model"] == "scripted: equation"
    with pytest.raises(ValueError, match="^--style must be a known name .*, got 'poem'. Known: bare, "):
        call("generate", *typed("b", "--model=scripted", "--style=poem"))


def test_kill_9_loses_and_repeats_nothing(call, typed, tmp_path):
    many = ("--samples=30",)
    command = [sys.executable, "-m", "launch.generate", *typed("a", *many, generation__batch_size=2)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    path, end = tmp_path / "a" / ROLLOUTS, time.monotonic() + 240
    while not path.is_file() or path.read_bytes().count(b"\n") < 20:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    there = answers(tmp_path / "a")
    call("generate", *typed("a", *many))
    call("generate", *typed("b", *many))
    found = answers(tmp_path / "a")  # reading it, a repeated answer is an error
    assert len(there) < len(found)
    assert there.items() <= found.items()
    assert {k: (r.response, r.tokens) for k, r in found.items()} == {
        k: (r.response, r.tokens) for k, r in answers(tmp_path / "b").items()
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        asked = body["messages"][-1]["content"]
        bad = self.server.broken in asked
        choice = {"message": {"content": "same"}, "finish_reason": "stop"}
        content = json.dumps({"choices": [choice], "usage": {"completion_tokens": 5}}).encode()
        self.send_response(422 if bad else 200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def test_a_served_teacher_answers_and_what_failed_is_tried_again(call, typed, tmp_path, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.broken, server.daemon_threads = [], "9 + 9", True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        served = {"served__base_url": url, "served__model": "big", "data__system_prompt": "Be brief."}
        command = typed("a", "--model=served", "--split=all", **served)
        try:
            said = call("generate", *command)
            assert "22 of 24 answers to 12 prompts" in said
            assert "now: 24 asked for, 110 tokens in" in said
            assert "note: the answers to each of 11 prompts are all the same, at temperature 0.7" in said
            assert "failed, 2 x: status 422: " in said
            assert "2 failed; start again with the same command" in said
            assert len(server.asked) == 24
            assert server.asked[0]["messages"][0] == {"role": "system", "content": "Be brief."}
            assert server.asked[0]["messages"][1]["content"].endswith(" Reply with the answer only.")
            server.broken = "nothing"
            assert "24 of 24 answers" in call("generate", *command)
            assert len(server.asked) == 26
        finally:
            server.shutdown()
            thread.join()
    assert all(rollout.response == "same" for rollout in answers(tmp_path / "a").values())
    assert read_manifest(tmp_path / "a")["depends"]["model"] == "served: big"
    assert b"sk-very-secret" not in b"".join(path.read_bytes() for path in (tmp_path / "a").iterdir())


def test_a_stop_by_hand_says_how_to_go_on(call, typed, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(generating, "rollouts", stop)
    assert f"stopped; what was answered is in {tmp_path / 'a'}, the same command" in call("generate", *typed("a"))


@pytest.mark.parametrize("template", [True, False])
def test_a_server_is_shown_what_a_model_here_is(template):
    data = config.Data(chat_template=template, system_prompt="Be brief.")
    prompt = Prompt("a", ({"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": "8"}, TURN))
    for asked in (prompt, Prompt("b", "3 + 4?")):
        shown, tokenizer = generating._shown(asked, data), synthetic.make_tokenizer()
        ids = prompt_ids(asked, tokenizer, chat_template=template, system_prompt="Be brief.")
        text = tokenizer.apply_chat_template(shown, add_generation_prompt=True, tokenize=False) if template else shown
        assert text == tokenizer.decode(ids)


def test_a_model_is_asked_with_the_settings_of_generation(monkeypatch):
    asks = []

    def rollouts(model, ids, numbers, settings, **rest):
        asks.append((ids, numbers, settings, rest))
        yield 1, 4, Completion("so", (7, 8), -2.0, "stop")

    monkeypatch.setattr(generating, "rollouts", rollouts)
    prompts, said = [Prompt("a", "3 + 4?"), Prompt("b", "5?")], []
    settings = config.Generation(
        temperature=0.7, top_p=0.9, top_k=20, min_p=0.1, new_tokens=7, stop=("##",), batch_size=3, seed=5
    )
    speaker = Speaker(synthetic.config(), {}, {}, synthetic.make_tokenizer(), (2,), 259, Rules(), "float32")
    source = generating.of_model(speaker, prompts, settings, config.Data())
    source([(1, 4), (0, 0), (1, 2)], lambda answer, count: said.append((answer, count)))
    ids = [prompt_ids(prompt, speaker.tokenizer) for prompt in prompts]
    kept = {"new_tokens": 7, "names": ["a", "b"], "seed": 5, "stop": ("##",), "batch_size": 3}
    assert asks == [(ids, [[0], [4, 2]], Sampling(temperature=0.7, top_p=0.9, top_k=20, min_p=0.1), kept)]
    assert said == [(Rollout("b", 4, "so", "stop", -2.0, (7, 8)), 2)]


def test_what_must_be_given(call, typed):
    with pytest.raises(ValueError, match="--out must be set"):
        call("generate", *[a for a in typed("a") if not a.startswith("--out")])
    with pytest.raises(ValueError, match="prompts.path must name the prompts, got ''"):
        call("generate", *typed("a", prompts__path=""))
    with pytest.raises(ValueError, match="served.base_url must be set, got ''"):
        call("generate", *typed("a", "--model=served"))
    with pytest.raises(ValueError, match="generation.samples must be 1 with generation.temperature=0, got 2; all"):
        call("generate", *typed("a", generation__temperature=0.0))
    own = {"student__path": "synthetic", "student__init__kind": "own"}
    with pytest.raises(ValueError, match="teacher.path must be set, got ''; there is nobody to ask"):
        call("generate", *typed("a", "--model=teacher", teacher__path="", **own))
