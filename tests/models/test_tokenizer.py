"""Tokenizers out of GGUF metadata against independent ones, saved and loaded again, compared, and the synthetic one."""

import itertools
import json

import gguf
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import GPT2Tokenizer, Qwen2Tokenizer

from kdjax import models
from kdjax.models import hf_io, synthetic, tokenizer

TEXTS = [
    "Hello world, it's 2024! I'll pay 12345 dollars.",
    "  two  spaces,\ttabs\nand\r\nlines\n\n\n end ",
    "Grüße, déjà-vu, 日本語 и русский, emoji 🙂👍🏽, e\u0301",
    "def f(x_1):\n    return x_1**2 # don't, can't, WE'RE\n",
    "<|im_start|>user\nHi<|im_end|> and <think>hm</think>",
    "",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def train():
    """A byte-level BPE of a few hundred merges, as lists."""
    inner = Tokenizer(tokenizer_models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS * 3, trainer)
    vocab = inner.get_vocab()
    return sorted(vocab, key=vocab.get), [tuple(pair) for pair in json.loads(inner.to_str())["model"]["merges"]]


TOKENS, MERGES = train()


def write(path, tokens=TOKENS, merges=MERGES, kinds=None, **settings):
    """A GGUF file with nothing but a tokenizer."""
    writer = gguf.GGUFWriter(str(path), "llama")
    kinds = kinds or [3 if token in SPECIAL else 1 for token in tokens]
    found = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if merges is not None:
        found["merges"] = [f"{a} {b}" for a, b in merges]
    for key, value in (found | settings).items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}[
            type(value)
        ]
        add("tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path):
    return tokenizer.load_tokenizer(path)


@pytest.mark.parametrize(("pre", "oracle"), [("gpt-2", GPT2Tokenizer), ("qwen2", Qwen2Tokenizer)])
def test_byte_level_bpe_equals_the_class_of_transformers(tmp_path, pre, oracle):
    ours = load(write(tmp_path / "t.gguf", pre=pre))
    theirs = oracle(vocab={token: i for i, token in enumerate(TOKENS)}, merges=MERGES)
    theirs.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    for text in TEXTS:
        assert ours(text, add_special_tokens=False).input_ids == theirs(text, add_special_tokens=False).input_ids
        assert pre == "qwen2" or ours.decode(ours(text).input_ids) == text  # Qwen2 normalises e + accent


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'ll", "Ġpay", "Ġ12345", "Ġdollars", "ĊĊĠ", "Ġnow", "!?"]),
        ("smollm", ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4", "5", "Ġdollars", "ĊĊĠ", "Ġnow", "!?"]),
        ("qwen2", ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4", "5", "Ġdollars", "ĊĊ", "Ġ", "Ġnow", "!?"]),
        ("llama-bpe", ["I", "'ll", "Ġpay", "Ġ", "123", "45", "Ġdollars", "ĊĊ", "Ġ", "Ġnow", "!?"]),
    ],
)
def test_text_is_split_as_each_kind_does(tmp_path, pre, pieces):
    inner = load(write(tmp_path / "t.gguf", pre=pre)).backend_tokenizer
    found = [piece for piece, _ in inner.pre_tokenizer.pre_tokenize_str("I'll pay 12345 dollars\n\n  now!?")]
    assert found == pieces


def test_special_and_user_defined_tokens_stay_whole_and_padding_rows_go(tmp_path):
    tokens = [*TOKENS, "<think>", "[PAD401]", "[PAD402]"]
    kinds = [3 if token in SPECIAL else 1 for token in TOKENS] + [4, 5, 5]
    found = load(write(tmp_path / "t.gguf", tokens, kinds=kinds))
    ids = found("<|im_start|>a<think>").input_ids
    assert ids == [1, TOKENS.index("a"), len(TOKENS)]
    assert found.decode(ids, skip_special_tokens=True) == "a<think>"
    assert len(found) == len(TOKENS) + 1
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, 2, 2)


@pytest.mark.parametrize(
    ("settings", "leading"),
    [
        ({"pre": "smollm"}, []),
        ({"pre": "llama-bpe"}, [1]),
        ({"pre": "llama-bpe", "add_bos_token": False}, []),
        ({"add_bos_token": True}, [1]),
    ],
)
def test_a_leading_bos_comes_when_the_file_says_so(tmp_path, settings, leading):
    found = load(write(tmp_path / "t.gguf", **settings))
    assert found("a").input_ids == [*leading, TOKENS.index("a")]
    assert found("a", add_special_tokens=False).input_ids == [TOKENS.index("a")]


