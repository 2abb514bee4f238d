"""PACED: a weight per problem from the student's own pass rate, its rivals, and the file that says them.

w = p^alpha (1 - p)^beta (Xu et al., arXiv 2603.11178): problems that the student always or never solves teach little.
Where rates are k of K they are used as integers. `weights.jsonl` has one object per problem, {"id", "right", "tried",
"weight"}; weight 0 means: leave its rows out.

To add a weight: a function and a line in WEIGHTS.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from kdjax import config, registry
from kdjax.curation.pass_rates import NAME as RATES
from kdjax.curation.pass_rates import PassRates, differences, estimate, load_pass_rates, read_lines, write_lines

NAME = "weights"
FEW = 4  # answers per problem: fewer make the weights coarse
BINS = 10  # of the histogram, if problems differ in how often they were tried
UNJUDGED = "unjudged"

Counts = Float[np.ndarray, "N"]


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """Columns over N problems, in the order of the pass rates.

    weight: float64 [N]; normalised as `pass_rates.normalise` says, 0 = left out. right, tried: the integers they come
    from. summary: figures for people, as in the manifest. notes: sentences for the user.
    """

    ids: tuple[str, ...]
    right: np.ndarray
    tried: np.ndarray
    weight: np.ndarray
    normalise: str
    summary: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def by_id(self) -> dict[str, float]:
        """Prompt id -> weight."""
        return dict(zip(self.ids, self.weight.tolist(), strict=True))


# --- raw weights of (a, n): a successes of n trials, n > 0


def kernel(a: Counts, n: Counts, alpha: float, beta: float) -> Counts:
    """p^alpha (1 - p)^beta at p = a / n, with 0^0 = 1: an exponent of 0 switches its side off."""
    return (a / n) ** alpha * ((n - a) / n) ** beta  # NumPy has 0 ** 0 = 1


def unbiased(a: Counts, n: Counts, alpha: int, beta: int) -> Counts:
    """The estimate of p^alpha (1 - p)^beta whose mean is just that, whatever n >= alpha + beta.

    a (a-1) ... [alpha factors] (n-a) (n-a-1) ... [beta factors] / (n (n-1) ... [alpha + beta factors]); for (1, 1)
    k (K - k) / (K (K - 1)).
    """
    return _falling(a, alpha) * _falling(n - a, beta) / _falling(n, alpha + beta)


def _falling(x: Counts, factors: int) -> Counts:
    return np.prod([x - i for i in range(factors)], axis=0) if factors else np.ones_like(x)


def paced(a: Counts, n: Counts, settings: config.PassRates) -> Counts:
    """`kernel`, or `unbiased` where problems differ in n: the bias of the kernel, (1 - 1/K) for (1, 1), depends on it.

    Raises ValueError for n = 1, whose weights are all 0, and for differing n that no unbiased estimate can be had of.
    """
    alpha, beta = settings.alpha, settings.beta
    if settings.estimator == "raw" and alpha > 0 and beta > 0 and n.max() < 2:
        raise ValueError(
            "generation.samples must be at least 2 with pass_rates.weight='paced', got 1 answer per problem; a rate of "
            "0 or 1 has the weight 0. Set it to 8."
        )
    if settings.estimator != "raw" or (n == n[0]).all():
        return kernel(a, n, alpha, beta)
    if not (float(alpha).is_integer() and float(beta).is_integer()):
        raise ValueError(
            f"pass_rates.alpha and beta must be integers where problems have {int(n.min())} to {int(n.max())} answers, "
            f"got {alpha} and {beta}; the bias would differ between them. Set integers, pass_rates.weight='bayes', or "
            "have all problems answered equally often."
        )
    enough = n >= alpha + beta
    weights = np.zeros_like(n)
    weights[enough] = unbiased(a[enough], n[enough], int(alpha), int(beta))
    return weights


def bayes(a: Counts, n: Counts, settings: config.PassRates) -> Counts:
    """E[p^alpha (1 - p)^beta] under the posterior Beta(a + c, n - a + c), c = pass_rates.prior; never 0.

    = B(a + c + alpha, n - a + c + beta) / B(a + c, n - a + c); (k+1)(K-k+1) / ((K+2)(K+3)) for all = 1.
    """
    if settings.estimator != "raw":
        raise ValueError(
            f"pass_rates.estimator must be 'raw' with pass_rates.weight='bayes', got {settings.estimator!r}; the prior "
            "would count twice. Set it to 'raw'."
        )
    x, y = a + settings.prior, n - a + settings.prior
    return np.exp(_log_beta(x + settings.alpha, y + settings.beta) - _log_beta(x, y))


def _log_beta(x: Counts, y: Counts) -> Counts:
    lgamma = np.vectorize(math.lgamma, otypes=[np.float64])
    return lgamma(x) + lgamma(y) - lgamma(x + y)


def uniform(a: Counts, n: Counts, settings: config.PassRates) -> Counts:
    """1."""
    return np.ones_like(n)


def hard_filter(a: Counts, n: Counts, settings: config.PassRates) -> Counts:
    """1 where 1/5 < a / n < 4/5, else 0; in integers."""
    return ((5 * a > n) & (5 * a < 4 * n)).astype(np.float64)


def easy(a: Counts, n: Counts, settings: config.PassRates) -> Counts:
    """p."""
    return a / n


def hard(a: Counts, n: Counts, settings: config.PassRates) -> Counts:
    """1 - p."""
    return (n - a) / n


def variance(a: Counts, n: Counts, settings: config.PassRates) -> Counts:
    """sqrt(p (1 - p)), the spread of the answers' rewards, as GRPO weighs problems."""
    return kernel(a, n, 0.5, 0.5)


