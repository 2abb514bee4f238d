"""Losses: one pointwise divergence per entry; `objective.py` mixes, weighs and reduces them.

To add one: a file with a factory `Loss config -> Term`, and a line here. The contract tests then check it against a
float64 oracle, at student == teacher, at extreme logits, under permutation of the slots, and on 8 devices.

Left out, of the PACED reference's catalogue: MiniLLM (L5: returns to go, teacher-mixed sampling, a text loss of its
own) and DistiLLM's rule for how many answers are the student's (L9). DistiLLM-2 (L10) is skew_kl as loss.terms and
skew_reverse_kl as on_policy.terms, but for its skew that follows each answer, and its pairs of answers to one prompt.
"""

from collections.abc import Callable

from kdjax.config import Loss
from kdjax.kernels.linear_divergence import Term
from kdjax.losses.adakd import adakd_forward_kl, adakd_reverse_kl
from kdjax.losses.akl import akl
from kdjax.losses.at_kd import at_kd
from kdjax.losses.cross_entropy import cross_entropy
from kdjax.losses.dkd import dkd
from kdjax.losses.forward_kl import forward_kl
from kdjax.losses.jsd import jsd
from kdjax.losses.reverse_kl import reverse_kl
from kdjax.losses.sampled import sampled_k2, sampled_k3, sampled_reverse_kl
from kdjax.losses.skew_kl import skew_kl, skew_reverse_kl
from kdjax.losses.taid import taid
from kdjax.losses.todi import todi
from kdjax.losses.tvd import tvd
from kdjax.losses.udkd import udkd

LOSSES: dict[str, Callable[[Loss], Term]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "todi": todi,
    "akl": akl,
    "dkd": dkd,
    "udkd": udkd,
    "at_kd": at_kd,
    "adakd_forward_kl": adakd_forward_kl,
    "adakd_reverse_kl": adakd_reverse_kl,
    "taid": taid,
    "sampled_reverse_kl": sampled_reverse_kl,
    "sampled_k2": sampled_k2,
    "sampled_k3": sampled_k3,
    "cross_entropy": cross_entropy,
}