def test_chat_template_of_the_file_is_used(tmp_path):
    found = load(
        write(
            tmp_path / "t.gguf",
            chat_template="{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}",
        )
    )
    assert found.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "user: Hi"


def greedy_pieces(text, scores):
    """SentencePiece BPE by definition: join the neighbours whose union scores best, leftmost first, while any does."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [(scores.get(a + b, -np.inf), -i) for i, (a, b) in enumerate(itertools.pairwise(pieces))]
        if not joined or max(joined)[0] == -np.inf:
            return pieces
        at = -max(joined)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def test_sentencepiece_bpe_merges_by_score_and_falls_back_to_bytes(tmp_path):
    rng = np.random.default_rng(0)
    letters = "▁abcde"
    pieces = sorted({"".join(rng.choice(list(letters), rng.integers(2, 6))) for _ in range(400)})
    rng.shuffle(pieces)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) + len(letters))
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [-1e6] * len(letters)
    found = load(
        write(tmp_path / "t.gguf", tokens, None, kinds, model="llama", pre="default", scores=scores, unknown_token_id=0)
    )
    ranked = {piece: -i for i, piece in enumerate(pieces)}
    for _ in range(200):
        text = "".join(rng.choice(list(letters[1:] + " "), 20)).replace("▁", " ")
        ids = found(text).input_ids
        assert ids[0] == 1
        assert [tokens[i] for i in ids[1:]] == greedy_pieces(text, ranked)
        assert found.decode(ids, skip_special_tokens=True) == text
    ids = found("aé", add_special_tokens=False).input_ids
    assert [tokens[i] for i in ids[-2:]] == ["<0xC3>", "<0xA9>"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, r"must hold a tokenizer of the model gpt2 or llama, got 't5'.*Set data\.tokenizer"),
        ({"pre": "tekken"}, r"must hold merges and one of the pre-tokenizers gpt-2, smollm, .*got 'tekken'"),
        ({"merges": None}, r"must hold merges"),
        ({"merges": [("no", "such")]}, r"must hold a consistent tokenizer, got a damaged one"),
        ({"tokens": [*TOKENS[:-1], TOKENS[0]]}, r"must hold each token once"),
        ({"kinds": [1, 1]}, r"must hold each token once, got a damaged tokenizer"),
        ({"model": "llama", "scores": [0.5]}, r"must hold a score for each token"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_names_the_file(tmp_path, changes, message):
    path = write(tmp_path / "odd.gguf", **changes)
    with pytest.raises(ValueError, match=rf"odd\.gguf {message}"):
        load(path)


def save(path, family, found):
    cfg = models.ModelConfig(
        family,
        vocab_size=len(found),
        width=8,
        layers=1,
        heads=2,
        kv_heads=1,
        head_dim=4,
        mlp=8,
        attention_bias=family == "qwen2",
    )
    params = jax.tree.map(lambda spec: np.zeros(spec.shape, np.float32), models.param_specs(cfg))
    return hf_io.save_hf(path, cfg, params, found)


@pytest.mark.parametrize(
    ("family", "pre"),
    [("llama", "smollm"), ("llama", "llama-bpe"), ("qwen2", "qwen2"), ("qwen3", "qwen2"), ("llama", "")],
)
def test_a_saved_tokenizer_comes_back_the_same(tmp_path, family, pre):
    first = (
        load(write(tmp_path / "t.gguf", pre=pre, chat_template="{{ messages[0]['content'] }}"))
        if pre
        else load("synthetic")
    )
    second = load(save(tmp_path / "out", family, first))
    for text in TEXTS:
        assert first(text).input_ids == second(text).input_ids
    assert tokenizer.token_ids(first) == tokenizer.token_ids(second)
    assert first.chat_template == second.chat_template
    assert [first.bos_token, first.eos_token, first.pad_token] == [second.bos_token, second.eos_token, second.pad_token]
    assert tokenizer.fingerprint(first) == tokenizer.fingerprint(second)


def test_a_directory_without_or_with_a_damaged_tokenizer(tmp_path):
    out = save(tmp_path / "out", "llama", load("synthetic"))
    (out / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match=r"data\.tokenizer must be a model with a readable tokenizer, got '.*out'"):
        load(out)
    (out / "tokenizer.json").unlink()
    with pytest.raises(
        ValueError,
        match=r"data\.tokenizer must be a model with a tokenizer, got '.*out', which holds none of tokenizer\.json",
    ):
        load(out)


def test_fingerprint_tells_tokenizers_apart(tmp_path):
    swapped = [*TOKENS[:-2], TOKENS[-1], TOKENS[-2]]
    variants = [
        {},
        {"tokens": swapped},
        {"merges": [MERGES[1], MERGES[0], *MERGES[2:]]},
        {"kinds": [1 if token == SPECIAL[0] or token not in SPECIAL else 3 for token in TOKENS]},
        {"pre": "smollm"},
        {"pre": "qwen2"},
    ]
    found = [tokenizer.fingerprint(load(write(tmp_path / f"{i}.gguf", **change))) for i, change in enumerate(variants)]
    assert len(set(found)) == len(variants)
    assert tokenizer.fingerprint(load(write(tmp_path / "again.gguf"))) == found[0]


def test_same_tokenizer_with_other_widths_is_fine(tmp_path):
    teacher = load(write(tmp_path / "a.gguf"))
    wider = load(write(tmp_path / "b.gguf", [*TOKENS, "<extra>"], kinds=[1] * len(TOKENS) + [4]))
    tokenizer.check_same_tokenizer(teacher, teacher, 512, 448)
    tokenizer.check_same_tokenizer(teacher, wider, len(TOKENS), 512)


def test_other_tokenizers_are_refused_with_the_tokens_that_differ(tmp_path):
    teacher = load(write(tmp_path / "a.gguf"))
    moved = [*TOKENS[:10], *TOKENS[20:], *TOKENS[10:20]]
    with pytest.raises(ValueError, match=r"student\.path must have the teacher's tokenizer, got another: ") as caught:
        tokenizer.check_same_tokenizer(teacher, load(write(tmp_path / "b.gguf", moved)), 512, 512)
    message = str(caught.value)
    assert f"{TOKENS[10]!r} (10 and {len(TOKENS) - 10})" in message
    assert message.count(" and ") == 7  # five tokens, the rest, "ids of teacher and student"
    assert f" and {len(TOKENS) - 10 - 5} more" in message
    with pytest.raises(ValueError, match=r"'<extra>' \(\d+ and absent\) \(ids of"):
        tokenizer.check_same_tokenizer(
            load(write(tmp_path / "c.gguf", [*TOKENS, "<extra>"], kinds=[1] * len(TOKENS) + [4])), teacher, 512, 512
        )


def test_ids_without_an_embedding_row_are_refused(tmp_path):
    teacher = load(write(tmp_path / "a.gguf"))
    with pytest.raises(ValueError, match=rf"got 512 and {len(TOKENS) - 7} rows: none for .* and 2 more\. Set"):
        tokenizer.check_same_tokenizer(teacher, teacher, 512, len(TOKENS) - 7)


def test_a_token_for_padding_alone_is_not_emitted(tmp_path):
    kinds = [3 if token in SPECIAL else 1 for token in TOKENS] + [3]
    padded = load(write(tmp_path / "p.gguf", [*TOKENS, "<pad>"], kinds=kinds, padding_token_id=len(TOKENS)))
    assert set(tokenizer.token_ids(padded)) - set(tokenizer.emit_ids(padded)) == {"<pad>"}
    tokenizer.check_same_tokenizer(padded, load(write(tmp_path / "a.gguf")), len(TOKENS), len(TOKENS))
    plain = load(write(tmp_path / "b.gguf"))
    assert plain.pad_token == plain.eos_token
    assert tokenizer.emit_ids(plain) == tokenizer.token_ids(plain)


SYNTHETIC = synthetic.make_tokenizer()


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_synthetic_tokenizer_is_one_token_per_byte_and_loses_nothing(text):
    plain = text.replace("<|", "<")
    ids = SYNTHETIC(plain).input_ids
    assert len(ids) == len(plain.encode("utf-8", "surrogatepass"))
    assert SYNTHETIC.decode(ids) == plain
    assert all(3 <= i < 259 for i in ids)


def test_synthetic_tokenizer_fits_its_model_and_speaks_chatml():
    assert max(tokenizer.token_ids(SYNTHETIC).values()) == 258 < synthetic.config().vocab_size
    text = SYNTHETIC.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = SYNTHETIC(text).input_ids
    assert (ids[0], ids.count(1), ids.count(2)) == (SYNTHETIC.bos_token_id, 2, 1)
    cfg = synthetic.config()
    assert (cfg.bos_id, cfg.eos_ids, cfg.pad_id) == (
        SYNTHETIC.bos_token_id,
        (SYNTHETIC.eos_token_id,),
        SYNTHETIC.pad_token_id,
    )
