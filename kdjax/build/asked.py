"""Prompts as models take them, what they weigh, and training rows from their answers."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.build.checks import check_served, is_served, said_answers
from kdjax.config import Experiment
from kdjax.curation import params_fingerprint
from kdjax.curation.answers.selected import NAME, basis_of, check_chooser, read_selected
from kdjax.curation.batches import choose_rows, easiest_first
from kdjax.curation.paced import load_weights, rates_of_weights, training_weights
from kdjax.curation.pass_rates import PassRates
from kdjax.curation.served_cache import (
    SERVED,
    Said,
    check_answers,
    check_cuts,
    digest,
    first_difference,
    make_listener,
)
from kdjax.data import LoadedData, Rows
from kdjax.data.prompts import Prompt, fingerprint, load_prompts, messages, question_digest, split_prompts
from kdjax.data.responses import Answered, answer_rows, end_of_answer, prompt_ids, room_for_teacher
from kdjax.generation.generate import identity
from kdjax.generation.store import FAILED, LENGTH, STOP, Rollout, each_rollout
from kdjax.models import tokenizer as tokenizers
from kdjax.types import Params

GOLD, POOL = "gold", "pool"
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """The prompts of an experiment, encoded.

    heldout: to evaluate on. train: those with a weight above 0; ids, seen_by_teacher (None = the same) and weight are
    of these, in this order; rank: with a curriculum the place of each, the easiest first. end: the id that ends an
    answer. room: how much longer the teacher's rows are. weighs: whether rows have these weights in the loss; else they
    are drawn by them. rates: of the train prompts, with pass_rates.every. student: the fingerprint of the parameters
    whose answers made the weights; "" = any.
    """

    heldout: tuple[Prompt, ...]
    train: tuple[Prompt, ...]
    ids: tuple[tuple[int, ...], ...]
    seen_by_teacher: tuple[tuple[int, ...] | None, ...]
    weight: np.ndarray
    rank: np.ndarray | None
    end: int
    room: int
    fingerprint: str
    weighs: bool = True
    rates: PassRates | None = None
    student: str = ""

    def answered(self, number: int, answer: Sequence[int]) -> Answered:
        """The row to be of an answer to train[number]."""
        weight = float(self.weight[number]) if self.weighs else 1.0
        return Answered(self.ids[number], tuple(answer), weight, self.seen_by_teacher[number])

    def choice(self, e: Experiment, prompts: np.ndarray, steps: int) -> Callable[[int], np.ndarray] | None:
        """`curation.batches.choose_rows` for rows that answer these prompts, of batches for `steps` steps."""
        rank = None if self.rank is None else self.rank[prompts]
        return choose_rows(self.weight[prompts], rank, e.pass_rates, e.train.batch_size, e.train.seed, steps)


def load_asked(e: Experiment, tokenizer: Any, workdir: Path | None) -> Asked:
    """The prompts of `e.prompts`, with the weights that launch.curate left in `workdir`.

    Raises ValueError for prompts that are too long for data.seq_len, weights that are missing or of another experiment,
    a teacher that shall see gold answers that are not there.
    """
    every = load_prompts(e.prompts)
    heldout, train = split_prompts(every, e.prompts)
    rates = _rates(e, train, tokenizer, workdir)
    weight, rank = _weights(e, train, workdir)
    kept = [number for number in range(len(train)) if weight[number] > 0]
    train, weight = [train[number] for number in kept], weight[kept]
    rank = None if rank is None else rank[kept]
    ids = [tuple(_encode(e, prompt, tokenizer)) for prompt in train]
    _check_room(e, train, ids)
    seen = tuple(_privileged(e, prompt, tokenizer) for prompt in train)
    room = room_for_teacher([Answered(a, (), 1.0, b) for a, b in zip(ids, seen, strict=True)])
    end = end_of_answer(tokenizer, chat_template=e.data.chat_template)
    return Asked(
        tuple(heldout),
        tuple(train),
        tuple(ids),
        seen,
        weight,
        rank,
        end,
        room,
        fingerprint(every),
        e.pass_rates.normalise != "sample",
        rates.of([prompt.id for prompt in train]) if rates is not None and e.pass_rates.every else None,
        "" if rates is None else str(rates.basis.get("model", "")),
    )


def check_student(e: Experiment, asked: Asked, params: Params, workdir: Path | None) -> None:
    """The student with these parameters is the one that answers were chosen for, and whose answers made the weights.

    Raises ValueError if it is not.
    """
    if e.prompts.answers == POOL and workdir is not None:
        check_chooser(workdir, lambda: params_fingerprint(params))
    if asked.student and asked.student != (here := params_fingerprint(params)):
        raise ValueError(
            f"student.* must give the student whose pass rates there are, {asked.student[:12]}, got {here[:12]}; "
            "another one solves other prompts. Run launch.curate in another --workdir, or undo the change."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingText:
    """What is trained on: with prompts.answers `data.train` has these answers, else the rows of the corpus.

    asked: the prompts, None if no answers are trained on. teacher: columns of `types.TeacherText` by row_id, {} = the
    teacher reads the rows. choose: (batch number) -> its rows; None = all in turn. speaker: for the cache of a served
    teacher who that is. said: what it said of its own answers, by row_id; {} = it is asked.
    """

    data: LoadedData
    asked: Asked | None = None
    teacher: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    choose: Callable[[int], np.ndarray] | None = None
    said: Mapping[int, Said] = dataclasses.field(default_factory=dict)
    speaker: str | None = None


def training_text(e: Experiment, data: LoadedData, tokenizer: Any, workdir: Path | None) -> TrainingText:
    """The training text of an experiment whose corpus is `data`.

    Raises ValueError as `load_asked` does, and for settings of answers where none are trained on.
    """
    said, speaker = dict[int, Said](), None
    if is_served(e):
        check_served(e)
        speaker = check_answers(e) if said_answers(e) else SERVED + e.served.model
    if not e.prompts.answers and e.on_policy.fraction == 0:
        if workdir is not None:
            _check_effect(e)
        return TrainingText(data, speaker=speaker)
    asked = load_asked(e, tokenizer, workdir)
    rows, text, choose = data.train, dict[str, np.ndarray](), None
    if e.prompts.answers:
        rows, text, numbers, said = rows_of_answers(e, asked, tokenizer, answers_of(e, asked, tokenizer, workdir))
        choose = asked.choice(e, numbers, e.train.steps)
    if said_answers(e):
        speaker = f"{speaker}, {digest(said)}"
    key = hashlib.sha256(f"{data.fingerprint} {asked.fingerprint} {asked.weight.tobytes().hex()}".encode())
    key.update(rows.row_hash.astype("<u8").tobytes())
    train = dataclasses.replace(data, train=rows, fingerprint=key.hexdigest())
    return TrainingText(train, asked, text, choose, said, speaker)


def reselected(text: TrainingText, e: Experiment, tokenizer: Any, workdir: Path, selection: str) -> TrainingText:
    """The text with the answers of another selection of the pool."""
    if text.asked is None:
        raise ValueError(f"prompts.answers must be {POOL!r} where answers are chosen anew, got {e.prompts.answers!r}.")
    rows, columns, numbers, _ = rows_of_answers(
        e, text.asked, tokenizer, answers_of(e, text.asked, tokenizer, workdir, selection)
    )
    choose = text.asked.choice(e, numbers, e.train.steps)
    return dataclasses.replace(text, data=dataclasses.replace(text.data, train=rows), teacher=columns, choose=choose)


def answers_of(
    e: Experiment, asked: Asked, tokenizer: Any, workdir: Path | None, selection: str = NAME
) -> Iterator[Rollout]:
    """What `prompts.answers` names: a directory of launch.generate, or with "pool" what launch.curate selected.

    Raises ValueError if that was selected for another experiment, but for the student.
    """
    if e.prompts.answers != POOL:
        yield from each_rollout(e.prompts.answers)
    elif workdir is not None:
        for one in read_selected(workdir, selection, e.answers, basis_of(e, tokenizer, asked.fingerprint)):
            yield Rollout(one.id, 0, one.text.lstrip(), LENGTH if one.cut_off else STOP)


def rows_of_answers(
    e: Experiment, asked: Asked, tokenizer: Any, answers: Iterable[Rollout]
) -> tuple[Rows, dict[str, np.ndarray], np.ndarray, dict[int, Said]]:
    """The rows of `prompts.answers`, the teacher's in their place ({} = the same), the prompt of each, what was said.

    gold: the gold answer of every prompt. Otherwise all of `answers` to the train prompts but those that failed; one
    that was cut off has no end. What a server said of a row is read for its cache. Raises ValueError if there is none,
    or one of another question with this id.
    """
    made: list[Answered] = []
    numbers: list[int] = []
    said: dict[int, Said] = {}
    if e.prompts.answers == GOLD:
        for number, prompt in enumerate(asked.train):
            if prompt.answer:
                made.append(asked.answered(number, [*_plain_ids(tokenizer, prompt.answer), asked.end]))
                numbers.append(number)
    else:
        number_of = {prompt.id: number for number, prompt in enumerate(asked.train)}
        asks = [question_digest(prompt, e.prompts.instruction) for prompt in asked.train]
        found = (r for r in answers if r.finish != FAILED and r.response and r.id in number_of)
        for rollout, ids, heard in _heard(e, found, tokenizer):
            if rollout.asks not in ("", asks[number_of[rollout.id]]):
                raise ValueError(
                    f"prompts.answers must hold answers to the questions of prompts.path, got {e.prompts.answers!r}, "
                    f"whose answer to {rollout.id!r} is to another question. Set prompts.path to the prompts that "
                    "launch.generate was given, or run it for these with another --out."
                )
            if heard is not None:
                said[len(made)] = heard
            end = [] if rollout.finish == LENGTH else [asked.end]
            made.append(asked.answered(number_of[rollout.id], [*ids, *end]))
            numbers.append(number_of[rollout.id])
    if not made:
        raise ValueError(
            f"prompts.answers must hold answers to the train prompts, got {e.prompts.answers!r} with none. Run "
            "launch.generate (with 'pool' launch.curate) for these prompts first, or set it to 'gold'."
        )
    long = sum(len(one.prompt) + len(one.answer) > e.data.seq_len for one in made)
    if long:
        log.warning(
            "%d of %d answers of prompts.answers do not fit into data.seq_len=%d behind their prompts and lose their "
            "ends. Raise it to %d.",
            long,
            len(made),
            e.data.seq_len,
            max(len(one.prompt) + len(one.answer) for one in made),
        )
    return *answer_rows(made, e.data.seq_len, asked.room), np.array(numbers), said


def _heard(
    e: Experiment, rollouts: Iterable[Rollout], tokenizer: Any
) -> Iterator[tuple[Rollout, list[int], Said | None]]:
    """Each rollout, its ids, and for a cache of log-probabilities what the server said, whose cut the ids are then."""
    listen = make_listener(tokenizer) if said_answers(e) else None
    count, strange = 0, []
    for rollout in rollouts:
        ids, heard = _plain_ids(tokenizer, rollout.response), listen(rollout) if listen else None
        if heard is not None:
            count += 1
            if heard.answer is None:
                strange.append(first_difference(rollout, heard, ids))
            else:
                ids = list(heard.answer)
        yield rollout, ids, heard
    if listen:
        check_cuts(count, strange, e.prompts.answers)


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _encode(e: Experiment, prompt: Prompt, tokenizer: Any) -> list[int]:
    return prompt_ids(prompt, tokenizer, chat_template=e.data.chat_template, system_prompt=e.data.system_prompt)


def _check_effect(e: Experiment) -> None:
    """Nothing is set that only answers to prompts feel, for the text of data.path is trained on."""
    for name, value, default in (
        ("pass_rates.weight", e.pass_rates.weight, "uniform"),
        ("teacher.privileged", e.teacher.privileged, ""),
    ):
        if value != default:
            raise ValueError(
                f"{name} must be {default!r} without answers to prompts to train on, got {value!r}; the text of "
                "data.path would be trained on without it. Set prompts.answers or on_policy.fraction."
            )


def _rates(e: Experiment, train: Sequence[Prompt], tokenizer: Any, workdir: Path | None) -> PassRates | None:
    """The pass rates behind the weights, if there are weights; but for the student, they are of this experiment."""
    if e.pass_rates.weight == "uniform" or workdir is None:
        return None
    depends = identity("", tokenizers.fingerprint(tokenizer), train, e.generation, e.data)
    depends |= {"default_verifier": e.prompts.verifier}
    wanted = {name: value for name, value in depends.items() if name not in ("model", "seed")}
    return rates_of_weights(workdir, json.loads(json.dumps(wanted)), e.generation.seed)


def _weights(e: Experiment, train: Sequence[Prompt], workdir: Path | None) -> tuple[np.ndarray, np.ndarray | None]:
    """(weights, ranks of a curriculum) of the prompts."""
    if e.pass_rates.weight == "uniform" or workdir is None:
        return np.ones(len(train), np.float64), None
    names = [prompt.id for prompt in train]
    weight = training_weights(workdir, names, e.pass_rates)
    if e.pass_rates.weight != "curriculum":
        return weight, None
    found = load_weights(workdir, e.pass_rates)
    place = {name: number for number, name in enumerate(found.ids)}
    rates = [np.array([column[place[name]] for name in names], np.float64) for column in (found.right, found.tried)]
    rank = np.empty(len(names), np.int64)
    rank[easiest_first(*rates)] = np.arange(len(names))
    return weight, rank


def _check_room(e: Experiment, train: Sequence[Prompt], ids: Sequence[tuple[int, ...]]) -> None:
    if e.prompts.answers == POOL and e.on_policy.fraction == 0:
        return  # launch.curate selects no answer to a prompt without room for one
    wanted = e.generation.new_tokens if e.on_policy.fraction != 0 else 1
    longest = max(range(len(ids)), key=lambda number: len(ids[number]))
    if len(ids[longest]) + wanted > e.data.seq_len:
        raise ValueError(
            f"data.seq_len must hold the longest prompt and its answer, got {e.data.seq_len} for the "
            f"{len(ids[longest])} tokens of {train[longest].id!r} and {wanted} new ones. Raise it to "
            f"{len(ids[longest]) + wanted}, or lower generation.new_tokens."
        )


def _privileged(e: Experiment, prompt: Prompt, tokenizer: Any) -> tuple[int, ...] | None:
    """What the teacher is asked: the last turn's question in teacher.privileged, with the gold answer."""
    if not e.teacher.privileged:
        return None
    if prompt.answer is None:
        raise ValueError(
            f"prompts.path must hold gold answers with teacher.privileged, got none for {prompt.id!r}; the teacher is "
            'shown them. Add "answer" to it.'
        )
    *before, last = messages(prompt)
    text = e.teacher.privileged.replace("{question}", last["content"]).replace("{answer}", prompt.answer)
    shown = dataclasses.replace(prompt, prompt=(*before, {**last, "content": text}))
    return tuple(_encode(e, shown, tokenizer))
