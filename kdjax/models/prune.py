"""Students cut from a teacher: some of its layers, everything else as it is."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kdjax.models.params import ModelConfig
from kdjax.types import Params

FIRST = 3  # what a cut model cannot do without


def default_keep(total: int, layers: int) -> tuple[int, ...]:
    """The first three layers and, for the rest, equal steps to the last: (0, 1, 2, 10, 20, 29) for 6 of 30.

    Raises ValueError unless 1 <= layers <= total.
    """
    if not 1 <= layers <= total:
        raise ValueError(
            f"student.init.layers must be in 1..{total}, the layers of the teacher, got {layers}. Set it in that range."
        )
    first = min(FIRST, layers)
    rest = layers - first
    # i * total / rest, held back or pushed on so that every step has a layer of its own.
    spread = (max(first - 1 + i, min(total - 1 - rest + i, i * total // rest)) for i in range(1, rest + 1))
    return (*range(first), *spread)


def cut_config(cfg: ModelConfig, keep: Sequence[int]) -> ModelConfig:
    """The config of the student that has the layers `keep` of the teacher. A local layer stays local.

    Raises ValueError unless `keep` is non-empty, ascending and within the teacher's layers.
    """
    keep = tuple(keep)
    if not keep or any(a >= b for a, b in itertools.pairwise(keep)) or keep[0] < 0 or keep[-1] >= cfg.layers:
        raise ValueError(
            f"student.init.keep must be ascending layers in 0..{cfg.layers - 1}, each once, got {keep}; they are the "
            "teacher's layers that the student starts from. Leave it () for an even spread of student.init.layers."
        )
    local = tuple(cfg.local_layers[layer] for layer in keep) if cfg.local_layers else ()
    return dataclasses.replace(cfg, layers=len(keep), local_layers=local)


def cut(cfg: ModelConfig, params: Params, keep: Sequence[int]) -> tuple[ModelConfig, Params]:
    """Config and parameters of the student that has the layers `keep` of the teacher. All leaves are copies.

    From a file without the teacher in memory: `io.load_model(..., keep=keep)`. Raises ValueError as `cut_config` does.
    """
    student, index = cut_config(cfg, keep), jnp.asarray(tuple(keep))
    kept = {"layers": jax.tree.map(lambda leaf: leaf[index], params["layers"])}
    rest = {name: jax.tree.map(jnp.copy, leaf) for name, leaf in params.items() if name != "layers"}
    return student, rest | kept
