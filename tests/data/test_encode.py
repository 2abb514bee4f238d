"""Token ids and targets: separators, chat spans under several templates, and the errors of templates and tokenizers."""

import numpy as np
import pytest

from kdjax.data import Document
from kdjax.data.encode import encode, end_of_document

EOD, IM_START, IM_END = 256, 257, 258
CHAT = (("user", "hi?"), ("assistant", "Yes"), ("user", "so"), ("assistant", " No\n"))

# Renders every turn but the last without its thoughts, as reasoning models do; the second line is the usual Llama form.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
NO_SPECIAL = (
    "{% for m in messages %}{{ 'Q: ' if m['role'] == 'user' else 'A:' }}{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


def chat(*turns: tuple[str, str]) -> Document:
    return Document("chats.jsonl#7", messages=turns)


def targets(encoded, tokenizer) -> list[str]:
    """The stretches of targets, as text."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.loss_mask.astype(int), [0]])))
    return [tokenizer.decode(encoded.tokens[a:b]) for a, b in edges.reshape(-1, 2)]


def test_text_is_its_bytes_and_one_separator_that_is_no_target(tokenizer):
    documents = [Document("a", text="aé<"), Document("b", text="x")]
    a, b = encode(documents, tokenizer)
    assert tokenizer.decode(a.tokens) == "aé<<|endoftext|>"
    assert a.tokens.tolist()[-1] == b.tokens.tolist()[-1] == EOD
    assert a.loss_mask.tolist() == [False, True, True, True, False]
    assert b.loss_mask.tolist() == [False, False]
    assert (a.tokens.dtype, a.loss_mask.dtype, a.id) == (np.int32, bool, "a")


def test_of_the_special_tokens_that_a_tokenizer_adds_the_first_is_kept(make_tokenizer):
    """Gemma and Llama 3 were never shown a text without it."""
    from tokenizers import processors

    adding = make_tokenizer(eos_token="<|im_end|>", bos_token="<|im_start|>")
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", IM_START), ("<|im_end|>", IM_END)]
    )
    assert adding("x")["input_ids"][0] == IM_START
    (text,) = encode([Document("a", text="xy")], adding)
    assert adding.decode(text.tokens) == "<|im_start|>xy<|endoftext|>"
    assert text.loss_mask.tolist() == [False, True, True, False]
    (turns,) = encode([chat(("user", "q"), ("assistant", "a"))], adding, chat_template=False)
    assert adding.decode(turns.tokens) == "<|im_start|>q\na<|im_end|>"
    assert targets(turns, adding) == ["a<|im_end|>"]


def test_separator_is_endoftext_if_there_is_one_else_the_end_of_sequence(tokenizer, make_tokenizer):
    assert end_of_document(tokenizer) == EOD
    other = make_tokenizer(special=("</s>",), eos_token="</s>")
    assert end_of_document(other) == other.eos_token_id == 256
    with pytest.raises(
        ValueError, match=r"data\.tokenizer must have an end-of-sequence token, got a tokenizer with neither"
    ):
        end_of_document(make_tokenizer(special=()))


def test_blank_documents_are_left_out(tokenizer):
    documents = [Document("a", text=""), Document("b", text="x"), Document("c", text=" \n")]
    assert [e.id for e in encode(documents, tokenizer)] == ["b"]


def test_order_does_not_depend_on_the_kind_of_document(tokenizer):
    documents = [chat(*CHAT), Document("a", text="x"), chat(*CHAT[:2])]
    both = encode(documents, tokenizer)
    for document, together in zip(documents, both, strict=True):
        (alone,) = encode([document], tokenizer)
        np.testing.assert_array_equal(alone.tokens, together.tokens)
        np.testing.assert_array_equal(alone.loss_mask, together.loss_mask)


def test_of_a_chat_only_answers_and_their_ends_are_targets_though_end_is_padding(tokenizer):
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == IM_END
    (made,) = encode([chat(*CHAT)], tokenizer)
    assert targets(made, tokenizer) == ["Yes<|im_end|>", " No\n<|im_end|>"]
    assert tokenizer.decode(made.tokens) == (
        "<|im_start|>user\nhi?<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
        "<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n No\n<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (THINKING, ["Yes<|im_end|>", "<think></think>\n No\n<|im_end|>"]),
        (TRIMMING, ["Yes<|im_end|>", "No<|im_end|>"]),
        (NO_SPECIAL, ["Yes\n", " No\n\n"]),
    ],
    ids=["thinking", "trimming", "no special tokens"],
)
def test_answers_are_found_under_other_templates(make_tokenizer, template, expected):
    made = make_tokenizer(eos_token="<|im_end|>", chat_template=template)
    assert targets(encode([chat(*CHAT)], made)[0], made) == expected


def test_answer_that_repeats_the_question_or_holds_many_byte_letters_is_found_where_it_is(tokenizer):
    (made,) = encode([chat(("user", "é assistant é"), ("assistant", "é assistant é"))], tokenizer)
    assert targets(made, tokenizer) == ["é assistant é<|im_end|>"]
    assert made.loss_mask.sum() == len("é assistant é".encode()) + 1


def test_special_tokens_inside_an_answer_do_not_end_it(tokenizer):
    (made,) = encode([chat(("user", "q"), ("assistant", "a<|im_start|>b"), ("user", "c"))], tokenizer)
    assert targets(made, tokenizer) == ["a<|im_start|>b<|im_end|>"]


def test_end_of_turn_that_begins_like_another_special_token_is_found_whole(make_tokenizer):
    template = "{% for m in messages %}{{ m['content'] }}<e>!\n{% endfor %}{% if add_generation_prompt %}{% endif %}"
    made = make_tokenizer(special=("<e>", "<e>!"), eos_token="<e>!", chat_template=template)
    assert targets(encode([chat(*CHAT[:2])], made)[0], made) == ["Yes<e>!"]


def test_without_template_turns_are_lines_and_an_answer_ends_the_sequence(tokenizer):
    (one,) = encode([chat(("user", "hi?"), ("assistant", "Yes"))], tokenizer, chat_template=False)
    assert tokenizer.decode(one.tokens) == "hi?\nYes<|im_end|>"
    assert targets(one, tokenizer) == ["Yes<|im_end|>"]
    (two,) = encode([chat(*CHAT, ("user", "unanswered"))], tokenizer, chat_template=False, system_prompt="Be brief.")
    assert tokenizer.decode(two.tokens) == "Be brief.\nhi?\nYes<|im_end|>so\n No\n<|im_end|>"
    assert targets(two, tokenizer) == ["Yes<|im_end|>", " No\n<|im_end|>"]
    (bare,) = encode([chat(("assistant", "Yes"))], tokenizer, chat_template=False)
    assert targets(bare, tokenizer) == ["es<|im_end|>"]  # nothing comes before the first token


def test_system_prompt_comes_first_unless_the_chat_has_one(tokenizer):
    own = chat(("system", "Mine."), *CHAT[:2])
    made = encode([chat(*CHAT[:2]), own], tokenizer, system_prompt="Be brief.")
    assert tokenizer.decode(made[0].tokens).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi?")
    assert tokenizer.decode(made[1].tokens).startswith("<|im_start|>system\nMine.<|im_end|>\n<|im_start|>user\nhi?")
    assert [targets(m, tokenizer) for m in made] == [["Yes<|im_end|>"]] * 2


def test_template_that_does_not_extend_its_prompt_is_an_error(make_tokenizer):
    counting = make_tokenizer(
        eos_token="<|im_end|>",
        chat_template="{{ messages | length }} turns{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}",
    )
    with pytest.raises(
        ValueError, match=r"data\.chat_template must be False .* in chats\.jsonl#7 .* before turn 1 is no prefix"
    ):
        encode([chat(*CHAT)], counting)


def test_answer_without_an_end_is_an_error(make_tokenizer):
    template = (
        "{% for m in messages %}{{ '>' if m['role'] == 'user' else '<' }}"
        "{{ '!' if loop.last and m['role'] == 'assistant' }}{{ m['content'] }}{% endfor %}"
        "{{ '<' if add_generation_prompt }}"
    )
    endless = make_tokenizer(eos_token="<|im_end|>", chat_template=template)
    with pytest.raises(ValueError, match=r"in chats\.jsonl#7 turn 1 has no end"):
        encode([chat(*CHAT)], endless)


def test_missing_template_names_the_chat_and_both_ways_out(make_tokenizer):
    plain = make_tokenizer(eos_token="<|im_end|>")
    with pytest.raises(
        ValueError, match=r"data\.chat_template must be False .* chats\.jsonl#7 is a chat\. Set it to False"
    ):
        encode([chat(*CHAT)], plain)
    assert len(encode([chat(*CHAT)], plain, chat_template=False)) == 1
    assert len(encode([Document("a", text="x")], plain)) == 1


def test_template_that_refuses_a_role_names_the_chat(make_tokenizer):
    strict = make_tokenizer(
        eos_token="<|im_end|>",
        chat_template="{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
    )
    with pytest.raises(
        ValueError, match=r"template takes, got chats\.jsonl#7; it fails on the roles system.*no system role"
    ):
        encode([chat(("system", "x"), *CHAT)], strict)


def test_chat_without_answer_is_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"must have an assistant turn, got none in chats\.jsonl#7"):
        encode([chat(("user", "x"))], tokenizer)


def test_slow_tokenizer_is_an_error():
    with pytest.raises(ValueError, match=r"data\.tokenizer must be a fast tokenizer, got object"):
        encode([Document("a", text="x")], object())
