"""Answers from any OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, transformers serve, hosted APIs.

One request per prompt and sample, several at a time. Every one of them ends as a `Rollout`: an answer, or `failed` with
the reason. `score` asks in the same way what the model says of texts that are given. Trouble that passes (time-out,
lost connection, 408, 409, 425, 429, 5xx, a reply that is no JSON or holds no text) is tried again after pauses that
double, with jitter, or as long as Retry-After says. The key comes from the environment variable `served.api_key_env`;
it is in no error, log or file.
"""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import hashlib
import json
import math
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from kdjax import config
from kdjax.generation.logprobs import TextScores, of_choice, of_text
from kdjax.generation.store import FAILED, LENGTH, STOP, Rollout

Messages = Sequence[Mapping[str, str]]
T = TypeVar("T")
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between the attempts at one prompt
LONGEST_WAIT = 300.0  # seconds that a server may ask to wait; one that asks for more has nothing to give today
ROUNDS_LOST = 4  # after so many prompts per connection that fail one after another the rest is not tried
PASSES = (408, 409, 425, 429)  # and all from 500
OWN_FAULT = (400, 413, 422)  # these say something about the request and not about the server
ENDS = {"stop": STOP, "eos": STOP, "eos_token": STOP, "stop_sequence": STOP, "length": LENGTH, "max_tokens": LENGTH}
# Said although they are the API's own defaults: vLLM takes those of the model's generation_config.json instead.
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request: sample number `sample` for the prompt `id`, a text to go on with or the messages of a chat."""

    id: str
    sample: int
    prompt: str | Messages


class _Failed(Exception):
    """There is no reply after all attempts; its text is the reason in one line."""


class _Trouble(Exception):
    """One attempt failed. again: whether another may go well; pause: seconds that the server asks to wait."""

    def __init__(self, reason: str, *, again: bool, pause: float | None = None, server: bool = True) -> None:
        super().__init__(reason)
        self.again, self.pause, self.server = again, pause, server


def check(served: config.Served) -> None:
    """Raises ValueError, before anything is sent, for what makes every request fail."""
    for name, example in (("base_url", "http://localhost:8000/v1"), ("model", "the name that the server gives it")):
        if not getattr(served, name):
            raise ValueError(f"served.{name} must be set, got ''; a server is asked there. Set it to {example}.")
    url = urlsplit(served.base_url)
    if url.username is not None or url.query:
        raise ValueError(
            "served.base_url must be without a name, password and query, got one with; it is written to files. Put the "
            f"key into the environment variable {served.api_key_env}."
        )
    if not re.fullmatch(r"[A-Za-z_]\w*", served.api_key_env):
        raise ValueError(
            "served.api_key_env must be the name of an environment variable, got something else (not shown, it may be "
            "the key itself). Set it to OPENAI_API_KEY, and that variable to the key."
        )
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"the package openai must be there for a served teacher, got none; {error}. Run `pip install openai`."
        ) from error


def answer(
    asks: Sequence[Ask],
    served: config.Served,
    generation: config.Generation,
    on_answer: Callable[[Rollout, int], None],
) -> None:
    """Ask them all, `served.concurrency` at a time; on_answer(rollout, its tokens or 0) as soon as each is there.

    Raises ValueError for settings with which nothing can be asked, and what on_answer raises.
    """

    async def one(server: _Server, ask: Ask) -> None:
        chat = not isinstance(ask.prompt, str)
        body = _to_answer(ask, served, generation, chat)
        try:
            made = await server.reply(body, generation.new_tokens, lambda content: _parsed(ask, content, chat))
        except _Failed as error:
            made = Rollout(ask.id, ask.sample, "", FAILED, reason=str(error)), 0
        on_answer(*made)

    check(served)
    asyncio.run(_each(asks, served, one))


def score(
    texts: Sequence[Sequence[int]],
    served: config.Served,
    on_text: Callable[[int, TextScores | None, str], None],
) -> None:
    """Ask for the `served.prompt_logprobs` likeliest tokens at each place of these texts, which are sent as token ids.

    on_text(number of the text, what was said of it, "") as soon as that is there, in any order; or (number, None, why
    there is nothing). Texts have 2 tokens or more. The server does not cut them anew, and nothing is put before them.
    Raises ValueError for settings with which nothing can be asked, and what on_text raises: then no more are asked.
    """

    async def one(server: _Server, number: int) -> None:
        found, reason = None, ""
        try:
            found = await server.reply(_to_score(texts[number], served), 1, lambda said: _scored(texts[number], said))
        except _Failed as error:
            reason = str(error)
        on_text(number, found, reason)

    check(served)
    asyncio.run(_each(range(len(texts)), served, one))


async def _each(asks: Sequence[T], served: config.Served, one: Callable[[_Server, T], Awaitable[None]]) -> None:
    from openai import AsyncOpenAI

    # A key is always handed over, else the client would take OPENAI_API_KEY, which may be meant for another server.
    key = os.environ.get(served.api_key_env, "")
    async with AsyncOpenAI(
        base_url=served.base_url, api_key=key or "none", max_retries=0, timeout=served.timeout
    ) as client:
        server = _Server(client, served, key)
        waiting = iter(asks)

        async def worker() -> None:
            for ask in waiting:
                await one(server, ask)

        workers = [asyncio.create_task(worker()) for _ in range(min(served.concurrency, len(asks)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


class _Server:
    """The connections to one server, and what is known of it."""

    def __init__(self, client: Any, served: config.Served, key: str) -> None:
        self._client, self._served, self._key = client, served, key
        self._limit = "max_tokens"  # what all servers understand but the newest models of OpenAI
        self._in_a_row = 0

    async def reply(self, body: dict[str, Any], tokens: int, read: Callable[[bytes], T]) -> T:
        """What `read` makes of the reply to this request, for at most so many tokens; _Failed if none comes.

        read: raises _Trouble for a reply that is of no use.
        """
        lost = self._in_a_row >= ROUNDS_LOST * self._served.concurrency
        reason = f"not tried, because {self._in_a_row} others failed one after another"
        attempt = 0
        while not lost:
            try:
                made = read(await self._attempt(body, tokens))
                self._in_a_row = 0
                return made
            except _Trouble as trouble:
                reason = self._told(trouble)
                if self._limit == "max_tokens" and "max_completion_tokens" in reason:
                    self._limit = "max_completion_tokens"
                    continue
                pause = _pause(attempt) if trouble.pause is None else trouble.pause
                if not trouble.again or attempt >= self._served.retries or pause > LONGEST_WAIT:
                    self._in_a_row += trouble.server
                    break
                attempt += 1
                await asyncio.sleep(pause)
        if attempt:
            reason += f" (after {attempt + 1} attempts)"
        raise _Failed(reason)

    async def _attempt(self, body: dict[str, Any], tokens: int) -> bytes:
        """The content of the reply to one request. Raises _Trouble if there is none."""
        import openai

        api = self._client.chat.completions if "messages" in body else self._client.completions
        extra = {self._limit: tokens} | body["extra_body"]
        try:
            async with asyncio.timeout(self._served.timeout):
                reply = await api.with_raw_response.create(**body | {"extra_body": extra})
                return reply.content
        except (TimeoutError, openai.APITimeoutError) as error:
            raise _Trouble(f"no answer within {self._served.timeout:g} s", again=True) from error
        except openai.APIStatusError as error:
            status = error.status_code
            raise _Trouble(
                f"status {status}: {error.response.text or error.message}",
                again=status in PASSES or status >= 500,
                pause=_retry_after(error.response.headers),
                server=status not in OWN_FAULT,
            ) from error
        except openai.APIConnectionError as error:
            raise _Trouble(f"connection lost: {error.__cause__ or error}", again=True) from error

    def _told(self, trouble: _Trouble) -> str:
        """The reason in one line, without the key, which some servers repeat."""
        text = " ".join(str(trouble).split())
        if self._key:
            text = text.replace(self._key, "[key]")
        if text.startswith("status 401") and not self._key:
            text += f"; the environment variable {self._served.api_key_env} is not set"
        return text[:500]


def _to_answer(ask: Ask, served: config.Served, made: config.Generation, chat: bool) -> dict[str, Any]:
    """The request; what OpenAI's own API does not know is only in it if it was asked for."""
    body: dict[str, Any] = {
        "model": served.model,
        "temperature": made.temperature,
        "top_p": made.top_p,
        "seed": seed_of(made.seed, ask.id, ask.sample),
    }
    if chat:
        body["messages"] = [dict(message) for message in ask.prompt]  # type: ignore[arg-type]
    else:
        body["prompt"] = ask.prompt
    if made.stop:
        body["stop"] = list(made.stop)
    if served.top_logprobs:
        wanted = served.top_logprobs
        body |= {"logprobs": True, "top_logprobs": wanted} if chat else {"logprobs": wanted}
    extra = {"top_k": made.top_k, "min_p": made.min_p}
    return body | {"extra_body": {name: value for name, value in extra.items() if value}}


