"""PACED V9: what a longer prompt of the teacher reaches, with a language model that reads the last two tokens only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax.build import build_chooser, build_objective
from kdjax.build.parts import reads_its_own
from kdjax.config import Loss, Selection
from kdjax.data import as_batch
from kdjax.data.responses import Answered, answer_rows, room_for_teacher
from kdjax.sharding import Rules
from kdjax.step import LanguageModel, StepParts, make_supervise
from kdjax.types import Head

V, LENGTH = 13, 12
PROMPT, ANSWER = (3, 4, 5, 6), (7, 8, 9, 10, 11)


def hidden(params, batch):
    """[B, T, V] logits of the token after each place, from that place and the one before."""
    before = jnp.concatenate([jnp.zeros_like(batch.tokens[:, :1]), batch.tokens[:, :-1]], 1)
    return params["before"][before] + params["here"][batch.tokens]


@functools.cache
def total():
    model = LanguageModel(hidden, lambda params: Head(jnp.eye(V), V))
    parts = StepParts(
        student=model,
        teacher=reads_its_own(model, Rules()),
        chooser=build_chooser(Selection(policy="all")),
        objective=build_objective(Loss(terms=(("reverse_kl", 1.0),))),
        optimiser=optax.sgd(1.0),
        learning_rate=lambda step: jnp.asarray(1.0),
        rules=Rules(),
    )
    supervise = make_supervise(parts)
    keys = jax.random.split(jax.random.key(0))
    params = {name: jax.random.normal(key, (V, V)) for name, key in zip(("before", "here"), keys, strict=True)}
    return jax.jit(lambda batch: supervise(params, params, batch, (), keys[0], jnp.int32(0))[0].total)


def losses(seen_by_teacher):
    """[5]: the reverse KL at each token of the answer; the prompt of the student starts at another place."""
    answered = [Answered(PROMPT, ANSWER, 1.0, seen_by_teacher)]
    rows, text = answer_rows(answered, LENGTH, room_for_teacher([Answered(PROMPT, (), 1.0, tuple(range(1, 9)))]))
    names = ("tokens", "segment_ids", "positions", "loss_mask", "row_id", "weight")
    columns = {name: getattr(rows, name) for name in names} | {"epoch": np.zeros(1, np.int32), "teacher": text}
    found = []
    for place in range(len(PROMPT), len(PROMPT) + len(ANSWER)):
        only = np.arange(LENGTH)[None] == place
        found.append(float(total()(as_batch(columns | {"loss_mask": rows.loss_mask & only}, jnp.asarray))))
    return np.array(found)


@pytest.mark.parametrize("seen", [(1, 2, 12, 3, 4, 5, 6), (12, 5, 6), (3, 4, 1, 2, 5, 6)])
def test_text_before_the_last_two_tokens_changes_nothing(seen):
    np.testing.assert_allclose(losses(seen), 0.0, atol=1e-6)


@pytest.mark.parametrize(("seen", "differ"), [((3, 4, 5, 6, 1, 2), 2), ((3, 4, 5, 1, 6), 1)])
def test_another_end_of_the_prompt_reaches_two_tokens(seen, differ):
    """The first token of the answer is predicted from both, the second from the last; later ones from the answer."""
    found = losses(seen)
    assert (found[:differ] > 1e-2).all()
    np.testing.assert_allclose(found[differ:], 0.0, atol=1e-6)
