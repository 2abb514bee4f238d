"""A cache from what a server says of given text: what is sent, what is stored, what is refused."""

import numpy as np
import pytest

from kdjax.config import Served
from kdjax.curation import served_text
from kdjax.curation.served_text import make_text_recorder
from kdjax.data import eligible
from kdjax.generation.logprobs import TextScores, token_texts
from kdjax.models import synthetic

TOKENIZER = synthetic.make_tokenizer()
WRITES = token_texts(TOKENIZER)
V, LISTED = 37, 6
TABLE = np.random.default_rng(0).normal(0, 3, (53, V))
TABLE -= np.logaddexp.reduce(TABLE, 1, keepdims=True)


def logp_after(prefix):
    """The model: what it says depends on all that it has read, in order."""
    state = 0
    for token in prefix:
        state = (7 * state + int(token) + 1) % len(TABLE)
    return TABLE[state]


def speak(ids, listed=LISTED, writes=WRITES.get):
    top, own = [], []
    for at in range(1, len(ids)):
        logp = logp_after(ids[:at])
        named = {*np.argsort(-logp)[:listed].tolist(), ids[at]}
        top.append([[token, float(logp[token])] for token in sorted(named)])
        own.append(float(logp[ids[at]]))
    return TextScores(tuple(top), tuple(own), tuple((writes(token) or b"").decode("latin-1") for token in ids[1:]))


@pytest.fixture
def server(monkeypatch):
    """server(says) -> the texts that are sent; says(ids) -> TextScores, or why there are none."""

    def install(says=speak):
        sent = []

        def score(texts, served, on_text):
            sent.extend(texts)
            for number in reversed(range(len(texts))):  # replies come in any order
                found = says(texts[number])
                on_text(number, *((None, found) if isinstance(found, str) else (found, "")))

        monkeypatch.setattr(served_text, "score", score)
        return sent

    return install


def recorded(rows, entries=4, vocab_size=V, **more):
    return list(make_text_recorder(Served(), TOKENIZER, entries, vocab_size, **more)(rows))


def probs_of(codes):
    return np.where(codes > 0, np.exp(8 - (codes - 1.0) / 2048), 0)


def test_every_segment_is_sent_by_itself_up_to_its_last_target(small, server):
    sent = server()
    recorded(small.rows)
    expected, cut_off = [], 0
    for tokens, segments, mask in zip(small.rows.tokens, small.rows.segment_ids, small.rows.loss_mask, strict=True):
        for number in range(1, segments.max() + 1):
            ids, targets = tokens[segments == number], np.flatnonzero(mask[segments == number])
            if len(targets) and targets[-1] > 0:  # the first token has nothing before it
                expected.append(ids[: targets[-1] + 1].tolist())
                cut_off += len(ids) - len(expected[-1])
    assert sent == expected
    assert len(expected) > 1.5 * len(small.rows)
    assert cut_off > 5


def test_what_is_stored_is_what_was_said(small, server):
    server()
    rows, allowed = small.rows, eligible(small.rows)
    found = recorded(rows, label_logp=True)
    assert len(found) == len(rows)
    for row, record in enumerate(found):
        np.testing.assert_array_equal(record.places, np.flatnonzero(allowed[row]))
        assert record.eligible == len(record.places)
        for at, place in enumerate(record.places):
            segment = rows.segment_ids[row] == rows.segment_ids[row, place]
            logp = logp_after(rows.tokens[row, np.flatnonzero(segment & (np.arange(len(segment)) <= place))])
            best = np.argsort(-logp)[:4]
            np.testing.assert_array_equal(record.ids[at], best)
            np.testing.assert_allclose(probs_of(record.codes[at]), np.exp(logp[best]), rtol=4e-4)
            np.testing.assert_allclose(record.label_logp[at], logp[rows.tokens[row, place + 1]], rtol=1e-6)
    assert found[small.no_target].eligible == 0
    assert recorded(rows)[0].label_logp is None


def test_a_position_is_left_out_where_the_student_knows_too_few_of_the_tokens(small, server):
    server()
    found = recorded(small.rows, vocab_size=20)
    assert all((record.ids < 20).all() and (record.codes > 0).all() for record in found)
    assert 0 < sum(len(record.places) for record in found) < sum(record.eligible for record in found)


def test_a_token_of_no_probability_has_a_finite_one(small, server):
    def never(ids):
        said = speak(ids)
        return TextScores(said.top, (None,) * len(said.own), said.writes)

    server(never)
    assert (recorded(small.rows, label_logp=True)[0].label_logp == -80).all()


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (
            lambda ids: "status 500: oops",
            r"served.base_url must answer for every row .* row 20: status 500: oops\. What",
        ),
        (
            lambda ids: "status 400: Requested prompt logprobs of 30",
            r"row 20: status 400: Requested prompt logprobs of 30\. vLLM lists at most 20 .*: --max-logprobs; .*"
            r"--max-model-len .* data.seq_len \+ 1\. What is whole in the cache stands: start again",
        ),
        (lambda ids: speak(ids, listed=3), r"must list classes.entries=4 tokens at each place, got 3 at one of row 20"),
        (
            lambda ids: speak(ids, writes=lambda token: WRITES[token + 40]),
            r"data.tokenizer must be the served model's, got another one: \d+ of \d+ tokens .* there and '.' here",
        ),
        (
            lambda ids: TextScores(
                ([[t, -0.0] for t in range(6)],) * (len(ids) - 1), speak(ids).own, speak(ids).writes
            ),
            r"must list log-probabilities in nats, got 6 as the sum .* of row 20\.",
        ),
    ],
)
def test_what_stops_the_cache(small, server, says, message):
    server(says)
    with pytest.raises(ValueError, match=message):
        recorded(small.rows)


@pytest.mark.parametrize("mark", ["\u2581{}", "\u0120{}", " {}", "{}", "\ufffd", "", "token_id:7"])
def test_ways_to_write_the_same_token_down(small, server, mark):
    def says(ids):
        said = speak(ids)
        return TextScores(said.top, said.own, tuple(mark.format(WRITES[token].decode("latin-1")) for token in ids[1:]))

    server(says)
    assert len(recorded(small.rows)) == len(small.rows)


def test_a_few_strange_tokens_are_no_other_tokenizer(small, server):
    strange = dict.fromkeys(range(3, V, 4), b"strange")
    server(lambda ids: speak(ids, writes=lambda token: strange.get(token, WRITES[token])))
    assert len(recorded(small.rows)) == len(small.rows)
