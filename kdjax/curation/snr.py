"""Does a problem's gradient point where those of its kind point? Signal-to-noise per bin of the pass rate, measured.

Of n problems of a bin with gradients g_i, one each: signal = ||E g||^2, noise = tr Cov(g), SNR = signal / noise. The
naive ||mean g||^2 holds noise / n of noise: a bin without any signal would have SNR 1 / n. PACED (arXiv 2603.11178)
says that SNR falls to 0 at both ends of the pass rate, about like p (1 - p).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kdjax.data import Rows, heldout_batches, to_batch
from kdjax.step import StepParts, make_supervise
from kdjax.types import Array, Batch, Params

DIMENSIONS = 4096
RESAMPLES = 1000
FEWEST = 5  # problems in a bin that has an interval: fewer resample to next to nothing
WORD = 32  # random signs in one draw


@dataclasses.dataclass(frozen=True)
class BinSnr:
    """One bin: its name, how many problems, and (value, low, high) with a bootstrap interval.

    The values are NaN for fewer than two problems, the intervals for fewer than FEWEST. signal can be negative:
    it is an estimate without bias of a number that may be 0.
    """

    name: str
    problems: int
    signal: tuple[float, float, float]
    noise: tuple[float, float, float]
    snr: tuple[float, float, float]


def row_gradients(
    parts: StepParts,
    params: Params,
    teacher_params: Params,
    rows: Rows,
    *,
    text: Mapping[str, np.ndarray] | None = None,
    dimensions: int = DIMENSIONS,
    seed: int = 0,
    on_row: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "R D"]:
    """float64 [R, dimensions]: of each row the gradient of its own mean loss at `params`, randomly projected.

    The loss is that of the step (positions, targets and terms of `parts`), each row by itself and with weight 1, so one
    row has to be one problem. `project` keeps inner products in the mean. text: columns of `types.TeacherText` by
    row_id, if the teacher reads another text. on_row(rows done) is called as they come.
    Raises ValueError on a mesh, and for a row without a position to learn from or with a gradient that is not finite.
    """
    if parts.rules.mesh is not None:
        raise ValueError(
            "mesh.preset must be 'single' to measure gradients row by row, got a mesh; one row cannot be split over "
            "it. Set it to 'single'."
        )
    gradient = jax.jit(make_row_gradient(parts, dimensions, seed))
    found = np.zeros((len(rows), dimensions))
    for at, columns in enumerate(heldout_batches(rows, 1)):
        if text:
            columns["teacher"] = {name: column[columns["row_id"]] for name, column in text.items()}
        row, count = jax.device_get(gradient(params, teacher_params, to_batch(columns)))
        if not count > 0 or not np.isfinite(row).all():
            what = "no position to learn from" if not count > 0 else "a gradient that is not finite"
            raise ValueError(
                f"rows must have finite gradients to be measured, got row {rows.row_id[at]} with {what}. Leave it out."
            )
        found[at] = row
        if on_row is not None:
            on_row(at + 1)
    return found


def row_of_prompts(rows: Rows, prompts: Sequence[Sequence[int]]) -> dict[int, int]:
    """Number of a prompt, given by its ids -> the first row that answers it, known by what comes before its targets."""
    number_of = {tuple(ids): number for number, ids in enumerate(prompts)}
    found: dict[int, int] = {}
    for row, (tokens, mask) in enumerate(zip(rows.tokens, rows.loss_mask, strict=True)):
        number = number_of.get(tuple(tokens[: int(np.argmax(mask))].tolist()))
        if number is not None:
            found.setdefault(number, row)
    return found


def make_row_gradient(
    parts: StepParts, dimensions: int, seed: int
) -> Callable[[Params, Params, Batch], tuple[Array, Array]]:
    """(params, teacher_params, batch of one row) -> (projected gradient of the mean loss [D], its count [])."""
    supervise = make_supervise(parts)

    def row_gradient(params: Params, teacher_params: Params, batch: Batch) -> tuple[Array, Array]:
        alone = dataclasses.replace(batch, weight=jnp.ones_like(batch.weight))

        def total(params: Params) -> tuple[Array, Array]:
            key, step = jax.random.key(seed), jnp.zeros((), jnp.int32)
            output, _, _ = supervise(params, teacher_params, alone, parts.chooser.policy.init(), key, step)
            return output.total, output.count

        (_, count), gradient = jax.value_and_grad(total, has_aux=True)(params)
        return project(gradient, dimensions, seed) / jnp.maximum(count, 1e-30), count

    return row_gradient


def project(tree: Any, dimensions: int, seed: Any) -> Float[Array, "D"]:
    """float32 [D] of all leaves: entry i, with a random sign, is added to place i mod D.

    Over the signs, which depend on `seed`, the mean of an inner product of two projections is that of the trees, with a
    variance of about 2 / D of the product of their squared norms. It costs one pass over the leaves.
    """
    found = jnp.zeros(dimensions, jnp.float32)
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        flat = leaf.astype(jnp.float32).reshape(-1)
        key = jax.random.fold_in(jax.random.key(seed), number)
        words = jax.random.bits(key, (-(-flat.size // WORD), 1), jnp.uint32)
        bits = (words >> jnp.arange(WORD, dtype=jnp.uint32)[None, :]) & 1
        signed = jnp.where(bits.reshape(-1)[: flat.size] == 1, flat, -flat)
        lines = -(-flat.size // dimensions)
        found += jnp.pad(signed, (0, lines * dimensions - flat.size)).reshape(lines, dimensions).sum(0)
    return found


def snr_by_bin(
    gradients: Float[np.ndarray, "R D"],
    bins: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[BinSnr]:
    """The figures of each bin, in the order in which bins first appear; 95 % intervals over its problems.

    bins: [R], the name of each problem's; they may differ in size, which biases neither signal nor noise and shows in
    the intervals. A problem that a resample draws twice is not paired with itself: that would count its noise as
    signal.
    """
    if len(bins) != len(gradients):
        raise ValueError(f"bins must name one bin per gradient, got {len(bins)} for {len(gradients)}.")
    rng = np.random.default_rng(seed)
    found, names = [], np.array(bins)
    for name in dict.fromkeys(bins):
        members = np.flatnonzero(names == name)
        n = len(members)
        gram = gradients[members] @ gradients[members].T
        draws = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(resamples)])
        value = _figures(gram, np.ones((1, n)))
        figures = _figures(gram, draws.astype(np.float64))
        told = [
            (float(v[0]), *(_interval(drawn) if n >= FEWEST else (math.nan, math.nan)))
            for v, drawn in zip(value, figures, strict=True)
        ]
        found.append(BinSnr(name, n, *told))
    return found


def _figures(gram: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(signal, noise, SNR), each [R], of the problems taken `counts` [R, n] times; gram: inner products [n, n].

    signal: mean of <g_i, g_j> over pairs of different problems, (||sum g||^2 - sum ||g||^2) / (n (n - 1)) if all counts
    are 1. noise: mean ||g_i||^2 - signal, which is then sum ||g_i - mean g||^2 / (n - 1).
    """
    square = np.diag(gram)
    pairs = np.sum(counts @ gram * counts, 1) - counts**2 @ square
    number = counts.sum(1) ** 2 - (counts**2).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        signal = np.where(number > 0, pairs / number, np.nan)
        noise = counts @ square / counts.sum(1) - signal
        return signal, noise, signal / noise


