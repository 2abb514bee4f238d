"""The whole way from `data` settings to train and held-out rows: split, counts, notes, identity, errors."""

import dataclasses
import json

import numpy as np
import pytest

from kdjax.config import Data
from kdjax.data import SOURCES, ids_in, load_data, make_rows, take
from kdjax.data.encode import Encoded
from kdjax.data.load import _fingerprint, split
from kdjax.data.packing import eligible

COLUMNS = ("tokens", "segment_ids", "positions", "loss_mask", "row_id", "weight", "row_hash")


@pytest.fixture
def corpus(tmp_path):
    """40 documents of 1 to 40 letters, each of one letter pair of its own."""
    texts = [chr(65 + i % 26) * (i % 7) + chr(97 + i // 2) * (i + 1 - i % 7) for i in range(40)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Data(path=str(path), seq_len=16, heldout_fraction=0.25), texts


def texts_of(rows, tokenizer) -> list[str]:
    stream = tokenizer.decode(rows.tokens[rows.segment_ids > 0])
    return stream.split("<|endoftext|>")[:-1]


def same(a, b) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in COLUMNS)


@pytest.mark.parametrize("packing", ["pack", "row"])
def test_every_document_is_in_exactly_one_part_and_whole(corpus, tokenizer, packing):
    data, texts = corpus
    loaded = load_data(dataclasses.replace(data, packing=packing), tokenizer)
    train, heldout = (texts_of(rows, tokenizer) for rows in (loaded.train, loaded.heldout))
    assert (len(train), len(heldout)) == (30, 10)
    assert sorted(train + heldout) == sorted(texts)


def test_summary_counts_what_the_rows_hold(corpus, tokenizer):
    data, _ = corpus
    loaded = load_data(data, tokenizer)
    for part, rows in (("train", loaded.train), ("heldout", loaded.heldout)):
        counts, texts = loaded.summary[part], texts_of(rows, tokenizer)
        tokens = sum(len(text) + 1 for text in texts)
        assert counts["documents"] == len(texts)
        assert counts["tokens"] == tokens
        assert counts["targets"] == eligible(rows).sum()
        assert counts["rows"] == len(rows) == -(-tokens // 16)
        assert counts["longest_document"] == max(map(len, texts)) + 1
        ends = np.cumsum([len(text) + 1 for text in texts])
        assert counts["splits"] == sum(border not in ends for border in range(16, tokens, 16))
    json.dumps(loaded.summary)


def test_split_depends_on_seed_and_ids_only(corpus, tokenizer):
    data, _ = corpus
    first, again, other = (load_data(dataclasses.replace(data, seed=seed), tokenizer) for seed in (0, 0, 1))
    assert same(first.train, again.train)
    assert same(first.heldout, again.heldout)
    assert first.fingerprint == again.fingerprint
    assert texts_of(first.heldout, tokenizer) != texts_of(other.heldout, tokenizer)
    assert first.fingerprint != other.fingerprint


def test_split_does_not_depend_on_the_order_of_documents_nor_on_seq_len():
    documents = [Encoded(f"d{i}", np.zeros(2, np.int32), np.ones(2, bool)) for i in range(40)]
    heldout, train = split(documents, Data(heldout_fraction=0.07))
    assert len(heldout) == 3  # round(2.8)
    assert {d.id for d in heldout} | {d.id for d in train} == {d.id for d in documents}
    assert [d.id for d in split(documents[::-1], Data(heldout_fraction=0.07, seq_len=9))[0]] == [d.id for d in heldout]
    # A larger part holds the smaller one, so figures at several fractions are comparable.
    assert {d.id for d in heldout} < {d.id for d in split(documents, Data(heldout_fraction=0.5))[0]}
    ordered = [d.id for d in heldout + train]
    assert ordered != [d.id for d in documents]  # no part is just the first files


@pytest.mark.parametrize(("fraction", "count", "heldout"), [(0.001, 5, 1), (0.999, 5, 4), (0.5, 2, 1)])
def test_both_parts_keep_a_document(fraction, count, heldout):
    documents = [Encoded(f"d{i}", np.zeros(2, np.int32), np.ones(2, bool)) for i in range(count)]
    assert len(split(documents, Data(heldout_fraction=fraction))[0]) == heldout


def test_max_train_tokens_keeps_whole_rows_and_leaves_the_heldout_part(corpus, tokenizer):
    data, _ = corpus
    whole = load_data(data, tokenizer)
    for limit, rows in ((16, 1), (47, 2), (48, 3), (10**6, len(whole.train))):
        part = load_data(dataclasses.replace(data, max_train_tokens=limit), tokenizer)
        assert len(part.train) == part.summary["train"]["rows"] == rows
        np.testing.assert_array_equal(part.train.row_hash, whole.train.row_hash[:rows])
        np.testing.assert_array_equal(part.heldout.row_hash, whole.heldout.row_hash)
        assert part.summary["train"]["documents"] == part.train.begins.sum()
        assert (part.fingerprint == whole.fingerprint) == (limit == 10**6)
    with pytest.raises(ValueError, match=r"data\.max_train_tokens must be 0 .* at least the 16 tokens .* got 15"):
        load_data(dataclasses.replace(data, max_train_tokens=15), tokenizer)


def test_chats_are_masked_through_the_whole_way(tmp_path, tokenizer):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "response": f"answer {i}"}) + "\n" for i in range(20)))
    for packing in ("pack", "row"):
        loaded = load_data(Data(path=str(path), seq_len=64, packing=packing), tokenizer)
        for rows in (loaded.train, loaded.heldout):
            per_row = [tokenizer.decode(row[mask]) for row, mask in zip(rows.tokens, rows.loss_mask, strict=True)]
            answers = [text + "<|im_end|>" for text in "".join(per_row).split("<|im_end|>")[:-1]]
            assert len(answers) == int(rows.begins.sum())
            assert all(answer.startswith("answer ") for answer in answers)
            if packing == "row":
                assert per_row == answers
    loose = load_data(Data(path=str(path), seq_len=64, chat_template=False), tokenizer)
    assert tokenizer.decode(loose.train.tokens[0]).startswith("q")


