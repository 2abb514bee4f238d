"""From answers to weights of the prompts: rollouts -> verified -> pass rates -> weights, all files of a workdir.

  rollouts/         what `generation/store.py` writes, of the train prompts
  verified.jsonl    {"id", "sample", "verdict", "extracted", "reason", "of": digest of the response}, append-only
  pass_rates.jsonl  see pass_rates.py
  weights.jsonl     see paced.py

Beside each <name>.jsonl is <name>.manifest.json with what it depends on. Answers and verdicts, which take time, go on
where they stopped; what follows from them is a matter of milliseconds and always made anew.
"""

import collections
import dataclasses
import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdjax import config, registry, verifiers
from kdjax.curation.paced import Weights, weigh, write_weights
from kdjax.curation.pass_rates import FORMAT, PassRates, after, count, merge, write_pass_rates
from kdjax.data.prompts import Prompt, fingerprint
from kdjax.generation.store import FAILED, Rollout, read_manifest, read_rollouts
from kdjax.run_log import cut_off_last_line, read_lines, write_whole
from kdjax.verifiers import Finding, Verdict

ROLLOUTS, VERIFIED = "rollouts", "verified"
OWN = ("seed", "samples")  # of what answers depend on: may differ between runs whose counts are added up


@dataclasses.dataclass(frozen=True)
class Curated:
    """What a run of the chain made. sha256: of pass_rates.jsonl. tokens: of all answers. notes: for the user."""

    rates: PassRates
    weights: Weights
    sha256: str
    tokens: int
    notes: tuple[str, ...]


def curate(
    workdir: Path,
    prompts: Sequence[Prompt],
    default_verifier: str,
    settings: config.PassRates,
    *,
    added: Sequence[PassRates] = (),
    earlier: Sequence[PassRates] = (),
) -> Curated:
    """The stages after the rollouts, which are in `rollouts_of`; all files are written to `workdir`.

    prompts: those whose weights are wanted. added: pass rates of other seeds, see `merge`. earlier: pass rates of the
    student as it was, oldest first, for estimators that look at several rounds. Raises ValueError for prompts without
    answers, an unknown verifier, and as `weigh` does.
    """
    rollouts, depends = _answers(rollouts_of(workdir, settings), prompts)
    notes = _failures(rollouts)
    basis = basis_of(depends, prompts, default_verifier)
    checked = verify(workdir, prompts, rollouts, basis, default_verifier)
    verdicts = {key: str(found.verdict) for key, found in checked.items()}
    rates = count([prompt.id for prompt in prompts], rollouts, verdicts, basis, int(depends.get("seed", 0)))
    rates = after(earlier, merge([rates, *added]))
    manifest = write_pass_rates(workdir, rates)
    weights = weigh([rates], settings, _commonest(checked.values()))
    write_weights(workdir, weights, {"pass_rates": manifest["sha256"], "settings": dataclasses.asdict(settings)})
    tokens = sum(len(rollout.tokens or ()) for rollout in rollouts)
    return Curated(rates, weights, manifest["sha256"], tokens, (*notes, *weights.notes))


def rollouts_of(workdir: Path, settings: config.PassRates) -> Path:
    """Where the answers are: pass_rates.rollouts, or the workdir's own."""
    return Path(os.path.normpath(workdir / (settings.rollouts or ROLLOUTS)))


