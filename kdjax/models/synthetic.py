"""The model `synthetic`: a tiny Llama with random weights and a byte-level tokenizer, to check the pipeline only.

It has learned nothing: figures obtained with it say that the code runs, not that distillation works.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np

from kdjax import models
from kdjax.sharding import Rules
from kdjax.types import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SOURCE = "synthetic: a tiny Llama with random weights, to check the pipeline only"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2; the 256 bytes follow
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def config() -> models.ModelConfig:
    """Eight layers, so that the default cuts of a teacher work; 264 rows for 259 tokens, the rest is padding."""
    return models.ModelConfig(
        family="llama",
        vocab_size=264,
        width=64,
        layers=8,
        heads=4,
        kv_heads=2,
        head_dim=16,
        mlp=160,
        norm_eps=1e-5,
        tied=True,
        max_positions=2048,
        initializer_range=0.2,  # wide, so that the predictions are not all but uniform and there is something to match
        bos_id=1,
        eos_ids=(2,),
        pad_id=2,
    )


def make_params(rules: Rules = Rules()) -> Params:
    """The same random float32 parameters every time."""
    rng = np.random.default_rng(0)  # not jax.random, whose numbers may change with its version

    def draw(spec: models.ParamSpec) -> jax.Array:
        leaf = spec.init.mean + spec.init.std * rng.standard_normal(spec.shape)
        return jax.device_put(leaf.astype(np.float32), rules.storage(spec.axes, spec.shape))

    return jax.tree.map(draw, models.param_specs(config()))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, three special tokens, a ChatML template; any text goes through and back unchanged."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIAL, *letters))}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[2],
        unk_token=SPECIAL[0],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
