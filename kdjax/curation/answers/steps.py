"""An answer as steps, and the scores that look at steps: LALP (arXiv 2510.03988) and ASLEC (arXiv 2604.06834).

A step ends at a line break, or after ".", "?" or "!" followed by a blank; the blanks belong to the step that they end.
A step without a letter or digit goes with the one before it (the first: after it), and so does the number of a list
("2. ") with what it numbers. A token belongs to the step that holds its last character.
Token arrays are over A: tokens of the answer's text, special ones left out, in order.
"""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

END = re.compile(r"\s*\n\s*|(?<=[.?!])\s+")
NUMBER = re.compile(r"[ \t]*(\d{1,2}|[A-Za-z])\.[ \t]+")  # "2. ", "b. "
SAYS = re.compile(r"\w")
WINDOW = 1  # steps before the one that is scored
SKIPPED = 1  # first tokens of a step; the released driver has 2

Span = tuple[int, int]
Row = tuple[tuple[int, ...], tuple[int, ...]]  # ids of a question and of an answer to it


def split_steps(text: str) -> list[Span]:
    """(start, end) of each step in characters; together they are the text. [] for an empty one."""
    ends = [found.end() for found in END.finditer(text) if found.end() < len(text)]
    steps: list[Span] = []
    since, start = 0, 0
    for end in (*ends, len(text)):
        piece, start = text[start:end], end
        if NUMBER.fullmatch(piece) and end < len(text):
            continue
        if SAYS.search(piece):
            steps.append((since, end))
        elif steps:
            steps[-1] = (steps[-1][0], end)
        elif end < len(text):
            continue
        elif text:
            steps.append((since, end))
        since = end
    return steps


def steps_of_tokens(text: str, offsets: Sequence[Span]) -> list[int]:
    """The number 0, 1, ... of each token's step. offsets: (start, end) of the tokens in `text`, as tokenizers give it.

    A token without characters goes with the one before it. Numbers of steps that hold no token are not used.
    """
    ends = np.array([end for _, end in split_steps(text)])
    found: list[int] = []
    for start, end in offsets:
        same = found[-1] if found else 0
        found.append(int(np.searchsorted(ends, end - 1, side="right")) if end > start else same)
    numbers = {step: number for number, step in enumerate(sorted(set(found)))}
    return [numbers[step] for step in found]


def step_figures(nll: Float[np.ndarray, "A"], step_of: Sequence[int], skipped: int = SKIPPED) -> dict[str, float]:
    """Of ASLEC: rest_logp and first_logp, mean log-probability without and of the first tokens of steps; first_share.

    nll: of each token, nats. first_share: how many of the tokens are among the first `skipped` of a step. NaN where no
    token is left; such an answer has no DROP score (the released code gives it the highest, 0).
    """
    first = np.array([place < skipped for place in _places(nll, step_of)], bool)
    if not len(first):
        return {"rest_logp": math.nan, "first_logp": math.nan, "first_share": math.nan}
    return {
        "rest_logp": -_mean(np.asarray(nll, np.float64)[~first]),
        "first_logp": -_mean(np.asarray(nll, np.float64)[first]),
        "first_share": float(first.mean()),
    }


def fit_casl(figures: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """ASLEC-CASL: {"rest", "first", "share", "constant"}, by least squares over all answers of the pool.

    -answer_nll ~ rest * rest_logp + first * first_logp + share * first_share + constant; `share` is the gamma that
    scores.Context takes. Answers with a figure that is not finite are left out. Raises ValueError for fewer than five
    of them, and where first_share is the same in all: its weight is not determined then.
    """
    names = ("rest_logp", "first_logp", "first_share", "answer_nll")
    rows = np.array([[each[name] for name in names] for each in figures], np.float64).reshape(-1, 4)
    rows = rows[np.isfinite(rows).all(1)]
    if len(rows) < 5 or np.ptp(rows[:, 2]) == 0:
        raise ValueError(
            f"figures must be of at least 5 answers with different shares of first tokens, got {len(rows)} answers; "
            "four numbers are fitted to them. Score more answers, or use answers.score='aslec_drop'."
        )
    design = np.concatenate([rows[:, :3], np.ones((len(rows), 1))], 1)
    found = np.linalg.lstsq(design, -rows[:, 3], rcond=None)[0]
    return dict(zip(("rest", "first", "share", "constant"), found.tolist(), strict=True))


def local_rows(
    question: Sequence[int], answer: Sequence[int], step_of: Sequence[int], window: int = WINDOW
) -> list[Row]:
    """What LALP scores besides the answer itself: each step after the first 1 + `window`, as (question, answer) ids.

    Such a question is the prompt and the `window` steps before the step. The first steps have no more than that before
    them anyway: the answer's own NLLs are theirs. Score the rows as any answer and give their NLLs to `lalp`.
    """
    _places(answer, step_of)
    ids = [tuple(answer[at] for at in places) for places in _tokens_of(step_of)]
    rows = []
    for step in range(window + 1, len(ids)):
        before = tuple(token for part in ids[step - window : step] for token in part)
        rows.append(((*question, *before), ids[step]))
    return rows


def lalp(
    nll: Float[np.ndarray, "A"],
    step_of: Sequence[int],
    local: Sequence[Float[np.ndarray, "_"]],
    window: int = WINDOW,
) -> float:
    """Mean over the steps of each one's mean log-probability given the prompt and `window` steps before it; higher.

    nll: of the answer's tokens as a whole. local: the NLLs of the rows of `local_rows`, in order.
    """
    _places(nll, step_of)
    steps = _tokens_of(step_of)
    if len(local) != max(0, len(steps) - window - 1):
        raise ValueError(
            f"local must hold the NLLs of {max(0, len(steps) - window - 1)} rows, got {len(local)}; they are those of "
            f"local_rows with window={window}."
        )
    whole = np.asarray(nll, np.float64)
    means = [_mean(whole[places]) for places in steps[: window + 1]]
    return -_mean(np.array([*means, *(_mean(np.asarray(each, np.float64)) for each in local)]))


def _tokens_of(step_of: Sequence[int]) -> list[list[int]]:
    """The places of the tokens of each step, in the order of steps."""
    found: dict[int, list[int]] = {}
    for at, step in enumerate(step_of):
        found.setdefault(step, []).append(at)
    return [found[step] for step in sorted(found)]


def _places(tokens: Sequence[int] | np.ndarray, step_of: Sequence[int]) -> list[int]:
    """Of each token its number 0, 1, ... within its step."""
    if len(tokens) != len(step_of):
        raise ValueError(f"step_of must name the step of each of the {len(tokens)} tokens, got {len(step_of)}.")
    counts: dict[int, int] = {}
    found = []
    for step in step_of:
        found.append(counts.get(step, 0))
        counts[step] = found[-1] + 1
    return found


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
