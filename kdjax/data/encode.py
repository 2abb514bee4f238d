"""Documents to token ids, and which of the tokens may be targets."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdjax.data.sources import Document

BATCH = 1000  # documents per call of the tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """tokens: int32 [n]; loss_mask: bool [n], True where the token at this place may be a target."""

    id: str
    tokens: np.ndarray
    loss_mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of text to tokenise, after the tokens `head`: the characters in `spans` are targets, then comes `tail`.

    spans: (start, end) in characters; None = all of the text. tail_is_target: of the tokens in `tail`.
    """

    text: str
    spans: tuple[tuple[int, int], ...] | None = None
    tail: tuple[int, ...] = ()
    tail_is_target: bool = False
    head: tuple[int, ...] = ()


def end_of_document(tokenizer: Any) -> int:
    """The token that follows every text document: <|endoftext|> if the tokenizer has it, else its end of sequence."""
    vocabulary = tokenizer.get_vocab()
    if "<|endoftext|>" in vocabulary:
        return vocabulary["<|endoftext|>"]
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "data.tokenizer must have an end-of-sequence token, got a tokenizer with neither eos_token nor "
            "<|endoftext|>; documents could not be told apart. Set eos_token in its tokenizer_config.json."
        )
    return tokenizer.eos_token_id


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template puts after an answer; None if it puts none there, or there is none."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    try:
        chat = render_chat("a chat", (("user", "Hello."), ("assistant", "Hi.")), tokenizer, _special(tokenizer))
    except ValueError:  # a template that takes no such chat ends no answer
        return None
    ((_, end),) = chat.spans or ()
    last = int(tokenizer(chat.text[:end], add_special_tokens=False)["input_ids"][-1])
    return last if last in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} else None


def start_of_document(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer itself puts before a text: <bos> for Gemma and Llama 3, which need it; nothing for Qwen."""
    begin = tokenizer.bos_token_id
    return (begin,) if begin is not None and tokenizer("")["input_ids"][:1] == [begin] else ()


def encode(
    documents: Sequence[Document], tokenizer: Any, *, chat_template: bool = True, system_prompt: str = ""
) -> list[Encoded]:
    """Token ids and target masks of the documents that are not blank, in order.

    A text follows the begin-of-sequence token, if the tokenizer begins texts with one, and is followed by the
    end-of-document token; neither is a target. Of a chat the answers are targets, with the
    token that ends each of them; with `chat_template=False` its turns are joined by newlines and an answer ends with
    the end-of-sequence token. The first token of a document never is a target: nothing comes before it. No other
    special tokens are added. Raises ValueError for a template that is missing, fails, or does not extend its prompt.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"data.tokenizer must be a fast tokenizer, got {type(tokenizer).__name__}; character offsets are needed to "
            "find the answers. Convert it to a tokenizer.json."
        )
    start, end = start_of_document(tokenizer), end_of_document(tokenizer)
    special = _special(tokenizer)
    eos = end if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    pieces: list[tuple[str, list[Piece]]] = []
    for document in documents:
        if document.messages is None:
            if document.text and not document.text.isspace():
                pieces.append((document.id, [Piece(document.text, tail=(end,), head=start)]))
            continue
        turns = _complete(document, system_prompt)
        if chat_template:  # it writes its own beginning
            made = [render_chat(document.id, turns, tokenizer, special)]
        else:
            made = plain_chat(turns, eos)
            made[0] = dataclasses.replace(made[0], head=start)
        pieces.append((document.id, made))
    flat = iter(_tokenise([piece for _, group in pieces for piece in group], tokenizer))
    encoded = []
    for name, group in pieces:
        ids, masks = zip(*(next(flat) for _ in group), strict=True)
        mask = np.concatenate(masks)
        mask[:1] = False
        encoded.append(Encoded(name, np.concatenate(ids), mask))
    return encoded


def _complete(document: Document, system_prompt: str) -> list[tuple[str, str]]:
    """The turns up to the last answer, after the system prompt if there is one and the chat brings none."""
    turns = list(document.messages or ())
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    if not turns:
        raise ValueError(f"a chat must have an assistant turn, got none in {document.id}; only answers are targets.")
    if system_prompt and turns[0][0] != "system":
        turns.insert(0, ("system", system_prompt))
    return turns


