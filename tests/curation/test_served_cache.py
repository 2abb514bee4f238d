"""A cache from what a server said: which tokens are the answer's, which positions are stored, what is refused."""

import dataclasses
import json
import math

import numpy as np
import pytest

from kdjax import config
from kdjax.build.checks import check_served, is_served, said_answers, scores_text
from kdjax.curation.served_cache import (
    check_answers,
    check_cuts,
    digest,
    first_difference,
    make_listener,
    served_recorder,
)
from kdjax.data.prompts import fingerprint, load_prompts
from kdjax.data.responses import Answered, answer_rows
from kdjax.generation.store import Rollout
from kdjax.models import synthetic

TOKENIZER = synthetic.make_tokenizer()
A, B, C = TOKENIZER("abc").input_ids
END = 2


def said(response="ab", tokens=("a", "b", "<|im_end|>"), top=None, finish="stop"):
    top = top or [[["a", math.log(0.5)], ["b", math.log(0.25)], ["c", -50.0]]] * len(tokens)
    return Rollout("p", 0, response, finish, chosen=tuple([t, -1.0] for t in tokens), top=tuple(top))


def listen(rollout):
    return make_listener(TOKENIZER)(rollout)


def record(rollout, answer=(A, B, END), entries=2, vocab_size=264, seq_len=8):
    """What is stored of a row with a prompt of two tokens and this answer."""
    rows, _ = answer_rows([Answered((5, 6), answer)], seq_len)
    (found,) = served_recorder({0: listen(rollout)}, entries, vocab_size)(rows)
    return found


@pytest.mark.parametrize(
    ("response", "tokens", "answer"),
    [
        ("ab", ("a", "b"), (A, B)),
        ("ab", ("a", "b", "<|im_end|>"), (A, B)),
        ("ab", (A, B, END), (A, B)),  # a server that gives ids
        ("a", ("a", "b"), (A,)),  # what comes after a stop text
        ("\u00e9", ([0xC3], [0xA9], ""), tuple(TOKENIZER("\u00e9").input_ids)),
        ("ab", ("ab",), None),  # a token of another tokenizer
        ("ab", ("a", "c"), None),
        ("ab", ("a",), None),
        ("ab", ("a", 9999), None),
    ],
)
def test_the_servers_own_cut_of_an_answer(response, tokens, answer):
    assert listen(said(response, tokens)).answer == answer


def test_without_log_probabilities_nothing_was_said():
    assert listen(Rollout("p", 0, "ab", "stop")) is None


def test_the_likeliest_are_stored_up_to_the_end():
    found = record(said())
    assert found.eligible == 3
    np.testing.assert_array_equal(found.places, [1, 2, 3])
    np.testing.assert_array_equal(found.ids, [[A, B]] * 3)
    np.testing.assert_allclose(np.exp(8 - (found.codes - 1.0) / 2048), [[0.5, 0.25]] * 3, rtol=3e-4)
    far = record(said(), entries=3)
    assert (far.codes > 0).all(), "a token of probability e^-50 is known all the same"


def test_a_position_without_log_probabilities_is_not_stored():
    np.testing.assert_array_equal(record(said(tokens=("a", "b"))).places, [1, 2])  # nothing of the end
    known = [["b", -0.1], ["a", -5.0]]
    np.testing.assert_array_equal(record(said(top=[known, [], known])).places, [1, 3])
    np.testing.assert_array_equal(record(said(top=[known, known[:1], known])).places, [1, 3])
    np.testing.assert_array_equal(record(said(top=[known, [*known[:1], ["strange", -3.0]], known])).places, [1, 3])
    np.testing.assert_array_equal(
        record(said(top=[known, [*known[:1], [263, -3.0]], known]), vocab_size=263).places, [1, 3]
    )
    cut = record(said(), answer=(A, B, END), seq_len=4)  # the row has no room for the end
    np.testing.assert_array_equal(cut.places, [1, 2])


def test_only_after_the_servers_own_text():
    """Where the row has another token, what the server said afterwards is of another text."""
    np.testing.assert_array_equal(record(said(), answer=(A, C, END)).places, [1, 2])
    np.testing.assert_array_equal(record(said(), answer=(C, B, END)).places, [1])


def test_rows_of_which_nothing_was_said_have_no_positions():
    rows, _ = answer_rows([Answered((5, 6), (A, B))] * 2, 8)
    first, second = served_recorder({1: listen(said())}, 2, 264)(rows)
    assert (len(first.places), first.eligible) == (0, 2)
    np.testing.assert_array_equal(second.places, [1, 2])


def test_numbers_that_are_no_log_probabilities():
    with pytest.raises(ValueError, match=r"served.base_url must list log-probabilities in nats, got 2 as the sum"):
        record(said(top=[[["a", -0.0], ["b", 0.0]]] * 3))


def test_another_tokenizer_is_said_with_the_first_difference():
    rollout = said("ab", ("ab",))
    words = first_difference(rollout, listen(rollout), [A, B])
    assert words == f"token 0 of sample 0 of 'p' is 'ab' there and id {A} here"
    message = rf"data.tokenizer must be the served model's, got one that cuts 2 of 3 answers in 'x' .*; {words}\. Set"
    with pytest.raises(ValueError, match=message):
        check_cuts(3, [words] * 2, "x")
    check_cuts(4, [words] * 2, "x")
    with pytest.raises(ValueError, match="prompts.answers must hold log-probabilities .* got none in 'x'"):
        check_cuts(0, [], "x")


