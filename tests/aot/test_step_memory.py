"""What the default step compiles to at its real size, from shapes alone: B = 4, T = 512, V = 49152."""

import math
import re

import jax
import jax.numpy as jnp
import optax

from kdjax import models
from kdjax.build import build_parts
from kdjax.config import default_config, from_config_dict
from kdjax.models import ModelConfig
from kdjax.sharding import Rules
from kdjax.step import init_state, make_train_step
from kdjax.types import Batch

ROWS, LENGTH, VOCAB = 4, 512, 49152
TEACHER = ModelConfig("llama", VOCAB, 576, 30, 9, 3, 64, 1536, rope_theta=1e5, norm_eps=1e-5, tied=True)
STUDENT = ModelConfig("llama", VOCAB, 576, 6, 9, 3, 64, 1536, rope_theta=1e5, norm_eps=1e-5, tied=True)


def compiled_step(policy: str, remat: str = "none"):
    config = default_config()
    config.selection.policy = policy
    config.student.remat = remat
    config.train.batch_size = ROWS
    parts = build_parts(from_config_dict(config), STUDENT, TEACHER, Rules())
    params, teacher = (models.abstract_params(cfg) for cfg in (STUDENT, TEACHER))

    def array(shape, dtype):
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    whole, row = (ROWS, LENGTH), (ROWS,)
    ints, mask = array(whole, jnp.int32), array(whole, bool)
    row_ids, weight = array(row, jnp.int32), array(row, jnp.float32)
    batch = Batch(ints, ints, ints, mask, row_ids, row_ids, weight)
    state = jax.eval_shape(lambda p: init_state(parts, p, 0), params)
    return jax.jit(make_train_step(parts), donate_argnums=0).lower(state, teacher, batch).compile()


def naive_step():
    """The same step as it is usually written: whole logits of both sides, log-softmax, JAX's own gradient."""

    def loss(params, teacher, tokens, mask):
        sides = ((STUDENT, params), (TEACHER, teacher))
        hidden = [models.hidden(cfg, side, tokens, tokens, tokens) for cfg, side in sides]
        logits = [jnp.einsum("btd,vd->btv", h, side["embed"]) for h, (_, side) in zip(hidden, sides, strict=True)]
        logq, logp = (jax.nn.log_softmax(z, -1) for z in (logits[0], jax.lax.stop_gradient(logits[1])))
        kl = jnp.sum(jnp.exp(logp) * (logp - logq), -1)
        return jnp.sum(jnp.where(mask, kl, 0.0)) / jnp.sum(mask)

    optimiser = optax.adamw(1e-4)

    def step(params, state, teacher, tokens, mask):
        value, gradient = jax.value_and_grad(loss)(params, teacher, tokens, mask)
        updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    params, teacher = (models.abstract_params(cfg) for cfg in (STUDENT, TEACHER))
    tokens, mask = (jax.ShapeDtypeStruct((ROWS, LENGTH), dtype) for dtype in (jnp.int32, bool))
    state = jax.eval_shape(optimiser.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, teacher, tokens, mask).compile()


def temporary_mib(compiled) -> float:
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def largest_buffers(text: str) -> dict[int, str]:
    """elements -> shape, of every array that the program names."""
    found = {}
    for kind, sizes in re.findall(r"\b(pred|bf16|[suf]\d+)\[([\d,]+)\]", text):
        found[math.prod(map(int, sizes.split(",")))] = f"{kind}[{sizes}]"
    return found


def test_the_scan_sees_a_large_buffer():
    x = jax.ShapeDtypeStruct((7, 11), jnp.float32)
    text = jax.jit(lambda a: jnp.sum(jnp.exp(a @ a.T @ a))).lower(x).compile().as_text()
    assert max(largest_buffers(text)) == 77


def test_no_buffer_of_batch_positions_vocabulary():
    temporary = {}
    for policy in ("all", "top_fraction"):
        compiled = compiled_step(policy)
        sizes = largest_buffers(compiled.as_text())
        # The largest array is the embedding (and its gradient); [B, T, V] would have 3.6 times its elements.
        assert max(sizes) == VOCAB * STUDENT.width, sizes[max(sizes)]
        assert max(sizes) < ROWS * LENGTH * VOCAB
        temporary[policy] = temporary_mib(compiled)
    # One [B, T, V] in float32 is 384 MiB; a naive step holds both logits and their gradients. What is left here is the
    # trunks' and the gradients', so that the fraction of the positions makes no difference to it.
    assert max(temporary.values()) < 860, temporary
    assert abs(temporary["top_fraction"] - temporary["all"]) < 5, temporary
    assert temporary["top_fraction"] < 0.40 * temporary_mib(naive_step())  # 0.35


def test_selection_takes_less_than_dense_where_the_trunk_is_not_the_peak():
    """With remat="dots" the trunk keeps less, and what the heads need is seen: 665 against 687 MiB."""
    dense, selective = (temporary_mib(compiled_step(policy, "dots")) for policy in ("all", "top_fraction"))
    assert selective < dense - 10
