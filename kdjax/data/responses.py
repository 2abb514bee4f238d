"""Answers to prompts as rows: the prompt is context, the answer is what is learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdjax.data.encode import end_of_turn, start_of_document
from kdjax.data.packing import Rows, hash_rows
from kdjax.data.prompts import Prompt, messages

ROUND_UP = 16  # lengths of the teacher's rows, so that few programs compile


@dataclasses.dataclass(frozen=True)
class Answered:
    """One row to be: the ids of a prompt and of an answer, and what the row weighs in the loss.

    seen_by_teacher: the ids of the prompt that the teacher reads instead; None = the same.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    weight: float = 1.0
    seen_by_teacher: tuple[int, ...] | None = None


def prompt_ids(prompt: Prompt, tokenizer: Any, *, chat_template: bool = True, system_prompt: str = "") -> list[int]:
    """The ids that a model goes on with: the chat up to where the assistant's turn begins, as `encode` has it.

    Without a template the turns are lines of text. Raises ValueError for a missing template or a prompt without ids.
    """
    turns = messages(prompt)
    if system_prompt and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system_prompt}, *turns]
    if not chat_template:
        text = "".join(turn["content"] + "\n" for turn in turns)
        ids = [*start_of_document(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]]
    elif tokenizer.chat_template is None:
        raise ValueError(
            "data.chat_template must be False for a tokenizer without a chat template, got True. Set it to False, or "
            "data.tokenizer to a tokenizer that has one."
        )
    else:
        ids = list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False))
    if not ids:
        raise ValueError(f"prompts.path must hold prompts with text, got none of it in {prompt.id!r}.")
    return ids


def end_of_answer(tokenizer: Any, *, chat_template: bool = True) -> int:
    """The id that ends an answer: what the template writes after an assistant's turn, else the end of sequence.

    Raises ValueError if there is neither.
    """
    end = end_of_turn(tokenizer) if chat_template else None
    if end is None:
        end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            "data.tokenizer must have an end-of-sequence token, got a tokenizer without one; answers could not end. "
            "Set eos_token in its tokenizer_config.json."
        )
    return int(end)


def answer_rows(
    answered: Sequence[Answered], seq_len: int, teacher_room: int = 0
) -> tuple[Rows, dict[str, np.ndarray]]:
    """(rows, teacher's text): one answer a row, of which the answer's tokens alone are targets.

    What is longer than `seq_len` is cut off at its end. teacher's text: the columns of `types.TeacherText`, its rows
    `teacher_room` tokens longer (`room_for_teacher`); {} if no teacher reads another prompt. Raises ValueError for a
    prompt that leaves no room for an answer.
    """
    count = len(answered)
    tokens, segments = np.zeros((count, seq_len), np.int32), np.zeros((count, seq_len), np.int32)
    mask = np.zeros((count, seq_len), bool)
    for at, one in enumerate(answered):
        if len(one.prompt) >= seq_len:
            raise ValueError(
                f"data.seq_len must leave room for an answer, got {seq_len} and a prompt of {len(one.prompt)} tokens. "
                "Raise it, or leave long prompts out."
            )
        ids = [*one.prompt, *one.answer][:seq_len]
        tokens[at, : len(ids)], segments[at, : len(ids)] = ids, 1
        mask[at, len(one.prompt) : len(ids)] = True
    rows = Rows(
        tokens=tokens,
        segment_ids=segments,
        positions=_positions(segments),
        loss_mask=mask,
        row_id=np.arange(count, dtype=np.int32),
        weight=np.array([one.weight for one in answered], np.float32),
        row_hash=hash_rows(tokens, segments, mask),
        begins=(segments[:, 0] > 0).astype(np.int32),
    )
    return rows, _teacher_text(answered, segments, teacher_room)


def room_for_teacher(answered: Sequence[Answered]) -> int:
    """How many tokens longer a teacher's prompt is than the student's, at most; rounded up."""
    longer = [len(one.seen_by_teacher) - len(one.prompt) for one in answered if one.seen_by_teacher is not None]
    return -(-max(0, *longer, 0) // ROUND_UP) * ROUND_UP


def _teacher_text(answered: Sequence[Answered], segments: np.ndarray, room: int) -> dict[str, np.ndarray]:
    if all(one.seen_by_teacher is None for one in answered):
        return {}
    count, seq_len = segments.shape
    length = seq_len + room
    tokens, own, index = (np.zeros((count, width), np.int32) for width in (length, length, seq_len))
    for at, one in enumerate(answered):
        prompt = one.prompt if one.seen_by_teacher is None else one.seen_by_teacher
        used = int(segments[at].sum()) - len(one.prompt)  # tokens of the answer in the row
        ids = [*prompt, *one.answer[:used]]
        tokens[at, : len(ids)], own[at, : len(ids)] = ids, 1
        # the answer's token i is predicted at the prompt's end + i - 1, in either row
        index[at, len(one.prompt) - 1 : len(one.prompt) + used] = np.arange(len(prompt) - 1, len(prompt) + used)
    return {"tokens": tokens, "segment_ids": own, "positions": _positions(own), "index": index}


def _positions(segments: np.ndarray) -> np.ndarray:
    places = np.arange(segments.shape[1], dtype=np.int32)
    return np.where(segments > 0, places[None], 0).astype(np.int32)
