"""Log-probabilities as servers give them, and as sparse targets of a loss.

Fields of a line of rollouts.jsonl, in nats, if served.top_logprobs or served.prompt_logprobs asks for them and the
server gives them:
  chosen      per token of the answer [token, logp]
  top         per token of the answer [[token, logp], ...], the most likely ones
  prompt_top  per token of the prompt null or [[id, logp], ...] (vLLM); the first has none
A token is its id if the server says it, which vLLM is asked for with served.prompt_logprobs; else its text, or the list
of its bytes where these are no text by themselves.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FLOOR = -80.0  # nats; far below is 0 in float32, which stands for no entry


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


def of_prompt(found: Any) -> tuple[Any, ...] | None:
    """vLLM's {id: {"logprob": ...}} per token of the prompt."""
    if not found:
        return None
    return tuple(
        None if entry is None else [[int(token), _number(said["logprob"])] for token, said in entry.items()]
        for entry in found
    )


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
    """(ids int32 [T, K], probs float32 [T, K], 0 = empty) of `Rollout.top` or `prompt_top`, as in SparseTargets.

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
