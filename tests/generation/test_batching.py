"""Many prompts at a time: the same text whatever the batch, stop strings, ends, and few compiled programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import models
from kdjax.config import Mesh
from kdjax.generation import Sampling, batching, complete, encode, end_ids, rollouts, sample, speaker
from kdjax.generation.sampler import advance, begin, refill
from kdjax.models import synthetic
from kdjax.sharding import make_rules

NEW = 20
GREEDY, WARM = Sampling(temperature=0), Sampling(0.8)
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
    max_positions=96,
    eos_ids=(7,),
)


class Encoded(dict):
    """What a tokenizer call returns."""


class LetterTokenizer:
    """Letters a, b, c, ... are ids 0, 1, 2, ..."""

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


LETTERS = LetterTokenizer()
PROMPTS = [encode(LETTERS, text) for text in ("hello", "b" * 40, "tokens", "a", "the" * 11, "xyz", "bananas")]


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(3)

    def draw(spec):
        return jnp.asarray(spec.init.mean + spec.init.std * rng.normal(size=spec.shape), jnp.float32)

    return speaker(CFG, jax.tree.map(draw, models.param_specs(CFG)), LETTERS)


def answers(model, prompts=PROMPTS, samples=3, settings=WARM, **options):
    found = list(rollouts(model, prompts, samples, settings, new_tokens=NEW, **{"batch_size": 6, "seed": 4} | options))
    assert len({key[:2] for key in found}) == len(found)
    return {(index, number): completion for index, number, completion in found}


def same(left, right):
    """The same but for the rounding of logp, which depends on the shape of the batch."""
    assert set(left) == set(right)
    for key, one in left.items():
        other = right[key]
        assert (one.text, one.tokens, one.finish) == (other.text, other.tokens, other.finish)
        assert one.logp == pytest.approx(other.logp, abs=1e-4)


def test_every_answer_whatever_the_batch(model):
    every = answers(model)
    assert set(every) == {(index, number) for index in range(7) for number in range(3)}
    assert {completion.finish for completion in every.values()} == {"stop", "length"}
    assert len({completion.text for completion in every.values()}) > 18
    for completion in every.values():
        assert completion.text == LETTERS.decode(completion.tokens, skip_special_tokens=True)
        assert 7 not in completion.tokens
        assert (len(completion.tokens) == NEW) == (completion.finish == "length")
        assert completion.logp <= 0
    same(answers(model, batch_size=2), every)  # fewer than the samples of a prompt
    names = [str(index) for index in range(7)]
    some = answers(model, PROMPTS[::-1], [[2], [0, 1], [], [1], [2, 0], [], [0]], names=names[::-1])
    same({(6 - index, number): completion for (index, number), completion in some.items()}, {
        key: every[key] for key in [(6, 2), (5, 0), (5, 1), (3, 1), (2, 2), (2, 0), (0, 0)]
    })  # fmt: skip


def test_answers_that_begin_late_say_what_passes_over_the_whole_text_say(model):
    """Two rows for 21 prompts: the cache goes round, and what a row had before is not seen."""
    prompts = [[*prompt[: 5 + at], at, 3 * at] for at in range(3) for prompt in PROMPTS]
    found = answers(model, prompts, 1, GREEDY, batch_size=2)
    assert {completion.finish for completion in found.values()} == {"stop", "length"}
    lengths = {len(completion.tokens) for completion in found.values()}
    assert len(lengths) > 2
    forward = jax.jit(lambda params, *inputs: models.hidden(CFG, params, *inputs))
    for (index, _), completion in found.items():
        text = [*prompts[index], *completion.tokens]
        row, at = np.zeros((1, 48), np.int32), np.arange(48, dtype=np.int32)[None]
        row[0, : len(text)] = text
        hidden = np.asarray(forward(model.params, row, (at < len(text)).astype(np.int32), at))[0]
        likely = (hidden @ np.asarray(model.params["embed"]).T).argmax(-1)[len(prompts[index]) - 1 : len(text)]
        ended = [7] if completion.finish == "stop" else []
        assert likely[: NEW if not ended else None].tolist() == [*completion.tokens, *ended]


def steps_of(monkeypatch, model, **options):
    """(answers, steps that all rows went on by)."""
    taken, real = [], batching.advance

    def counted(cfg, how, fast, state, *rest):
        before = int(state.cache.slot)
        state = real(cfg, how, fast, state, *rest)
        taken.append((int(state.cache.slot) - before) % NEW)
        return state

    with monkeypatch.context() as patched:
        patched.setattr(batching, "advance", counted)
        return answers(model, **options), sum(taken)


def test_finished_rows_make_room(monkeypatch, model):
    """Each row takes the next answer as it finishes one; batches that run to their ends take longer."""
    prompts = [[at % 50, at // 50, at % 3] for at in range(60)]
    often = dataclasses.replace(model, ends=tuple(range(7, 13)))
    found, steps = steps_of(monkeypatch, often, prompts=prompts, samples=1, batch_size=4)
    lasts = [min(len(completion.tokens), NEW - 1) for _, completion in sorted(found.items())]
    ends = [0] * 4
    for last in lasts:
        at = ends.index(min(ends))
        ends[at] += last
    assert steps == max(ends)
    assert steps < 0.7 * sum(max(lasts[at : at + 4]) for at in range(0, 60, 4))


def test_rows_stay_on_the_device_that_read_their_prompt():
    assert batching._seats({0: "a", 3: "b"}, dict.fromkeys((0, 1, 2, 5), "c"), 2) == {1: 0, 2: 2, 4: 5}
    assert batching._seats({0: "a", 1: "b"}, {1: "c"}, 2) == {}
    assert batching._seats({}, {}, 2) == {}


def test_the_cache_has_the_prompts_that_wait_and_a_row_an_answer(monkeypatch, model):
    """Bytes of keys and values at any time: what `analysis/plan_generation.py` says."""
    seen, real = [], batching.refill

    def watched(cfg, how, state, waiting, source):
        state = real(cfg, how, state, waiting, source)
        seen.append(sum(leaf.size for part in (state, waiting) for leaf in jax.tree.leaves(part.cache[:2])))
        return state

    monkeypatch.setattr(batching, "refill", watched)
    answers(model, batch_size=6)
    place = 2 * CFG.layers * CFG.kv_heads * CFG.head_dim
    assert set(seen) == {(2 * width + 6 * (width + NEW)) * place for width in (32, 48)}


def test_seed_and_name_change_the_draws_and_not_greedy_answers(model):
    first = answers(model, PROMPTS[:1])
    for changed in (answers(model, PROMPTS[:1], seed=5), answers(model, PROMPTS[:1], names=["other"])):
        assert {c.text for c in changed.values()}.isdisjoint(c.text for c in first.values())
    greedy = answers(model, PROMPTS[:1], settings=GREEDY)
    assert len({completion.text for completion in greedy.values()}) == 1


def test_log_probability_is_the_sum_over_the_tokens(model):
    found = answers(model, PROMPTS[:1], 2)
    keys = batching._keys(jax.random.key(4), np.array([batching.zlib.crc32(b"0")], np.uint32), np.arange(2)[None])
    padded = jnp.asarray([PROMPTS[0] + [0] * 27], jnp.int32)
    made = sample(CFG, model.params, padded, jnp.asarray([5]), keys, settings=WARM, new_tokens=NEW, eos_ids=(7,))
    for number in range(2):
        count = int(made.counts[0, number])
        assert found[0, number].tokens == tuple(made.tokens[0, number, :count].tolist())
        assert found[0, number].logp == pytest.approx(float(np.sum(made.logp[0, number, :count])), abs=1e-4)


def test_no_program_is_compiled_once_the_widths_are_known(model):
    answers(model)
    before = [program._cache_size() for program in (begin, refill, advance)]
    answers(
        model,
        [[3] * 17, [4] * 31, [5] * 48, [6] * 2, [9] * 33],
        [[0, 1, 2], [5, 6, 7], [1, 8, 3], [2, 0, 1], [3, 4]],
        seed=9,
    )
    answers(model, stop=("ab",))
    assert [program._cache_size() for program in (begin, refill, advance)] == before
    answers(model, [[3] * 49])
    assert begin._cache_size() == before[0] + 1


def test_stop_strings_end_text_tokens_and_log_probability(model):
    free = answers(model, samples=1)
    long = next(completion for completion in free.values() if completion.finish == "length")
    stop = long.text[11:13]
    at = long.text.index(stop)
    cut = answers(model, samples=1, stop=("#", stop))
    seen = 0
    for key, completion in cut.items():
        whole = free[key]
        if stop not in whole.text:
            assert completion == whole
            continue
        seen += 1
        assert completion.text == whole.text[: whole.text.index(stop)]
        assert completion.tokens == whole.tokens[: len(completion.text)]
        assert completion.finish == "stop"
        assert completion.logp == 0 if not completion.tokens else whole.logp < completion.logp < 0
    assert seen
    assert at < NEW - 2


@pytest.fixture(scope="module")
def words():
    return synthetic.make_tokenizer()


def test_characters_of_several_tokens(words):
    """One token a byte: texts are cut between characters, a stop string may be one, and half a character is none."""
    text = "Grüße 日本\n\nnot this"
    ids = words(text)["input_ids"]
    logp = -np.arange(1, len(ids) + 1, dtype=np.float32)

    def cut(count, stop, finish=""):
        return batching._completion(words, ids[:count], logp[:count], finish, stop)

    kept = len("Grüße 日本".encode())
    assert cut(len(ids), ("this", "\n\n", "not")) == batching.Completion(
        "Grüße 日本", tuple(ids[:kept]), -kept * (kept + 1) / 2, "stop"
    )
    assert cut(len(ids), ("本",)).tokens == tuple(ids[: len("Grüße 日".encode())])
    for count in range(kept + 1):
        assert cut(count, ("本\n",)) is None  # goes on
    assert cut(3, ("ü",)) is None  # its first byte alone
    assert cut(4, ("ü",)).text == "Gr"
    assert cut(0, ("ü",), "stop") == batching.Completion("", (), 0.0, "stop")
    assert cut(5, (), "length").finish == "length"
    assert cut(len(ids), ("G",)) == batching.Completion("", (), 0.0, "stop")


def test_ends_are_the_models_and_the_templates(words):
    cfg = synthetic.config()
    assert end_ids(cfg, words) == (2,)
    template = words.chat_template
    try:
        words.chat_template = template.replace("<|im_end|>", "<|endoftext|>")
        assert end_ids(cfg, words) == (0, 2)
        words.chat_template = template.replace("<|im_end|>", " over.")  # no token of its own
        assert end_ids(cfg, words) == (2,)
        words.chat_template = "{{ raise_exception('never') }}"
        assert end_ids(cfg, words) == (2,)
        words.chat_template = None
        assert end_ids(models.ModelConfig(**{**vars(cfg), "eos_ids": (5,)}), words) == (2, 5)
    finally:
        words.chat_template = template
    assert end_ids(CFG, LETTERS) == (7,)


def test_complete_takes_texts_and_messages(model):
    prompts = ["hello", [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]]
    made = complete(CFG, model.params, LETTERS, prompts, 9)
    for text, prompt in zip(made, ["hello", "abcz"], strict=True):
        ids = LETTERS(prompt)["input_ids"]
        padded, key = jnp.asarray([ids], jnp.int32), jax.random.split(jax.random.key(0), (1, 1))
        options = {"settings": GREEDY, "new_tokens": 9, "eos_ids": (7,)}
        want = sample(CFG, model.params, padded, jnp.asarray([len(ids)]), key, **options)
        assert text == LETTERS.decode(want.tokens[0, 0, : int(want.counts[0, 0])].tolist(), skip_special_tokens=True)
    assert complete(CFG, model.params, LETTERS, [], 9) == []


def test_meshes_with_a_real_tokenizer(words):
    """`rollouts` on eight devices; `complete`, which goes to one, whatever mesh the parameters and the caller have."""
    cfg, rules = synthetic.config(), make_rules(Mesh("fsdp"))
    cfg = models.ModelConfig(**{**vars(cfg), "layers": 2})
    whole = models.init_params(cfg, jax.random.key(0))
    split = models.init_params(cfg, jax.random.key(0), rules)
    prompts = ["The capital", [{"role": "user", "content": "Who are you?"}]]
    want = complete(cfg, whole, words, prompts, 3)
    assert all(isinstance(text, str) for text in want)
    with jax.set_mesh(rules.mesh):
        assert complete(cfg, split, words, prompts, 3) == want
    ids = [encode(words, prompt) for prompt in prompts]
    ids += [[at, 5, 9 + at] for at in range(10)]  # more than rows: some begin late, each on its device
    one, many = (
        {
            (index, number): completion
            for index, number, completion in rollouts(
                model, ids, 2, WARM, new_tokens=8, batch_size=size, stop=("zz",), seed=1
            )
        }
        for model, size in ((speaker(cfg, whole, words), 4), (speaker(cfg, split, words, rules=rules), 16))
    )
    same(one, many)
    assert len(one) == 24


def test_widths():
    assert [batching.padded_width(length) for length in (1, 32, 33, 48, 49, 64, 65, 97, 128, 129, 193, 1537)] == [
        32, 32, 48, 48, 64, 64, 96, 128, 128, 192, 256, 2048,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("counts", "batch_size", "each"),
    [
        ([8] * 100 + [3], 16, 8),  # a run that was broken off in the middle of a prompt
        ([1] * 14 + [2], 16, 1),  # on-policy: hardly any prompt twice
        ([64], 16, 16),
        ([12] * 5, 8, 6),  # two readings of 6 and not 8 + 4
        ([0, 0], 8, 1),
        ([], 8, 1),
    ],
)
def test_samples_that_share_a_reading(counts, batch_size, each):
    assert batching.samples_at_once(counts, batch_size) == each


def test_prompt_without_tokens_is_an_error(model):
    with pytest.raises(ValueError, match=r"prompts\[1\] must have at least one token, got none. Add some text"):
        list(rollouts(model, [[1], []], 1, GREEDY, new_tokens=NEW))


def test_prompt_without_room_is_an_error(model):
    message = (
        r"prompts\[0\] must leave room .* got 80 tokens \+ 20 new ones; the model's context is 96. Shorten the prompt"
    )
    with pytest.raises(ValueError, match=message):
        list(rollouts(model, [[1] * 80], 1, GREEDY, new_tokens=NEW))
    assert not list(rollouts(model, [], 1, GREEDY, new_tokens=NEW))
