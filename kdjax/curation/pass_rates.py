"""Pass rates: of each problem, how many of a student's answers were right; integers, with what they depend on.

`pass_rates.jsonl` has one object per problem: {"id", "right", "tried", "undecided", "truncated"}, with earlier rounds
also "before", their [right, tried]. Beside it `pass_rates.manifest.json` says whose rates these are (`PassRates.basis`,
`seeds`) and which bytes belong to it. A rate is never stored as a float: bounds and corrections stay exact. Equal
questions are one problem, `data.load_prompts` sees to it before anything is asked.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from kdjax import config, registry
from kdjax.curation.competence import tracker
from kdjax.generation.store import FAILED, LENGTH, Rollout
from kdjax.run_log import write_whole

FORMAT = 1
NAME = "pass_rates"
COUNTS = ("right", "tried", "undecided", "truncated")


@dataclasses.dataclass(frozen=True, eq=False)
class PassRates:
    """Columns over N problems, in the order of the prompts.

    right <= tried: int64 [N], answers that were verified as right, and as right or wrong. undecided: int64 [N], those
    that ended by themselves and that the verifier could not judge; they count nowhere else. truncated: int64 [N],
    answers that reached the length limit. basis: what the counts depend on, by name, besides the seeds of the answers.
    before: (right, tried) of the student as it was in earlier rounds, oldest first.
    """

    ids: tuple[str, ...]
    right: np.ndarray
    tried: np.ndarray
    undecided: np.ndarray
    truncated: np.ndarray
    basis: Mapping[str, Any]
    seeds: tuple[int, ...]
    before: tuple[tuple[np.ndarray, np.ndarray], ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, ids: Sequence[str]) -> "PassRates":
        """Those of some of the problems, in the order of `ids`. Raises ValueError for one that is not here."""
        place = {name: at for at, name in enumerate(self.ids)}
        without = [name for name in ids if name not in place]
        if without:
            raise ValueError(
                f"pass rates must hold all prompts, got none for {len(without)} of {len(ids)}, the first is "
                f"{without[0]!r}. Run launch.curate again with these prompts."
            )
        index = np.array([place[name] for name in ids], np.int64)
        before = tuple((right[index], tried[index]) for right, tried in self.before)
        columns = {name: getattr(self, name)[index] for name in COUNTS}
        return dataclasses.replace(self, ids=tuple(ids), before=before, **columns)


def count(
    ids: Sequence[str],
    rollouts: Iterable[Rollout],
    verdicts: Mapping[tuple[str, int], str],
    basis: Mapping[str, Any],
    seed: int,
) -> PassRates:
    """Count the verdicts of each problem; ids: those of the prompts, in order.

    rollouts: those that failed are no answers. verdicts: (id, sample) -> right | wrong | undecided. An answer that was
    cut off before it could be judged is wrong: the student did not get there in the tokens that it had.
    Raises ValueError for an answer to no prompt, without a verdict, or that is there twice.
    """
    place = {name: at for at, name in enumerate(ids)}
    columns: dict[str, Any] = {name: np.zeros(len(ids), np.int64) for name in COUNTS}
    seen: set[tuple[str, int]] = set()
    for rollout in rollouts:
        key = rollout.key
        if rollout.finish == FAILED:
            continue
        if key[0] not in place or key not in verdicts or key in seen:
            why = "no such prompt" if key[0] not in place else "it is there twice" if key in seen else "no verdict"
            raise ValueError(
                f"rollouts must be answers to the prompts, each once and with a verdict, got {key[0]!r} sample "
                f"{key[1]}; {why}. Run launch.curate again, or in another --workdir."
            )
        seen.add(key)
        at, cut_off = place[key[0]], rollout.finish == LENGTH
        undecided = verdicts[key] == "undecided" and not cut_off
        columns["right"][at] += verdicts[key] == "right"
        columns["tried"][at] += not undecided
        columns["undecided"][at] += undecided
        columns["truncated"][at] += cut_off
    return PassRates(tuple(ids), **columns, basis=dict(basis), seeds=(seed,))


def merge(runs: Sequence[PassRates]) -> PassRates:
    """The counts of several runs added up: the same student, sampling, prompts and verifier, other seeds.

    Raises ValueError that names what differs, or the seed whose answers would count twice.
    """
    if not runs:
        raise ValueError("runs must not be empty; there is nothing to merge.")
    first, *rest = runs
    seeds = list(first.seeds)
    for other in rest:
        differing = differences(other.basis, first.basis)
        if differing or other.ids != first.ids:
            raise ValueError(
                "pass rates must be of one student, sampling, prompts and verifier to be added up, got others: "
                f"{'; '.join(differing) or 'the problems are not the same'}. Merge runs that differ in their seed only."
            )
        twice = sorted(set(seeds) & set(other.seeds))
        if twice:
            raise ValueError(
                f"pass rates must be of different answers to be added up, got generation.seed={twice[0]} in two of "
                "them; equal seeds give equal answers. Generate one of them with another seed."
            )
        seeds += other.seeds
    columns = {name: np.sum([getattr(run, name) for run in runs], 0) for name in COUNTS}
    return dataclasses.replace(first, **columns, seeds=tuple(sorted(seeds)))


def after(earlier: Sequence[PassRates], rates: PassRates) -> PassRates:
    """`rates` with the rounds before them, oldest first, which take the place of those that they had.

    Raises ValueError if they are of other problems.
    """
    _require_same_problems([*earlier, rates])
    return dataclasses.replace(rates, before=tuple((each.right, each.tried) for each in earlier))


def _require_same_problems(rounds: Sequence[PassRates]) -> None:
    if not rounds or not len(rounds[-1]) or any(other.ids != rounds[-1].ids for other in rounds):
        raise ValueError(
            f"rounds must be pass rates of the same problems, got {len(rounds)} of differing ones or none. Estimate "
            "them on the same prompts."
        )


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """'sampling.temperature is 0.7 there and 1.0 here' for everything that differs; long digests are cut."""
    found = []
    for name in sorted({*there, *here}):
        values = there.get(name), here.get(name)
        if isinstance(values[0], Mapping) and isinstance(values[1], Mapping):
            found += differences(values[0], values[1], f"{prefix}{name}.")
        elif values[0] != values[1]:
            shown = [value[:12] if isinstance(value, str) and len(value) == 64 else repr(value) for value in values]
            found.append(f"{prefix}{name} is {shown[0]} there and {shown[1]} here")
    return found


def write_pass_rates(directory: Path, rates: PassRates, made: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write the counts and their manifest, which is returned. made: how they came about, for people."""
    lines = [
        {"id": name, **{column: int(getattr(rates, column)[at]) for column in COUNTS}}
        | ({"before": [[int(right[at]), int(tried[at])] for right, tried in rates.before]} if rates.before else {})
        for at, name in enumerate(rates.ids)
    ]
    said = {"basis": dict(rates.basis), "seeds": list(rates.seeds), "made": dict(made or {})}
    return write_lines(directory, NAME, lines, said)


