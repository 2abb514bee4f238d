"""From a pool to the answers that may be selected: admitted.jsonl, a line per row of the pool and why it is not.

{"row", "id", "teacher", "reason": "" if admitted, else one of pool.REASONS}, with "where" (file:line) and "why" of
those that are not admitted, and "truncated": true where the end of an admitted one is cut off. The manifest counts them
by teacher and reason; the counts add up to "rows". "truncated" is how many of the admitted ones are cut off.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdjax import config, verifiers
from kdjax.curation.answers.encode import Coding, coding_basis, encode_answer, encode_question
from kdjax.curation.answers.loops import repeated_share
from kdjax.curation.answers.pool import NONE, REASONS, Candidate, Pool, candidates, digest_of, reader
from kdjax.curation.answers.released import as_released
from kdjax.curation.answers.stage import FOLDER, Stage, open_stage, records
from kdjax.curation.chain import basis_of
from kdjax.data.answer_pools import PoolRow
from kdjax.data.prompts import Prompt
from kdjax.verifiers import Verdict

ADMITTED = "admitted.jsonl"
# reasons of answers that are right
RIGHT = ("", "loop", "too_long", "truncated", "special_only", "altered", "duplicate", "identical")
Unusable = Callable[[Candidate], tuple[str, bool]]
LONGEST_WHY = 300  # characters


@dataclasses.dataclass(frozen=True, eq=False)
class Admitted:
    """A pool that was verified. reason: int8 of each of its rows, a number in REASONS. counts: as in the manifest."""

    pool: Pool
    reason: np.ndarray
    counts: Mapping[str, Any]


def admit(
    workdir: Path,
    pool: Pool,
    settings: config.Answers,
    default_verifier: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    of: Coding | None = None,
    needed: bool = True,
) -> Admitted:
    """Verify the answers of a pool, question after question; leave out loops, what has no use, what is there twice.

    of: by which an answer has to be usable, else one that is too long would keep a usable one of its teacher out as its
    duplicate; None = nobody trains on them.

    Goes on where it was killed; where nothing is left to do it only reads. What was found for another pool, other
    prompts, verifiers or settings is dropped. on_progress(rows that are done, all). A question that its verifier cannot
    check has undecided answers. Raises ValueError for an unknown verifier, and with `needed` if no answer is admitted.
    """
    settings = as_released(settings)
    path = workdir / FOLDER / ADMITTED
    reason, cut = pool.reason.copy(), np.zeros(len(pool), bool)
    with open_stage(path, _depends(pool, settings, default_verifier, of), renew=True) as stage, reader(pool) as read:
        done = _known(path, pool, reason, cut)
        for row in range(done, pool.of(NONE).stop):
            stage.append(_line_of_none(pool, read, row))
        for question in range(len(pool.questions)):
            rows = pool.of(question)
            if rows.stop > max(done, rows.start):
                found = candidates(pool, read, question)
                unusable = _unusable(pool.questions[question], of)
                _judge(stage, pool, rows, found, reason, cut, done, settings, default_verifier, unusable)
                on_progress(rows.stop, len(pool))
        counts = _count(pool, reason) | {"truncated": int(cut.sum())}
        stage.finish(counts)
    if needed and not counts["reasons"][""]:
        why = ", ".join(f"{name} {count}" for name, count in counts["reasons"].items() if count)
        raise ValueError(
            f"answers.pool must hold right answers to the train prompts, got none in {len(pool)} rows ({why}); {path} "
            f"says why of each. Look at prompts.path, prompts.verifier{f', data.seq_len={of.seq_len}' if of else ''} "
            "and the files."
        )
    return Admitted(pool, reason, counts)


def admitted_answers(admitted: Admitted, settings: config.Answers) -> Iterator[tuple[Prompt, list[Candidate]]]:
    """Question after question the answers that may be selected, by teacher; [] if there is none.

    With answers.candidates so many of them, drawn by answers.seed and the question's id.
    """
    pool = admitted.pool
    with reader(pool) as read:
        for question, prompt in enumerate(pool.questions):
            rows = pool.of(question)
            kept = [at for at, row in enumerate(rows) if admitted.reason[row] == 0]
            if 0 < settings.candidates < len(kept):
                draw = random.Random(f"{settings.seed} {prompt.id}")
                kept = sorted(draw.sample(kept, settings.candidates))
            found = candidates(pool, read, question) if kept else []
            yield prompt, [found[at] for at in kept]


def right_shares(admitted: Admitted) -> dict[str, float]:
    """Teacher -> how often it is right: the mean over the pool's questions of the share of its answers that are right.

    In [0, 1]. By it a teacher is the strongest, and it is r of CAR (teacher_scores.py). All teachers are measured on
    the same questions: one that a teacher has no answer to counts as 0. Loops, duplicates and identical texts were
    verified before they were left out: they are right.
    """
    pool = admitted.pool
    answers, count = pool.question != NONE, len(pool.teachers)
    numbers = pool.question[answers].astype(np.int64) * count + pool.teacher[answers]
    pairs, pair = np.unique(numbers, return_inverse=True)
    right = np.isin(admitted.reason[answers], [REASONS.index(name) for name in RIGHT])
    shares = np.bincount(pair, right) / np.bincount(pair)
    total = np.bincount(pairs % count, shares, count)
    questions = max(1, len(np.unique(pairs // count)))
    return {name: float(of) / questions for name, of in zip(pool.teachers, total, strict=True)}


def _depends(pool: Pool, settings: config.Answers, default_verifier: str, of: Coding | None) -> dict[str, Any]:
    names = ("duplicates", "identical", "loops")
    depends = {
        "pool": pool.content,
        "reasons": REASONS,
        "heldout": hashlib.sha256("\n".join(sorted(pool.heldout)).encode()).hexdigest(),
        "abilities": verifiers.abilities(),
        "coding": coding_basis(of) if of is not None else {},
        **{name: getattr(settings, name) for name in names},
    }
    return basis_of(depends, pool.questions, default_verifier)


def _known(path: Path, pool: Pool, reason: np.ndarray, cut: np.ndarray) -> int:
    """How many rows are in the file; their reasons are put into `reason`, and whether they are truncated into `cut`."""
    number = -1
    for number, (_, record) in enumerate(records(path)):
        known = number < len(pool) and record.get("teacher") == pool.teachers[pool.teacher[number]]
        if not known or record.get("reason") not in REASONS:
            raise ValueError(
                f"{path}, line {number + 1} must be of row {number + 1} of the pool, got {record!r:.80}; somebody "
                "wrote there. Remove the file, and the pool is verified anew."
            )
        reason[number], cut[number] = REASONS.index(record["reason"]), record.get("truncated", False)
    return number + 1


def _line_of_none(pool: Pool, read: Callable[[int], PoolRow], row: int) -> dict[str, str]:
    """The line of a row that answers no question."""
    line = {"row": "", "id": "", "teacher": pool.teachers[pool.teacher[row]], "reason": REASONS[pool.reason[row]]}
    try:
        said = read(row)
    except ValueError as error:
        why = str(error)
    else:
        line |= {"row": digest_of(said.id, said.teacher, said.text), "id": said.id}
        other = REASONS[pool.reason[row]] == "other_question"
        why = f"it asks {said.question or said.asks!r}" if other else said.failed
    return line | _because(pool, row, why)


def _judge(
    stage: Stage,
    pool: Pool,
    rows: range,
    found: list[Candidate],
    reason: np.ndarray,
    cut: np.ndarray,
    done: int,
    settings: config.Answers,
    default_verifier: str,
    unusable: Unusable,
) -> None:
    """Append the lines of a question's rows from number `done` on; those before it are in `reason` and `cut`."""
    answered: set[str] = set()
    said_by: dict[str, str] = {}
    for row, one in zip(rows, found, strict=True):
        text = _same(one.text)
        if row >= done:
            name, why = _reason(one, settings, default_verifier)
            error, long = unusable(one) if not name else ("", False)
            name = name or error
            if not name and settings.duplicates == "first" and one.teacher in answered:
                name = "duplicate"
            elif not name and settings.identical == "first" and said_by.get(text, one.teacher) != one.teacher:
                name, why = "identical", f"{said_by[text]} says the same"
            reason[row], cut[row] = REASONS.index(name), long and not name
            line: dict[str, Any] = {"row": one.row, "id": one.question.id, "teacher": one.teacher, "reason": name}
            if cut[row]:
                line["truncated"] = True
            stage.append(line | _because(pool, row, why) if name else line)
        if not reason[row]:
            answered.add(one.teacher)
            said_by.setdefault(text, one.teacher)


