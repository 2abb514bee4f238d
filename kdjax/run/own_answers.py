"""The student's own answers as training text: which steps use them, the blocks they come in, and when they collapse.

A block is `on_policy.block` steps' worth of answers, written at once by the student of that moment, each row used
`on_policy.reuse` times. Which step is an own one, which prompts a block has and every draw depend on seeds and the step
alone, and a block is on disk before it is used: a run that goes on after a kill writes no answer of its past again.
With samples.fraction below 1 a block asks for more answers than it trains on (own_samples.py).
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from kdjax.build import Asked, Built, student_speaker
from kdjax.checkpoint import agreed
from kdjax.config import Experiment, fingerprint
from kdjax.curation.batches import weigh_batch
from kdjax.curation.paced import weigh
from kdjax.curation.pass_rates import PassRates
from kdjax.data import Rows, fed_places, heldout_batches, take, to_batch
from kdjax.data.pipeline import Columns
from kdjax.data.responses import answer_rows
from kdjax.evals.heldout import make_eval_step
from kdjax.generation.batching import STOP, rollouts
from kdjax.generation.sampling import Sampling
from kdjax.run.own_samples import ScoreBlock, best, kept_figures, make_score_block
from kdjax.run_log import write_whole
from kdjax.schedules import own_steps
from kdjax.selection.policies.base import enough_for
from kdjax.sharding import Rules
from kdjax.types import Params
from kdjax.verifiers import Verdict, verify

log = logging.getLogger("kdjax")

SEEDS = 1_000_003  # blocks of one generation.seed meet neither those of another nor the rollouts of launch.curate


@dataclasses.dataclass(frozen=True)
class Answer:
    """tokens: without the end token; finished: whether it ended by itself; logp: of all tokens together, in nats."""

    text: str
    tokens: tuple[int, ...]
    logp: float
    finished: bool


Writer = Callable[[Params, Sequence[int], int], Sequence[Answer]]  # (student, numbers of prompts, seed) -> answers
Judge = Callable[[Params, Rows, Mapping[str, np.ndarray]], Mapping[str, float]]  # figures of rows, by both models

# figure -> (how it may be against the first block's, and in the first block itself, without an alarm, what that says)
ALARMS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "rollout_tokens": (lambda now, first: now > 0.25 * first, "answers are empty or became four times shorter"),
    "rollout_truncated": (
        lambda now, first: now < min(max(0.9, first + 0.05), 0.99),
        "answers do not end by themselves (see generation.new_tokens and generation.stop)",
    ),
    "rollout_distinct": (lambda now, first: now > 0.5 * first, "answers repeat the same pairs of tokens"),
    "rollout_entropy": (lambda now, first: now > 0.1 * first, "the student has nearly stopped to vary its answers"),
    "rollout_teacher_nll": (lambda now, first: now < 2 * first + 1, "the teacher gives these answers little mass"),
}


class Collapse(FloatingPointError):
    """The student's answers collapsed, and on_policy.alarms is 'stop'."""