def test_the_digest_is_of_what_was_said():
    one, other = listen(said()), listen(said(top=[[["a", -0.1], ["b", -3.0]]] * 3))
    assert digest({0: one}) == digest({0: listen(said())})
    assert len({digest({0: one}), digest({0: other}), digest({1: one}), digest({})}) == 4


# --- what a config and a directory must be


def experiment(**changes):
    e = config.Experiment()
    values = {
        "teacher.source": "cache",
        "served.top_logprobs": 20,
        "classes.kind": "ghost_tail",
        "classes.entries": 20,
        "cache.entropy": False,
        "prompts.answers": "x",
        "prompts.path": "arith:sum1",
        "prompts.size": 20,
    }
    for name, value in (values | {name.replace("__", "."): value for name, value in changes.items()}).items():
        room, field = name.split(".")
        e = dataclasses.replace(e, **{room: dataclasses.replace(getattr(e, room), **{field: value})})
    return e


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "prompts.answers",
            "gold",
            "must be a directory of launch.generate with the log-probabilities of a server, got",
        ),
        (
            "classes.kind",
            "sampled",
            "must be one of renormalised, ghost_tail, zero_tail .* got 'sampled'; a server lists",
        ),
        ("classes.kind", "all", "must be one of renormalised"),
        ("classes.entries", 21, "must be at most 20 with .* got 21; no more are listed"),
        ("loss.tau", 2.0, "must be 1.0 with .* got 2.0; a server says them at temperature 1"),
        ("cache.entropy", True, "must be False with .* got True; no server says what it is"),
        ("cache.label_logp", True, "must be False with .* got True; an answer's end may have none"),
    ],
)
def test_what_a_server_does_not_know(name, value, message):
    check_served(experiment())
    with pytest.raises(ValueError, match=f"{name} {message}"):
        check_served(experiment(**{name: value}))


def of_text(**changes):
    return experiment(served__top_logprobs=0, served__prompt_logprobs=20, served__model="big", **changes)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("served.model", "", "must be the model's name there with .* got ''; it tells caches apart"),
        ("classes.kind", "sampled", "must be one of renormalised"),
        ("classes.entries", 21, "must be at most 20 with .* got 21; .* or served.prompt_logprobs to 0"),
        ("loss.tau", 2.0, "must be 1.0 with"),
        ("cache.entropy", True, "must be False with"),
    ],
)
def test_what_a_server_does_not_know_of_a_text(name, value, message):
    for answers in ("", "gold", "pool", "x"):
        check_served(of_text(prompts__answers=answers, cache__label_logp=True))
    with pytest.raises(ValueError, match=f"{name} {message}"):
        check_served(of_text(**{name: value}))


def test_when_a_cache_is_a_servers():
    said, text, live, neither = (
        experiment(),
        of_text(),
        of_text(teacher__source="live"),
        experiment(served__top_logprobs=0),
    )
    assert [said_answers(e) for e in (said, text, live, neither)] == [True, False, False, False]
    assert [scores_text(e) for e in (said, text, live, neither)] == [False, True, False, False]
    assert [is_served(e) for e in (said, text, live, neither)] == [True, True, False, False]
    with pytest.raises(ValueError, match=r"prompt_logprobs must be 0 with served.top_logprobs=20, got 5; .* Set one\."):
        check_served(experiment(served__prompt_logprobs=5))


@pytest.mark.parametrize(
    ("manifest", "changes", "message"),
    [
        ({"model": "abc"}, {}, "where the model was 'abc', and no served one"),
        ({"temperature": 0.7}, {}, "where temperature was 0.7, not 1.0"),
        ({"top_p": 0.9}, {}, "where top_p was 0.9, not 1.0"),
        ({"system_prompt": "Be brief."}, {}, "where system_prompt was 'Be brief.', not ''"),
        ({"top_logprobs": 5}, {}, "where served.top_logprobs was 5, less than classes.entries=20"),
        ({}, {"served.model": "small"}, "where the model was 'served: big', not the served.model 'small'"),
        ({}, {"prompts.instruction": "Please!"}, "where the prompts were others than those of prompts"),
    ],
)
def test_answers_of_something_else_are_refused(tmp_path, manifest, changes, message):
    prompts = load_prompts(experiment().prompts)
    depends = {"model": "served: big", "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "top_logprobs": 20}
    depends |= {"chat_template": True, "system_prompt": "", "prompts": fingerprint(prompts)}

    def write(depends):
        (tmp_path / "manifest.json").write_text(json.dumps({"depends": depends, "made": {}}))

    write(depends)
    assert check_answers(experiment(prompts__answers=str(tmp_path), served__model="big")) == "served: big"
    write(depends | manifest)
    with pytest.raises(ValueError, match=f"prompts.answers must be what a server answers .*{message}"):
        check_answers(experiment(prompts__answers=str(tmp_path), **changes))
