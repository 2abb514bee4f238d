"""The teacher's cache from what a server says of the training text itself, whoever wrote it. No model runs here.

Each segment of a row, a document or a part of one, is sent by itself as token ids (`generation/served.py`: score); the
reply lists the likeliest tokens at each of its places, and the token that is there. So the server reads what a teacher
that is loaded would read. A segment without targets is not sent, nor is what follows its last target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kdjax.config import Served
from kdjax.curation.served_cache import STRANGE, likeliest, row_record
from kdjax.data import Rows, eligible
from kdjax.generation.logprobs import FLOOR, TextScores, sparse_targets, token_texts
from kdjax.generation.served import score
from kdjax.teacher.cache import RowRecord

COMPARED = 8  # tokens that both tokenizers have a text for, before the server's is found to be another one
LIMITS = (
    "vLLM lists at most 20 tokens, or as many as it is started with: --max-logprobs; and it reads --max-model-len "
    "tokens, which must be data.seq_len + 1. "
)


def make_text_recorder(
    served: Served, tokenizer: Any, entries: int, vocab_size: int, *, label_logp: bool = False
) -> Callable[[Rows], Iterator[RowRecord]]:
    """recorder(rows) -> a `RowRecord` per row, in order, once the server has answered for all of them.

    Its `entries` likeliest tokens below `vocab_size` are stored wherever the server lists so many of them; label_logp:
    and the log-probability of the text's own next token. The first row of which the server says nothing ends it: raises
    ValueError that names the row and the reason. So does a server that lists fewer tokens, or has another tokenizer.
    """
    entries = min(entries, vocab_size)
    check_tokens = _make_check(token_texts(tokenizer))

    def recorder(rows: Rows) -> Iterator[RowRecord]:
        allowed = eligible(rows)
        texts = list(_texts(rows, allowed))
        ids, probs = np.zeros((*allowed.shape, entries), np.int32), np.zeros((*allowed.shape, entries), np.float32)
        own = np.zeros(allowed.shape, np.float32)

        def on_text(number: int, said: TextScores | None, reason: str) -> None:
            at, first, sent = texts[number]
            row, places = int(rows.row_id[at]), slice(first, first + len(sent) - 1)
            if said is None:
                raise ValueError(
                    f"served.base_url must answer for every row of the text, got nothing of row {row}: {reason}. "
                    f"{LIMITS if reason.startswith('status 400') else ''}What is whole in the cache stands: start "
                    "again with the same command to go on from there."
                )
            check_tokens(sent, said, row)
            _check_listed(said, entries, row)
            ids[at, places], probs[at, places] = likeliest(*sparse_targets(said.top, {}), entries, vocab_size, row)
            own[at, places] = [FLOOR if logp is None else max(logp, FLOOR) for logp in said.own]

        score([sent for _, _, sent in texts], served, on_text)
        for at, places in enumerate(allowed):
            yield row_record(ids[at], probs[at], places, own[at] if label_logp else None)

    return recorder


def _texts(rows: Rows, allowed: np.ndarray) -> Iterator[tuple[int, int, list[int]]]:
    """(row, its first place in it, token ids) of every segment with a target, up to its last one."""
    for at, (segment, places) in enumerate(zip(rows.segment_ids, allowed, strict=True)):
        for number in np.unique(segment[places]):
            here = segment == number
            first, last = int(np.argmax(here)), int(np.flatnonzero(here & places)[-1])
            yield at, first, rows.tokens[at, first : last + 2].tolist()


def _check_listed(said: TextScores, entries: int, row: int) -> None:
    """Raises ValueError if there are fewer than `entries` at a place: then nothing could be stored of it."""
    least = min(map(len, said.top))
    if least < entries:
        raise ValueError(
            f"served.base_url must list classes.entries={entries} tokens at each place, got {least} at one of row "
            f"{row}; the server lists fewer than it is asked for. Lower classes.entries."
        )


def _make_check(writes: dict[int, bytes]) -> Callable[[Sequence[int], TextScores, int], None]:
    """check(ids, what was said of them, row): ValueError once the server writes other texts for more than half of ids.

    A server takes any ids that it has; those of another tokenizer give numbers as well, of a text that nobody wrote.
    """
    compared, strange = 0, list[str]()

    def check(sent: Sequence[int], said: TextScores, row: int) -> None:
        nonlocal compared
        for number, theirs in zip(sent[1:], said.writes, strict=True):
            ours, text = _shown(writes.get(number)), _shown(theirs)
            if ours and text:
                compared += 1
                strange.extend([f"id {number} is {text!r} there and {ours!r} here"] if ours != text else [])
        if compared >= COMPARED and len(strange) > STRANGE * compared:
            raise ValueError(
                f"data.tokenizer must be the served model's, got another one: {len(strange)} of {compared} tokens are "
                f"other texts for the server, up to row {row}; {strange[0]}. Set data.tokenizer, and a student of that "
                "vocabulary."
            )

    return check


def _shown(text: bytes | str | None) -> str:
    """What of a token's text is the same in all ways of writing it down; "" if it is no text by itself."""
    try:
        found = text.decode() if isinstance(text, bytes) else text or ""
    except UnicodeDecodeError:
        return ""
    if "\ufffd" in found or found.startswith("token_id:"):
        return ""
    return found.replace("\u2581", " ").replace("\u0120", " ").strip()