class OwnAnswers:
    """The own steps of a run and their batches; one block is in memory at a time."""

    def __init__(
        self,
        e: Experiment,
        asked: Asked,
        workdir: Path,
        write: Writer,
        judge: Judge | None,
        rules: Rules = Rules(),
        score: ScoreBlock | None = None,
    ) -> None:
        self._e, self._asked, self._folder = e, asked, workdir / "own_answers"
        self._write, self._judge, self._score = write, judge, score
        self._fed = fed_places(rules, e.train.batch_size, e.train.accumulate)
        self._own = own_steps(self._e.on_policy.fraction, self._e.train.steps, self._e.train.seed)
        self._round: tuple[int, Asked] | None = None
        self._rounds: dict[int, PassRates] = {}
        self._block: tuple[int, Rows, dict[str, np.ndarray]] | None = None

    def takes(self, step: int) -> bool:
        """Whether this step, counted from 1, trains on the student's own answers."""
        return bool(self._own[step - 1])

    def others_before(self, step: int) -> int:
        """How many of the first `step` steps train on other text."""
        return int(np.sum(~self._own[:step]))

    def due(self, step: int) -> bool:
        """Whether `load` must come before the columns of this step."""
        return self._block is None or self._block[0] != self._number(step)

    def load(self, step: int, params: Params) -> dict[str, float]:
        """The block of this step, from disk if it was written before, else by the student.

        Its figures, if it begins with this step, else {}.
        Raises Collapse if its answers set off an alarm that is to stop the run.
        """
        number, o = self._number(step), self._e.on_policy
        asked, prompts = self._asked_at(number), self._prompts(number)
        found = self._read(number, step) if agreed(self._path(number).is_file()) else None
        if found is None:
            answers = list(self._write(params, prompts, number))
            verdicts, began = self._verdicts(prompts, answers), step
            figures = _figures(answers, verdicts)
            if self._e.pass_rates.every:
                figures["rollout_effective_prompts"] = _effective(asked.weight)
        else:
            answers, figures, began, kept = found
        keep = np.array([bool(a.tokens) and (a.finished or o.truncated == "keep") for a in answers])
        rows, text = answer_rows(
            [
                asked.answered(prompt, [*answer.tokens, *([asked.end] if answer.finished else [])])
                for prompt, answer in zip(prompts, answers, strict=True)
            ],
            self._e.data.seq_len,
            asked.room,
        )
        rows = dataclasses.replace(
            rows,
            row_id=np.array(prompts, np.int32),
            weight=np.where(keep, rows.weight, 0).astype(np.float32),
            loss_mask=rows.loss_mask & keep[:, None],
        )
        if found is None:
            if self._judge is not None:
                figures |= self._judge(params, rows, text)
            kept = np.arange(len(rows))
            if self._score is not None:
                scores = self._score(params, rows, text, number)
                kept = best(scores, o.block * self._e.train.batch_size)
                figures |= kept_figures(scores, kept)
            self._store(number, step, prompts, answers, verdicts, figures, kept)
        self._block = number, take(rows, kept), {name: column[kept] for name, column in text.items()}
        if o.alarms != "off":
            self._alarm(number, figures)
        return figures if began == step else {}

    def columns(self, step: int) -> Columns:
        """The fields of this step's batch, those of its rows that this process feeds."""
        if self._block is None:
            raise ValueError("the block of a step must be loaded before its columns are read.")
        number, rows, text = self._block
        o, size = self._e.on_policy, self._e.train.batch_size
        turn, place = divmod(self._own_before(step) - number * o.block * o.reuse, o.block)
        order = np.arange(o.block * size) if turn == 0 else _rng(self._e, 3, number, turn).permutation(o.block * size)
        whole = order[place * size : (place + 1) * size]
        weight, weigh = rows.weight[whole], weigh_batch(self._e.pass_rates)
        if weigh is not None:
            weight = weigh(weight, np.asarray(rows.loss_mask[whole].any(1)))
        index = whole[self._fed]
        columns: Columns = {
            name: getattr(rows, name)[index] for name in ("tokens", "segment_ids", "positions", "loss_mask", "row_id")
        }
        columns["weight"] = weight[self._fed].astype(np.float32)
        columns["epoch"] = np.full(len(index), self._own_before(step), np.int32)
        if text:
            columns["teacher"] = {name: column[index] for name, column in text.items()}
        return columns

    def _own_before(self, step: int) -> int:
        return int(np.sum(self._own[: step - 1]))

    def _number(self, step: int) -> int:
        return self._own_before(step) // (self._e.on_policy.block * self._e.on_policy.reuse)

    def _prompts(self, number: int) -> list[int]:
        """The prompts of a block: each epoch has all of them once, in an order of its own, or as weights choose."""
        e, first = self._e, number * self._e.on_policy.block
        own = -(-int(self._own.sum()) // e.on_policy.reuse)
        choose = self._asked_at(number).choice(e, np.arange(len(self._asked.train)), own)
        if choose is not None:
            return [int(at) for step in range(first, first + e.on_policy.block) for at in choose(step)]
        count = len(self._asked.train)
        size = enough_for(e.on_policy.block * e.train.batch_size, e.samples.fraction)
        places = range(number * size, (number + 1) * size)
        orders = {epoch: _rng(self._e, 2, epoch).permutation(count) for epoch in {at // count for at in places}}
        return [int(orders[at // count][at % count]) for at in places]

    def _path(self, number: int) -> Path:
        return self._folder / f"block-{number:06d}.jsonl"

    def _identity(self, prompts: Sequence[int]) -> str:
        """Of the run and of what a block asks: a run that was begun anew may find blocks of the one before."""
        asked = [self._asked.train[prompt].id for prompt in prompts]
        return hashlib.sha256(json.dumps([fingerprint(self._e), self._asked.fingerprint, asked]).encode()).hexdigest()

    def _asked_at(self, number: int) -> Asked:
        """The prompts as they weigh in a block: with pass_rates.every also by the own answers of full rounds before it.

        A round is that many blocks. Blocks are on disk, so a resumed run finds the same weights.
        """
        every, base = self._e.pass_rates.every, self._asked.rates
        count = number // every if every else 0
        if base is None or not count:
            return self._asked
        if self._round is None or self._round[0] != count:
            for r in range(len(self._rounds), count):  # each file is read once
                self._rounds[r] = self._counted(base, r * every, every)
            found = weigh([base, *(self._rounds[r] for r in range(count))], self._e.pass_rates)
            self._round = count, dataclasses.replace(self._asked, weight=found.weight)
        return self._round[1]

    def _counted(self, base: PassRates, first: int, blocks: int) -> PassRates:
        """Pass rates of the answers in some blocks."""
        place = {name: at for at, name in enumerate(base.ids)}
        right, tried = (np.zeros(len(base), np.int64) for _ in range(2))
        for number in range(first, first + blocks):
            _, *lines = map(json.loads, self._path(number).read_text(encoding="utf-8").splitlines())
            for line in lines:
                right[place[line["id"]]] += line["verdict"] == Verdict.RIGHT
                tried[place[line["id"]]] += line["verdict"] != Verdict.UNDECIDED
        return dataclasses.replace(base, right=right, tried=tried, undecided=0 * right, truncated=0 * right)

    def _verdicts(self, prompts: Sequence[int], answers: Sequence[Answer]) -> list[str] | None:
        """What the verifiers say; None if some prompt has none."""
        default = self._e.prompts.verifier
        if not all(self._asked.train[prompt].verifier or default for prompt in prompts):
            return None
        return [
            str(verify(answer.text, self._asked.train[prompt], default, cut_off=not answer.finished).verdict)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _store(
        self,
        number: int,
        step: int,
        prompts: Sequence[int],
        answers: Sequence[Answer],
        verdicts: Sequence[str] | None,
        figures: Mapping[str, float],
        kept: np.ndarray,
    ) -> None:
        head = {"block": number, "step": step, "of": self._identity(prompts), "figures": dict(figures)}
        head |= {"kept": kept.tolist()} if self._score is not None else {}  # places among the lines below
        said: Sequence[str | None] = verdicts or [None] * len(prompts)
        lines = [head] + [
            {"id": self._asked.train[prompt].id, "verdict": verdict} | dataclasses.asdict(answer)
            for prompt, answer, verdict in zip(prompts, answers, said, strict=True)
        ]
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._path(number), "".join(json.dumps(line) + "\n" for line in lines))

    def _read(self, number: int, step: int) -> tuple[list[Answer], dict[str, float], int, np.ndarray] | None:
        """What is on disk of this block; None if another run wrote it, or this one at a later step.

        Answers, figures, the step that it begins with, and the places of the answers that are trained on.
        """
        head, *lines = map(json.loads, self._path(number).read_text(encoding="utf-8").splitlines())
        if head.get("of") != self._identity(self._prompts(number)) or head["step"] > step:
            return None
        fields = ("text", "tokens", "logp", "finished")
        answers = [
            Answer(**({name: line[name] for name in fields} | {"tokens": tuple(line["tokens"])})) for line in lines
        ]
        return answers, head["figures"], head["step"], np.array(head.get("kept", range(len(answers))), np.int64)

    def _alarm(self, number: int, figures: Mapping[str, float]) -> None:
        first = figures
        if number:
            with open(self._path(0), encoding="utf-8") as file:
                first = json.loads(file.readline())["figures"]
        for name, (healthy, says) in ALARMS.items():
            if name in figures and name in first and not healthy(figures[name], first[name]):
                before = f", in the first block it was {first[name]:.3g}" if number else ""
                text = f"{says}: {name} is {figures[name]:.3g} in block {number} ({self._path(number)}){before}."
                if self._e.on_policy.alarms == "stop":
                    raise Collapse(
                        text + " The last checkpoint stands. Lower optim.learning_rate or on_policy.fraction, or set "
                        "on_policy.alarms='warn'."
                    )
                log.warning("%s Look at the answers; on_policy.alarms='stop' ends a run here.", text)


def own_answers(built: Built, workdir: Path) -> OwnAnswers | None:
    """The own steps of an experiment whose on_policy.fraction is not 0."""
    e, asked = built.experiment, built.asked
    if asked is None or e.on_policy.fraction == 0:
        return None
    judge = None if e.on_policy.alarms == "off" else _judge(built)
    return OwnAnswers(e, asked, workdir, _writer(built, asked), judge, built.rules, make_score_block(built))


def _writer(built: Built, asked: Asked) -> Writer:
    g = built.experiment.generation
    settings = Sampling(g.temperature, g.top_p, g.top_k, g.min_p)

    def write(params: Params, prompts: Sequence[int], seed: int) -> list[Answer]:
        model = student_speaker(built, params)
        unique = list(dict.fromkeys(prompts))  # a prompt that comes twice in a block has two samples
        counts = [prompts.count(prompt) for prompt in unique]
        found = rollouts(
            model,
            [asked.ids[prompt] for prompt in unique],
            [range(count) for count in counts],
            settings,
            new_tokens=g.new_tokens,
            names=[asked.train[prompt].id for prompt in unique],
            seed=SEEDS * (g.seed + 1) + seed,
            stop=g.stop,
            batch_size=g.batch_size,
        )
        made = {(unique[index], sample): completion for index, sample, completion in found}
        taken = dict.fromkeys(unique, 0)
        answers = []
        for prompt in prompts:
            one = made[prompt, taken[prompt]]
            taken[prompt] += 1
            answers.append(Answer(one.text, one.tokens, one.logp, one.finish == STOP))
        return answers

    return write


def _judge(built: Built) -> Judge | None:
    """What student and teacher say of the first rows of a block: nats a token; None without a live teacher."""
    teacher, size = built.parts.teacher, built.experiment.train.batch_size // built.experiment.train.accumulate
    if teacher is None:
        return None
    step = make_eval_step(built.parts.student, teacher, built.rules)

    def judge(params: Params, rows: Rows, text: Mapping[str, np.ndarray]) -> dict[str, float]:
        columns: Columns = next(heldout_batches(rows, size, size))
        if text:
            columns["teacher"] = {name: column[:size] for name, column in text.items()}
        batch = teacher.feed(to_batch(columns, built.rules))
        sums = {
            name: float(np.sum(part))
            for name, part in jax.device_get(step(params, built.teacher_params, batch)).items()
        }
        if not sums["count"]:
            return {}
        return {f"rollout_{name}": sums[name] / sums["count"] for name in ("teacher_nll", "kl")}

    return judge


def _rng(e: Experiment, *purpose: int) -> np.random.Generator:
    return np.random.default_rng([e.train.seed, *purpose])


def _effective(weight: np.ndarray) -> float:
    """(sum w)^2 / (N sum w^2): which share of the prompts, all weighed alike, would vary as little; in (0, 1]."""
    return float(weight.sum() ** 2 / (len(weight) * (weight**2).sum()))


def _figures(answers: Sequence[Answer], verdicts: Sequence[str] | None) -> dict[str, float]:
    """tokens: mean length. distinct: share of pairs of neighbours that are new in their answer. entropy: of a token."""
    lengths = [len(answer.tokens) for answer in answers]
    pairs = [list(zip(answer.tokens, answer.tokens[1:], strict=False)) for answer in answers]
    count = sum(map(len, pairs))
    figures = {
        "rollout_tokens": float(np.mean(lengths)),
        "rollout_truncated": float(np.mean([not answer.finished for answer in answers])),
    }
    judged = [verdict for verdict in verdicts or () if verdict != Verdict.UNDECIDED]
    if judged:
        figures["rollout_right"] = judged.count(Verdict.RIGHT) / len(judged)
    if count:
        figures["rollout_distinct"] = sum(len(set(found)) for found in pairs) / count
    if sum(lengths):
        figures["rollout_entropy"] = -sum(answer.logp for answer in answers) / sum(lengths)
    return figures
