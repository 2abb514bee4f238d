"""linear_sample: draws from softmax(hidden @ head) or a power of it, with replacement, without ever keeping [N, V].

RS-KD (sekd 2.5) shows the student N such draws instead of the teacher's whole distribution. Under stop-gradient.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kdjax.kernels import _dispatch
from kdjax.kernels.linear_sample import reference, xla
from kdjax.kernels.linear_sample.api import Sample
from kdjax.types import Head

__all__ = ["DECLINES", "IMPLEMENTATIONS", "Sample", "implementation_of", "linear_sample"]

IMPLEMENTATIONS = {"reference": reference.linear_sample, "xla": xla.linear_sample}
DECLINES: dict[str, _dispatch.Declines] = {}


def implementation_of(kernels: str | None) -> str | None:
    """As `head_gradient.implementation_of`: None for kernels that other ops have and this one lacks."""
    return _dispatch.or_default(IMPLEMENTATIONS, kernels)


def linear_sample(
    hidden: Float[Array, "N D"],
    head: Head,
    uniforms: Float[Array, "N K"],
    tau: Float[Array, ""] | float = 1.0,
    power: float = 1.0,
    *,
    implementation: str | None = None,
) -> Sample:
    """K draws per row from the distribution proportional to p^power, p = softmax(logits / tau); no gradient.

    id = the first v with sum_{u <= v} p_u^power > uniform * sum_u p_u^power, in the order of the ids: exact inverse-CDF
    sampling, monotone in the uniform number, in [0, 1). An id whose p^power is 0 in float32 and a padding column never
    come up. logits are the head's, after its scale and soft cap. K may be 0, for the entropy and `max_logp` at tau.
    With `head.vocab_axis`, all devices of the axis get the same draws; [N] masses of each are gathered.
    Raises ValueError unless tau and power are positive.
    """
    for name, value, why in (
        ("tau", tau, "logits are divided by it"),
        ("power", power, "at 0 every id would be as likely as any other"),
    ):
        if not isinstance(value, jax.core.Tracer) and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}; {why}. Set it to 1 for the model's own softmax.")
    chosen = _dispatch.choose("linear_sample", IMPLEMENTATIONS, DECLINES, implementation, hidden, head, uniforms)
    hidden, head, uniforms, tau = lax.stop_gradient(
        (hidden, head, uniforms.astype(jnp.float32), jnp.asarray(tau, jnp.float32))
    )
    return chosen(hidden, head, uniforms, tau, float(power))
