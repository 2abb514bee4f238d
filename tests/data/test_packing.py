"""Rows: every token once and in order, segments that never mix documents, targets that never cross them."""

import dataclasses
import hashlib
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.data import PACKINGS, ids_in, make_rows, take
from kdjax.data.encode import Encoded
from kdjax.data.packing import eligible, hash_rows, splits
from kdjax.types import Batch, targets_of

EOD = 999


def document(at: int, length: int) -> Encoded:
    """Tokens that tell document and place: 1000 * (at + 1) + place, then the separator."""
    tokens = np.arange(length, dtype=np.int32) + 1000 * (at + 1)
    tokens[-1] = EOD
    return Encoded(f"d{at}", tokens, np.array([0 < i < length - 1 for i in range(length)], bool))


def rows_by_hand(documents: list[Encoded], seq_len: int, packing: str) -> list[list[tuple]]:
    """The specification, token by token: rows of (document, token, segment, position, mask, place in the document)."""
    rows: list[list[tuple]] = []
    for at, d in enumerate(documents):
        for place in range(len(d.tokens)):
            if not rows or len(rows[-1]) == seq_len or (packing == "row" and place == 0):
                rows.append([])
            row = rows[-1]
            same = bool(row) and row[-1][0] == at
            segment = (row[-1][2] + (not same)) if row else 1
            row.append(
                (at, int(d.tokens[place]), segment, row[-1][3] + 1 if same else 0, bool(d.loss_mask[place]), place)
            )
    return rows


@pytest.mark.parametrize("packing", sorted(PACKINGS))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 23), min_size=1, max_size=12), seq_len=st.integers(2, 9))
def test_rows_are_those_of_the_specification(packing, lengths, seq_len):
    documents = [document(at, length) for at, length in enumerate(lengths)]
    made = make_rows(documents, seq_len, packing)
    want = rows_by_hand(documents, seq_len, packing)
    assert made.tokens.shape == (len(want), seq_len)
    for r, row in enumerate(want):
        n = len(row)
        _, tokens, segments, positions, mask, _ = (list(column) for column in zip(*row, strict=True))
        assert made.tokens[r, :n].tolist() == tokens
        assert made.segment_ids[r].tolist() == segments + [0] * (seq_len - n)
        assert made.positions[r].tolist() == positions + [0] * (seq_len - n)
        assert made.loss_mask[r].tolist() == mask + [False] * (seq_len - n)
        assert made.begins[r] == sum(place == 0 for *_, place in row)
    # Every token of every document, once and in order.
    stream = made.tokens[made.segment_ids > 0]
    np.testing.assert_array_equal(stream, np.concatenate([d.tokens for d in documents]))
    assert int(made.begins.sum()) == len(documents)
    crossed = sum(a[-1][0] == b[0][0] for a, b in itertools.pairwise(want))
    assert splits(made) == crossed
    if packing == "pack":
        assert len(want) == -(-sum(lengths) // seq_len)
        assert (made.segment_ids[:-1] > 0).all()


@pytest.mark.parametrize("packing", sorted(PACKINGS))
def test_targets_are_those_of_the_contract_and_never_cross_documents(packing):
    documents = [document(at, length) for at, length in enumerate((5, 1, 2, 17, 3, 9))]
    made = make_rows(documents, 6, packing)
    zeros = jnp.zeros(len(made))
    columns = [jnp.asarray(getattr(made, name)) for name in ("tokens", "segment_ids", "positions", "loss_mask")]
    labels, mask = (np.asarray(x) for x in targets_of(Batch(*columns, row_id=zeros, epoch=zeros, weight=zeros)))
    np.testing.assert_array_equal(eligible(made), mask)
    # The segments alone must be enough, whatever the mask says of first tokens and of padding.
    columns[3] = jnp.ones_like(columns[3])
    _, loose = targets_of(Batch(*columns, row_id=zeros, epoch=zeros, weight=zeros))
    everything = dataclasses.replace(made, loss_mask=np.ones_like(made.loss_mask))
    np.testing.assert_array_equal(eligible(everything), np.asarray(loose))
    assert loose.sum() > mask.sum() > 10
    assert (labels[mask] // 1000 == made.tokens[mask] // 1000).all()  # the same document
    assert (labels[mask] == made.tokens[mask] + 1).all()  # and its very next token
    assert EOD not in labels[mask]
    assert EOD not in made.tokens[mask]


def test_exact_multiple_has_no_padding_and_a_cut_document_starts_a_segment():
    made = make_rows([document(0, 4), document(1, 8)], 6)
    assert made.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2], [1] * 6]
    assert made.positions.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5]]
    assert (splits(made), made.begins.tolist()) == (1, [2, 0])
    assert eligible(made).tolist() == [[True, True, False, False, True, False], [True] * 4 + [False] * 2]