def _reason(one: Candidate, settings: config.Answers, default_verifier: str) -> tuple[str, str]:
    try:
        said = verifiers.verify(one.text, one.question, default_verifier, cut_off=one.cut_off)
    except ValueError as error:  # the question lacks what its verifier reads; verifiers themselves are known by now
        return "undecided", str(error)
    if said.verdict != Verdict.RIGHT:
        return str(said.verdict), said.reason
    if settings.loops < 1:
        share = repeated_share(one.text)
        if share > settings.loops:
            return "loop", f"{share:.2f} of its words repeat"
    return "", ""


def _unusable(question: Prompt, of: Coding | None) -> Unusable:
    """(an answer to it) -> why the student cannot be trained on it, "" = it can; whether its end is cut off then."""
    if of is None:
        return lambda one: ("", False)
    asked = encode_question(question, of)

    def unusable(one: Candidate) -> tuple[str, bool]:
        found = encode_answer(one, asked, of)
        return found.error, found.truncated

    return unusable


def _because(pool: Pool, row: int, why: str) -> dict[str, str]:
    return {"where": pool.place(row)} | ({"why": why[:LONGEST_WHY]} if why else {})


def _same(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _count(pool: Pool, reason: np.ndarray) -> dict[str, Any]:
    """Rows by reason, by teacher and reason; questions, and those without an admitted answer."""
    table = np.zeros((len(pool.teachers), len(REASONS)), np.int64)
    np.add.at(table, (pool.teacher, reason), 1)
    answered = np.unique(pool.question[reason == 0])
    return {
        "rows": len(pool),
        "reasons": _by_name(table.sum(0)),
        "teachers": {name: _by_name(counts) for name, counts in zip(pool.teachers, table, strict=True)},
        "questions": len(pool.questions),
        "questions_without_answer": len(pool.questions) - len(answered),
    }


def _by_name(counts: np.ndarray) -> dict[str, int]:
    return {name: int(count) for name, count in zip(REASONS, counts, strict=True)}