WEIGHTS: dict[str, Callable[[Counts, Counts, config.PassRates], Counts]] = {
    "paced": paced,
    "bayes": bayes,
    "uniform": uniform,
    "curriculum": uniform,  # but the easiest first, see `batches.choose_rows`
    "hard_filter": hard_filter,
    "easy": easy,
    "hard": hard,
    "variance": variance,
    "shuffled": paced,  # of other problems: the control for what the weights have to do with the rates
}


def weigh(rounds: Sequence[PassRates], settings: config.PassRates, undecided: str = "") -> Weights:
    """The weights of the problems by `pass_rates.weight`, from their pass rates; rounds: the newest last.

    undecided: why most of the answers that could not be judged could not. Problems of which no answer could be judged
    have the weight 0 and are not in the mean, except under 'uniform', which does not ask. Raises ValueError if no
    problem has a weight, unless pass_rates.fallback='uniform'.
    """
    a, n = estimate(rounds, settings)
    rates = rounds[-1]
    of = registry.lookup(WEIGHTS, settings.weight, "pass_rates.weight")
    measured = n > 0 if settings.weight != "uniform" else np.ones(len(n), bool)
    found, notes = np.zeros(len(n)), []
    if measured.any():
        found[measured] = of(a[measured], n[measured], settings)
    if not found.any():
        notes.append(_nothing_left(rates, settings, undecided))
        found[:] = measured if measured.any() else 1.0
    if settings.weight == "shuffled":
        found[measured] = shuffled(found[measured], [rates.ids[i] for i in np.flatnonzero(measured)], settings.seed)
    typical = np.median(rates.tried[rates.tried > 0]) if rates.tried.any() else 0
    if settings.weight != "uniform" and typical < FEW:
        notes.append(
            f"half of the problems have at most {typical:g} judged answers: with fewer than {FEW} there are hardly any "
            "weights between 0 and the largest. Raise generation.samples."
        )
    weight = found if settings.normalise == "none" else mean_one(found, found > 0)
    said = _summary(found, weight, measured, rates, settings)
    return Weights(rates.ids, rates.right, rates.tried, weight, settings.normalise, said, tuple(notes))


def _nothing_left(rates: PassRates, settings: config.PassRates, undecided: str) -> str:
    """What to say if all weights are 0 and pass_rates.fallback takes all problems alike; else ValueError."""
    never, always = (rates.right == 0) & (rates.tried > 0), (rates.right == rates.tried) & (rates.tried > 0)
    counts = f"{never.sum()} are never solved, {always.sum()} always, {(rates.tried == 0).sum()} could not be judged"
    if undecided:
        counts += f" (most often: {undecided})"
    if settings.fallback == "uniform":
        return f"no problem has a {settings.weight!r} weight, so all weigh the same (pass_rates.fallback): {counts}"
    mend = "Raise generation.samples, set prompts.path to problems of other difficulty"
    if not rates.tried.any():
        mend = "See to what keeps them from being judged, set prompts.verifier to another one"
    raise ValueError(
        f"pass_rates.weight={settings.weight!r} must leave problems to train on, got none of {len(rates)}: {counts}. "
        f"{mend}, or pass_rates.fallback='uniform'."
    )


# --- normalisation and draws


