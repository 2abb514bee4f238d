"""Greedy decoding against the plain model without a cache, one row at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import models
from kdjax.config import Mesh
from kdjax.generation import complete, greedy
from kdjax.models import synthetic
from kdjax.sharding import make_rules

NEW = 9
CFG = models.ModelConfig(
    family="llama",
    vocab_size=61,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp=24,
    tied=True,
    initializer_range=0.5,
    max_positions=64,
    eos_ids=(7,),
)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(3)

    def draw(spec):
        return jnp.asarray(spec.init.mean + spec.init.std * rng.normal(size=spec.shape), jnp.float32)

    return jax.tree.map(draw, models.param_specs(CFG))


forward = jax.jit(lambda params, *inputs: models.hidden(CFG, params, *inputs))


def uncached(params, prompt):
    """NEW whole-sequence forward passes, logits written out in float64 from the hidden states."""
    embedding, tokens = np.asarray(params["embed"], np.float64), list(prompt)
    for _ in range(NEW):
        padded, at = np.zeros((1, 24), np.int32), np.arange(24, dtype=np.int32)[None]
        padded[0, : len(tokens)] = tokens
        hidden = forward(params, padded, (at < len(tokens)).astype(np.int32), at)
        logits = embedding @ np.asarray(hidden[0, len(tokens) - 1], np.float64)  # the head is tied
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def batch_of(prompts, filler):
    width = max(map(len, prompts)) + 2
    padded = [[*prompt, *[filler] * (width - len(prompt))] for prompt in prompts]
    return jnp.asarray(padded, jnp.int32), jnp.asarray([len(p) for p in prompts], jnp.int32)


PROMPTS = [[5, 9, 33, 2, 60, 11, 4], [17], [8, 8, 41, 3]]


def test_equals_the_model_without_a_cache(params):
    want = [uncached(params, prompt) for prompt in PROMPTS]
    assert len({tuple(row) for row in want}) == 3
    tokens, counts = greedy(CFG, params, *batch_of(PROMPTS, filler=0), new_tokens=NEW)
    np.testing.assert_array_equal(tokens, want)
    np.testing.assert_array_equal(counts, NEW)


def test_padding_is_never_seen(params):
    first = greedy(CFG, params, *batch_of(PROMPTS, filler=0), new_tokens=NEW)
    second = greedy(CFG, params, *batch_of(PROMPTS, filler=50), new_tokens=NEW)
    np.testing.assert_array_equal(first[0], second[0])


def test_each_row_stops_at_its_own_eos(params):
    free, _ = greedy(CFG, params, *batch_of(PROMPTS, filler=0), new_tokens=NEW)
    free = np.asarray(free).tolist()
    ends = (free[0][3], free[1][0])
    tokens, counts = greedy(CFG, params, *batch_of(PROMPTS, filler=0), new_tokens=NEW, eos_ids=ends)
    for row, made, count in zip(free, np.asarray(tokens).tolist(), counts.tolist(), strict=True):
        before = next((at for at, token in enumerate(row) if token in ends), NEW)
        assert count == before
        assert made[:count] == row[:count]
    assert counts[1] == 0
    assert counts[0] <= 3


def test_padding_columns_are_never_generated(params):
    free, _ = greedy(CFG, params, *batch_of(PROMPTS, filler=0), new_tokens=NEW)
    limit = int(np.max(free))
    tokens, _ = greedy(CFG, params, *batch_of(PROMPTS, filler=0), new_tokens=NEW, vocab_size=limit)
    assert np.max(tokens) < limit


class Encoded(dict):
    """What a tokenizer call returns."""


class LetterTokenizer:
    """Letters a, b, c, ... are ids 0, 1, 2, ...; enough of a tokenizer for `complete`."""

    eos_token_id = None

    def __call__(self, text):
        return Encoded(input_ids=[ord(letter) - ord("a") for letter in text])

    def get_vocab(self):
        return {chr(ord("a") + token): token for token in range(61)}

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize, return_dict):
        assert add_generation_prompt
        assert tokenize
        assert not return_dict
        return self("".join(message["content"] for message in messages) + "z")["input_ids"]

    def decode(self, ids, *, skip_special_tokens):
        assert skip_special_tokens
        return "".join(chr(ord("a") + token) for token in ids)


def letters(ids):
    return LetterTokenizer().decode(ids, skip_special_tokens=True)


def test_complete_texts_and_messages(params):
    prompts = ["hello", [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]]
    made = complete(CFG, params, LetterTokenizer(), prompts, NEW)
    for text, prompt in zip(made, ["hello", "abcz"], strict=True):
        want = uncached(params, LetterTokenizer()(prompt)["input_ids"])
        want = want[: want.index(7)] if 7 in want else want
        assert text == letters(want)
    assert complete(CFG, params, LetterTokenizer(), [], NEW) == []


def test_complete_stops_at_the_tokenizers_eos_too(params):
    (free,) = complete(CFG, params, LetterTokenizer(), ["hello"], NEW)
    tokenizer = LetterTokenizer()
    tokenizer.eos_token_id = ord(free[2]) - ord("a")
    (made,) = complete(CFG, params, tokenizer, ["hello"], NEW)
    assert made == free[: free.index(free[2])]


def test_complete_with_a_real_tokenizer_and_parameters_on_a_mesh():
    cfg, tokenizer = synthetic.config(), synthetic.make_tokenizer()
    prompts = ["The capital", [{"role": "user", "content": "Who are you?"}]]
    rules = make_rules(Mesh("fsdp"))
    split = synthetic.make_params(rules)
    made = complete(cfg, split, tokenizer, prompts, 3)  # first: a program that was traced for one device would be found
    want = complete(cfg, synthetic.make_params(), tokenizer, prompts, 3)
    assert all(isinstance(text, str) for text in want)
    assert made == want
    with jax.set_mesh(rules.mesh):
        assert complete(cfg, split, tokenizer, prompts, 3) == want


def test_prompt_without_tokens_is_an_error(params):
    with pytest.raises(ValueError, match=r"prompts\[1\] must have at least one token, got ''. Add some text"):
        complete(CFG, params, LetterTokenizer(), ["a", ""], NEW)


def test_prompt_without_room_is_an_error(params):
    message = (
        r"prompts\[0\] must leave room .* got 60 tokens \+ 9 new ones; the model's context is 64. Shorten the prompt"
    )
    with pytest.raises(ValueError, match=message):
        complete(CFG, params, LetterTokenizer(), ["a" * 60], NEW)
