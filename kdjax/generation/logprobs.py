"""Log-probabilities as servers give them, and as sparse targets of a loss.

Fields of a line of rollouts.jsonl, in nats, if served.top_logprobs asks for them and the server gives them:
  chosen  per token of the answer [token, logp]
  top     per token of the answer [[token, logp], ...], the most likely ones
A token is its id if the server says it (vLLM with --return-tokens-as-token-ids); else its text, or the list of its
bytes where these are no text by themselves. What a server says of a text that is given, always by ids, is in no such
file: `TextScores`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FLOOR = -80.0  # nats; far below is 0 in float32, which stands for no entry


@dataclasses.dataclass(frozen=True)
class TextScores:
    """What a server said of a given text of n tokens: n - 1 of each, of the tokens 1, 2, ... after those before them.

    top: [[id, logp or None], ...], the likeliest and the token itself, in any order. own: the logp of the token itself.
    writes: what the server's tokenizer writes for that token; None if it does not say.
    """

    top: tuple[list[list[Any]], ...]
    own: tuple[float | None, ...]
    writes: tuple[str | None, ...]


def of_choice(found: Any, chat: bool) -> tuple[tuple[Any, ...] | None, tuple[Any, ...] | None]:
    """(chosen, top) of the "logprobs" of a choice, of a chat or a text; None if the server gives none.

    Raises LookupError, TypeError or ValueError if they are not in the form of OpenAI's API.
    """
    if not found:
        return None, None
    if chat:
        tokens = found.get("content") or []
        chosen = [[_token(t), _number(t["logprob"])] for t in tokens]
        top = [[[_token(o), _number(o["logprob"])] for o in t.get("top_logprobs") or ()] for t in tokens]
    else:
        tokens, logps = found.get("tokens") or [], found.get("token_logprobs") or []
        chosen = [[_token({"token": token}), _number(logp)] for token, logp in zip(tokens, logps, strict=True)]
        top = [
            [[_token({"token": token}), _number(logp)] for token, logp in (entry or {}).items()]
            for entry in found.get("top_logprobs") or [{}] * len(tokens)
        ]
    return (tuple(chosen) or None), (tuple(top) if any(top) else None)


def of_text(found: Any, ids: Sequence[int]) -> TextScores:
    """Of vLLM's "prompt_logprobs": null, then per token of `ids` {id: {"logprob": ..., "decoded_token": ...}}.

    Raises ValueError that says what is missing; an entry without the id that was sent there is of another text.
    """
    if not isinstance(found, list):
        raise ValueError(f"got {found!r:.80}; the server gives none. vLLM does")
    if len(found) != len(ids):
        raise ValueError(f"{len(found)} entries for {len(ids)} tokens")
    top, own, writes = [], [], []
    for at, (sent, entry) in enumerate(zip(ids[1:], found[1:], strict=True), 1):
        try:
            top.append([[int(token), _number(said["logprob"])] for token, said in entry.items()])
            itself = entry.get(str(sent))
            text = itself.get("decoded_token") if itself else None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"entry {at} is {entry!r:.80}") from error
        if itself is None:
            raise ValueError(f"entry {at} lacks the id {sent} that was sent; data.tokenizer must be the served model's")
        own.append(_number(itself["logprob"]))
        writes.append(text if isinstance(text, str) else None)
    return TextScores(tuple(top), tuple(own), tuple(writes))


def token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[bytes, int]:
    """The bytes that a token writes -> its id, the lower one if several do; a special token writes its name."""
    return {text: number for number, text in sorted(token_texts(tokenizer).items(), reverse=True)}


def token_texts(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """An id -> the bytes that it writes."""
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    byte_level = "ByteLevel" in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    written = _written if byte_level else _pieces
    vocabulary = tokenizer.get_vocab().items()
    return {number: token.encode() if number in special else written(token) for token, number in vocabulary}


def sparse_targets(entries: Sequence[Any], table: Mapping[bytes, int]) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32 [T, K], probs float32 [T, K], 0 = empty) of `Rollout.top` or `TextScores.top`, as in SparseTargets.

    table: `token_ids` of the student's tokenizer, which must be the server's. An entry without a token in it is left
    out, as is one without a log-probability; the mass that is missing from 1 is the tail. No entry is below e^FLOOR.
    """
    found = []
    for position in entries:
        named = [(_id_of(token, table), logp) for token, logp in position or () if logp is not None]
        found.append({number: math.exp(min(max(logp, FLOOR), 0.0)) for number, logp in named if number is not None})
    width = max(map(len, found), default=0)
    ids, probs = np.zeros((len(found), width), np.int32), np.zeros((len(found), width), np.float32)
    for at, position in enumerate(found):
        ids[at, : len(position)], probs[at, : len(position)] = list(position), list(position.values())
    return ids, probs


def _token(entry: Mapping[str, Any]) -> int | str | list[int]:
    """The id or the text of a token; its bytes where they are a part of a character and the text is a stand-in."""
    known = re.fullmatch(r"token_id:(\d+)", str(entry["token"]))
    if known:
        return int(known[1])
    raw = entry.get("bytes")
    if raw:
        try:
            bytes(raw).decode("utf-8")
        except UnicodeDecodeError:
            return list(raw)
    text = entry["token"]
    if not isinstance(text, str):
        raise TypeError(f"token is {text!r}")
    return text


def _number(value: Any) -> float | None:
    """A log-probability; None if it is not finite: JSON has no such numbers, and servers write them all the same."""
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _id_of(token: Any, table: Mapping[bytes, int]) -> int | None:
    if isinstance(token, int):
        return token
    return table.get(token.encode() if isinstance(token, str) else bytes(token))


def _written(token: str) -> bytes:
    """Of byte-level BPE, where every byte is a printable character: itself, or the next one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {chr(byte): byte for byte in printable}
    spelled |= {chr(256 + n): byte for n, byte in enumerate(b for b in range(256) if b not in printable)}
    return bytes(spelled[letter] for letter in token) if all(c in spelled for c in token) else token.encode()


def _pieces(token: str) -> bytes:
    """Of SentencePiece: a low line for a blank, and <0xE4> for a byte."""
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()
