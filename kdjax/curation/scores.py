"""A score per row from one pass of a frozen student (and teacher) over the text, and which rows are kept.

score_i = mean of u_t over the eligible positions of row i; with u_t = H(q_t) it is U_i of SE-KD (arXiv 2602.01395,
section on samples). Trunks run on all positions; with `samples.positions` < 1 the vocabulary is only looked at in a
random part of them, which is most of the cost of a small student.

To add one: what it reads and its formula, as a line in SCORES.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int

from kdjax import config, registry
from kdjax.data import Rows, heldout_batches, to_batch
from kdjax.data.packing import eligible as eligible_on_host
from kdjax.data.pipeline import Columns
from kdjax.selection.policies.base import budget, eligible_count, exact, sortable, take
from kdjax.selection.signals import CERTAIN, position_noise
from kdjax.selection.stats import NEEDS_TEACHER, token_stats
from kdjax.sharding import Rules
from kdjax.step import LanguageModel, feed_of, side_specs
from kdjax.types import Array, Batch, Params, Selection, gather_slots, targets_of

RANDOM_SCORE, RANDOM_POSITIONS = 3, 4  # purposes of noise; 1 and 2 are those of selection/choose.py

ScoreStep = Callable[[Params, Params, Batch], Array]
OnBatch = Callable[[int, int], None]
Scorer = Callable[..., np.ndarray]  # (student_params, teacher_params, rows, on_batch=None, text={}) -> float64 [R]


@dataclasses.dataclass(frozen=True)
class Score:
    """of(*statistics) -> [B, S]: the value of a position, whose mean is the score of a row; higher = more worth using.

    needs: the `TokenStats` fields that `of` is given. With none, a row's score is a random number and no model is run.
    """

    needs: tuple[str, ...] = ()
    of: Callable[..., Array] = lambda value: value

    @property
    def needs_teacher(self) -> bool:
        """Whether a live teacher has to run beside the student."""
        return any(name in NEEDS_TEACHER for name in self.needs)


def _ratio(student_ce: Array, teacher_ce: Array) -> Array:
    return student_ce / (teacher_ce + CERTAIN)


SCORES: dict[str, Score] = {
    "student_entropy": Score(("student_entropy",)),  # SE-KD: H(q_t)
    "kl": Score(("kl",)),  # KL(p_t || q_t), teacher p
    "ce_ratio": Score(("student_ce", "teacher_ce"), _ratio),  # how much worse the student predicts the text
    "random": Score(),  # uniform in [0, 1), of samples.seed and row_id alone
}


def make_scorer(
    student: LanguageModel,
    teacher: LanguageModel | None,
    samples: config.Samples,
    rules: Rules = Rules(),
    batch_size: int = 8,
) -> Scorer:
    """scorer(student_params, teacher_params, rows, on_batch=None, text={}) -> `samples.score` of each row, float64 [R].

    Compiled once. Without an eligible position a row scores -inf. The numbers are rounded to float32, as they are
    stored. batch_size: rows a call over all devices, a multiple of their number; the last batch is filled up with empty
    rows. on_batch(rows done, tokens done) is called as batches come back. text: the columns of `types.TeacherText`, row
    by row, if the teacher reads another prompt. Batch size, order of the rows and mesh change a score by the rounding
    of the models' dtype alone. Raises ValueError for an unknown score, one that needs an absent teacher, a batch size
    that does not divide, and for rows whose score is not finite.
    """
    score = registry.lookup(SCORES, samples.score, "samples.score")
    if not score.needs:
        return lambda student_params, teacher_params, rows, *_, **__: _random_scores(rows, samples.seed)
    parts = rules.batch_shards
    if batch_size < 1 or batch_size % parts:
        raise ValueError(
            f"batch_size must be a positive multiple of the mesh's {parts} devices, got {batch_size}; each takes the "
            "same number of rows. Change it or mesh.shape."
        )
    step = make_score_step(student, teacher, samples, rules)
    feed = feed_of(teacher if score.needs_teacher else None)

    def scorer(
        student_params: Params,
        teacher_params: Params,
        rows: Rows,
        on_batch: OnBatch | None = None,
        text: Mapping[str, np.ndarray] = {},
    ) -> np.ndarray:
        if not len(rows):
            raise ValueError("rows must not be empty; there is nothing to score.")
        tokens = np.cumsum((rows.segment_ids > 0).sum(1))
        seen = text if score.needs_teacher else {}
        batches = (feed(to_batch(columns, rules)) for columns in _batches(rows, seen, batch_size))
        found = []
        for pair in _in_order(step, student_params, teacher_params, batches):
            found.append(pair)
            done = min(len(found) * batch_size, len(rows))
            if on_batch is not None:
                on_batch(done, int(tokens[done - 1]))
        total, count = np.concatenate(found, 1)[:, : len(rows)].astype(np.float64)
        return _means(total, count, rows, samples.score)

    return scorer


def make_score_step(
    student: LanguageModel, teacher: LanguageModel | None, samples: config.Samples, rules: Rules = Rules()
) -> ScoreStep:
    """The jitted (student_params, teacher_params, batch) -> float32 [2, B]: per row the sum and number of the values.

    With `samples.positions` < 1 the head sees [B, S, D] of the hidden states, S = ceil(positions * (T - 1)). Without
    need of a teacher `teacher_params` is not read. Under a mesh the result is whole on every device.
    """
    score = registry.lookup(SCORES, samples.score, "samples.score")
    models = [student]
    if score.needs_teacher:
        if teacher is None:
            raise ValueError(
                f"samples.score must not need a teacher where none is loaded, got {samples.score!r}. Set teacher.path "
                "and teacher.source to 'live', or samples.score to 'student_entropy'."
            )
        models.append(teacher)
    specs = [side_specs(model, rules) for model in models]

    def local(sides: list[Any], batch: Batch) -> Array:
        labels, valid = targets_of(batch)
        if samples.positions < 1:
            slots = random_positions(batch, valid, samples)
            sides = [(gather_slots(hidden, slots.index), head) for hidden, head in sides]
            labels, valid = gather_slots(labels, slots.index), slots.weight > 0
        whole = rules.with_heads(sides, specs)
        pair = whole[1] if len(whole) > 1 else None
        stats = token_stats(score.needs, whole[0], pair, labels, implementation=rules.kernels)
        values = jnp.where(valid, score.of(*(getattr(stats, name) for name in score.needs)), 0.0)
        return jnp.stack([jnp.sum(values, 1), jnp.sum(valid, 1)]).astype(jnp.float32)

    def score_step(student_params: Params, teacher_params: Params, batch: Batch) -> Array:
        every = (student_params, teacher_params)
        sides = [(model.hidden(p, batch), model.head(p)) for model, p in zip(models, every, strict=False)]
        batch_specs = jax.tree.map(lambda a: rules.batch_spec(a.ndim), batch)
        found = rules.rowwise(local, in_specs=(specs, batch_specs), out_specs=P(None, *rules.batch_spec(1)))(
            sides, batch
        )
        return found if rules.mesh is None else jax.sharding.reshard(found, NamedSharding(rules.mesh, P()))

    return jax.jit(score_step)


def random_positions(batch: Batch, eligible: Bool[Array, "B T"], samples: config.Samples) -> Selection:
    """S = ceil(positions * (T - 1)) slots per row, drawn without replacement among the eligible ones.

    A row with fewer takes them all. Draws depend on samples.seed and row_id alone, so that the mean over the slots
    estimates the mean over the row without bias, and in the same way in any batch.
    """
    size = budget(samples.positions, eligible.shape[1] - 1)
    noise = position_noise(jax.random.key(samples.seed), batch, RANDOM_POSITIONS)
    return take(sortable(noise, eligible), jnp.minimum(eligible_count(eligible), size), size)


def keep(scores: Float[np.ndarray, "R"], fraction: float) -> Int[np.ndarray, "K"]:
    """int64, ascending: the positions of the max(1, floor(fraction * R)) rows of highest score; ties: the lower row.

    In exact arithmetic, 0.2 being 1/5: 2 of 10 rows, 1 of 7, 1 of 4. So few rows never turn "20 %" into all of them,
    or into none. Rows at -inf are never kept; fraction 1 = all others. Raises ValueError if none is left.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"samples.fraction must be in (0, 1], got {fraction}; it is a fraction, 0.2 means 20 %.")
    if np.isnan(scores).any():
        raise ValueError(f"scores must be numbers, got NaN in {int(np.isnan(scores).sum())} of {len(scores)} rows.")
    usable = int(np.sum(scores > -np.inf))
    if not usable:
        raise ValueError(
            f"scores must be above -inf somewhere, got {len(scores)} rows without; a row without a target cannot be "
            "trained on. Add text or raise data.seq_len."
        )
    count = min(usable, max(1, math.floor(exact(fraction) * len(scores))))
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def overlap(kept: Int[np.ndarray, "K"], other: Int[np.ndarray, "N"]) -> float:
    """|kept & other| / |kept|: which share of the first choice the second one shares."""
    return float(np.isin(kept, other).mean())


