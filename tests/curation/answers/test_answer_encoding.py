"""Ids of questions and answers: what counts, why an answer is refused, and that training reads the very same."""

import dataclasses
import json

import numpy as np
import pytest

from kdjax.build import asked as asking
from kdjax.config import Answers, Data, Experiment, Generation, OnPolicy, Prompts, default_config, from_config_dict
from kdjax.curation.answers.encode import REASONS, coding, encode, encode_answer, encode_question
from kdjax.curation.answers.pool import Candidate
from kdjax.curation.answers.released import as_released
from kdjax.data.prompts import Prompt
from kdjax.generation.store import LENGTH, STOP, Rollout
from kdjax.models.synthetic import make_tokenizer

PROMPT = Prompt("p", "1+1?", None, "", {})
START, END = 1, 2  # <|im_start|>, <|im_end|>


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def code(tokenizer, seq_len=256, chat=True, **answers):
    return coding(tokenizer, Data(seq_len=seq_len, chat_template=chat), Answers(**answers))


def answer(of, text, cut_off=False):
    candidate = Candidate(PROMPT, "t", text, "0" * 16, cut_off)
    return encode_answer(candidate, encode_question(PROMPT, of), of)


def test_what_counts(tokenizer):
    of = code(tokenizer)
    found = encode(PROMPT, [Candidate(PROMPT, "t", " \n2\n", "r")], of)
    asked = found.question
    assert tokenizer.decode(asked.ids) == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(asked.ids[asked.counted]) == "user\n1+1?\nassistant\n"
    assert (asked.ids[~asked.counted] == [START, END, START]).all()
    (one,) = found.answers
    assert (found.id, one.row, one.teacher, one.error, one.truncated) == ("p", "r", "t", "", False)
    assert tokenizer.decode(one.tokens.ids) == "2\n"
    assert one.tokens.counted.all()


def test_trailing_template_tokens(tokenizer):
    one = answer(code(tokenizer, trailing="keep"), "2")
    assert tokenizer.decode(one.tokens.ids) == "2<|im_end|>\n"
    assert one.tokens.counted.tolist() == [True, False, True]
    assert (
        answer(code(tokenizer, trailing="keep"), "2", cut_off=True).tokens.ids.tolist() == one.tokens.ids[:1].tolist()
    )
    plain = answer(code(tokenizer, chat=False, trailing="keep"), "2")
    assert (plain.tokens.ids[-1], plain.tokens.counted.tolist()) == (END, [True, False])


def test_an_answer_is_refused_by_reason(tokenizer):
    of = code(tokenizer)
    n = len(encode_question(PROMPT, of).ids)
    cases = {
        ("2", n + 2): "",
        ("2", n + 1): "truncated",  # its end does not fit
        ("2", n): "too_long",
        ("", n + 9): "special_only",
        (" \n ", n + 9): "special_only",
        ("<|im_end|>", n + 30): "special_only",
        ("2<|im_end|>", n + 30): "altered",
        ("2\r\u0301", n + 30): "",
    }
    for (text, seq_len), reason in cases.items():
        one = answer(code(tokenizer, seq_len), text)
        assert (one.error, one.error in REASONS) == (reason, True), (text, seq_len)
        assert (len(one.tokens.ids) > 0) == (reason == "")
    assert answer(code(tokenizer, n + 1), "2", cut_off=True).error == ""  # it has no end


def test_a_cut_off_answer_may_be_kept(tokenizer):
    n = len(encode_question(PROMPT, code(tokenizer)).ids)
    one = answer(code(tokenizer, n + 3, truncated="keep"), "12345")
    assert (tokenizer.decode(one.tokens.ids), one.error, one.truncated) == ("123", "", True)
    whole = answer(code(tokenizer, n + 6, truncated="keep"), "12345")
    assert (tokenizer.decode(whole.tokens.ids), whole.truncated) == ("12345", False)
    assert answer(code(tokenizer, n, truncated="keep"), "12345").error == "too_long"


