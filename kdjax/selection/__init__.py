"""The position axis: statistics -> signal (a score per position) -> policy (fixed-size slots).

A signal says how interesting a position is and what it must be told to know that; a policy spends a budget on scores.
Both are open tables; every signal runs with every policy.
"""

from kdjax.selection.choose import Chooser
from kdjax.selection.policies import POLICIES, Context, Policy
from kdjax.selection.signals import SIGNALS, Signal, View
from kdjax.selection.stats import token_stats

__all__ = ["POLICIES", "SIGNALS", "Chooser", "Context", "Policy", "Signal", "View", "token_stats"]
