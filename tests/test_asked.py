"""Answers as training rows: whose question they answer, and whether they fit."""

import dataclasses
import logging

import numpy as np
import pytest

from kdjax.build.asked import Asked, rows_of_answers
from kdjax.config import Data, Experiment, Generation, Prompts
from kdjax.data.prompts import Prompt, question_digest
from kdjax.generation.generate import generate, identity
from kdjax.generation.store import Rollout, each_rollout
from kdjax.models.synthetic import make_tokenizer

ASK = Prompt("p", "What is 1 + 1? Be quick.", "2")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def rows(tokenizer, answers, prompt=ASK, seq_len=64):
    e = dataclasses.replace(
        Experiment(),
        data=Data(seq_len=seq_len),
        prompts=Prompts(path="p.jsonl", answers="runs/a", instruction=" Be quick."),
    )
    asked = Asked((), (prompt,), ((5, 6, 7),), (None,), np.ones(1), None, 2, 0, "")
    return rows_of_answers(e, asked, tokenizer, answers)[0]


def test_answers_to_another_question_with_the_same_id_are_refused(tokenizer):
    asks = question_digest(Prompt("x", "What  is 1 + 1?"))  # blanks, the id and the instruction do not count
    assert len(rows(tokenizer, [Rollout("p", 0, "2", "stop", asks=asks), Rollout("p", 1, "2", "stop")])) == 2
    other = Rollout("p", 0, "2", "stop", asks=question_digest(Prompt("p", "What is 1 * 1?")))
    message = (
        r"^prompts\.answers must hold answers to the questions of prompts\.path, got 'runs/a', whose answer to 'p' is "
        r"to another question\. Set prompts\.path"
    )
    with pytest.raises(ValueError, match=message):
        rows(tokenizer, [other])


def test_answers_say_which_question_they_are_to(tmp_path, tokenizer):
    def source(asked, on_answer):
        for _, sample in asked:
            on_answer(Rollout("p", sample, "2", "stop"), 1)

    depends = identity("m", "t", [ASK], Generation(), Data())
    generate(tmp_path, [ASK], 2, source, depends, {}, instruction=" Be quick.")
    found = list(each_rollout(tmp_path))
    assert [one.asks for one in found] == [question_digest(Prompt("", "What is 1 + 1?"))] * 2
    assert len(rows(tokenizer, found)) == 2
    with pytest.raises(ValueError, match=r"is to another question"):
        rows(tokenizer, found, dataclasses.replace(ASK, prompt="What is 2 + 0? Be quick."))


def test_answers_that_lose_their_end_are_counted(tokenizer, caplog):
    answers = [Rollout("p", 0, "2", "stop"), Rollout("p", 1, "It is 2", "length")]
    long = 3 + len(tokenizer("It is 2", add_special_tokens=False)["input_ids"])
    with caplog.at_level(logging.WARNING):
        rows(tokenizer, answers, seq_len=long)
        assert caplog.messages == []
        rows(tokenizer, answers, seq_len=long - 1)
    (said,) = caplog.messages
    assert said == (
        f"1 of 2 answers of prompts.answers do not fit into data.seq_len={long - 1} behind their prompts and lose "
        f"their ends. Raise it to {long}."
    )