def _interval(drawn: np.ndarray) -> tuple[float, float]:
    usable = drawn[np.isfinite(drawn)]
    return tuple(np.percentile(usable, [2.5, 97.5]).tolist()) if len(usable) else (math.nan, math.nan)


def efficiency(weights: np.ndarray, ideal: np.ndarray, share: np.ndarray | None = None) -> float:
    """(E w w*)^2 / (E w^2 E w*^2), in [0, 1]: of the gain of one step with the ideal weights w*, what w reaches.

    share: how common each entry is, None = equally. With |log(w / w*)| <= delta it is at least sech^2(delta).
    """
    p = np.ones_like(weights) if share is None else share
    return float(np.sum(p * weights * ideal) ** 2 / (np.sum(p * weights**2) * np.sum(p * ideal**2)))


def reached(found: Sequence[BinSnr], weights: Mapping[str, float], problems: Mapping[str, int]) -> float:
    """`efficiency` of the weights of the bins against SNR / (1 + SNR), which is best for one step of gradient descent.

    weights, problems: of each bin by its name; bins without a measured SNR are left out, below 0 it counts as 0. NaN if
    no bin is left or all of either side are 0.
    """
    known = [each for each in found if math.isfinite(each.snr[0])]
    ratio = np.array([max(each.snr[0], 0.0) for each in known])
    given, share = (np.array([float(side[each.name]) for each in known]) for side in (weights, problems))
    if not (given * ratio * share).any():
        return math.nan
    return efficiency(given, ratio / (1 + ratio), share)


def lines_of(found: Sequence[BinSnr]) -> Iterator[Mapping[str, Any]]:
    """The figures as records for a JSON file; what is not known is null."""
    for each in found:
        yield {
            name: [None if not math.isfinite(v) else v for v in value] if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(each).items()
        }


def table(found: Sequence[BinSnr]) -> list[str]:
    """The figures as lines of text."""
    lines = [f"{'pass rate':>10}{'problems':>10}{'signal':>11}{'noise':>11}{'SNR':>9}   95 % interval"]
    for each in found:
        value, low, high = each.snr
        lines.append(
            f"{each.name:>10}{each.problems:>10}{each.signal[0]:>11.3g}{each.noise[0]:>11.3g}{value:>9.4f}   "
            f"[{low:.4f}, {high:.4f}]"
        )
    return lines
