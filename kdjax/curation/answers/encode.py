"""A question and its answers as token ids, and which of the tokens count.

The question is the chat up to where the assistant's turn begins. An answer is tokenised by itself and put behind it, so
no token belongs to both, and all answers follow the same ids. Special tokens count in neither. What counts of an answer
is trained on, but for what the template writes after it (answers.trailing "keep"); its end is trained on and does not
count.
"""

import dataclasses
import hashlib
import json
import unicodedata
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from kdjax import config
from kdjax.curation.answers.pool import Candidate
from kdjax.data.prompts import Prompt
from kdjax.data.responses import end_of_answer, prompt_ids
from kdjax.models import tokenizer as tokenizers

SPECIAL = ("<|im_start|>", "<|im_end|>")  # marks of a turn, even in tokenizers that do not call them special

# why an answer is not scored; "" = it is
REASONS = (
    "",
    "too_long",  # the question leaves no room for an answer in data.seq_len
    "truncated",  # the answer does not fit into data.seq_len, and answers.truncated is "drop"
    "special_only",  # no token of it counts
    "altered",  # its tokens are not its text: it writes special tokens, or the tokenizer cannot write it
    "not_finite",  # the student gives no finite figures
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """Token ids, and which of them count: Q of a question, A of an answer."""

    ids: Int[np.ndarray, "N"]
    counted: Bool[np.ndarray, "N"]


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedAnswer:
    """An answer's row and teacher, what follows the question, and why it cannot be scored (a key of REASONS).

    truncated: its end is cut off.
    """

    row: str
    teacher: str
    tokens: Tokens
    error: str = ""
    truncated: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """A question with its answers."""

    id: str
    question: Tokens
    answers: tuple[EncodedAnswer, ...]


@dataclasses.dataclass(frozen=True)
class Coding:
    """How text becomes ids. special: ids that do not count. after: what follows an answer, its end id first.

    The rest is of `config.Data` and `config.Answers`.
    """

    tokenizer: Any
    special: frozenset[int]
    after: tuple[int, ...]
    seq_len: int
    chat_template: bool
    system_prompt: str
    trailing: str
    truncated: str


def coding(tokenizer: Any, data: config.Data, answers: config.Answers) -> Coding:
    """The coding of an experiment. Raises ValueError for a tokenizer without an end of sequence."""
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    known = tokenizer.get_vocab()
    special |= {known[name] for name in SPECIAL if name in known}
    return Coding(
        tokenizer,
        frozenset(special),
        _after_answer(tokenizer, data.chat_template),
        data.seq_len,
        data.chat_template,
        data.system_prompt,
        answers.trailing,
        answers.truncated,
    )


def coding_basis(of: Coding) -> dict[str, Any]:
    """What the ids and the choice of those that count depend on, by name, for manifests.

    template: sha256 of the chat template and of the special tokens that it may write; the tokenizer's is of neither.
    """
    template = of.tokenizer.chat_template if of.chat_template else None
    told = json.dumps([template, of.tokenizer.special_tokens_map, sorted(of.special)], sort_keys=True, default=str)
    names = ("seq_len", "chat_template", "system_prompt", "trailing", "truncated")
    return {
        "tokenizer": tokenizers.fingerprint(of.tokenizer),
        "template": hashlib.sha256(told.encode()).hexdigest(),
        **{name: getattr(of, name) for name in names},
    }


def answer_ids(tokenizer: Any, text: str) -> list[int]:
    """What is scored and trained on of an answer, without its end: the ids of the text, leading blanks left out."""
    return list(tokenizer(text.lstrip(), add_special_tokens=False)["input_ids"])


def encode(prompt: Prompt, candidates: Iterable[Candidate], of: Coding) -> Encoded:
    """A question and its answers. Raises ValueError for a prompt without ids."""
    question = encode_question(prompt, of)
    return Encoded(prompt.id, question, tuple(encode_answer(each, question, of) for each in candidates))


def encode_question(prompt: Prompt, of: Coding) -> Tokens:
    """The prompt that answers follow, the beginning of the assistant's turn included."""
    ids = prompt_ids(prompt, of.tokenizer, chat_template=of.chat_template, system_prompt=of.system_prompt)
    return _tokens(ids, of)


def encode_answer(candidate: Candidate, question: Tokens, of: Coding) -> EncodedAnswer:
    """An answer to an encoded question, or why it has none of its figures.

    With its end it has to fit into `data.seq_len`, as in training; answers.truncated "keep" cuts off what does not.
    answers.trailing "keep": what the template writes after an answer follows, and counts but for special tokens.
    """
    ids = answer_ids(of.tokenizer, candidate.text)
    room, end = of.seq_len - len(question.ids), 0 if candidate.cut_off else 1
    long = len(ids) + end > room
    error = ""
    if room < 1:
        error = "too_long"
    elif long and of.truncated == "drop":
        error = "truncated"
    elif all(token in of.special for token in ids[:room]):
        error = "special_only"
    elif not _is_text(ids, candidate.text, of):
        error = "altered"
    if of.trailing == "keep" and not candidate.cut_off:
        ids = [*ids, *of.after]
    kept = _tokens([] if error else ids[:room], of)
    return EncodedAnswer(candidate.row, candidate.teacher, kept, error, long and not error)


def _is_text(ids: list[int], text: str, of: Coding) -> bool:
    """Whether the tokens that count spell the text; tokenizers may compose accents (NFC)."""
    counted = [token for token in ids if token not in of.special]
    spelt = of.tokenizer.decode(counted, clean_up_tokenization_spaces=False)
    return unicodedata.normalize("NFC", spelt) == unicodedata.normalize("NFC", text.lstrip())


def _tokens(ids: list[int], of: Coding) -> Tokens:
    return Tokens(np.array(ids, np.int32), np.array([token not in of.special for token in ids], bool))


def _after_answer(tokenizer: Any, chat_template: bool) -> tuple[int, ...]:
    """The end of an answer and what the template writes after it."""
    end = end_of_answer(tokenizer, chat_template=chat_template)
    if not chat_template or tokenizer.chat_template is None:
        return (end,)
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    whole = list(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False))
    last = len(whole) - 1 - whole[::-1].index(end) if end in whole else len(whole)
    return (end, *whole[last + 1 :])
