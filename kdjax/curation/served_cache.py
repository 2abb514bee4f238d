"""The teacher's cache from what a server said: the likeliest tokens at each token of its own answers. No model runs.

launch.generate --model=served with served.top_logprobs writes them beside every answer (`generation/logprobs.py`); of
any other text a server can be asked itself (`served_text.py`).
A row has the server's own cut of the answer into tokens. A position is stored where all tokens of the answer before it
are the server's, and where at least classes.entries of the listed ones are known here: what else was chosen there does
not matter, so the end of the answer is stored too if the server says anything of it. The entropy is not known.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from kdjax.config import Experiment
from kdjax.data import Rows, eligible
from kdjax.data.prompts import fingerprint, load_prompts, split_prompts
from kdjax.generation.logprobs import sparse_targets, token_ids, token_texts
from kdjax.generation.store import Rollout, read_manifest
from kdjax.teacher.cache import RowRecord
from kdjax.teacher.classes import encode

SERVED = "served: "  # begins the model in the manifest of a served teacher's answers
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
MOST = 1.01  # probabilities of one position, in the arithmetic of servers
STRANGE = 0.5  # share of answers that may be cut otherwise, such as those that a stop text ended within a token


@dataclasses.dataclass(frozen=True, eq=False)
class Said:
    """What a server said of an answer of n tokens, with what it chose after its text.

    chosen: int32 [n], -1 = no token of this tokenizer. ids: int32 [n, K]; probs: float32 [n, K], 0 = empty. answer: the
    first ones of `chosen`, which make up the text; None if they do not.
    """

    chosen: np.ndarray
    ids: np.ndarray
    probs: np.ndarray
    answer: tuple[int, ...] | None


def make_listener(tokenizer: Any) -> Callable[[Rollout], Said | None]:
    """listener(rollout) -> what was said of it, in the student's ids; None if there are no log-probabilities."""
    table, writes = token_ids(tokenizer), token_texts(tokenizer)

    def listen(rollout: Rollout) -> Said | None:
        if not rollout.chosen or not rollout.top:
            return None
        count = min(len(rollout.chosen), len(rollout.top))
        tokens = [token for token, _ in rollout.chosen[:count]]
        known = [token if isinstance(token, int) else table.get(_bytes(token), -1) for token in tokens]
        cut = _cut([writes.get(number) for number in known], rollout.response.encode())
        answer = None if cut is None else tuple(known[:cut])
        return Said(np.array(known, np.int32), *sparse_targets(rollout.top[:count], table), answer)

    return listen


def check_answers(e: Experiment) -> str:
    """Who gave the answers of `e.prompts.answers`, as the manifest there has it.

    Raises ValueError unless it is a server that was asked the prompts of this experiment, at temperature 1.
    """
    depends = read_manifest(e.prompts.answers)["depends"]
    model, prompts = str(depends.get("model")), load_prompts(e.prompts)
    shown = {name: getattr(e.data, name) for name in ("chat_template", "system_prompt")}
    wanted = PLAIN | shown
    different = [
        f"{name} was {depends.get(name)!r}, not {value!r}"
        for name, value in wanted.items()
        if depends.get(name) != value
    ]
    if depends.get("prompts") not in map(fingerprint, (prompts, *split_prompts(prompts, e.prompts))):
        different.append("the prompts were others than those of prompts.*")
    listed = depends.get("top_logprobs") or 0
    if listed < e.classes.entries:
        different.append(f"served.top_logprobs was {listed}, less than classes.entries={e.classes.entries}")
    if e.served.model and model != SERVED + e.served.model:
        different.append(f"the model was {model!r}, not the served.model {e.served.model!r}")
    if not model.startswith(SERVED):
        different = [f"the model was {model!r}, and no served one"]
    if different:
        raise ValueError(
            f"prompts.answers must be what a server answers to these prompts at temperature 1, with log-probabilities, "
            f"got {e.prompts.answers!r}, where {'; '.join(different)}. A distribution belongs to what the server was "
            "shown, and servers differ in what temperature and top-p do to it. Set these as they were, or run "
            "launch.generate --model=served anew into another directory."
        )
    return model


def first_difference(rollout: Rollout, said: Said, ids: Sequence[int]) -> str:
    """Where the server's tokens are not `ids`, those of the same text by the tokenizer here, in words."""
    pairs = zip(said.chosen.tolist(), ids, strict=False)
    at = next((at for at, (theirs, ours) in enumerate(pairs) if theirs != ours), min(len(said.chosen), len(ids)))
    theirs = repr(rollout.chosen[at][0]) if rollout.chosen and at < len(said.chosen) else "the end"
    ours = f"id {ids[at]}" if at < len(ids) else "the end"
    return f"token {at} of sample {rollout.sample} of {rollout.id!r} is {theirs} there and {ours} here"