def mean_one(weights: Counts, among: np.ndarray | None = None) -> Counts:
    """weights / their mean, over the problems `among` (bool [N], None = all).

    Over those that are kept, the ones trained on have mean 1; over all, the kept ones have 1 / (kept fraction).
    """
    return weights / np.mean(weights if among is None else weights[among])


def shuffled(weights: Counts, ids: Sequence[str], seed: int) -> Counts:
    """The same weights on other problems, by a permutation that depends on the seed and the ids, not on their order."""
    by_name = np.argsort(np.array(ids), kind="stable")
    found = np.empty_like(weights)
    found[by_name] = weights[by_name][np.random.default_rng(seed).permutation(len(ids))]
    return found


# --- what it comes to


def _summary(
    raw: Counts, weight: Counts, measured: np.ndarray, rates: PassRates, settings: config.PassRates
) -> dict[str, Any]:
    known, tried = raw[measured], rates.tried > 0
    return {
        "weight": settings.weight,
        "alpha": settings.alpha,
        "beta": settings.beta,
        "estimator": settings.estimator,
        "normalise": settings.normalise,
        "mean_over": "raw" if settings.normalise == "none" else "kept",  # whose mean weight is 1
        "problems": len(rates),
        "judged": int(tried.sum()),
        "never_solved": int((tried & (rates.right == 0)).sum()),
        "always_solved": int((tried & (rates.right == rates.tried)).sum()),
        "kept": int((raw > 0).sum()),
        "kept_fraction": float((raw > 0).mean()),
        "mean_raw_weight": float(known.mean()) if len(known) else 0.0,
        "effective_sample": effective_sample(known) if len(known) else 0.0,
        "answers": {name: int(getattr(rates, name).sum()) for name in ("right", "tried", "undecided", "truncated")},
        "histogram": histogram(rates, weight),
    }


def effective_sample(weights: Counts) -> float:
    """(sum w)^2 / (N sum w^2), in (0, 1]: the share of N equally weighted problems whose mean is as certain."""
    total = np.sum(weights**2)
    return float(np.sum(weights) ** 2 / (len(weights) * total)) if total > 0 else 0.0


