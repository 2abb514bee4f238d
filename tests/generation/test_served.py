"""A served teacher against a server on loopback that does all that servers do: every prompt ends answered or failed."""

import contextlib
import importlib.util
import itertools
import json
import logging
import math
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from kdjax import config
from kdjax.generation import complete, served, store
from kdjax.generation.logprobs import sparse_targets, token_ids
from kdjax.generation.served import Ask, answer, failures, score, seed_of
from kdjax.models import hf_io, synthetic

pytest.importorskip("openai")

PLAIN = config.Generation()
KEY = "sk-very-secret-0123456789"
MESSAGES = ({"role": "user", "content": "What is 3 + 4?"},)


def chat(text="7", finish="stop", **fields):
    body = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish, **fields}]}
    return 200, {}, json.dumps(body | {"usage": {"completion_tokens": 3}}).encode()


DRIBBLE = chat()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            number = len(server.seen)
            server.seen.append(
                (time.monotonic(), self.path, body, {name.lower(): value for name, value in self.headers.items()})
            )
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            self.reply(server.behave(number, body))
        finally:
            with server.lock:
                server.now -= 1

    def reply(self, does):
        if does == "die":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        status, headers, content = does
        self.send_response(status)
        for name, value in (
            {"content-type": "application/json", "content-length": str(len(content))} | headers
        ).items():
            self.send_header(name, value)
        self.end_headers()
        for at in range(0, len(content), 20 if does is DRIBBLE else 1000):
            self.wfile.write(content[at : at + (20 if does is DRIBBLE else 1000)])
            time.sleep(0.1 if does is DRIBBLE else 0)
        self.close_connection = "content-length" in headers

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass  # a client that hangs up is part of the tests


@pytest.fixture
def serve(monkeypatch):
    """serve(behave) -> the server; behave(number of the request, its body) -> (status, headers, content) or "die"."""
    monkeypatch.setattr(served, "FIRST_PAUSE", 0.02)
    monkeypatch.setenv("KDJAX_TEST_KEY", KEY)
    started = []

    def start(behave):
        server = Server(("127.0.0.1", 0), Handler)
        server.behave, server.seen, server.lock, server.now, server.most = behave, [], threading.Lock(), 0, 0
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        started.append((server, thread))
        return server

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()


def settings(server, **changes):
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    values = {"api_key_env": "KDJAX_TEST_KEY", "timeout": 5.0, "retries": 3, "concurrency": 4}
    return config.Served(base_url=url, model="big", **values | changes)


def ask(server, asks, made=PLAIN, **changes):
    """The rollouts by (id, sample)."""
    got = []
    answer(asks, settings(server, **changes), made, lambda rollout, tokens: got.append((rollout, tokens)))
    assert sorted(rollout.key for rollout, _ in got) == sorted((a.id, a.sample) for a in asks)
    return {rollout.key: rollout for rollout, _ in got}


def one(server, made=PLAIN, prompt=MESSAGES, **changes):
    return ask(server, [Ask("a", 0, prompt)], made, **changes)["a", 0]


def test_what_is_asked_and_what_comes_of_it(serve):
    server = serve(lambda number, body: chat("7", "length"))
    made = config.Generation(new_tokens=9, temperature=0.7, top_p=0.9, stop=("\n",), seed=3)
    assert one(server, made) == store.Rollout("a", 0, "7", "length")
    ((_, path, body, headers),) = server.seen
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "big",
        "messages": [{"role": "user", "content": "What is 3 + 4?"}],
        "max_tokens": 9,
        "temperature": 0.7,
        "top_p": 0.9,
        "stop": ["\n"],
        "seed": seed_of(3, "a", 0),
    }
    assert headers["authorization"] == f"Bearer {KEY}"


def test_a_text_is_gone_on_with_and_what_openai_does_not_know_is_sent_if_it_is_set(serve):
    body = {"choices": [{"text": " 7", "finish_reason": "stop"}]}
    server = serve(lambda number, _: (200, {}, json.dumps(body).encode()))
    made = config.Generation(top_k=20, min_p=0.05)
    assert one(server, made, prompt="3 + 4 =", top_logprobs=5).response == " 7"
    ((_, path, sent, _),) = server.seen
    assert path == "/v1/completions"
    assert sent["prompt"] == "3 + 4 ="
    assert [sent[name] for name in ("top_k", "min_p", "logprobs")] == [20, 0.05, 5]


