"""Training from what a server said: launch.generate, cache_teacher and train, against the same model as a live teacher.

The server is a small one on loopback whose log-probabilities are computed here, in float64, from the weights of the
model `synthetic`; nothing of kdjax's own targets goes into them.
"""

import json
import pathlib
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
LISTED, LENGTH = 12, 64
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
        content = json.dumps({"choices": [self.server.choice(body)]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


class Model:
    """The model `synthetic` behind the chat API: it says one of SAID and lists the likeliest tokens at each of them."""

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

    def choice(self, body):
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
        made.choice, made.daemon_threads = Model().choice, True
        thread = threading.Thread(target=made.serve_forever, args=(0.02,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def typed(paths, server):
    """typed(*more, a__b=value) -> the arguments of a command."""

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
