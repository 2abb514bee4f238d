"""Answers to prompts as rows: what is a target, and what the teacher reads in their place."""

import numpy as np
import pytest

from kdjax.data import eligible
from kdjax.data.prompts import Prompt
from kdjax.data.responses import Answered, answer_rows, end_of_answer, prompt_ids, room_for_teacher
from kdjax.models import synthetic

QUESTION = Prompt("q", "What is 1 + 1?", "2")


def test_the_answer_alone_is_learned():
    made = [Answered((5, 6, 7), (8, 9), 2.0), Answered((4,), (3, 2, 1, 9, 9, 9, 9, 9), 0.5)]
    rows, text = answer_rows(made, 8)
    assert text == {}
    np.testing.assert_array_equal(rows.tokens, [[5, 6, 7, 8, 9, 0, 0, 0], [4, 3, 2, 1, 9, 9, 9, 9]])
    np.testing.assert_array_equal(rows.segment_ids.sum(1), [5, 8])
    np.testing.assert_array_equal(rows.positions[0], [0, 1, 2, 3, 4, 0, 0, 0])
    np.testing.assert_array_equal(rows.weight, np.float32([2, 0.5]))
    # a target is predicted at the place before it: the prompt's last token predicts the answer's first
    np.testing.assert_array_equal(np.flatnonzero(eligible(rows)[0]), [2, 3])
    np.testing.assert_array_equal(np.flatnonzero(eligible(rows)[1]), range(7))


def test_the_teacher_predicts_the_same_tokens_after_its_own_prompt():
    made = [
        Answered((5, 6), (7, 8, 9), 1.0, (1, 2, 3, 4, 5)),
        Answered((5, 6, 6), (7,), 1.0, (1,)),
        Answered((5,), (2, 3, 4, 2, 3, 4, 2), 1.0, (9, 9, 9)),
    ]
    room = room_for_teacher(made)
    assert room == 16
    rows, text = answer_rows(made, 6, room)
    assert text["tokens"].shape == (3, 22)
    targets = eligible(rows)
    for row in range(3):
        for place in np.flatnonzero(targets[row]):
            there = text["index"][row, place]
            assert text["tokens"][row, there + 1] == rows.tokens[row, place + 1]
            assert text["segment_ids"][row, there + 1] == 1
            own, seen = len(made[row].prompt), len(made[row].seen_by_teacher)
            assert there - seen == place - own
        used = text["segment_ids"][row].sum()
        np.testing.assert_array_equal(text["positions"][row, :used], range(used))


def test_a_prompt_without_room_is_refused():
    with pytest.raises(ValueError, match=r"^data\.seq_len must leave room for an answer, got 4 and a prompt of 4 "):
        answer_rows([Answered((1, 2, 3, 4), (5,))], 4)


def test_a_prompt_is_encoded_as_training_text_is():
    tokenizer = synthetic.make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"^data\.chat_template must be False for a tokenizer without"):
        prompt_ids(QUESTION, tokenizer)
    ids = prompt_ids(QUESTION, tokenizer, chat_template=False)
    assert tokenizer.decode(ids) == "What is 1 + 1?\n"
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    told = prompt_ids(QUESTION, tokenizer, system_prompt="Be brief.")
    assert tokenizer.decode(told).startswith("<system>Be brief.")
    assert tokenizer.decode(told).endswith("<assistant>")
    both = prompt_ids(Prompt("q", ({"role": "system", "content": "No."}, {"role": "user", "content": "x"})), tokenizer)
    assert tokenizer.decode(both).startswith("<system>No.")


def test_an_answer_ends_as_the_template_ends_it():
    tokenizer = synthetic.make_tokenizer()
    tokenizer.chat_template = None
    assert end_of_answer(tokenizer) == tokenizer.eos_token_id
    special = next(i for i in tokenizer.added_tokens_decoder if i != tokenizer.eos_token_id)
    name = tokenizer.added_tokens_decoder[special].content
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}" + name + "{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert end_of_answer(tokenizer) == special
    assert end_of_answer(tokenizer, chat_template=False) == tokenizer.eos_token_id
    tokenizer.chat_template = (  # special tokens before the answer are not its end
        "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}<|im_start|>{% endif %}"
        "{{ m.content }}" + name + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    assert end_of_answer(tokenizer) == special != tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    assert end_of_answer(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"^data\.tokenizer must have an end-of-sequence token"):
        end_of_answer(tokenizer)
