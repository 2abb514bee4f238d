"""Is this answer right? Three-valued verifiers, found by name."""

import dataclasses
import importlib.metadata
import os
from collections.abc import Iterable

from kdjax import registry
from kdjax.data.prompts import Prompt
from kdjax.verifiers.code_tests import ALLOWED, unit_tests
from kdjax.verifiers.finding import Finding, Verdict, Verifier
from kdjax.verifiers.form import CHECKS, instructions
from kdjax.verifiers.formulas import symbolic
from kdjax.verifiers.gym import reasoning_gym
from kdjax.verifiers.multiple_choice import choice
from kdjax.verifiers.numeric_answers import numeric
from kdjax.verifiers.released_rule import released_rule
from kdjax.verifiers.texts import exact, regex

# name -> (response, prompt) -> Finding
VERIFIERS: dict[str, Verifier] = {
    "numeric": numeric,
    "symbolic": symbolic,
    "choice": choice,
    "exact": exact,
    "regex": regex,
    "reasoning_gym": reasoning_gym,
    "instructions": instructions,
    "code": unit_tests,
    "released_rule": released_rule,  # of SCAS; accepts 17 for 7
}


def verify(response: str, prompt: Prompt, default: str = "", *, cut_off: bool = False) -> Finding:
    """What the prompt's own verifier says of a response, or the one called `default` (prompts.verifier).

    cut_off: the response reached the length limit; then what cannot be told is wrong, as `curation.pass_rates` counts.
    Raises ValueError that names the prompt if it has no verifier or lacks what that reads.
    """
    name = prompt.verifier or default
    if not name:
        raise ValueError(
            f"prompts.verifier must be set, got ''; prompt {prompt.id!r} names no verifier."
            + registry.did_you_mean("", VERIFIERS)
        )
    where = f'"verifier" of prompt {prompt.id!r}' if prompt.verifier else "prompts.verifier"
    found = registry.lookup(VERIFIERS, name, where)(response, prompt)
    if cut_off and found.verdict == Verdict.UNDECIDED:
        return dataclasses.replace(found, verdict=Verdict.WRONG)
    return found


def check_prompts(prompts: Iterable[Prompt], default: str = "") -> None:
    """ValueError for the first prompt that cannot be verified, before hours are spent on answers to it."""
    for prompt in prompts:
        verify("", prompt, default)


def abilities() -> dict[str, str]:
    """What verdicts depend on besides the code here: versions of the packages asked, "" if absent; is code run, "1"."""
    found = {"code": os.environ.get(ALLOWED, "")}
    for package in ("math-verify", "reasoning-gym"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    return found


__all__ = [
    "CHECKS",
    "VERIFIERS",
    "Finding",
    "Verdict",
    "Verifier",
    "abilities",
    "check_prompts",
    "verify",
]