def rate_bins(rates: PassRates) -> tuple[list[str], list[str]]:
    """(names of the bins, ascending; the bin of each problem): one per k of K where all were tried K times.

    Otherwise one per tenth, with never and always apart. UNJUDGED, which is not among the names, if none was tried.
    """
    k, n = rates.right, rates.tried
    judged, most = n > 0, int(n.max(initial=0))
    if (n[judged] == most).all() and most <= 2 * BINS:
        at, names = k, [f"{i}/{most}" for i in range(most + 1)]
    else:
        inside = np.minimum(BINS * k // np.maximum(n, 1), BINS - 1) + 1
        at = np.where(k == 0, 0, np.where(k == n, BINS + 1, inside))
        names = ["0", *(f"{i / BINS:.1f}-{(i + 1) / BINS:.1f}" for i in range(BINS)), "1"]
    return names, [names[number] if known else UNJUDGED for number, known in zip(at, judged, strict=True)]


def histogram(rates: PassRates, weight: Counts) -> list[dict[str, Any]]:
    """Per bin of `rate_bins`: "rate", "problems", "truncated" (the share of their answers), "weight" (mean)."""
    names, bins = rate_bins(rates)
    lines = []
    for name in [*names, *([UNJUDGED] if UNJUDGED in bins else [])]:
        part = np.array([each == name for each in bins], bool)
        answers = (rates.tried + rates.undecided)[part].sum()
        lines.append(
            {
                "rate": name,
                "problems": int(part.sum()),
                "truncated": float(rates.truncated[part].sum() / answers) if answers else 0.0,
                "weight": float(weight[part].mean()) if part.any() else 0.0,
            }
        )
    return lines


def table(summary: Mapping[str, Any]) -> list[str]:
    """The summary as lines of text."""
    lines = [f"{'pass rate':>10}{'problems':>10}{'truncated':>11}{'weight':>9}"]
    for line in summary["histogram"]:
        lines.append(f"{line['rate']:>10}{line['problems']:>10}{line['truncated']:>11.1%}{line['weight']:>9.3f}")
    answers = summary["answers"]
    lines += [
        f"kept {summary['kept']} of {summary['problems']} problems ({summary['kept_fraction']:.1%}): "
        f"{summary['never_solved']} are never solved, {summary['always_solved']} always",
        f"weight {summary['weight']!r} of the estimator {summary['estimator']!r}, normalise {summary['normalise']!r} "
        f"(mean over: {summary['mean_over']})",
        f"effective sample {summary['effective_sample']:.1%} of the judged problems; "
        f"{answers['right']:,} of {answers['tried']:,} judged answers are right, {answers['undecided']:,} undecided, "
        f"{answers['truncated']:,} truncated",
    ]
    return lines


# --- the file


def write_weights(directory: Path, weights: Weights, basis: Mapping[str, Any]) -> dict[str, Any]:
    """Write weights.jsonl and its manifest, which is returned. basis: what they depend on."""
    columns = (weights.right.tolist(), weights.tried.tolist(), weights.weight.tolist())
    lines = [
        {"id": name, "right": right, "tried": tried, "weight": weight}
        for name, right, tried, weight in zip(weights.ids, *columns, strict=True)
    ]
    said = {"basis": dict(basis), "normalise": weights.normalise, "summary": weights.summary, "notes": weights.notes}
    return write_lines(directory, NAME, lines, said)


def load_weights(directory: Path, settings: config.PassRates | None = None) -> Weights:
    """What `write_weights` wrote, if it was by these `settings` (None = any).

    Raises ValueError if it is not there, not whole or no weights, or names the settings that differ.
    """
    lines, manifest = read_lines(directory, NAME)
    try:
        right, tried = (np.array([line[name] for line in lines], np.int64) for name in ("right", "tried"))
        weight = np.array([line["weight"] for line in lines], np.float64)
        ids, said = tuple(line["id"] for line in lines), manifest["summary"]
        found = Weights(ids, right, tried, weight, manifest["normalise"], said, tuple(manifest["notes"]))
        made_by = manifest["basis"].get("settings", {})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{directory / NAME}.jsonl must hold weights, got other lines; {error!r}.") from error
    if not (np.isfinite(weight).all() and (weight >= 0).all() and weight.any()):
        raise ValueError(
            f"weights must be finite, not negative and not all 0, got others in {directory / NAME}.jsonl. Run "
            "launch.curate again."
        )
    differing = [] if settings is None else differences(made_by, dataclasses.asdict(settings), "pass_rates.")
    if differing:
        raise ValueError(
            f"{directory} must hold weights by the settings of this experiment, got others: {'; '.join(differing)}. "
            "Run launch.curate again, or undo these changes."
        )
    return found


def rates_of_weights(directory: Path, depends: Mapping[str, Any], seed: int) -> PassRates:
    """The pass rates that the weights in `directory` were made of, if they are of this experiment.

    depends: what its answers depend on, as in the basis of the pass rates; what it does not name may differ. seed: of
    answers that were counted. Raises ValueError that names what differs, or if the weights are of other pass rates.
    """
    made_of = read_lines(directory, NAME)[1].get("basis", {})
    rates = load_pass_rates(directory)
    if made_of.get("pass_rates") != read_lines(directory, RATES)[1]["sha256"]:
        raise ValueError(
            f"{directory / NAME}.jsonl must be made of the pass rates beside it, got weights of others; a run of "
            "launch.curate was stopped between the two. Run it again."
        )
    differing = differences({name: rates.basis.get(name) for name in depends}, depends)
    if seed not in rates.seeds:
        differing.append(f"generation.seed is {', '.join(map(str, rates.seeds))} there and {seed} here")
    if differing:
        raise ValueError(
            f"{directory} must hold weights by the pass rates of this student on these prompts, got others: "
            f"{'; '.join(differing)}. Run launch.curate in another --workdir, or undo these changes."
        )
    return rates


def training_weights(directory: Path, ids: Sequence[str], settings: config.PassRates) -> Float[np.ndarray, "N"]:
    """float64 [N]: what each of these prompts weighs in training by the weights in `directory`, 0 = leave it out.

    Those that are kept have mean 1, except under pass_rates.normalise='none'. Raises ValueError as `load_weights` does,
    and for a prompt without a weight.
    """
    by_id = load_weights(directory, settings).by_id()
    without = [name for name in ids if name not in by_id]
    if without:
        raise ValueError(
            f"{directory / NAME}.jsonl must hold a weight of every prompt, got none for {len(without)} of {len(ids)}, "
            f"the first is {without[0]!r}. Run launch.curate again with these prompts."
        )
    found = np.array([by_id[name] for name in ids], np.float64)
    if not found.any():
        raise ValueError(
            f"{directory / NAME}.jsonl must hold a weight above 0 for one of the prompts, got 0 for all {len(ids)}. "
            "Set prompts.path to the prompts that it was made of, or run launch.curate again."
        )
    return found if settings.normalise == "none" else mean_one(found, found > 0)
