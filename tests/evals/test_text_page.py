"""Token pieces of real tokenizers, and the rows of the entropy page."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.evals.text_page import entropy_page, pieces
from kdjax.models import synthetic

TEXT = "Côte d'Ivoire — 日本語 😀👩‍👩‍👧\n  two  spaces\t<script>alert(1)</script>"


@pytest.fixture(scope="module")
def byte_level():
    return synthetic.make_tokenizer()


@pytest.fixture(scope="module")
def trained():
    """Byte-level BPE whose merges put parts of characters together, as real vocabularies do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    inner.train_from_iterator([TEXT, "the cat and the dog", "日本 日語 😀😁"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


@pytest.fixture(scope="module")
def metaspace():
    """Leading-space markers: alone, a token loses its blank."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: at for at, word in enumerate(["<unk>", "▁the", "▁cat", "s", "▁"])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.mark.parametrize("name", ["byte_level", "trained"])
def test_pieces_join_to_the_text(name, request):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer(TEXT)["input_ids"]
    made = pieces(ids, tokenizer)
    assert len(made) == len(ids)
    assert "".join(made) == TEXT
    assert "�" not in "".join(made)
    assert "" in made, "a part of a character is nobody's text"


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=30))
def test_pieces_of_any_text(text):
    tokenizer = synthetic.make_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert "".join(pieces(ids, tokenizer)) == tokenizer.decode(ids, skip_special_tokens=False)


def test_byte_tokens_belong_to_the_last_byte_of_their_character(byte_level):
    ids = byte_level("aé日b")["input_ids"]
    assert pieces(ids, byte_level) == ["a", "", "é", "", "", "日", "b"]


def test_row_cut_within_a_character(byte_level):
    ids = byte_level("a日")["input_ids"][:3]
    made = pieces(ids, byte_level)
    assert "".join(made) == byte_level.decode(ids)
    assert made[0] == "a"
    assert set("".join(made[1:])) == {"�"}


def test_leading_space_markers(metaspace):
    assert pieces([1, 2, 3, 1, 2], metaspace) == ["the", " cat", "s", " the", " cat"]


def test_special_tokens_are_shown(byte_level):
    assert pieces([0, *byte_level("hi")["input_ids"], 2], byte_level) == ["<|endoftext|>", "h", "i", "<|im_end|>"]


def test_figures_belong_to_the_predicted_token(byte_level):
    tokens = np.array([*byte_level("abcdef")["input_ids"], 0, 0])
    entropy = np.array([1.0, 3.0, 2.0, 3.0, 9.0, 9.0, 9.0, 9.0])
    nll = entropy / 2
    eligible = np.array([False, True, True, True, True, False, False, False])
    page = entropy_page(tokens, entropy, nll, eligible, np.array([3, 2]), byte_level, length=6)
    assert [entry["token"] for entry in page] == list("abcdef")
    assert [entry["eligible"] for entry in page] == [False, False, True, True, True, True]
    assert page[1]["entropy"] is None
    assert page[2] == {"token": "c", "entropy": 3.0, "nll": 1.5, "rank": 2, "selected": False, "eligible": True}
    assert [entry["rank"] for entry in page] == [None, None, 2, 4, 3, 1], "ties: the earlier position first"
    assert [entry["token"] for entry in page if entry["selected"]] == ["d", "e"]
    mask = np.isin(np.arange(8), [2, 3])
    assert entropy_page(tokens, entropy, nll, eligible, mask, byte_level, length=6) == page


def test_nothing_selected(byte_level):
    tokens = np.array(byte_level("abc")["input_ids"])
    page = entropy_page(tokens, np.ones(3), np.ones(3), np.ones(3, bool), np.array([]), byte_level)
    assert [entry["selected"] for entry in page] == [False] * 3
    assert [entry["eligible"] for entry in page] == [False, True, True]