def test_notes_tell_what_a_user_should_know(tmp_path, tokenizer):
    for name, text in {"a": "same text", "b": "same text", "c": " ", "d": "long " * 20}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "LICENSE").write_text("free")
    found = {}
    for seed in range(8):
        data = Data(path=str(tmp_path), seq_len=16, heldout_fraction=0.34, packing="row", seed=seed)
        for note in load_data(data, tokenizer).summary["notes"]:
            found[note.split(" ", 1)[1][:24]] = note
    notes = "\n".join(found.values())
    assert "1 files that are neither .txt nor .jsonl were left out: LICENSE" in notes
    assert "1 blank documents were left out" in notes
    assert "targets, fewer than 1000: its figures are noisy. Raise data.heldout_fraction." in notes
    assert "1 held-out documents are also in the train part, word for word" in notes
    assert "documents longer than data.seq_len=16 go on in another row without their context: 6 times" in notes


def test_rows_without_targets_are_noted(tmp_path, tokenizer):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"prompt": "long " * 20 + str(i), "response": "yes"}) + "\n" for i in range(9)))
    loaded = load_data(Data(path=str(path), seq_len=32), tokenizer)
    idle = sum(loaded.summary[part]["rows_without_targets"] for part in ("train", "heldout"))
    assert idle == sum(int((eligible(rows).sum(1) == 0).sum()) for rows in (loaded.train, loaded.heldout)) > 9
    assert (
        f"{idle} rows have no target (a prompt, or the end of a document, alone): raise data.seq_len"
        in loaded.summary["notes"]
    )


def test_data_too_small_to_split_or_to_learn_from_is_an_error(tmp_path, tokenizer):
    def load(name: str, *texts: str, **settings):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return load_data(Data(path=str(path), **settings), tokenizer)

    with pytest.raises(
        ValueError, match=r"data\.path must hold at least 2 documents, got 1 in '.*one\.jsonl' \(one\.jsonl#1\)"
    ):
        load("one.jsonl", "only")
    with pytest.raises(
        ValueError, match=r"data\.path must hold tokens, got '.*blank\.jsonl' with 2 documents, all of them blank"
    ):
        load("blank.jsonl", " ", "\n")
    with pytest.raises(ValueError, match=r"must hold targets in its train part, got '.*short\.jsonl' with 2 tokens"):
        load("short.jsonl", "a", "b")


def test_fingerprint_sees_one_changed_letter(tmp_path, tokenizer):
    def fingerprint(letter: str) -> str:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps({"text": f"text number {i} {letter}"}) + "\n" for i in range(4)))
        return load_data(Data(path=str(path)), tokenizer).fingerprint

    assert fingerprint("x") == fingerprint("x") != fingerprint("y")
    assert len(fingerprint("x")) == 64


def test_fingerprint_sees_where_the_heldout_part_begins():
    documents = [Encoded(f"d{i}", np.full(4, i, np.int32), np.ones(4, bool)) for i in range(3)]
    rows = make_rows(documents, 4)
    parts = [(take(rows, slice(0, at)), take(rows, slice(at, 3))) for at in (1, 2)]
    assert _fingerprint(*parts[0]) != _fingerprint(*parts[1])


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_every_source_loads(name, tokenizer):
    loaded = load_data(Data(path=name, seq_len=256, max_train_tokens=50_000), tokenizer)
    assert 49_000 < loaded.summary["train"]["tokens"] <= 50_000
    assert loaded.summary["heldout"]["targets"] > 1000
    assert ids_in(loaded.train).max() < len(tokenizer)


def test_packing_half_a_million_tokens_is_quick():
    import time

    lengths = np.random.default_rng(0).integers(1, 8000, 140)
    documents = [Encoded(str(i), np.ones(n, np.int32), np.ones(n, bool)) for i, n in enumerate(lengths)]
    start = time.process_time()
    rows = make_rows(documents, 128)
    assert time.process_time() - start < 1.0
    assert (rows.segment_ids > 0).sum() == lengths.sum() > 500_000