def released(**values):
    config = default_config()
    config.update_from_flattened_dict({"answers.official": True} | values)
    return from_config_dict(config)


def test_official_reads_what_the_released_code_reads(tokenizer):
    """Question and answer in a row are the whole chat as the template writes it, with the released system text."""
    e = released()
    of = coding(tokenizer, e.data, as_released(e.answers))
    found = encode(PROMPT, [Candidate(PROMPT, "t", "It is 2.", "r")], of)
    turns = [("system", "You are a helpful assistant."), ("user", "1+1?"), ("assistant", "It is 2.")]
    chat = [{"role": role, "content": text} for role, text in turns]
    whole = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert [*found.question.ids, *found.answers[0].tokens.ids] == whole
    assert found.answers[0].tokens.counted.tolist() == [True] * len("It is 2.") + [False, True]


def test_a_system_text_that_is_given_stays():
    assert released(**{"data.system_prompt": "Be short."}).data.system_prompt == "Be short."
    assert released(**{"data.chat_template": False}).data.system_prompt == ""
    assert released(**{"answers.official": False}).data.system_prompt == ""


def test_training_reads_the_same(tokenizer):
    """Token for token: the rows that the step gets, whose targets are A and the end."""
    e = dataclasses.replace(
        Experiment(),
        data=Data(seq_len=64),
        prompts=dataclasses.replace(Experiment().prompts, answers="pool"),
    )
    texts = ["2", "It is 2.\n\nSure: 1 + 1 = 2", "é — 2", "x" * 40]
    of = coding(tokenizer, e.data, dataclasses.replace(e.answers, truncated="keep"))
    question = encode_question(PROMPT, of)
    asked = asking.Asked((), (PROMPT,), (tuple(question.ids.tolist()),), (None,), np.ones(1), None, of.after[0], 0, "")
    for cut in (False, True):
        said = [Rollout("p", at, text, LENGTH if cut else STOP) for at, text in enumerate(texts)]
        rows = asking.rows_of_answers(e, asked, tokenizer, said)[0]
        for at, text in enumerate(texts):
            one = answer(of, text, cut)
            targets = rows.tokens[at][rows.loss_mask[at]].tolist()
            end = [] if cut or one.truncated else [END]
            assert targets == [*one.tokens.ids.tolist(), *end]
            before = rows.tokens[at][: int(np.argmax(rows.loss_mask[at]))]
            assert before.tolist() == question.ids.tolist()


@pytest.mark.parametrize(("answers", "fraction"), [("pool", 0.5), ("gold", 0.0)])
def test_a_question_without_room_is_passed_over_where_answers_are_selected(tokenizer, tmp_path, answers, fraction):
    """launch.curate selects no answer to it; own answers and gold ones are of every question."""
    path = tmp_path / "p.jsonl"
    asked = [{"id": str(n), "prompt": f"{n}?" + "x" * (n == 3) * 40, "answer": "1"} for n in range(4)]
    path.write_text("".join(json.dumps(one) + "\n" for one in asked))
    prompts = Prompts(path=str(path), heldout_fraction=0, answers="pool")
    e = dataclasses.replace(Experiment(), data=Data(seq_len=32, chat_template=False), prompts=prompts)
    assert len(asking.load_asked(e, tokenizer, None).train) == 4
    e = dataclasses.replace(e, prompts=dataclasses.replace(prompts, answers=answers))
    e = dataclasses.replace(e, on_policy=OnPolicy(fraction=fraction), generation=Generation(new_tokens=8))
    with pytest.raises(ValueError, match=r"^data\.seq_len must hold the longest prompt and its answer, got 32 .* '3'"):
        asking.load_asked(e, tokenizer, None)


def test_a_tokenizer_without_an_end_is_refused(tokenizer):
    broken = make_tokenizer()
    broken.eos_token = None
    with pytest.raises(ValueError, match="^data.tokenizer must have an end-of-sequence token"):
        code(broken, chat=False)
