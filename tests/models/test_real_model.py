"""SmolLM2-135M-Instruct, dequantised from Q4_1: read bit for bit, tokenised, asked a question, compared with torch.

Skipped where the file is not in the cache ($KDJAX_CACHE or ~/.cache/kdjax): nothing is downloaded here.
"""

import functools
import pathlib
import shutil

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import models
from kdjax.models import fetch, gguf_io, hf_io, io, tokenizer

pytestmark = pytest.mark.real_model
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TOLERANCE = 2e-4  # largest |difference| of logits whose scale is 35


@pytest.fixture(scope="module")
def file():
    path = fetch.cache_dir() / pathlib.Path(fetch.SMOLLM2_MEMBER).name
    if not path.is_file():
        pytest.skip(f"{path.name} is not in the model cache; fetch it with kdjax.models.fetch.smollm2()")
    return gguf_io.open_gguf(path)


@pytest.fixture(scope="module")
def loaded(file):
    return io.load_model("smollm2-135m")


@pytest.fixture(scope="module")
def words(file):
    return tokenizer.load_tokenizer("smollm2-135m")


def logits_of(cfg, params, hidden):
    head = models.head(cfg, params)
    return np.asarray(jnp.einsum("td,vd->tv", hidden, head.weight, precision="highest"))


def test_what_it_is(loaded):
    assert loaded.name == "smollm2-135m"
    assert loaded.source == "SmolLM2-135M-Instruct, dequantised from Q4_1"
    assert loaded.fingerprint == fetch.SMOLLM2_SHA256
    assert sum(leaf.size for leaf in jax.tree.leaves(loaded.params)) == 134_515_008
    assert loaded.cfg == models.ModelConfig(
        family="llama", vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, mlp=1536,
        rope_theta=1e5, norm_eps=1e-5, tied=True, max_positions=8192, bos_id=1, eos_ids=(2,), pad_id=2,
    )  # fmt: skip


def test_every_tensor_equals_the_reference_package_bit_for_bit(file):
    theirs = gguf.GGUFReader(file.path).tensors
    assert {tensor.name for tensor in theirs} == set(file.tensors)
    for tensor in theirs:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(gguf_io.read_tensor(file, tensor.name).view(np.uint32), expected.view(np.uint32))


def test_tokenizer_from_metadata_alone(words):
    pieces = words.convert_ids_to_tokens(words("Hello world, it's 2024!\n").input_ids)
    assert pieces == ["Hello", "Ġworld", ",", "Ġit", "'s", "Ġ", "2", "0", "2", "4", "!", "Ċ"]
    text = "Grüße, 日本語 🙂  two  spaces\r\n\tend"
    assert words.decode(words(text).input_ids) == text
    assert (words.bos_token, words.eos_token, words.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    prompt = words.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    assert words(prompt).input_ids[0] == 1
    assert len(words) == 49152


def test_greedy_answer_names_paris(loaded, words):
    cfg = loaded.cfg
    ids = words(words.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)).input_ids
    step = jax.jit(functools.partial(models.hidden_cached, cfg))
    cache = models.init_cache(cfg, 1, len(ids) + 12, jnp.float32)
    new, answer, start = ids, [], 0
    for _ in range(10):
        positions = jnp.arange(start, start + len(new), dtype=jnp.int32)[None]
        hidden, cache = step(loaded.params, jnp.asarray([new], jnp.int32), positions, cache)
        start += len(new)
        new = [int(np.argmax(logits_of(cfg, loaded.params, hidden[0, -1:])))]
        if new[0] in cfg.eos_ids:
            break
        answer += new
    assert words.decode(answer) == "The capital of France is Paris."


def test_logits_equal_torch_on_our_own_export(loaded, words, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is the oracle; pip install torch==2.13.0")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "In 1889 the Eiffel Tower was built in Paris; it's 330 m tall."
    out = hf_io.save_hf(tmp_path / "export", loaded.cfg, loaded.params, words)
    ids = AutoTokenizer.from_pretrained(out)(text).input_ids
    assert ids == words(text).input_ids
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out).eval()(torch.tensor([ids])).logits[0].numpy()
    shutil.rmtree(out)  # 538 MB, which pytest would keep
    tokens = jnp.asarray([ids], jnp.int32)
    positions = jnp.arange(len(ids), dtype=jnp.int32)[None]
    hidden = models.hidden(loaded.cfg, loaded.params, tokens, jnp.ones_like(tokens), positions)
    ours = logits_of(loaded.cfg, loaded.params, hidden[0])
    assert np.max(np.abs(theirs)) > 10
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))
    assert np.max(np.abs(ours - theirs)) <= TOLERANCE
