"""Rows of random text with gaps, and models so small that their whole logits can be written out."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.data.packing import Rows, eligible, hash_rows
from kdjax.sharding import Rules
from kdjax.step import LanguageModel
from kdjax.types import Head

T, V, D = 24, 37, 5
NO_TARGET = 3  # the row without an eligible position


def make_rows(count=21, seed=0, length=T) -> Rows:
    """Ragged rows of up to three segments; row 3 has no target, row 4 two."""
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(1, 4, (count, length)), 1)
    segments[rng.random(count) < 0.3, -5:] = 0
    mask = rng.random((count, length)) < 0.8
    mask[NO_TARGET] = False
    segments[4], mask[4] = 1, False
    mask[4, [7, 9]] = True
    tokens = rng.integers(0, V, (count, length))
    tokens, segments = tokens.astype(np.int32), segments.astype(np.int32)
    return Rows(
        tokens=tokens,
        segment_ids=segments,
        positions=np.tile(np.arange(length, dtype=np.int32), (count, 1)),
        loss_mask=mask,
        row_id=np.arange(count, dtype=np.int32),
        weight=rng.random(count).astype(np.float32),
        row_hash=hash_rows(tokens, segments, mask),
        begins=np.ones(count, np.int32),
    )


def bigram_model(rules=Rules()):
    """Hidden states are rows of a table: no attention, so an oracle needs none."""

    def hidden(params, batch):
        if rules.mesh is None:
            return params["table"][batch.tokens]
        return params["table"].at[batch.tokens].get(out_sharding=rules.batch(3))

    return LanguageModel(hidden, lambda params: Head(params["head"], vocab_size=V))


def make_params(seed, width=D, scale=1.5):
    rng = np.random.default_rng(seed)
    shapes = {"table": (V, width), "head": (width, V)}
    return {name: jnp.asarray(rng.normal(0, scale, shape), jnp.float32) for name, shape in shapes.items()}


def oracle(student, teacher, rows) -> list[dict[str, np.ndarray]]:
    """Of each row the values at its eligible positions, in float64 from whole logits."""

    def log_probs(params, tokens):
        logits = np.asarray(params["table"], np.float64)[tokens] @ np.asarray(params["head"], np.float64)
        return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)

    found = []
    for row, places in zip(rows.tokens, eligible(rows), strict=True):
        at = np.flatnonzero(places)
        q, p, label = log_probs(student, row[at]), log_probs(teacher, row[at]), row[np.minimum(at + 1, len(row) - 1)]
        each = np.arange(len(at))
        found.append(
            {
                "student_entropy": -np.sum(np.exp(q) * q, -1),
                "kl": np.sum(np.exp(p) * (p - q), -1),
                "ce_ratio": -q[each, label] / (1e-6 - p[each, label]),
            }
        )
    return found


@pytest.fixture(scope="session")
def small():
    """rows, student and teacher parameters, the bigram model and what builds more of them."""
    return types.SimpleNamespace(
        rows=make_rows(),
        student=make_params(1),
        teacher=make_params(2, width=9),
        model=bigram_model(),
        no_target=NO_TARGET,
        make_rows=make_rows,
        bigram_model=bigram_model,
        make_params=make_params,
        oracle=oracle,
    )
