"""The file of a choice of answers, selected.jsonl, made anew as a whole each time, and what can be said of it.

  {"id", "teacher_name", "row", "score_key", "score_value", "score_rank", "group", "forced", "text", "cut_off"}

score_key "" and score_value null, score_rank and group 0 where the policy reads no score. The manifest has "sha256" of
the file, what it depends on, and counts that add up: selected + dropped questions are all, considered + not_drawn
answers are the admitted ones, valid + errors are the considered ones. "overlap" is {name of another choice: how much of
the selection it would have taken}, see rivals.py. With policy "best_teacher" also "teacher_scores",
{teacher: its score or null}, the best first, "common_questions" and "rated_questions"; see best_teacher.py. With
"strongest", "teacher" and "best_teacher" the counts have "taken_teachers": whose answers are drawn from, more than one
where they are equals. With answers.families they have "same_family": how many of the admitted and of the selected
answers are of these.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdjax import config, registry
from kdjax.curation.answers.best_teacher import Rated
from kdjax.curation.answers.encode import coding, coding_basis
from kdjax.curation.answers.pool import Candidate
from kdjax.curation.answers.released import as_released
from kdjax.curation.answers.rivals import shares
from kdjax.curation.answers.scored import ScoredFile, ScoredLine
from kdjax.curation.answers.scores import Context, rate
from kdjax.curation.answers.select import Chosen, Pick, ScoredAnswer, choose, policy_of
from kdjax.curation.answers.stage import FOLDER, FORMAT, manifest_of, read_manifest, records
from kdjax.curation.answers.verify import Admitted, admitted_answers, right_shares
from kdjax.run_log import write_whole

NAME = "selected"
COMMAND = "python -m launch.curate"
Measure = Callable[[Candidate], tuple[int, str]]  # (tokens, why it cannot be trained on or "")
FREE = ("scored", "families", "rescore_every", "restart")  # fields of answers.* that a selection does not depend on


@dataclasses.dataclass(frozen=True)
class Selected:
    """A line of the file. score_value: None where the policy reads no score."""

    id: str
    teacher_name: str
    row: str
    score_key: str
    score_value: float | None
    score_rank: int
    group: int
    forced: bool
    text: str
    cut_off: bool = False


def select(
    workdir: Path,
    admitted: Admitted,
    settings: config.Answers,
    *,
    scored: ScoredFile | None = None,
    measure: Measure | None = None,
    context: Context | None = None,
    rated: Rated | None = None,
    basis: Mapping[str, Any] | None = None,
    name: str = NAME,
) -> dict[str, Any]:
    """Choose for every question, write <workdir>/answers/<name>.jsonl and its manifest; returns the counts.

    scored: the student's figures, for policies that read scores. measure: the length of an answer in tokens and why it
    cannot be trained on, for the others; context: of the scores (None: answers.question_share). rated: the teachers,
    for policy "best_teacher". basis: what else the choice depends on, `basis_of` and "student". All questions share one
    generator of answers.seed. Raises ValueError if what the policy reads is not given or not whole, for an unknown
    policy, score or teacher, and if nothing is selected.
    """
    settings = as_released(settings)
    teachers = _taken(settings, admitted, scored, measure, rated)
    context = context or Context(question_share=settings.question_share)
    tally, draws, family = _Tally(), random.Random(settings.seed), _family(settings, admitted.pool.teachers)
    path = workdir / FOLDER / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside, digest = path.with_name(path.name + ".tmp"), hashlib.sha256()
    with open(beside, "wb") as file:
        for prompt, candidates in admitted_answers(admitted, settings):
            answers, lines = _scored(candidates, settings, scored, measure, context)
            chosen = choose(prompt.id, answers, settings, draws, teachers)
            tally.add(prompt.id, answers, lines if policy_of(settings).scores else {}, chosen)
            if isinstance(chosen, Chosen):
                tally.compare(shares(prompt.id, chosen, answers, lines, settings))
            for one in _lines(candidates, chosen, settings) if isinstance(chosen, Chosen) else ():
                line = (json.dumps(dataclasses.asdict(one), ensure_ascii=False, allow_nan=False) + "\n").encode()
                digest.update(line)
                file.write(line)
        file.flush()
        os.fsync(file.fileno())
    counts = tally.counts(admitted, family) | ({"taken_teachers": teachers} if teachers else {})
    if not counts["rows"]:
        beside.unlink()
        raise ValueError(
            f"answers.policy must leave answers to train on, got none with {settings.policy!r} of "
            f"{counts['questions']} questions ({counts['dropped']}; answers without use: {counts['errors']}). Look at "
            "answers.small_pool, answers.teacher and the errors of the scores."
        )
    depends = {"format": FORMAT, "pool": admitted.pool.content, "scored": scored.path.name if scored else ""}
    depends |= {"gradients": rated.file if rated else ""}
    depends |= {"settings": dataclasses.asdict(settings), **(basis or {})}
    os.replace(beside, path)
    of_teachers = rated.record() if rated is not None else {}
    manifest = {"depends": depends, "counts": counts, **of_teachers, "sha256": digest.hexdigest()}
    write_whole(manifest_of(path), json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return counts


def basis_of(e: config.Experiment, tokenizer: Any, prompts: str) -> dict[str, Any]:
    """What a selection depends on besides pool, student and answers.*. prompts: `fingerprint` of all that there are."""
    own = {f"prompts.{name}": getattr(e.prompts, name) for name in ("seed", "heldout_fraction", "verifier")}
    return {"prompts": prompts, **own, **coding_basis(coding(tokenizer, e.data, as_released(e.answers)))}


def read_selected(
    workdir: Path,
    name: str = NAME,
    settings: config.Answers | None = None,
    basis: Mapping[str, Any] | None = None,
) -> Iterator[Selected]:
    """The answers that are trained on, in the order of the questions' ids.

    settings, basis: by which they have to be selected, the latter by `basis_of`; None = whichever. What the manifest of
    an earlier version does not name is not asked. Raises ValueError that names what differs, and if there are none.
    """
    path = workdir / FOLDER / f"{name}.jsonl"
    try:
        manifest = json.loads(manifest_of(path).read_text(encoding="utf-8"))
        with open(path, "rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest() == manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must hold the selected answers, got none: {error}. Run `{COMMAND}` with the same config."
        ) from error
    if not whole:
        raise ValueError(
            f"{path} must be the file that its manifest is of, got another one; a run was stopped, or somebody wrote "
            f"there. Run `{COMMAND}` again."
        )
    wanted = {} if settings is None else {"settings": dataclasses.asdict(as_released(settings))}
    _check_made_for(path, manifest["depends"], {**wanted, **(basis or {})})
    return (Selected(**record) for _, record in records(path))


def _check_made_for(path: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    def flat(depends: Mapping[str, Any]) -> dict[str, Any]:
        own = {f"answers.{name}": of for name, of in depends.get("settings", {}).items() if name not in FREE}
        return own | {name: of for name, of in depends.items() if name != "settings"}

    known, here = flat(there), flat(json.loads(json.dumps(wanted)))  # tuples as JSON has them
    differing = [
        f"{name} is {value!r:.80}, there it is {known[name]!r:.80}"
        for name, value in here.items()
        if name in known and known[name] != value
    ]
    if differing:
        raise ValueError(
            f"{path} must hold the answers that this config selects, got another one's: {'; '.join(differing)}. Run "
            f"`{COMMAND}` with the same config, or undo these changes."
        )


def check_chooser(workdir: Path, student: Callable[[], str]) -> None:
    """The student with this `params_fingerprint` made the first choice. Raises ValueError if another one did."""
    path = workdir / FOLDER / f"{NAME}.jsonl"
    there = read_manifest(path).get("depends", {}).get("student", "")  # "" = the policy reads no student
    if there and there != (here := student()):
        raise ValueError(
            f"student.* must give the student that chose {path}, {there[:12]}, got {here[:12]}; other answers suit "
            f"another one. Run `{COMMAND}` with the same config, or undo the change."
        )


def teacher_shares(selection: Iterable[Selected]) -> dict[str, float]:
    """Teacher -> its share of the answers."""
    counts = collections.Counter(one.teacher_name for one in selection)
    return {name: counts[name] / counts.total() for name in sorted(counts)}


def overlap(one: Iterable[Selected], other: Iterable[Selected]) -> float:
    """The mean over the questions of both selections of |same answers| / |answers of either|; NaN if there is none."""
    found = []
    for selection in (one, other):
        rows: dict[str, set[str]] = {}
        for answer in selection:
            rows.setdefault(answer.id, set()).add(answer.row)
        found.append(rows)
    both = found[0].keys() & found[1].keys()
    shares = [len(found[0][name] & found[1][name]) / len(found[0][name] | found[1][name]) for name in both]
    return math.fsum(shares) / len(shares) if shares else math.nan


class _Tally:
    """Counts over the questions."""

    def __init__(self) -> None:
        self._dropped: dict[str, list[str]] = {}
        self._errors: collections.Counter[str] = collections.Counter()
        self._teachers: collections.Counter[str] = collections.Counter()
        self._groups: collections.Counter[int] = collections.Counter()
        self._of_group: dict[int, list[float]] = {}
        self._overlaps: dict[str, tuple[int, float]] = {}
        self._questions = self._considered = self._valid = self._forced = self._tokens = 0

    def compare(self, shares: Mapping[str, float]) -> None:
        for name, share in shares.items():
            questions, before = self._overlaps.get(name, (0, 0.0))
            self._overlaps[name] = questions + 1, before + share

    def add(self, question: str, answers: Sequence[ScoredAnswer], lines: Mapping[str, ScoredLine], chosen: Any) -> None:
        self._questions += 1
        self._considered += len(answers)
        self._valid += len(chosen.ranked)
        valid = {pick.answer.row for pick in chosen.ranked}
        self._errors.update(answer.error or "no_score" for answer in answers if answer.row not in valid)
        for pick in chosen.ranked if lines else ():
            sums = self._of_group.setdefault(pick.group, [0, 0.0, 0.0, 0.0])
            nll = lines[pick.answer.row].values.get("answer_nll", math.nan)
            figures = (1, pick.answer.score, nll, pick.answer.length)
            self._of_group[pick.group] = [a + b for a, b in zip(sums, figures, strict=True)]
        if not isinstance(chosen, Chosen):
            self._dropped.setdefault(chosen.reason, []).append(question)
            return
        self._forced += chosen.forced
        self._tokens += sum(pick.answer.length for pick in chosen.picks)
        self._teachers.update(pick.answer.teacher for pick in chosen.picks)
        self._groups.update(pick.group for pick in chosen.picks)

    def counts(self, admitted: Admitted, family: Sequence[str]) -> dict[str, Any]:
        dropped = {reason: len(names) for reason, names in sorted(self._dropped.items())}
        found = admitted.counts["reasons"][""]
        usable = sum(admitted.counts["teachers"][name][""] for name in family)
        of_family = {"admitted": usable, "selected": sum(self._teachers[name] for name in family)}
        of_group = {}
        for group, (number, score, nll, length) in sorted(self._of_group.items()):
            means = (score / number, nll / number, length / number)
            of_group[str(group)] = {"answers": int(number)} | dict(
                zip(("score", "answer_nll", "n_answer"), means, strict=True)
            )
        return {
            "questions": self._questions,
            "selected": self._questions - sum(dropped.values()),
            "forced": self._forced,
            "dropped": dropped,
            "rows": self._teachers.total(),
            "tokens": self._tokens,
            "teachers": dict(sorted(self._teachers.items())),
            "groups": {str(group): count for group, count in sorted(self._groups.items())},
            "admitted": found,
            "not_drawn": found - self._considered,
            "considered": self._considered,
            "valid": self._valid,
            "errors": dict(sorted(self._errors.items())),
            "means_of_groups": of_group,
            "overlap": {name: of / count for name, (count, of) in self._overlaps.items()},
            "dropped_questions": dict(sorted(self._dropped.items())),
        } | ({"same_family": of_family} if family else {})


def _taken(
    settings: config.Answers,
    admitted: Admitted,
    scored: ScoredFile | None,
    measure: Measure | None,
    rated: Rated | None,
) -> list[str]:
    """The teachers that a policy of a few takes, by name; [] with the others. ValueError if something is missing."""
    policy, teachers = policy_of(settings), admitted.pool.teachers
    if policy.scores and scored is None:
        raise ValueError(
            f"answers.policy={settings.policy!r} must have scores, got none; the student has to read the answers "
            "first. Run `python -m launch.curate`, or set a policy without scores."
        )
    if policy.lengths and measure is None:
        raise ValueError(f"answers.policy={settings.policy!r} must have lengths, got no measure of them.")
    if not policy.few:
        return []
    if settings.policy == "strongest":
        shares = right_shares(admitted)
        return _equals(shares, max(shares.values()))
    if policy.teachers:
        return _best_of(settings, rated)
    if settings.teacher not in teachers:
        raise ValueError(
            f"answers.teacher must be a teacher of answers.pool, got {settings.teacher!r}."
            + registry.did_you_mean(settings.teacher, teachers)
        )
    return [settings.teacher]


def _equals(values: Mapping[str, float], best: float) -> list[str]:
    return sorted(name for name, value in values.items() if value == best)


def _family(settings: config.Answers, teachers: Sequence[str]) -> list[str]:
    """The teachers of answers.families. Raises ValueError for one that has none in the pool."""
    for name in settings.families:
        if not name or not any(teacher.startswith(name) for teacher in teachers):
            raise ValueError(
                f"answers.families must say how names of teachers of answers.pool begin, got {name!r}."
                + registry.did_you_mean(name, teachers)
            )
    return [teacher for teacher in teachers if teacher.startswith(tuple(settings.families))]


def _best_of(settings: config.Answers, rated: Rated | None) -> list[str]:
    """The teachers with the best score."""
    if rated is None:
        raise ValueError(
            f"answers.policy={settings.policy!r} must have rated teachers, got none; the student has to read answers "
            "first. Run `python -m launch.curate`, or set another policy."
        )
    best = next((score for score in rated.scores.values() if math.isfinite(score)), None)
    if best is None:
        raise ValueError(
            f"answers.score={settings.score!r} must rate a teacher, got no score of {', '.join(rated.scores)}; "
            f"together they have usable answers to {len(rated.questions)} questions. Look at data.seq_len, or set "
            "another answers.score."
        )
    return _equals(rated.scores, best)


def _scored(
    candidates: Sequence[Candidate],
    settings: config.Answers,
    scored: ScoredFile | None,
    measure: Measure | None,
    context: Context,
) -> tuple[list[ScoredAnswer], dict[str, ScoredLine]]:
    """A question's answers as `choose` reads them, and the lines of those that are scored by row."""
    known = {} if scored is None else {one.row: scored[one.row] for one in candidates if one.row in scored}
    if not policy_of(settings).scores or scored is None:
        measured = [(0, "") if measure is None else measure(one) for one in candidates]
        errors = [known[one.row].error if one.row in known else "" for one in candidates]
        rows = zip(candidates, measured, errors, strict=True)
        return [
            ScoredAnswer(one.row, one.teacher, length=n, error=why or other) for one, (n, why), other in rows
        ], known
    missing = [one for one in candidates if one.row not in known]
    if missing:
        raise ValueError(
            f"{scored.path} must hold the scores of all admitted answers, got none of {missing[0].row}, by "
            f"{missing[0].teacher!r} to {missing[0].question.id!r}; scoring was stopped. Run the same command again."
        )
    lines = list(known.values())
    values = rate(settings.score, [None if line.error else line.values for line in lines], context)
    answers = [
        ScoredAnswer(line.row, line.teacher, value, int(_number(line.values.get("n_answer"))), line.error)
        for line, value in zip(lines, values, strict=True)
    ]
    return answers, known


def _number(value: float | None) -> float:
    return 0.0 if value is None or math.isnan(value) else value


def _lines(candidates: Sequence[Candidate], chosen: Chosen, settings: config.Answers) -> Iterator[Selected]:
    by_row = {one.row: one for one in candidates}
    key = settings.score if policy_of(settings).scores else ""
    for pick in chosen.picks:
        yield _line(by_row[pick.answer.row], pick, key, chosen.forced)


def _line(one: Candidate, pick: Pick, key: str, forced: bool) -> Selected:
    score = pick.answer.score if key else None
    return Selected(
        id=one.question.id,
        teacher_name=one.teacher,
        row=one.row,
        score_key=key,
        score_value=score,
        score_rank=pick.rank,
        group=pick.group,
        forced=forced,
        text=one.text,
        cut_off=one.cut_off,
    )