def _to_score(ids: Sequence[int], served: config.Served) -> dict[str, Any]:
    """The request, at neutral settings: some servers apply those of an answer to what they say of a text."""
    body = {"model": served.model, "prompt": list(ids), "temperature": 1.0, "top_p": 1.0}
    wanted = {"prompt_logprobs": served.prompt_logprobs, "add_special_tokens": False}
    return body | {"extra_body": wanted | NEUTRAL}


def seed_of(seed: int, name: str, sample: int) -> int:
    """The seed of a request: samples of a prompt differ, and another run asks for the same ones. In [0, 2^31)."""
    digest = hashlib.sha256(json.dumps([seed, name, sample]).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _pause(attempt: int) -> float:
    """Half to all of 0.5, 1, 2, ... seconds, so that those who were refused together do not come back together."""
    return min(FIRST_PAUSE * 2.0**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.0)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: Retry-After as a number or a date; None if it does not say."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        moment = email.utils.parsedate_tz(value)
        if moment is None:
            return None
        seconds = email.utils.mktime_tz(moment) - time.time()
    return max(0.0, seconds) if not math.isnan(seconds) else None


def _parsed(ask: Ask, content: bytes, chat: bool) -> tuple[Rollout, int]:
    """The answer in the body of a reply. Raises _Trouble that says what is wrong with it."""
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
        reason = choice["finish_reason"]
        chosen, top = of_choice(choice.get("logprobs"), chat)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _Trouble(
            f"no answer in the reply, {error!r}: {content.decode('utf-8', 'replace')}", again=True
        ) from error
    if reason not in ENDS:
        raise _Trouble(f"finish_reason is {reason!r}", again=reason is None)
    if not isinstance(text, str) or not text:
        raise _Trouble(f"the text is {text!r}, with finish_reason {reason!r}", again=True)
    text = text.encode("utf-8", "replace").decode()  # half of a pair of surrogates can be written in JSON, not in UTF-8
    logps = [logp for _, logp in chosen or ()]
    rollout = Rollout(
        ask.id,
        ask.sample,
        text,
        ENDS[reason],
        logp=sum(logps) if logps and None not in logps else None,
        chosen=chosen,
        top=top,
    )
    usage = body.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return rollout, count if isinstance(count, int) else len(logps)


def _scored(ids: Sequence[int], content: bytes) -> TextScores:
    """What the body of a reply says of the text. Raises _Trouble that says what is wrong with it."""
    try:
        body = json.loads(content)
        found = body["choices"][0].get("prompt_logprobs") or body.get("prompt_logprobs")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _Trouble(
            f"no choice in the reply, {error!r}: {content.decode('utf-8', 'replace')}", again=True
        ) from error
    try:
        return of_text(found, ids)
    except ValueError as error:
        raise _Trouble(f"prompt_logprobs are not those of the text that was sent: {error}", again=False) from error


def failures(rollouts: Iterable[Rollout]) -> dict[str, int]:
    """Reason -> how many failed for it, the most frequent first."""
    counts: dict[str, int] = {}
    for rollout in rollouts:
        if rollout.finish == FAILED:
            counts[rollout.reason] = counts.get(rollout.reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
