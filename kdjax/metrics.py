"""The (sum, count) algebra: metrics are added over micro-batches, devices and steps, and divided once.

A metric is a pair of float32 scalars. Adding pairs is exact bookkeeping: no mean of means can arise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.types import Array, Metrics

# name -> (unit, what it says); the report and the progress line read it.
UNITS = {
    "loss": ("nats", "the training objective per slot"),
    "student_entropy": ("nats", "mean student entropy at the eligible positions"),
    "selected_fraction": ("fraction", "selected slots over eligible positions"),
    "grad_norm": ("", "global norm of the gradient before clipping"),
    "learning_rate": ("", "learning rate of the update"),
    "perplexity": ("", "exp of the mean negative log-likelihood of the held-out tokens"),
    "nll": ("nats", "mean negative log-likelihood of the held-out tokens"),
    "kl": ("nats", "mean KL(teacher || student) on the held-out tokens"),
    "agreement": ("fraction", "share of held-out positions where student and teacher have the same top token"),
    "accuracy": ("fraction", "share of held-out positions whose top token is the true next token"),
    "ece": ("fraction", "expected calibration error of the top token, 15 bins"),
    "entropy": ("nats", "mean entropy of the prediction on the held-out tokens"),
}


def mean(values: Array, where: Array | None = None) -> tuple[Array, Array]:
    """Sum and count of `values`, or of those under the mask `where`. Any shape; masked values may be non-finite."""
    values = values.astype(jnp.float32)
    if where is None:
        return jnp.sum(values), jnp.asarray(values.size, jnp.float32)
    return jnp.sum(jnp.where(where, values, 0.0)), jnp.sum(where, dtype=jnp.float32)


def add(left: Metrics, right: Metrics) -> Metrics:
    """Sums of sums and sums of counts; both sides have the same names."""
    return jax.tree.map(jnp.add, left, right)


def divide(metrics: Metrics) -> dict[str, float]:
    """The one division, on the host. An empty count gives nan, never an error."""
    host = jax.device_get(metrics)
    return {name: float(np.float64(s) / np.float64(n)) if n else float("nan") for name, (s, n) in host.items()}
