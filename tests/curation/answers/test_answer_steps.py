"""Steps of an answer: where they end, which token is in which, and the scores and rows that come of them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdjax.curation.answers import steps
from kdjax.models import synthetic

TEXT = "Add 3.5 and 4. That is 7.5! Right?\n\n1. Check: 7.5 - 4.\n---\n2. It fits.\nSo 7.5"
PIECES = ["Add 3.5 and 4. ", "That is 7.5! ", "Right?\n\n", "1. Check: 7.5 - 4.\n---\n", "2. It fits.\n", "So 7.5"]


def test_where_steps_end():
    assert [TEXT[a:b] for a, b in steps.split_steps(TEXT)] == PIECES
    assert steps.split_steps("") == []
    for whole in ("7", "...", "2. ", "- \nx", "\\boxed{3}", "e.g.this"):
        assert steps.split_steps(whole) == [(0, len(whole))], whole
    assert steps.split_steps("7.\nx") == [(0, 3), (3, 4)]


@given(st.text("ab1.!? \n-", max_size=40))
def test_steps_are_the_text(text):
    found = steps.split_steps(text)
    assert "".join(text[a:b] for a, b in found) == text
    assert all(any(c.isalnum() for c in text[a:b]) for a, b in found) or len(found) == 1


def test_tokens_belong_to_the_step_of_their_last_character():
    # "Yes. No." as Yes|.| No|.| and what follows the text
    assert steps.steps_of_tokens("Yes. No.", [(0, 3), (3, 4), (4, 7), (7, 8), (0, 0)]) == [0, 0, 1, 1, 1]
    assert steps.steps_of_tokens("a\nb\nc", [(0, 2), (2, 5)]) == [0, 1]  # the last token holds all of step 1 and 2
    assert steps.steps_of_tokens("", []) == []
    words = synthetic.make_tokenizer()
    offsets = words(TEXT, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    found = steps.steps_of_tokens(TEXT, offsets)
    assert [found.count(step) for step in range(6)] == [len(piece) for piece in PIECES]  # a token a byte


# --- ASLEC


def test_figures_without_and_of_first_tokens():
    nll, step_of = np.array([5.0, 1, 2, 7, 3, 9]), [0, 0, 0, 1, 1, 2]
    found = steps.step_figures(nll, step_of)
    assert found == {"rest_logp": -2.0, "first_logp": -7.0, "first_share": 0.5}
    two = steps.step_figures(nll, step_of, skipped=2)
    assert two == {"rest_logp": -2.0, "first_logp": pytest.approx(-(5 + 1 + 7 + 3 + 9) / 5), "first_share": 5 / 6}
    only = steps.step_figures(np.array([1.0]), [0])
    assert math.isnan(only["rest_logp"]), "not 0, which would win"
    assert (only["first_logp"], only["first_share"]) == (-1.0, 1.0)
    assert all(math.isnan(value) for value in steps.step_figures(np.zeros(0), []).values())
    with pytest.raises(ValueError, match=r"step_of must name the step of each of the 2 tokens, got 1"):
        steps.step_figures(np.ones(2), [0])


def test_least_squares_find_the_law():
    rng = np.random.default_rng(0)
    made = []
    for _ in range(40):
        rest, first, share = rng.normal(-1, 0.5), rng.normal(-3, 0.5), rng.uniform(0.05, 0.4)
        mean = 0.8 * rest + 0.15 * first - 1.7 * share + 0.3
        made.append({"rest_logp": rest, "first_logp": first, "first_share": share, "answer_nll": -mean})
    want = {"rest": 0.8, "first": 0.15, "share": -1.7, "constant": 0.3}
    assert steps.fit_casl(made) == pytest.approx(want, rel=1e-9)
    unscored = made[0] | {"rest_logp": math.nan, "answer_nll": 100.0}
    assert steps.fit_casl([*made, unscored]) == pytest.approx(want, rel=1e-9)
    for bad in (made[:4], [each | {"first_share": 0.5} for each in made]):
        with pytest.raises(ValueError, match=r"figures must be of at least 5 answers with different shares"):
            steps.fit_casl(bad)


# --- LALP


def last_two(ids):
    """NLL of each id given the two before it, of a made-up model that looks no further back."""
    return np.array([(31 * ids[i] + 7 * ids[i - 1] + 3 * ids[i - 2]) % 17 / 4 for i in range(2, len(ids))])


QUESTION, ANSWER = [90, 91, 92], [11, 12, 13, 21, 22, 31, 32, 33, 41]
STEP_OF = [0, 0, 0, 1, 1, 2, 2, 2, 3]


def test_rows_of_steps_with_a_window():
    assert steps.local_rows(QUESTION, ANSWER, STEP_OF, window=1) == [
        ((90, 91, 92, 21, 22), (31, 32, 33)),
        ((90, 91, 92, 31, 32, 33), (41,)),
    ]
    assert steps.local_rows(QUESTION, ANSWER, STEP_OF, window=2) == [((90, 91, 92, 21, 22, 31, 32, 33), (41,))]
    assert [row[0] for row in steps.local_rows(QUESTION, ANSWER, STEP_OF, window=0)] == [(90, 91, 92)] * 3
    assert steps.local_rows(QUESTION, ANSWER, STEP_OF, window=3) == []
    assert steps.local_rows(QUESTION, [], []) == []


@pytest.mark.parametrize("window", [0, 1, 2, 3, 9])
def test_local_log_probability(window):
    def nll(question, answer):
        return last_two([*question, *answer])[-len(answer) :]

    local = [nll(*row) for row in steps.local_rows(QUESTION, ANSWER, STEP_OF, window)]
    found = steps.lalp(nll(QUESTION, ANSWER), STEP_OF, local, window)
    parts = [[11, 12, 13], [21, 22], [31, 32, 33], [41]]
    means = []
    for step, part in enumerate(parts):  # all steps, written out
        before = [token for each in parts[max(0, step - window) : step] for token in each]
        means.append(np.mean(nll([*QUESTION, *before], part)))
    assert found == pytest.approx(-np.mean(means), rel=1e-12)
    if window >= 3:
        whole = nll(QUESTION, ANSWER)
        assert found == pytest.approx(-np.mean([whole[:3].mean(), whole[3:5].mean(), whole[5:8].mean(), whole[8]]))


def test_rows_that_do_not_fit():
    with pytest.raises(ValueError, match=r"local must hold the NLLs of 2 rows, got 1; they are those of local_rows"):
        steps.lalp(np.ones(9), STEP_OF, [np.ones(3)])
    with pytest.raises(ValueError, match=r"step_of must name the step of each of the 9 tokens, got 2"):
        steps.local_rows(QUESTION, ANSWER, [0, 1])