def load_pass_rates(directory: Path) -> PassRates:
    """What `write_pass_rates` wrote. Raises ValueError if it is not there, not whole, or impossible."""
    lines, manifest = read_lines(directory, NAME)
    try:
        columns = {name: np.array([line[name] for line in lines], np.int64) for name in COUNTS}
        ids = tuple(line["id"] for line in lines)
        rounds = zip(*(line.get("before", []) for line in lines), strict=True)
        before = tuple((right, tried) for right, tried in (np.array(each, np.int64).T for each in rounds))
        rates = PassRates(ids, **columns, basis=manifest["basis"], seeds=tuple(manifest["seeds"]), before=before)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{directory / NAME}.jsonl must hold pass rates, got other lines; {error!r}.") from error
    wrong = (rates.right < 0) | (rates.right > rates.tried)
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"right must be in 0..tried, got {rates.right[at]} of {rates.tried[at]} for {rates.ids[at]!r} in "
            f"{directory / NAME}.jsonl. Run launch.curate again."
        )
    return rates


def write_lines(directory: Path, name: str, lines: Sequence[Mapping[str, Any]], said: Mapping[str, Any]) -> dict:
    """Write <name>.jsonl, then <name>.manifest.json with its SHA-256: killed between the two, neither counts."""
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    manifest = {"format": FORMAT, **said, "lines": len(lines), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    try:
        write_whole(directory / f"{name}.jsonl", text)
        write_whole(directory / f"{name}.manifest.json", json.dumps(manifest, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise OSError(
            f"{name}.jsonl could not be written to {directory}: {error}. Free disk space or set another --workdir, "
            "then run the same command again."
        ) from error
    return manifest


def read_lines(directory: Path, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(lines, manifest) of `write_lines`. Raises ValueError if they are not there, or not those of each other."""
    path, beside = directory / f"{name}.jsonl", directory / f"{name}.manifest.json"
    if not (path.is_file() and beside.is_file()):
        raise ValueError(
            f"{directory} must hold {path.name} and {beside.name}, got no such files. Run `python -m launch.curate`."
        )
    content = path.read_bytes()
    try:
        manifest = json.loads(beside.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}, this version reads {FORMAT}")
        if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
            raise ValueError(f"the SHA-256 of {path.name} is not the one in {beside.name}")
        return [json.loads(line) for line in content.decode().splitlines()], manifest
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{directory} must hold a whole {path.name}, got a damaged one; {error}. Run launch.curate again."
        ) from error


# --- what is believed of a problem's rate, from the counts of one round or several. Only `raw` has rates of 0 and 1:
# with the others every problem that was judged keeps some weight.

Rounds = tuple[Int[np.ndarray, "R N"], Int[np.ndarray, "R N"]]  # (right, tried), oldest round first
Believed = tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]  # (successes a, trials n): the rate is a / n


def raw(rounds: Rounds, settings: config.PassRates) -> Believed:
    """k / K of the newest round; both are integers."""
    right, tried = rounds
    return right[-1].astype(np.float64), tried[-1].astype(np.float64)


def laplace(rounds: Rounds, settings: config.PassRates) -> Believed:
    """(k + c) / (K + 2c) of the newest round: the mean of the posterior Beta(k + c, K - k + c); c = pass_rates.prior.

    Where K = 0 nothing is believed: a / n = 0 / 0.
    """
    right, tried = raw(rounds, settings)
    return right + settings.prior * (tried > 0), tried + 2 * settings.prior * (tried > 0)


def discounted(rounds: Rounds, settings: config.PassRates) -> Believed:
    """a / (a + b) after a <- g a + k, b <- g b + K - k over the rounds, from a = b = c.

    g = pass_rates.discount: a round counts less with every round after it, because the student has moved on. c and
    K = 0 in all rounds as in `laplace`.
    """
    right, tried = rounds
    successes = np.full(right.shape[1], float(settings.prior))
    trials = 2 * successes
    for k, n in zip(right, tried, strict=True):
        successes, trials = settings.discount * successes + k, settings.discount * trials + n
    known = tried.any(0)
    return successes * known, trials * known


ESTIMATORS: dict[str, Callable[[Rounds, config.PassRates], Believed]] = {
    "raw": raw,
    "laplace": laplace,
    "discounted": discounted,
    "tracker": tracker,
}


def estimate(rounds: Sequence[PassRates], settings: config.PassRates) -> Believed:
    """(successes, trials), float64 [N], by pass_rates.estimator; rounds: of the same problems, the newest last.

    What is `before` the first of them comes first. Trials are 0 where nothing that the estimator looks at was tried.
    """
    estimator = registry.lookup(ESTIMATORS, settings.estimator, "pass_rates.estimator")
    _require_same_problems(rounds)
    counts = [*rounds[0].before, *((each.right, each.tried) for each in rounds)]
    right, tried = (np.stack(column) for column in zip(*counts, strict=True))
    return estimator((right, tried), settings)
