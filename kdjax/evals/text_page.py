"""The page of held-out text for the report: tokens as text, the student's entropy, and what the run selects there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.selection.stats import NEEDS_TEACHER, token_stats
from kdjax.step import StepParts, side_specs
from kdjax.types import Array, Batch, Params, targets_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PageStep = Callable[[Params, Params, Batch, Any, Array, Array], dict[str, Array | None]]


def make_page_step(parts: StepParts) -> PageStep:
    """The jitted (params, teacher_params, batch, policy_state, key, step) -> arrays for `entropy_page`, all [B, T].

    "entropy", "nll" of the student in nats, "eligible", and "selected": the positions that the run's own signal and
    policy take. policy_state, key and step are the run's (TrainState). teacher_params is read if the signal needs it.
    """
    rules = parts.rules
    needs = ("student_entropy", "student_ce", *parts.chooser.needs)
    models = [parts.student]
    if any(name in NEEDS_TEACHER for name in needs):
        if parts.teacher is None:
            raise ValueError("teacher.path must be set, got ''; the signal reads the teacher. Name one.")
        models.append(parts.teacher)
    specs = [side_specs(model, rules) for model in models]

    def local(sides: list, batch: Batch, policy_state: Any, key: Array, step: Array) -> dict[str, Array | None]:
        sides = rules.with_heads(sides, specs)
        labels, eligible = targets_of(batch)
        teacher = sides[1] if len(sides) > 1 else None
        stats = token_stats(dict.fromkeys(needs), sides[0], teacher, labels, implementation=rules.kernels)
        selection, _ = parts.chooser(stats, batch, eligible, policy_state, key, step, rules.all_rows)
        rows = jnp.arange(labels.shape[0])[:, None]
        selected = jnp.zeros(labels.shape, bool).at[rows, selection.index].max(selection.weight > 0)
        return {"entropy": stats.student_entropy, "nll": stats.student_ce, "eligible": eligible, "selected": selected}

    def page_step(
        params: Params, teacher_params: Params, batch: Batch, policy_state: Any, key: Array, step: Array
    ) -> dict:
        every = (params, teacher_params)
        sides = [(model.hidden(p, batch), model.head(p)) for model, p in zip(models, every, strict=False)]
        whole = jax.sharding.PartitionSpec()
        batch_specs = jax.tree.map(lambda a: rules.batch_spec(a.ndim), batch)
        run = rules.rowwise(local, (specs, batch_specs, whole, whole, whole), rules.batch_spec(2))
        found = run(sides, batch, policy_state, key, step)
        return {name: rules.reshard(rows, whole) for name, rows in found.items()}

    return jax.jit(page_step)


def entropy_page(
    tokens: Sequence[int] | np.ndarray,
    entropy: np.ndarray,
    nll: np.ndarray,
    eligible: np.ndarray,
    selected: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int | None = None,
) -> list[dict[str, Any]]:
    """One row as the list `text` of report_data.json (see analysis/report.py), in reading order.

    tokens: [T] ids; entropy, nll (nats), eligible (bool): [T], of the prediction made *at* a position, i.e. of the next
    token, as `targets_of` and the kernels have it; selected: bool [T] or the positions [S]. Here each token gets the
    figures of the prediction *of* it, those of the position before; the first token has none. `length`: the number of
    real tokens, T by default. "rank" is 1 at the highest entropy among the eligible ones, lower position first on ties.
    """
    total = len(tokens) if length is None else length
    selected = np.asarray(selected)
    chosen = np.zeros(len(tokens), bool)
    chosen[selected if selected.dtype == bool else selected.astype(np.int64)] = True
    eligible = np.asarray(eligible, bool)
    targets = [t for t in range(total - 1) if eligible[t]]
    ranks = {t: rank for rank, t in enumerate(sorted(targets, key=lambda t: (-float(entropy[t]), t)), 1)}
    page = []
    for at, piece in enumerate(pieces(list(map(int, tokens[:total])), tokenizer)):
        before = at - 1
        entry: dict[str, Any] = {
            "token": piece,
            "entropy": None,
            "nll": None,
            "rank": None,
            "selected": False,
            "eligible": False,
        }
        if before in ranks:
            entry |= {
                "entropy": round(float(entropy[before]), 4),
                "nll": round(float(nll[before]), 4),
                "rank": ranks[before],
                "selected": bool(chosen[before]),
                "eligible": True,
            }
        page.append(entry)
    return page


def pieces(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token adds to the text; joined they are exactly the decoded text.

    A byte-level token may be part of a character, or a marker whose blank depends on what is before it, so no token is
    decoded by itself: token k owns what the decoded first k tokens share with the whole text beyond its predecessors.
    The token that completes a character owns it; those before it own ''.
    """

    def decode(part: list[int]) -> str:
        return str(tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    whole, done, made = decode(ids), 0, []
    for count in range(1, len(ids) + 1):
        part, start = decode(ids[:count]) if count < len(ids) else whole, done
        while done < min(len(part), len(whole)) and part[done] == whole[done]:
            done += 1
        made.append(whole[start:done])
    return made
