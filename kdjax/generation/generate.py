"""Prompts in, rollouts out: only what is missing is asked for, and every answer is on disk as soon as it is there."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdjax import config, registry
from kdjax.data.prompts import Prompt, fingerprint, messages, question_digest
from kdjax.data.responses import prompt_ids
from kdjax.data.styles import STYLES, scripted
from kdjax.generation import served
from kdjax.generation.batching import Speaker, rollouts
from kdjax.generation.sampling import Sampling
from kdjax.generation.store import FAILED, LENGTH, STOP, Rollout, open_store, read_rollouts

Asked = Sequence[tuple[int, int]]  # (number of the prompt, number of the sample)
OnAnswer = Callable[[Rollout, int], None]  # (answer, how many tokens it has)
Source = Callable[[Asked, OnAnswer], None]  # who answers


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a directory holds of what was asked for, and what this run added to it.

    answers: with those that failed; cut_off: answers of the full length; same: prompts with several answers that are
    all the same text, of `several`. added: answers of this run; tokens, seconds: what they took.
    """

    answers: int
    failed: Mapping[str, int]
    cut_off: int
    same: int
    several: int
    added: int
    tokens: int
    seconds: float


def generate(
    directory: str | Path,
    prompts: Sequence[Prompt],
    samples: int,
    source: Source,
    depends: Mapping[str, Any],
    made: Mapping[str, Any],
    on_progress: Callable[[int, int, float], None] = lambda done, total, rate: None,
    instruction: str = "",
) -> Summary:
    """Answers number 0 .. samples - 1 to every prompt in `directory`; those that are there and did not fail stay.

    depends: what the answers depend on, see `identity`; another directory's is refused. on_progress(answers that are
    there, all, tokens per second). instruction: prompts.instruction, with which each question ends.
    Raises ValueError as `open_store` does, and for several greedy samples.
    """
    if samples > 1 and depends.get("temperature") == 0:
        raise ValueError(
            f"generation.samples must be 1 with generation.temperature=0, got {samples}; all answers to a prompt would "
            "be the same. Set --samples=1, or a temperature."
        )
    asks = {prompt.id: question_digest(prompt, instruction) for prompt in prompts}
    total, start, added, tokens = len(prompts) * samples, time.perf_counter(), 0, 0
    with open_store(directory, depends, made) as store:
        missing = [
            (number, sample)
            for number, prompt in enumerate(prompts)
            for sample in range(samples)
            if (prompt.id, sample) not in store.done
        ]

        def on_answer(rollout: Rollout, count: int) -> None:
            nonlocal added, tokens
            store.append(dataclasses.replace(rollout, asks=asks[rollout.id]))
            added, tokens = added + 1, tokens + count
            on_progress(total - len(missing) + added, total, tokens / (time.perf_counter() - start))

        if missing:
            source(missing, on_answer)
    wanted = {(prompt.id, sample) for prompt in prompts for sample in range(samples)}
    found = [rollout for rollout in read_rollouts(directory) if rollout.key in wanted]
    return _summary(found, added, tokens, time.perf_counter() - start)


def identity(
    model: str, tokenizer: str, prompts: Sequence[Prompt], generation: config.Generation, data: config.Data
) -> dict[str, Any]:
    """What answers depend on: `model` and `tokenizer` are fingerprints or names; see `open_store`.

    The number of samples and the batch size are not among it: an answer depends on its own prompt and number alone.
    """
    sampling = ("new_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "seed")
    return {
        "model": model,
        "tokenizer": tokenizer,
        "prompts": fingerprint(prompts),
        **{name: getattr(generation, name) for name in sampling},
        "chat_template": data.chat_template,
        "system_prompt": data.system_prompt,
    }


def of_model(model: Speaker, prompts: Sequence[Prompt], generation: config.Generation, data: config.Data) -> Source:
    """A model of ours as a source of answers. Raises ValueError that names the prompt that cannot be encoded."""
    template, system = data.chat_template, data.system_prompt
    ids = [prompt_ids(p, model.tokenizer, chat_template=template, system_prompt=system) for p in prompts]
    settings = Sampling(generation.temperature, generation.top_p, generation.top_k, generation.min_p)

    def source(asked: Asked, on_answer: OnAnswer) -> None:
        numbers: list[list[int]] = [[] for _ in prompts]
        for number, sample in asked:
            numbers[number].append(sample)
        for number, sample, made in rollouts(
            model,
            ids,
            numbers,
            settings,
            new_tokens=generation.new_tokens,
            names=[prompt.id for prompt in prompts],
            seed=generation.seed,
            stop=generation.stop,
            batch_size=generation.batch_size,
        ):
            answer = Rollout(prompts[number].id, sample, made.text, made.finish, made.logp, made.tokens)
            on_answer(answer, len(made.tokens))

    return source


def of_server(
    prompts: Sequence[Prompt], settings: config.Served, generation: config.Generation, data: config.Data
) -> Source:
    """The served teacher as a source of answers: chats, or with data.chat_template=False texts to go on with.

    Raises ValueError for settings with which nothing can be asked.
    """
    served.check(settings)
    shown = [_shown(prompt, data) for prompt in prompts]

    def source(asked: Asked, on_answer: OnAnswer) -> None:
        asks = [served.Ask(prompts[number].id, sample, shown[number]) for number, sample in asked]
        served.answer(asks, settings, generation, on_answer)

    return source


def of_script(prompts: Sequence[Prompt], style: str) -> Source:
    """A scripted teacher (`data/styles.py`). Raises ValueError for an unknown style, or a question it cannot answer."""
    write = registry.lookup(STYLES, style, "--style")
    said = [scripted(prompt, write) for prompt in prompts]

    def source(asked: Asked, on_answer: OnAnswer) -> None:
        for number, sample in asked:
            on_answer(Rollout(prompts[number].id, sample, said[number], STOP), len(said[number].split()))

    return source


def _shown(prompt: Prompt, data: config.Data) -> str | list[dict[str, str]]:
    """What `data.responses.prompt_ids` encodes, before it is encoded: the server has the template."""
    turns = messages(prompt)
    if data.system_prompt and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": data.system_prompt}, *turns]
    return turns if data.chat_template else "".join(turn["content"] + "\n" for turn in turns)


def _summary(found: Sequence[Rollout], added: int, tokens: int, seconds: float) -> Summary:
    texts: dict[str, list[str]] = {}
    for rollout in found:
        if rollout.finish != FAILED:
            texts.setdefault(rollout.id, []).append(rollout.response)
    several = [answers for answers in texts.values() if len(answers) > 1]
    return Summary(
        answers=len(found),
        failed=served.failures(found),
        cut_off=sum(rollout.finish == LENGTH for rollout in found),
        same=sum(len(set(answers)) == 1 for answers in several),
        several=len(several),
        added=added,
        tokens=tokens,
        seconds=seconds,
    )