def test_seeds_differ_between_prompts_and_samples_and_fit():
    seeds = {seed_of(seed, name, sample) for seed in (0, 1) for name in ("a", "b") for sample in range(50)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(0, "a", 0) == seed_of(0, "a", 0)


FAULTS = {
    "slow": (lambda: time.sleep(0.8) or chat("late"), "no answer within 0.4 s"),
    "dribbles": (lambda: DRIBBLE, "no answer within 0.4 s"),
    "dies": (lambda: "die", "connection lost: "),
    "429": (lambda: (429, {}, b'{"error": {"message": "slow down"}}'), "status 429: .*slow down"),
    "500": (lambda: (500, {}, b"oops"), "status 500: "),
    "malformed": (lambda: (200, {}, b'{"choices": [{"mess'), "no answer in the reply, JSONDecodeError.*mess"),
    "no JSON": (lambda: (200, {"content-type": "text/html"}, b"<html>"), "no answer in the reply, .*<html>"),
    "no choice": (lambda: (200, {}, b'{"choices": []}'), "no answer in the reply, IndexError"),
    "an error with 200": (lambda: (200, {}, b'{"error": {"message": "full"}}'), "no answer in the reply, .*full"),
    "a list": (lambda: (200, {}, b"[1]"), "no answer in the reply, TypeError"),
    "truncated": (lambda: (200, {"content-length": "500"}, chat()[2]), "connection lost: "),
    "empty": (lambda: chat(""), "the text is '', with finish_reason 'stop'"),
    "none": (lambda: chat(None), "the text is None"),
    "unfinished": (lambda: chat("7", None), "finish_reason is None"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_trouble_that_passes_costs_an_attempt(serve, fault):
    does, _ = FAULTS[fault]
    server = serve(lambda number, body: does() if number < 2 else chat("7"))
    assert one(server, timeout=0.4) == store.Rollout("a", 0, "7", "stop")
    assert len(server.seen) == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_trouble_that_stays_is_listed_with_its_reason(serve, fault):
    does, reason = FAULTS[fault]
    server = serve(lambda number, body: does() if body["messages"][0]["content"] == "bad" else chat("7"))
    bad = ({"role": "user", "content": "bad"},)
    asks = [Ask("good", 0, MESSAGES), Ask("bad", 0, bad), Ask("good", 1, MESSAGES)]
    found = ask(server, asks, timeout=0.4, retries=1)
    assert found["good", 0].response == found["good", 1].response == "7"
    failed = found["bad", 0]
    assert (failed.finish, failed.response) == ("failed", "")
    assert re.search(f"^{reason}.* \\(after 2 attempts\\)$", failed.reason), failed.reason
    assert failures(found.values()) == {failed.reason: 1}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_does_not_pass_is_not_tried_again(serve, status):
    server = serve(lambda number, body: (status, {}, b'{"detail": "no such thing"}'))
    failed = one(server)
    assert failed.finish == "failed"
    assert failed.reason.startswith(f"status {status}: ")
    assert "no such thing" in failed.reason
    assert len(server.seen) == 1


def test_half_a_pair_of_surrogates_is_replaced(serve):
    server = serve(lambda number, body: chat("7 \ud83d"))
    assert one(server).response == "7 ?"


def test_a_filtered_answer_is_failed(serve):
    server = serve(lambda number, body: chat("...", "content_filter"))
    assert one(server).reason == "finish_reason is 'content_filter'"
    assert len(server.seen) == 1


def test_pauses_grow_and_retry_after_is_respected(serve, monkeypatch):
    monkeypatch.setattr(served, "FIRST_PAUSE", 0.1)
    server = serve(lambda number, body: (503, {}, b"") if number < 3 else chat())
    assert one(server).response == "7"
    at = [seen[0] for seen in server.seen]
    first, second, third = (b - a for a, b in itertools.pairwise(at))
    assert first >= 0.05
    assert second >= 0.1
    assert third >= 0.2
    server = serve(lambda number, body: (429, {"retry-after": "0.7"}, b"") if number == 0 else chat())
    assert one(server).response == "7"
    assert server.seen[1][0] - server.seen[0][0] >= 0.7
    server = serve(lambda number, body: (429, {"retry-after": "86400"}, b"come back tomorrow"))
    assert "status 429" in one(server).reason
    assert len(server.seen) == 1


def test_retry_after_may_be_a_date():
    future = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert 97 <= served._retry_after({"retry-after": future}) <= 101
    assert served._retry_after({"retry-after": "Thu, 01 Jan 2026 00:00:00 GMT"}) == 0
    assert served._retry_after({"retry-after": "soon"}) is None
    assert served._retry_after({}) is None


def test_pauses_have_a_limit_and_differ():
    pauses = {served._pause(attempt) for attempt in (0, 0, 0, 50)}
    assert len(pauses) == 4
    assert max(pauses) <= served.LONGEST_PAUSE


def test_requests_are_under_way_together_and_no_more_than_asked_for(serve):
    def slow(number, body):
        time.sleep(0.1)
        return chat()

    server = serve(slow)
    start = time.monotonic()
    ask(server, [Ask("a", sample, MESSAGES) for sample in range(12)], concurrency=3)
    assert server.most == 3
    assert time.monotonic() - start < 1.1


def test_a_server_that_is_gone_does_not_hold_up_the_rest(serve):
    server = serve(lambda number, body: "die")
    asks = [Ask(f"{number}", 0, MESSAGES) for number in range(60)]
    found = ask(server, asks, retries=0, concurrency=2)
    reasons = failures(found.values())
    tried = 2 * served.ROUNDS_LOST
    assert tried <= len(server.seen) <= tried + 1
    assert sum(count for reason, count in reasons.items() if reason.startswith("not tried, because")) >= 59 - tried
    assert sum(reasons.values()) == 60


def test_a_server_that_loses_some_goes_on_to_be_asked(serve):
    server = serve(lambda number, body: chat() if number % 4 == 3 else "die")
    found = ask(server, [Ask(f"{number}", 0, MESSAGES) for number in range(24)], retries=0, concurrency=1)
    assert len(server.seen) == 24
    assert sum(rollout.finish == "stop" for rollout in found.values()) == 6


def test_prompts_at_fault_themselves_do_not_stop_the_others(serve):
    server = serve(lambda number, body: (400, {}, b"too long") if number < 30 else chat())
    found = ask(server, [Ask(f"{number}", 0, MESSAGES) for number in range(40)], concurrency=2)
    assert sum(rollout.finish == "stop" for rollout in found.values()) == 10


def test_a_server_that_wants_the_other_name_of_the_limit(serve):
    complaint = b'{"error": {"message": "max_tokens is not supported, use max_completion_tokens"}}'
    server = serve(lambda number, body: (400, {}, complaint) if "max_tokens" in body else chat())
    found = ask(server, [Ask("a", sample, MESSAGES) for sample in range(3)], concurrency=1)
    assert [rollout.response for rollout in found.values()] == ["7"] * 3
    assert ["max_tokens" in body for _, _, body, _ in server.seen] == [True, False, False, False]


def test_log_probabilities_of_a_chat(serve):
    content = [
        {"token": "7", "logprob": -0.25, "bytes": [55], "top_logprobs": [{"token": "7", "logprob": -0.25}]},
        {
            "token": "\ufffd",
            "logprob": -1.5,
            "bytes": [195],
            "top_logprobs": [{"token": "\ufffd", "logprob": -1.5, "bytes": [195]}, {"token": "x", "logprob": -9999.0}],
        },
    ]
    server = serve(lambda number, _: chat("7", logprobs={"content": content}))
    found = one(server, top_logprobs=2, prompt_logprobs=2)
    sent = server.seen[0][2]
    assert (sent["logprobs"], sent["top_logprobs"]) == (True, 2)
    assert "prompt_logprobs" not in sent, "they are asked for by launch.cache_teacher alone"
    assert found.logp == -1.75
    assert found.chosen == (["7", -0.25], [[195], -1.5])
    assert found.top == ([["7", -0.25]], [[[195], -1.5], ["x", -9999.0]])


def test_log_probabilities_of_a_text(serve):
    top = [{" 7": -0.5, "token_id:8": -2.0}, None]
    given = {"tokens": [" 7", "token_id:11"], "token_logprobs": [-0.5, -1.0], "top_logprobs": top}
    choice = {"text": " 7.", "finish_reason": "stop", "logprobs": given}
    server = serve(lambda number, _: (200, {}, json.dumps({"choices": [choice]}).encode()))
    found = one(server, prompt="3 + 4 =", top_logprobs=2)
    assert found.logp == -1.5
    assert found.chosen == ([" 7", -0.5], [11, -1.0])
    assert found.top == ([[" 7", -0.5], [8, -2.0]], [])


# --- what the model says of a text that is given

TEXT = (5, 17, 3)
SAID = [
    None,
    {"17": {"logprob": -0.5, "rank": 1, "decoded_token": "a"}, "3": {"logprob": float("-inf")}},
    {"9": {"logprob": -0.25}, "17": {"logprob": -2.0}, "3": {"logprob": -9.0, "rank": 40, "decoded_token": None}},
]


def scores(said=SAID, **fields):
    body = {"choices": [{"text": "!", "finish_reason": "length", "prompt_logprobs": said}], **fields}
    return 200, {}, json.dumps(body).encode()


def scored(server, texts=(TEXT,), **changes):
    """What on_text got, by the number of the text."""
    got = {}
    score(texts, settings(server, **{"prompt_logprobs": 2} | changes), lambda at, *found: got.update({at: found}))
    return got


def test_what_is_asked_of_a_text_and_what_comes_of_it(serve):
    server = serve(lambda number, body: scores())
    found, reason = scored(server)[0]
    assert reason == ""
    assert found.top == ([[17, -0.5], [3, None]], [[9, -0.25], [17, -2.0], [3, -9.0]])
    assert found.own == (-0.5, -9.0)
    assert found.writes == ("a", None)
    ((_, path, body, headers),) = server.seen
    assert path == "/v1/completions"
    assert body == {
        "model": "big",
        "prompt": [5, 17, 3],
        "max_tokens": 1,
        "prompt_logprobs": 2,
        "add_special_tokens": False,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    assert headers["authorization"] == f"Bearer {KEY}"
    older = scores(None, prompt_logprobs=SAID)  # where vLLM puts them for a chat
    assert scored(serve(lambda number, body: older))[0] == (found, "")


def test_texts_are_asked_for_together_and_each_gets_its_own(serve):
    def listed(number, body):
        time.sleep(0.05)
        return scores([None, *({str(token): {"logprob": -float(token)}} for token in body["prompt"][1:])])

    server = serve(listed)
    found = scored(server, [(1, at) for at in range(20)], concurrency=3)
    assert [found[at][0].own for at in range(20)] == [(-float(at),) for at in range(20)]
    assert server.most == 3


def test_trouble_with_a_text_that_passes_costs_an_attempt(serve):
    faults = [(429, {}, b"slow down"), "die", (200, {}, b'{"choices": [{"prom')]
    server = serve(lambda number, body: faults[number] if number < 3 else scores())
    assert scored(server)[0][1] == ""
    assert len(server.seen) == 4


LISTS = {
    "none": (None, "got None; the server gives none. vLLM does"),
    "no list": ("x", "got 'x'; the server gives none"),
    "too short": (SAID[:2], "2 entries for 3 tokens"),
    "one placeholder": ([None], "1 entries for 3 tokens"),
    "null inside": ([None, None, SAID[2]], "entry 1 is None"),
    "no numbers": ([None, {"17": {"rank": 1}}, SAID[2]], r"entry 1 is {'17': {'rank': 1}}"),
    "no ids": ([None, SAID[1], {"3": {"logprob": -1.0}, "dog": {"logprob": -2.0}}], "entry 2 is {'3': "),
    "another token": ([None, SAID[1], {"9": {"logprob": -0.25}}], "entry 2 lacks the id 3 that was sent; data.token"),
}


@pytest.mark.parametrize("fault", LISTS)
def test_lists_that_are_not_of_the_text(serve, fault):
    said, reason = LISTS[fault]
    server = serve(lambda number, body: scores(said))
    found = scored(server)[0]
    assert found[0] is None
    assert re.match(f"prompt_logprobs are not those of the text that was sent: {reason}", found[1]), found[1]
    assert len(server.seen) == 1, "asking again would cost and help nothing"


def test_a_text_that_fails_for_good_stops_the_rest_if_the_caller_wants_it(serve):
    server = serve(lambda number, body: (400, {}, f"too many {KEY}".encode()) if body["prompt"][1] == 7 else scores())

    def stop(number, found, reason):
        if found is None:
            raise ValueError(reason)

    texts = [(5, 7 if at == 3 else 17, 3) for at in range(30)]
    with pytest.raises(ValueError, match=r"^status 400: too many \[key\]$"):
        score(texts, settings(server, prompt_logprobs=2, concurrency=2), stop)
    assert len(server.seen) < 10


def test_tokens_by_what_they_write():
    table = token_ids(synthetic.make_tokenizer())
    assert len(table) == 259
    assert table[b"<|im_end|>"] == 2
    tokenizer = synthetic.make_tokenizer()
    for byte in range(128):
        assert tokenizer(chr(byte))["input_ids"] == [table[bytes([byte])]]
    assert tokenizer("\u00e9")["input_ids"] == [table[b"\xc3"], table[b"\xa9"]]
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(vocab={"<unk>": 0, "\u2581the": 1, "<0xE4>": 2, "a": 3, "b": 4}, merges=[]))
    inner.decoder = decoders.ByteFallback()
    pieces = token_ids(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>"))
    assert pieces == {b"<unk>": 0, b" the": 1, b"\xe4": 2, b"a": 3, b"b": 4}


def test_sparse_targets():
    table = {b" 7": 5, b"\xc3": 9, b"x": 1}
    top = ([[" 7", math.log(0.5)], [[195], math.log(0.25)], ["unknown", -1.0]], [], [["x", None], [17, 0.001]], None)
    ids, probs = sparse_targets(top, table)
    assert (ids.dtype, probs.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(ids, [[5, 9], [0, 0], [17, 0], [0, 0]])
    np.testing.assert_allclose(probs, [[0.5, 0.25], [0, 0], [1, 0], [0, 0]], rtol=1e-6)
    assert sparse_targets((), table)[0].shape == (0, 0)


def test_the_key_is_nowhere_but_in_the_header(serve, tmp_path, caplog, capfd, monkeypatch):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")

    def gossip(number, body):
        said = f"bad key {KEY}"
        replies = [(401, {}, json.dumps({"error": {"message": said}}).encode()), (200, {}, said.encode())]
        return replies[number % 2]

    server = serve(gossip)
    with store.open_store(tmp_path, {"model": "big"}, {}) as opened:
        asks = [Ask("a", sample, MESSAGES) for sample in range(4)]
        used = settings(server, retries=1, concurrency=1)
        answer(asks, used, config.Generation(), lambda rollout, _: opened.append(rollout))
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir()).decode()
    said = capfd.readouterr()
    assert written.count("bad key [key]") == 4
    for text in (written, said.out, said.err, caplog.text):
        assert KEY not in text
        assert "sk-of-another-server" not in text
    assert all(headers["authorization"] == f"Bearer {KEY}" for *_, headers in server.seen)


def test_without_a_key_that_of_another_server_is_not_sent(serve, monkeypatch):
    monkeypatch.delenv("KDJAX_TEST_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    server = serve(lambda number, body: (401, {}, b'{"error": {"message": "no"}}'))
    assert one(server).reason.endswith("; the environment variable KDJAX_TEST_KEY is not set")
    assert "sk-of-another-server" not in str(server.seen)


def test_an_answer_is_written_as_soon_as_it_is_there_and_never_paid_twice(serve, tmp_path):
    asks = [Ask("a", sample, MESSAGES) for sample in range(6)]
    wrong = seed_of(0, "a", 4)
    broken = True

    def once(number, body):
        return (500, {}, b"") if broken and body["seed"] == wrong else chat(str(body["seed"]))

    server = serve(once)

    class Full(OSError):
        pass

    def run(most):
        with store.open_store(tmp_path, {"model": "big"}, {}) as opened:

            def write(rollout, _):
                if len(opened.done) == most:
                    raise Full("disk")
                opened.append(rollout)

            left = [a for a in asks if (a.id, a.sample) not in opened.done]
            answer(left, settings(server, concurrency=1, retries=0), config.Generation(), write)

    with pytest.raises(Full):
        run(most=2)
    assert len(store.read_rollouts(tmp_path)) == 2
    run(most=99)
    assert [r.sample for r in store.read_rollouts(tmp_path) if r.finish == "failed"] == [4]
    broken = False
    run(most=99)
    found = store.read_rollouts(tmp_path)
    assert {r.sample: r.response for r in found} == {s: str(seed_of(0, "a", s)) for s in range(6)}
    # one each, one more for the answer that could not be written and for the one that failed
    assert len(server.seen) == 8


def test_what_must_be_set():
    with pytest.raises(ValueError, match="served.base_url must be set, got ''; a server is asked there"):
        answer([], config.Served(model="x"), config.Generation(), print)
    with pytest.raises(ValueError, match="served.model must be set, got ''"):
        answer([], config.Served(base_url="http://x"), config.Generation(), print)
    for url in ("http://me:hush@x", "http://x/v1?key=hush"):
        secret = config.Served(base_url=url, model="x")
        with pytest.raises(ValueError, match="served.base_url must be without a name, password and query") as raised:
            answer([], secret, config.Generation(), print)
        assert "hush" not in str(raised.value)
    with pytest.raises(ValueError, match="served.model must be set, got ''"):
        score([], config.Served(base_url="http://x"), print)
    with pytest.raises(ValueError, match="served.api_key_env must be the name of an environment variable") as raised:
        answer([], config.Served(base_url="http://x", model="x", api_key_env=KEY), config.Generation(), print)
    assert KEY not in str(raised.value)


def test_the_package_must_be_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match="the package openai must be there .*, got none; .*pip install openai"):
        answer([], config.Served(base_url="http://x", model="x"), config.Generation(), print)


@pytest.fixture
def transformers_serve(tmp_path):
    """(URL of a real server, name of its tiny random model, that model's parameters)."""
    for package in ("torch", "accelerate", "fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"transformers serve needs the package {package}")
    params = synthetic.make_params()
    # There padding columns of the vocabulary count, here they are never generated: with these weights neither does it.
    params["embed"] = params["embed"].at[len(synthetic.make_tokenizer()) :].set(0)
    model = str(hf_io.save_hf(tmp_path / "model", synthetic.config(), params, synthetic.make_tokenizer()))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", model, "--host=127.0.0.1"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*command, f"--port={port}", "--device=cpu"], stdout=log, stderr=log)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", model, params
    finally:
        process.kill()
        process.wait()


def test_a_real_server_says_what_the_model_says_here(transformers_serve):
    url, model, params = transformers_serve
    prompts = [[{"role": "user", "content": "What is 3 + 4?"}], [{"role": "user", "content": "Who?"}], "The capital"]
    want = complete(synthetic.config(), params, synthetic.make_tokenizer(), prompts, 12)
    found = {}
    answer(
        [Ask(str(at), 0, prompt) for at, prompt in enumerate(prompts)],
        config.Served(base_url=url, model=model, api_key_env="KDJAX_NO_SUCH_KEY", timeout=120.0),
        config.Generation(new_tokens=12, temperature=0.0),
        lambda rollout, tokens: found.update({int(rollout.id): (rollout.response, rollout.reason, tokens)}),
    )
    assert [found[at] for at in range(3)] == [(text, "", 12) for text in want]
    asked = config.Served(base_url=url, model="another", api_key_env="KDJAX_NO_SUCH_KEY", timeout=120.0)
    answer([Ask("a", 0, "x")], asked, config.Generation(), lambda rollout, _: found.update(bad=rollout.reason))
    assert found["bad"].startswith("status 400: ")
    assert "another" in found["bad"]
