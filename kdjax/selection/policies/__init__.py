"""Policies: how a budget of positions is spent on scores.

To add one: a file with a factory `Selection config -> Policy`, and a line in POLICIES.
"""

from collections.abc import Callable

from kdjax.config import Selection as SelectionConfig
from kdjax.selection.policies.adaptive import adaptive
from kdjax.selection.policies.all_positions import all_positions
from kdjax.selection.policies.base import Context, Policy
from kdjax.selection.policies.easy_hard import easy_hard, easy_hard_means
from kdjax.selection.policies.sampled import sampled
from kdjax.selection.policies.threshold import threshold
from kdjax.selection.policies.top_fraction import random_fraction, reserve_mix, top_fraction
from kdjax.selection.policies.windows import bucket, curriculum

__all__ = ["POLICIES", "Context", "Policy"]

POLICIES: dict[str, Callable[[SelectionConfig], Policy]] = {
    "all": all_positions,
    "top_fraction": top_fraction,
    "random_fraction": random_fraction,
    "reserve_mix": reserve_mix,
    "threshold": threshold,
    "curriculum": curriculum,
    "bucket": bucket,
    "sampled": sampled,
    "easy_hard": easy_hard,
    "easy_hard_means": easy_hard_means,
    "adaptive": adaptive,
}
