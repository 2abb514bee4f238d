"""Training from what a server says of its own answers or of given text, against the same model as a live teacher.

The server is a small one on loopback whose log-probabilities are computed here, in float64, from the weights of the
model `synthetic`; nothing of kdjax's own targets goes into them.
"""

import json
import os
import pathlib
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kdjax.build
from kdjax import models
from kdjax.data.prompts import Prompt
from kdjax.data.responses import prompt_ids
from kdjax.models import synthetic
from kdjax.models.hf_io import save_hf
from kdjax.models.prune import cut
from kdjax.run_log import read_lines
from kdjax.teacher.cache import open_cache

pytest.importorskip("openai")

ROOT = pathlib.Path(__file__).parents[2]
LISTED, LENGTH, KEY = 12, 64, "sk-very-secret-0123456789"
# ids 0..2 are special; then come the bytes that print as themselves, then the others
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = dict(enumerate([*PRINTED, *sorted(set(range(256)) - set(PRINTED))], 3))
SAID = ("It is 7", "\u00e9 8?", "No idea at all", "9")
VALUES = {
    "student.init.kind": "own",
    "data.seq_len": LENGTH,
    "data.max_train_tokens": 0,
    "prompts.size": 0,
    "prompts.instruction": "",
    "generation.samples": 2,
    "generation.temperature": 1.0,
    "served.model": "big",
    "served.top_logprobs": LISTED,
    "classes.kind": "ghost_tail",
    "classes.entries": 8,
    "cache.entropy": False,
    "cache.rows_per_shard": 8,
    "selection.policy": "all",
    "train.batch_size": 4,
    "train.steps": 3,
    "train.log_every": 1,
    "optim.warmup": 1,
    "eval.rows": 2,
    "eval.completions": 0,
    "log.tensorboard": False,
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append((body, self.headers["authorization"]))
        fault = self.server.fault(len(self.server.seen))
        choice = self.server.text if "prompt" in body else self.server.answer
        content = fault.encode() if fault else json.dumps({"choices": [choice(body)]}).encode()
        self.send_response(400 if fault else 200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


class Model:
    """The model `synthetic` behind a server's API, with the likeliest tokens at each place.

    answer: to a chat, one of SAID. text: what it says of token ids that are given, as vLLM writes it.
    """

    def __init__(self):
        self.cfg, self.params, self.tokenizer = synthetic.config(), synthetic.make_params(), synthetic.make_tokenizer()
        self.hidden = jax.jit(lambda tokens: models.hidden(self.cfg, self.params, *(tokens, *self.places(tokens))))
        self.lock = threading.Lock()

    def places(self, tokens):
        return jnp.ones_like(tokens), jnp.arange(LENGTH)[None]

    def logp(self, ids):
        """float64 [n, 264] of the token after each of ids; later ones do not matter to a causal model."""
        padded = jnp.array([[*ids, *[0] * (LENGTH - len(ids))]])
        hidden = np.asarray(self.hidden(padded)[0, : len(ids)], np.float64)
        logits = hidden @ np.asarray(self.params["embed"], np.float64).T
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    def entry(self, number, logp):
        if number not in BYTES and number > 2:  # a column of the head without a token
            return {"token": f"token_id:{number}", "logprob": float(logp)}
        raw = self.tokenizer.decode([number]).encode() if number < 3 else bytes([BYTES[number]])
        return {"token": raw.decode(errors="replace"), "bytes": list(raw), "logprob": float(logp)}

    def text(self, body):
        ids, listed = body["prompt"], [None]
        with self.lock:
            logp = self.logp(ids)
        for number, at in zip(ids[1:], logp, strict=False):
            named = dict.fromkeys([*np.argsort(-at)[: body["prompt_logprobs"]].tolist(), number])
            writes = {n: self.tokenizer.decode([n]) for n in named}
            listed.append({str(n): {"logprob": float(at[n]), "decoded_token": writes[n]} for n in named})
        return {"text": "!", "finish_reason": "length", "prompt_logprobs": listed}

    def answer(self, body):
        prompt = prompt_ids(Prompt("", tuple(body["messages"])), self.tokenizer)
        text = SAID[body["seed"] % len(SAID)]
        answer = [*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id]
        with self.lock:
            logp = self.logp([*prompt, *answer])[len(prompt) - 1 :]
        content = []
        for number, at in zip(answer, logp, strict=False):
            best = [self.entry(n, at[n]) for n in np.argsort(-at)[: body["top_logprobs"]].tolist()]
            content.append(self.entry(number, at[number]) | {"top_logprobs": best})
        return {"message": {"content": text}, "finish_reason": "stop", "logprobs": {"content": content}}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A directory with text, prompts and a student: the first two layers of the teacher."""
    root = tmp_path_factory.mktemp("served")
    text = [{"text": f"{i} bottles of beer on the wall; take {i}."} for i in range(30)]
    asked = [{"id": f"p{i}", "prompt": f"{i} + {i}?", "answer": str(2 * i)} for i in range(12)]
    for name, rows in (("text", text), ("prompts", asked)):
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg, params = cut(synthetic.config(), synthetic.make_params(), (0, 7))
    save_hf(root / "student", cfg, params, synthetic.make_tokenizer())
    return root


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        model, made.daemon_threads = Model(), True
        made.answer, made.text = model.answer, model.text
        thread = threading.Thread(target=made.serve_forever, args=(0.02,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def typed(paths, server, monkeypatch):
    """typed(*more, a__b=value) -> the arguments of a command."""
    server.seen, server.fault = [], lambda number: ""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def arguments(*more, **changes):
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        values = VALUES | {"data.path": paths / "text.jsonl", "prompts.path": paths / "prompts.jsonl"}
        values |= {"served.base_url": url, "teacher.path": "", "student.path": paths / "student"}
        values |= {"teacher.source": "cache", "prompts.answers": paths / "answers"}
        values |= {name.replace("__", "."): value for name, value in changes.items()}
        return [f"--config={ROOT}/configs/se_kd.py", *(f"--config.{n}={v}" for n, v in values.items()), *more]

    return arguments


def losses(workdir):
    return [line["loss"] for line in read_lines(workdir / "metrics.jsonl") if "loss" in line]


def test_the_loss_is_that_of_the_live_teacher(call, typed, paths, monkeypatch):
    said = call("generate", *typed("--model=served", f"--out={paths / 'answers'}"))
    assert "failed" not in said
    loaded, load_model = [], kdjax.build.load_model

    def load(path, **more):
        loaded.append(str(path))
        return load_model(path, **more)

    monkeypatch.setattr(kdjax.build, "load_model", load)
    said = call("cache_teacher", *typed(f"--workdir={paths / 'run'}"))
    call("train", *typed(f"--workdir={paths / 'run'}"))
    assert set(loaded) == {str(paths / "student")}, "no teacher is read"
    reader = open_cache(paths / "run/cache")
    assert reader.header.teacher.startswith("served: big, ")
    assert not reader.header.entropy
    assert reader.summary()["positions"] == reader.summary()["eligible"] > 100, "the ends are stored as well"
    assert f"{reader.summary()['positions']:,} positions" in said
    steps = list(read_lines(paths / "run/metrics.jsonl"))
    assert all(line["cache_misses"] == 0 for line in steps if "loss" in line)

    checked = call("cache_teacher", *typed(f"--inspect={paths / 'run/cache'}", "--verify=4"))
    assert "have the same entries (100.0000%)" in checked
    found = (paths / "answers/rollouts.jsonl").read_text()
    (paths / "answers/rollouts.jsonl").write_text(found.replace("-0.", "-1.", 1))
    with pytest.raises(ValueError, match=r"was written for something else: teacher is 'served: big, \w+' in the cache"):
        call("train", *typed(f"--workdir={paths / 'run'}"))
    (paths / "answers/rollouts.jsonl").write_text(found)
    with pytest.raises(ValueError, match="the model was 'served: big', not the served.model 'other'"):
        call("train", *typed(f"--workdir={paths / 'run'}", served__model="other"))

    live = {"teacher__source": "live", "teacher__path": "synthetic", "served__top_logprobs": 0}
    call("train", *typed(f"--workdir={paths / 'live'}", **live))
    assert len(losses(paths / "run")) == 3
    np.testing.assert_allclose(losses(paths / "run"), losses(paths / "live"), rtol=1e-3)
    assert losses(paths / "run")[0] > 0.1, "there is something to learn"


# --- what a server says of text that is given

TEXT = {"served__top_logprobs": 0, "served__prompt_logprobs": LISTED, "prompts__answers": ""}
LIVE = {"teacher__source": "live", "teacher__path": "synthetic", "served__prompt_logprobs": 0}


def sent(server):
    return [tuple(body["prompt"]) for body, _ in server.seen]


@pytest.mark.parametrize("answers", ["", "gold"])
def test_given_text_has_the_loss_of_the_live_teacher(call, typed, paths, server, answers):
    run, live = paths / f"run_{answers}", paths / f"live_{answers}"
    changes = TEXT | {"prompts__answers": answers, "cache__label_logp": True}
    said = call("cache_teacher", *typed(f"--workdir={run}", **changes))
    assert f"next: python -m launch.train --config={ROOT}/configs/se_kd.py" in said
    reader = open_cache(run / "cache")
    assert reader.header.teacher == "served: big"
    assert reader.summary()["positions"] == reader.summary()["eligible"] > (20 if answers else 500)
    texts = sent(server)
    assert len(texts) == len(set(texts)), "nothing is paid twice"
    if not answers:
        assert len(texts) > 1.5 * reader.header.rows, "several documents a row"

    server.seen.clear()
    call("train", *typed(f"--workdir={run}", **changes))
    assert not server.seen, "training reads the cache alone"
    steps = list(read_lines(run / "metrics.jsonl"))
    assert all(line["cache_misses"] == 0 for line in steps if "loss" in line)
    call("train", *typed(f"--workdir={live}", **changes | LIVE))
    assert len(losses(run)) == 3
    np.testing.assert_allclose(losses(run), losses(live), rtol=1e-3)
    assert losses(run)[0] > 0.1, "there is something to learn"
    said = json.loads((run / "report_data.json").read_text())["summary"]["teacher"]
    assert said == "big, not loaded: ghost_tail entries from a cache"

    if answers:
        return
    with pytest.raises(ValueError, match="written for something else: teacher is 'served: big' in the cache and 'serv"):
        call("train", *typed(f"--workdir={run}", **changes, served__model="other"))
    with pytest.raises(ValueError, match="holds another cache: teacher is 'served: big' in the cache and 'served: oth"):
        call("cache_teacher", *typed(f"--workdir={run}", **changes, served__model="other"))
    assert "no row is run again" in call("cache_teacher", f"--inspect={run / 'cache'}", "--verify=4")
    assert not server.seen


def test_what_is_whole_is_not_asked_for_again(call, typed, paths, server):
    """A server at fault, then kill -9, then the rest: each row of a whole shard is paid for once."""
    changes = TEXT | {"cache__rows_per_shard": 3, "served__concurrency": 2}
    arguments = typed(f"--workdir={paths / 'killed'}", **changes)
    cache = paths / "killed/cache"
    server.fault = lambda number: f"Requested prompt logprobs, {KEY}" if number > 12 else ""
    message = r"got nothing of row \d+: status 400: Requested prompt logprobs, \[key\]\. vLLM lists at most 20 tokens"
    with pytest.raises(ValueError, match=message):
        call("cache_teacher", *arguments)
    first = {path.name: path.stat().st_mtime_ns for path in cache.glob("shard-*.kdc")}
    assert first
    asked = sent(server)
    server.seen.clear()

    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch.cache_teacher", *arguments]
    started = []

    def kill(number):
        if number == 12:
            started[0].kill()
        return ""

    server.fault = kill
    with open(paths / "log", "w") as log:
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
        assert started[0].wait(300) == -9, (paths / "log").read_text()
    second = {path.name: path.stat().st_mtime_ns for path in cache.glob("shard-*.kdc")}
    assert len(second) > len(first)
    between = sent(server)
    server.seen.clear()

    server.fault = lambda number: ""
    call("cache_teacher", *arguments)
    third = {path.name: path.stat().st_mtime_ns for path in cache.glob("shard-*.kdc")}
    assert len(third) > len(second)
    assert third | second | first == third, "what was whole is as it was"
    rows = open_cache(cache).header.rows_per_shard
    most = 3 * rows  # segments of a shard
    assert len(set(asked) & set(between)) <= most
    assert len(set(asked + between) & set(sent(server))) <= 2 * most
    assert not {*asked[:3], *between[:3]} & set(sent(server)), "those of whole shards"
    server.seen.clear()
    assert "nothing to do, all " in call("cache_teacher", *arguments)
    assert not server.seen
    whole = typed(f"--workdir={paths / 'at_once'}", **changes)
    call("cache_teacher", *whole)
    assert {key for _, key in server.seen} == {f"Bearer {KEY}"}
    for name in third:
        assert (cache / name).read_bytes() == (paths / "at_once/cache" / name).read_bytes()
    files = [path for folder in ("killed", "at_once") for path in (paths / folder).rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not [path for path in [*files, paths / "log"] if KEY.encode() in path.read_bytes()]


def test_processes_that_share_a_mesh_ask_for_their_own_shards_alone(call, typed, paths, server, monkeypatch):
    from launch import processes

    for name, does in {
        "several": lambda: True,
        "place": lambda: (1, 2),
        "first": lambda: True,
        "wait": lambda what: None,
        "gathered": lambda missing: np.stack([np.ones_like(missing), missing]),  # the other has begun nothing
    }.items():
        monkeypatch.setattr(processes, name, does)
    said = call("cache_teacher", *typed(f"--workdir={paths / 'second'}", **TEXT))
    assert open_cache(paths / "second/cache", partial=True).present == (1,)
    assert said.startswith("8 rows, ")
    assert len(sent(server)) <= 8 * 3


def test_a_server_that_cannot_be_asked_is_said_before_anything_is_written(call, typed, paths):
    for url in ("", "http://me:hush@x/v1"):
        with pytest.raises(ValueError, match="served.base_url must be") as raised:
            call("cache_teacher", *typed(f"--workdir={paths / 'none'}", **TEXT, served__base_url=url))
        assert "hush" not in str(raised.value)
    assert not (paths / "none").exists()