def test_dtypes_and_defaults_are_those_of_the_batch():
    made = make_rows([document(0, 5)], 4)
    kinds = {field.name: getattr(made, field.name).dtype for field in dataclasses.fields(made)}
    wide = dict.fromkeys(("tokens", "segment_ids", "positions", "row_id", "begins"), np.int32)
    assert kinds == {**wide, "loss_mask": bool, "weight": np.float32, "row_hash": np.uint64}
    assert made.row_id.tolist() == [0, 1]
    assert made.weight.tolist() == [1.0, 1.0]


def test_row_hash_is_of_the_content_of_exactly_that_row():
    a, b, c = (document(at, 4) for at in range(3))
    abc, cba, ab = make_rows([a, b, c], 4), make_rows([c, b, a], 4), make_rows([a, b], 4)
    assert len(set(abc.row_hash.tolist())) == 3
    np.testing.assert_array_equal(abc.row_hash, cba.row_hash[::-1])
    np.testing.assert_array_equal(abc.row_hash[:2], ab.row_hash)
    # Fixed for ever: caches on disk are keyed by it. Segments, mask, tokens of row 0, little-endian.
    content = np.ones(4, "<i4").tobytes() + bytes([0, 1, 1, 0]) + a.tokens.astype("<i4").tobytes()
    assert int(abc.row_hash[0]) == int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def test_row_hash_sees_tokens_mask_and_segments_but_not_what_lies_under_padding():
    made = make_rows([document(0, 5), document(1, 4)], 6)
    base = hash_rows(made.tokens, made.segment_ids, made.loss_mask)
    np.testing.assert_array_equal(base, made.row_hash)
    padding = made.segment_ids == 0
    assert padding.sum() == 3
    edited = np.where(padding, 77, made.tokens)
    np.testing.assert_array_equal(hash_rows(edited, made.segment_ids, made.loss_mask | padding), base)
    for column in ("tokens", "segment_ids", "loss_mask"):
        columns = {name: getattr(made, name).copy() for name in ("tokens", "segment_ids", "loss_mask")}
        columns[column][0, 2] = columns[column][0, 2] ^ 1 if column == "loss_mask" else columns[column][0, 2] + 1
        changed = hash_rows(**columns) != base
        assert changed.tolist() == [True, False]


def test_ids_in_are_sorted_and_leave_out_padding():
    made = make_rows([document(1, 3), document(0, 2)], 8)
    assert ids_in(made).tolist() == [EOD, 1000, 2000, 2001]
    assert 0 in made.tokens


def test_take_keeps_ids_and_hashes():
    made = make_rows([document(at, 4) for at in range(5)], 4)
    part = take(made, np.array([3, 1]))
    assert part.row_id.tolist() == [3, 1]
    np.testing.assert_array_equal(part.row_hash, made.row_hash[[3, 1]])
    np.testing.assert_array_equal(part.tokens, made.tokens[[3, 1]])


def test_unknown_packing_and_empty_data_are_errors():
    with pytest.raises(ValueError, match=r"data\.packing must be a known name .* got 'pak'.*Did you mean 'pack'"):
        make_rows([document(0, 3)], 4, "pak")
    with pytest.raises(ValueError, match=r"data\.path must hold tokens, got 0 documents without any"):
        make_rows([], 4)