def plain_chat(turns: Sequence[tuple[str, str]], eos: int) -> list[Piece]:
    """A chat without a template: turns joined by newlines, answers are targets and closed by `eos`."""
    pieces, prompt = [], ""
    for role, content in turns:
        if role == "assistant":
            text = prompt + content
            pieces.append(Piece(text, ((len(prompt), len(text)),), (eos,), tail_is_target=True))
            prompt = ""
        else:
            prompt += content + "\n"
    return pieces


def render_chat(name: str, turns: Sequence[tuple[str, str]], tokenizer: Any, special: re.Pattern[str]) -> Piece:
    """The chat under the tokenizer's template, and where its answers are.

    An answer starts where the rendering of the turns before it, generation prompt included, ends: what the student is
    given when it has to write that answer. It ends with the first special token after its content (the end of the
    turn), else where the rendering of the turns up to it ends.
    """
    messages = [{"role": role, "content": content} for role, content in turns]
    whole = _render(name, messages, tokenizer)
    spans = []
    for at, (role, content) in enumerate(turns):
        if role != "assistant":
            continue
        prompt = _render(name, messages[:at], tokenizer, add_generation_prompt=True)
        if not whole.startswith(prompt):
            raise ValueError(
                f"data.chat_template must be False for this tokenizer, got True; in {name} the rendering of the turns "
                f"before turn {at} is no prefix of the whole chat, so the answer cannot be found: the whole has "
                f"{_after(whole, prompt)!r}, the prompt {_after(prompt, whole)!r} there. Or change the template."
            )
        upto = whole if at + 1 == len(turns) else _render(name, messages[: at + 1], tokenizer)
        # Some templates render an answer otherwise if it is the last one: then only a special token shows its end.
        limit = len(upto) if whole.startswith(upto) else None
        end = _answer_end(whole, len(prompt), limit, content.strip(), special)
        if end is None:
            raise ValueError(
                f"data.chat_template must be False for this tokenizer, got True; in {name} turn {at} has no end: the "
                "template puts no special token after it and renders it otherwise when it is the last. Or change the "
                "template."
            )
        spans.append((len(prompt), end))
    return Piece(whole, tuple(spans))


def _answer_end(whole: str, start: int, limit: int | None, content: str, special: re.Pattern[str]) -> int | None:
    """After the first special token behind `content`, which may itself hold some; else the limit."""
    found = whole.find(content, start, limit)
    behind = start if found < 0 else found + len(content)
    closing = special.search(whole, behind, len(whole) if limit is None else limit)
    return closing.end() if closing else limit


def _after(text: str, other: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return text[at : at + 30]


def _render(name: str, messages: list[dict[str, str]], tokenizer: Any, **options: bool) -> str:
    import jinja2

    if tokenizer.chat_template is None:
        raise ValueError(
            f"data.chat_template must be False for a tokenizer without a chat template, got True; {name} is a chat. "
            "Set it to False, or data.tokenizer to a tokenizer that has one."
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (jinja2.TemplateError, IndexError, KeyError, TypeError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages) or "no turn"
        raise ValueError(
            f"data.path must hold chats that the tokenizer's template takes, got {name}; it fails on the roles "
            f"{roles}: {error}."
        ) from error


def _special(tokenizer: Any) -> re.Pattern[str]:
    """Any special token of the tokenizer; never matches if it has none."""
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted(tokens | set(tokenizer.all_special_tokens), key=len, reverse=True)  # ab|a
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _tokenise(pieces: Sequence[Piece], tokenizer: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, loss_mask) of each piece, its head and tail included."""
    made: list[tuple[np.ndarray, np.ndarray]] = []
    for at in range(0, len(pieces), BATCH):
        batch = pieces[at : at + BATCH]
        offsets = any(piece.spans is not None for piece in batch)
        texts = [piece.text for piece in batch]
        out = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=offsets, verbose=False
        )
        for i, piece in enumerate(batch):
            ids = np.asarray(out["input_ids"][i], np.int32)
            mask = np.ones(len(ids), bool)
            if piece.spans is not None:
                begin, end = np.asarray(out["offset_mapping"][i], np.int64).reshape(-1, 2).T
                inside = [(begin >= start) & (end <= stop) for start, stop in piece.spans]
                mask = np.logical_or.reduce(inside) if inside else np.zeros(len(ids), bool)
            head, tail = (np.asarray(part, np.int32) for part in (piece.head, piece.tail))
            masks = np.zeros(len(head), bool), mask, np.full(len(tail), piece.tail_is_target)
            made.append((np.concatenate([head, ids, tail]), np.concatenate(masks)))
    return made