def check_cuts(heard: int, strange: Sequence[str], where: str) -> None:
    """Raises ValueError if no answer has log-probabilities, or if the server's tokens are not those of the tokenizer.

    heard: answers that have them; strange: of those whose tokens do not make up their text, the first difference.
    """
    if not heard:
        raise ValueError(
            f"prompts.answers must hold log-probabilities with served.top_logprobs, got none in {where!r}; the server "
            "gives none. Ask one that does, such as vLLM, or train on the answers alone, with served.top_logprobs=0."
        )
    if len(strange) > STRANGE * heard:
        raise ValueError(
            f"data.tokenizer must be the served model's, got one that cuts {len(strange)} of {heard} answers in "
            f"{where!r} otherwise; {strange[0]}. Set data.tokenizer, and a student of that vocabulary; or train on the "
            "answers alone, with served.top_logprobs=0."
        )


def digest(said: Mapping[int, Said]) -> str:
    """16 hex digits over what was said of each row."""
    found = hashlib.sha256()
    for row, one in sorted(said.items()):
        found.update(f"{row} {one.ids.shape}".encode())
        for array in (one.chosen, one.ids, one.probs):
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def served_recorder(said: Mapping[int, Said], entries: int, vocab_size: int) -> Callable[[Rows], Iterator[RowRecord]]:
    """recorder(rows) -> a `RowRecord` per row, in order, of its `entries` likeliest tokens; said: by row_id.

    Raises ValueError that names the row where the listed probabilities exceed 1.
    """
    entries = min(entries, vocab_size)

    def recorder(rows: Rows) -> Iterator[RowRecord]:
        for at, allowed in enumerate(eligible(rows)):
            places, row = np.flatnonzero(allowed), int(rows.row_id[at])
            ids, probs = np.zeros((len(allowed), entries), np.int32), np.zeros((len(allowed), entries), np.float32)
            if row in said:
                heard, count = said[row], _first_alike(said[row].chosen, rows.tokens[at, places + 1])
                found = likeliest(heard.ids[:count], heard.probs[:count], entries, vocab_size, row)
                ids[places[:count]], probs[places[:count]] = found
            yield row_record(ids, probs, allowed)

    return recorder


def likeliest(
    ids: np.ndarray, probs: np.ndarray, entries: int, vocab_size: int, row: int
) -> tuple[np.ndarray, np.ndarray]:
    """ids, probs [m, entries] of the likeliest that are below `vocab_size`, of those that a server listed [m, K].

    Raises ValueError that names the row where the listed probabilities exceed 1.
    """
    probs = np.where(ids < vocab_size, probs, 0)
    if (probs.sum(1) > MOST).any():
        raise ValueError(
            f"served.base_url must list log-probabilities in nats, got {probs.sum(1).max():.3g} as the sum of the "
            f"probabilities at a position of row {row}. Ask another server, or train on the answers alone."
        )
    best = np.argsort(-probs, axis=1, kind="stable")[:, :entries]
    missing = ((0, 0), (0, entries - best.shape[1]))
    ids, probs = (np.pad(np.take_along_axis(a, best, 1), missing) for a in (ids, probs))
    return ids, probs


def row_record(
    ids: np.ndarray, probs: np.ndarray, allowed: np.ndarray, label_logp: np.ndarray | None = None
) -> RowRecord:
    """What is stored of a row of T places: ids, probs [T, K], label_logp [T] where `allowed` [T] and all K known."""
    codes = np.asarray(encode(jnp.log(jnp.asarray(probs))))  # of one shape for all rows
    at = np.flatnonzero((probs > 0).all(1) & allowed)
    logp = None if label_logp is None else label_logp[at]
    return RowRecord(ids[at], codes[at], int(allowed.sum()), label_logp=logp, places=at.astype(np.int32))


def _first_alike(chosen: np.ndarray, answer: np.ndarray) -> int:
    """How many positions of the answer, from its start, have the server's own text before them."""
    length = min(len(answer), len(chosen))
    alike = np.cumprod(chosen[:length] == answer[:length]).sum()
    return min(length, int(alike) + 1)


def _bytes(token: str | Sequence[int]) -> bytes:
    return token.encode() if isinstance(token, str) else bytes(token)


def _cut(pieces: Sequence[bytes | None], text: bytes) -> int | None:
    """How many of the pieces make up the text."""
    length = 0
    for count, piece in enumerate((*pieces, b"")):
        if length == len(text):
            return count
        if not piece or not text.startswith(piece, length):
            return None
        length += len(piece)
    return None