def agreement(full: Float[np.ndarray, "R"], estimate: Float[np.ndarray, "R"], fraction: float) -> dict[str, float]:
    """How well an estimate ranks rows: Spearman's rank correlation ("spearman"), and "overlap" of the kept rows.

    Rows at -inf on either side are left out of the correlation; equal scores share their mean rank. NaN if it is not
    defined: fewer than two rows, or all equal.
    """
    usable = np.isfinite(full) & np.isfinite(estimate)
    rho = spearman(full[usable], estimate[usable])
    return {"spearman": rho, "overlap": overlap(keep(full, fraction), keep(estimate, fraction))}


def spearman(first: Float[np.ndarray, "R"], second: Float[np.ndarray, "R"]) -> float:
    """Rank correlation of finite numbers; equal ones share their mean rank. NaN for fewer than two, or all equal."""
    x, y = _mean_ranks(first), _mean_ranks(second)
    varied = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
    return float(np.corrcoef(x, y)[0, 1]) if varied else math.nan


def _batches(rows: Rows, text: Mapping[str, np.ndarray], size: int) -> Iterator[Columns]:
    """Batches of exactly `size` rows, in order, with what the teacher reads in their place; the last is filled up."""
    for number, columns in enumerate(heldout_batches(rows, size)):
        if text:
            parts = {name: column[number * size : (number + 1) * size] for name, column in text.items()}
            empty = {name: ((0, size - len(part)), (0, 0)) for name, part in parts.items()}
            columns["teacher"] = {name: np.pad(part, empty[name]) for name, part in parts.items()}
        yield columns


def _in_order(step: ScoreStep, student_params: Params, teacher_params: Params, batches: Iterator[Batch]) -> Any:
    """Results as they come, each fetched while the next batch is computed."""
    pending = None
    for batch in batches:
        sent = step(student_params, teacher_params, batch)
        if pending is not None:
            yield jax.device_get(pending)
        pending = sent
    yield jax.device_get(pending)


def _means(total: np.ndarray, count: np.ndarray, rows: Rows, name: str) -> np.ndarray:
    wrong = rows.row_id[~np.isfinite(total)]
    if len(wrong):
        shown = ", ".join(map(str, wrong[:5].tolist())) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise ValueError(
            f"samples.score must be finite, got {name!r} that is not in the rows {shown} of the training data. Check "
            "the weights at student.path and teacher.path."
        )
    means = np.where(count > 0, total / np.maximum(count, 1), -np.inf)
    return means.astype(np.float32).astype(np.float64)


def _random_scores(rows: Rows, seed: int) -> np.ndarray:
    key = jax.random.fold_in(jax.random.key(seed), RANDOM_SCORE)
    draws = jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, row)))(jnp.asarray(rows.row_id))
    return np.where(eligible_on_host(rows).any(1), np.asarray(draws, np.float64), -np.inf)


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]
