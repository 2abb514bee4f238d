"""float64 numpy, written from the formulas: what kernels, losses and statistics are compared with.

Plain functions for all test rooms: `from tests.kernels import oracle`. Nothing here imports kdjax.
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np

Rowwise = Callable[[np.ndarray], np.ndarray]  # logits [N, V] -> a number per row [N]


def f64(array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def log_softmax(logits) -> np.ndarray:
    logits = f64(logits)
    shifted = logits - logits.max(-1, keepdims=True, initial=-np.inf)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def entropy(logits) -> np.ndarray:
    logq = log_softmax(logits)
    return -(np.exp(logq) * logq).sum(-1)


def kl(from_logits, to_logits) -> np.ndarray:
    """KL(softmax(from_logits) || softmax(to_logits)) per row."""
    logp, logq = log_softmax(from_logits), log_softmax(to_logits)
    return (np.exp(logp) * (logp - logq)).sum(-1)


def kl_to_mixture(logits, other_logits, own_share: float) -> np.ndarray:
    """KL(a || own_share a + (1 - own_share) b) per row."""
    loga, logb = log_softmax(logits), log_softmax(other_logits)
    if own_share == 0:
        return kl(logits, other_logits)
    mixture = np.logaddexp(np.log(own_share) + loga, np.log1p(-own_share) + logb)
    return (np.exp(loga) * (loga - mixture)).sum(-1)


def statistics(logits, labels) -> dict[str, np.ndarray]:
    """The fields of LinearStats by name."""
    logits, labels, rows = f64(logits), np.asarray(labels), np.arange(len(logits))
    logq = log_softmax(logits)
    argmax = logits.argmax(-1)  # the first of equals
    return {
        "logz": logits[rows, argmax] - logq[rows, argmax],
        "entropy": entropy(logits),
        "label_logp": logq[rows, labels],
        "sum_p_sq": (np.exp(logq) ** 2).sum(-1),
        "max_logp": logq.max(-1, initial=-np.inf),
        "argmax": argmax,
        "brier": ((np.exp(logq) - (labels[:, None] == np.arange(logits.shape[1]))) ** 2).sum(-1),
    }


def head_gradient(head: "HeadOracle", hidden, labels, weights) -> dict[str, np.ndarray]:
    """Of sum_t weights_t (-log q_t[labels_t]) of one sequence: the gradient [V, D] in the head's matrix and its parts.

    rank: how many logits are at least the label's without its own and its equals', plus one.
    """
    hidden, labels, weights, rows = f64(hidden), np.asarray(labels), f64(weights), np.arange(len(labels))
    logits = head.logits(hidden)
    error = np.exp(log_softmax(logits)) - (labels[:, None] == np.arange(logits.shape[1]))
    slope = error * head.logit_scale * (1 - (logits / head.soft_cap) ** 2 if head.soft_cap else 1)
    tokens = slope[:, :, None] * hidden[:, None, :]
    gradient = (weights[:, None, None] * tokens).sum(0)
    return {
        "gradient": gradient,
        "norm": (gradient**2).sum(),
        "share": weights * (tokens * gradient[None]).sum((1, 2)),
        "token_norm": (tokens**2).sum((1, 2)),
        "label_logp": log_softmax(logits)[rows, labels],
        "brier": (error**2).sum(-1),
        "rank": 1 + (logits > logits[rows, labels][:, None]).sum(-1),
    }


def slope(function: Rowwise, logits, step: float = 1e-5) -> np.ndarray:
    """d function(logits)[n] / d logits[n, v] by central differences; rows are independent."""
    logits = f64(logits)
    gradient = np.empty_like(logits)
    for v in range(logits.shape[1]):
        up, down = logits.copy(), logits.copy()
        up[:, v] += step
        down[:, v] -= step
        gradient[:, v] = (function(up) - function(down)) / (2 * step)
    return gradient


@dataclasses.dataclass(frozen=True)
class HeadOracle:
    """A language-model head: weight [V, D] or [D, V] as it is stored, with padding columns behind `vocab_size`."""

    weight: np.ndarray
    vocab_size: int
    vocab_major: bool
    logit_scale: float = 1.0
    soft_cap: float = 0.0

    @property
    def matrix(self) -> np.ndarray:
        """[D, V] without the padding."""
        return (f64(self.weight).T if self.vocab_major else f64(self.weight))[:, : self.vocab_size]

    def squash(self, raw: np.ndarray) -> np.ndarray:
        """Logits from the bare product hidden @ matrix."""
        logits = raw * self.logit_scale
        return self.soft_cap * np.tanh(logits / self.soft_cap) if self.soft_cap else logits

    def logits(self, hidden) -> np.ndarray:
        return self.squash(f64(hidden) @ self.matrix)

    def gradients(self, hidden, function: Rowwise, weight) -> tuple[np.ndarray, np.ndarray]:
        """d sum_n weight_n function(logits)_n / d hidden and / d weight as it is stored (0 in the padding)."""
        hidden = f64(hidden)
        by_raw = f64(weight)[:, None] * slope(lambda raw: function(self.squash(raw)), hidden @ self.matrix)
        by_matrix = np.zeros(self.weight.shape[::-1] if self.vocab_major else self.weight.shape)
        by_matrix[:, : self.vocab_size] = hidden.T @ by_raw
        return by_raw @ self.matrix.T, by_matrix.T if self.vocab_major else by_matrix


def hlo_shapes(text: str) -> dict[str, int]:
    """Every array shape in an HLO text, such as 'f32[8,16]', and its number of elements."""
    found = {match[0]: match[1] for match in re.finditer(r"\b(?:pred|bf16|[fsuc]\d+\w*)\[([\d,]*)\]", text)}
    return {shape: int(np.prod([int(size) for size in sizes.split(",") if size])) for shape, sizes in found.items()}


def largest_shape(text: str) -> tuple[int, str]:
    """(elements, shape) of the largest array in an HLO text: no [B, T, V] means this stays below B * T * V."""
    return max((elements, shape) for shape, elements in hlo_shapes(text).items())
