"""What the default step compiles to at its real size, from shapes alone: B = 4, T = 512, V = 49152."""

import math
import re

import jax
import jax.numpy as jnp

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


def compiled_step(policy: str):
    config = default_config()
    config.selection.policy = policy
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
        temporary[policy] = compiled.memory_analysis().temp_size_in_bytes / 2**20
    # One [B, T, V] in float32 is 384 MiB; a naive step holds both logits and their gradients. What is left here is the
    # trunks' and the gradients', so that the fraction of the positions makes no difference to it.
    assert max(temporary.values()) < 860, temporary
    assert abs(temporary["top_fraction"] - temporary["all"]) < 5, temporary
