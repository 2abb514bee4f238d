"""From the config to an optax chain: clip, AdamW with decay on matrices only, learning-rate schedule."""

from typing import Any

import jax
import optax

from kdjax.config import Optim
from kdjax.schedules import Schedule, learning_rate
from kdjax.types import Params


def make_optimiser(config: Optim, steps: int) -> tuple[optax.GradientTransformation, Schedule]:
    """(transformation, learning rate as a function of the update number). Moments are float32 like the masters."""
    if config.warmup >= steps and config.warmup > 0 and config.schedule != "constant":
        raise ValueError(
            f"optim.warmup must be less than train.steps = {steps}, got {config.warmup}; the learning rate would never "
            "reach its peak. Lower it or train longer."
        )
    rate = learning_rate(config.schedule, config.learning_rate, config.warmup, steps, config.final_fraction)
    adam = optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decayed)
    return (optax.chain(optax.clip_by_global_norm(config.clip), adam) if config.clip else adam), rate


def decayed(params: Params) -> Any:
    """True for matrices and embeddings, False for vectors, norm scales ('*norm', 'scale') and biases ('b*')."""

    def decide(path: tuple, leaf: Any) -> bool:
        name = str(getattr(path[-1], "key", path[-1]))
        return leaf.ndim > 1 and not (name.endswith(("norm", "scale")) or name.startswith("b"))

    return jax.tree_util.tree_map_with_path(decide, params)