def verify(
    workdir: Path,
    prompts: Sequence[Prompt],
    rollouts: Iterable[Rollout],
    basis: Mapping[str, Any],
    default_verifier: str,
) -> dict[tuple[str, int], Finding]:
    """(id, sample) -> what is found of the answers, as in <workdir>/verified.jsonl; those that failed have none.

    Goes on where it was killed. Verdicts on another basis are not kept, nor that of an answer that is another one now.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    judges = _judges(prompts, default_verifier)
    path, manifest = workdir / f"{VERIFIED}.jsonl", workdir / f"{VERIFIED}.manifest.json"
    known = _known(path, manifest, basis)
    answers = [rollout for rollout in rollouts if rollout.finish != FAILED and rollout.id in by_id]
    found: dict[tuple[str, int], Finding] = {}
    with open(path, "a", encoding="utf-8") as file:
        for rollout in answers:
            digest = hashlib.blake2b(rollout.response.encode(), digest_size=8).hexdigest()
            said = known.get((*rollout.key, digest))
            if said is None:
                said = judges[rollout.id](rollout.response, by_id[rollout.id])
                line = {"id": rollout.id, "sample": rollout.sample, "verdict": str(said.verdict)}
                line |= {"extracted": said.extracted, "reason": said.reason, "of": digest}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
            found[rollout.key] = said
    return found


def basis_of(depends: Mapping[str, Any], prompts: Sequence[Prompt], default_verifier: str) -> dict[str, Any]:
    """What verdicts and pass rates depend on besides the seed: what the rollouts do, the prompts, who judges, how."""
    basis = {name: value for name, value in depends.items() if name not in OWN}
    basis |= {"verifier": _code(_judges(prompts, default_verifier).values()), "default_verifier": default_verifier}
    basis["abilities"] = verifiers.abilities()  # without them verifiers are undecided
    return json.loads(json.dumps(basis | {"prompts": fingerprint(prompts)}))  # tuples as JSON has them


def _code(judges: Iterable[verifiers.Verifier]) -> str:
    """sha256 hex of the source of kdjax/verifiers and of others that are used: versions are not mixed."""
    own = (Path(inspect.getfile(inspect.unwrap(judge))) for judge in judges)
    files = {*Path(inspect.getfile(verifiers)).parent.glob("*.py"), *own}
    digests = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _judges(prompts: Sequence[Prompt], default: str) -> dict[str, verifiers.Verifier]:
    """Prompt id -> its verifier."""
    found = {}
    for prompt in prompts:
        name = prompt.verifier or default
        if not name:
            raise ValueError(
                f"prompts.verifier must be set, got '' and prompt {prompt.id!r} names none; nothing says which answers "
                f"are right. Set it to one of {', '.join(verifiers.VERIFIERS)}."
            )
        found[prompt.id] = registry.lookup(verifiers.VERIFIERS, name, "prompts.verifier")
    return found


def _commonest(findings: Iterable[Finding]) -> str:
    """The commonest reason for which nothing could be decided; "" if all was."""
    reasons = collections.Counter(found.reason for found in findings if found.verdict == Verdict.UNDECIDED)
    return reasons.most_common(1)[0][0] if reasons else ""


def _known(path: Path, manifest: Path, basis: Mapping[str, Any]) -> dict[tuple[str, int, str], Finding]:
    """(id, sample, digest of the response) -> what was found by the file that is there, if it is of `basis`.

    Otherwise the file is emptied. A last line that a kill cut off is removed.
    """
    try:
        same = json.loads(manifest.read_text(encoding="utf-8")) == {"format": FORMAT, "basis": basis}
    except (OSError, ValueError):
        same = False
    if not same:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # before there is a manifest that says what its lines are of
        write_whole(manifest, json.dumps({"format": FORMAT, "basis": basis}, indent=2) + "\n")
        return {}
    if path.is_file():
        cut_off_last_line(path)
    return {
        (line["id"], line["sample"], line["of"]): Finding(Verdict(line["verdict"]), line["extracted"], line["reason"])
        for line in read_lines(path)
    }


def _answers(folder: Path, prompts: Sequence[Prompt]) -> tuple[list[Rollout], Mapping[str, Any]]:
    """The rollouts of these prompts and what they depend on."""
    depends = read_manifest(folder)["depends"]
    wanted = {prompt.id for prompt in prompts}
    rollouts = [rollout for rollout in read_rollouts(folder) if rollout.id in wanted]
    without = wanted - {rollout.id for rollout in rollouts}
    if without:
        raise ValueError(
            f"{folder} must hold answers to all prompts, got none to {len(without)} of {len(wanted)}, the first is "
            f"{min(without)!r}. Run `python -m launch.generate --out={folder}` with the same config to its end."
        )
    return rollouts, depends


def _failures(rollouts: Sequence[Rollout]) -> list[str]:
    failed = [rollout for rollout in rollouts if rollout.finish == FAILED]
    if not failed:
        return []
    return [f"{len(failed)} of {len(rollouts)} answers failed and count nowhere; the first: {failed[0].reason}"]
