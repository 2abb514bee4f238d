"""Prompts: the file and each way it can be wrong, the built-in task worked out anew, the draw and the split."""

import json
import math
import re
import sys
import types
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdjax.config import Prompts
from kdjax.data.prompts import Prompt, _shares, fingerprint, load_prompts, messages, split_prompts
from kdjax.data.tasks import KINDS


def write(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def load(path, **settings):
    return load_prompts(Prompts(path=str(path), **settings))


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital?"}]


# --- files


def test_a_file_gives_its_prompts_each_once_in_a_random_order(tmp_path):
    rows = [{"id": f"{n}", "prompt": f"Question {n}?", "answer": str(n)} for n in range(50)]
    path = write(tmp_path / "a.jsonl", *rows, "", {"id": "chat", "prompt": CHAT, "verifier": "exact", "meta": {"a": 1}})
    found = load(path)
    assert {prompt.id: prompt for prompt in found} == {
        **{row["id"]: Prompt(row["id"], row["prompt"], row["answer"]) for row in rows},
        "chat": Prompt("chat", tuple(CHAT), None, "exact", {"a": 1}),
    }
    assert len(found) == 51
    assert [prompt.id for prompt in found] != sorted(prompt.id for prompt in found)


def test_the_order_of_the_lines_does_not_matter_and_a_smaller_draw_is_the_beginning(tmp_path):
    rows = [{"id": f"{n}", "prompt": f"Question {n}?"} for n in range(30)]
    there, back = write(tmp_path / "a.jsonl", *rows), write(tmp_path / "b.jsonl", *rows[::-1])
    assert load(there) == load(back)
    assert load(there, size=7) == load(there)[:7]
    assert load(there, seed=1) != load(there)
    assert load_prompts(Prompts(path=there), 1) == load(there, seed=1)
    renamed = write(tmp_path / "c.jsonl", *({**row, "id": f"x{99 - int(row['id'])}"} for row in rows))
    assert [prompt.prompt for prompt in load(renamed)] == [prompt.prompt for prompt in load(there)]


def test_equal_questions_are_one_if_their_answers_are_equal(tmp_path):
    first = {"id": "a", "prompt": "What  is\n1 + 1? ", "answer": "2"}
    second = {"id": "b", "prompt": [{"role": "user", "content": "What is 1 + 1?"}], "answer": "2"}
    assert [prompt.id for prompt in load(write(tmp_path / "a.jsonl", first, second))] == ["a"]
    with pytest.raises(ValueError, match="one answer to a question, got '2' for 'a' and '3' for 'b'; .* Mend"):
        load(write(tmp_path / "a.jsonl", first, {**second, "answer": "3"}))


def test_the_instruction_follows_the_question_and_the_chat_of_a_text_is_a_turn(tmp_path):
    path = write(tmp_path / "a.jsonl", {"id": "a", "prompt": "1 + 1?"}, {"id": "b", "prompt": CHAT})
    text, chat = sorted(load(path, instruction=" Number only."), key=lambda prompt: prompt.id)
    assert messages(text) == [{"role": "user", "content": "1 + 1? Number only."}]
    assert messages(chat) == [CHAT[0], {"role": "user", "content": "Capital? Number only."}]
    assert CHAT[1]["content"] == "Capital?"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "one JSON object per line, got bad JSON at {file}:2; Expecting property name"),
        ("[1]", "one JSON object per line, got a list at {file}:2"),
        ({"prompt": "b?"}, 'the field "id" must be a non-empty string, got none at {file}:2'),
        ({"id": "", "prompt": "b?"}, 'the field "id" must be a non-empty string, got none at {file}:2'),
        ({"id": 7, "prompt": "b?"}, 'the field "id" must be a string, got 7 at {file}:2'),
        ({"id": "a", "prompt": "b?"}, "each \"id\" once, got 'a' at {file}:1 and at {file}:2"),
        ({"id": "b"}, 'the field "prompt" must be a non-empty text or a list of messages, got None at {file}:2'),
        ({"id": "b", "prompt": " "}, "the field \"prompt\" must be a non-empty text .*, got ' ' at {file}:2"),
        ({"id": "b", "prompt": []}, 'the field "prompt" must be a non-empty text or a list of messages, got [] at'),
        (
            {"id": "b", "prompt": [{"role": "user"}]},
            'each message of "prompt" must be {{"role": text, "content": text}}',
        ),
        (
            {"id": "b", "prompt": [*CHAT, {"role": "assistant", "content": "Rome"}]},
            "the last message of \"prompt\" must not be of the assistant, got 'Rome' at {file}:2",
        ),
        ({"id": "b", "prompt": "b?", "answer": 7}, 'the field "answer" must be a string, got 7 at {file}:2'),
        ({"id": "b", "prompt": "b?", "verifier": 7}, 'the field "verifier" must be a string, got 7 at {file}:2'),
        ({"id": "b", "prompt": "b?", "meta": "x"}, "the field \"meta\" must be a JSON object, got 'x' at {file}:2"),
        ({"id": "b", "prompt": "b?", "gold": "7"}, 'got "gold" at {file}:2; what a verifier reads besides goes into'),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, message):
    path = write(tmp_path / "a.jsonl", {"id": "a", "prompt": "a?"}, row)
    pattern = re.escape(message.format(file=path)).replace(re.escape(".*"), ".*")
    with pytest.raises(ValueError, match=pattern):
        load(path)


def test_null_is_as_good_as_absent(tmp_path):
    row = {"id": "a", "prompt": "a?", "answer": None, "verifier": None, "meta": None}
    assert load(write(tmp_path / "a.jsonl", row)) == [Prompt("a", "a?")]


def test_a_bad_path_is_named(tmp_path):
    with pytest.raises(ValueError, match="prompts.path must name the prompts, got ''"):
        load("")
    with pytest.raises(ValueError, match=r"must be an existing .jsonl file or .*, got 'no.jsonl'; no such file"):
        load("no.jsonl")
    with pytest.raises(ValueError, match=r"must be a .jsonl file or .*, got 'arit:sum1'. Did you mean 'arith'"):
        load("arit:sum1")
    with pytest.raises(ValueError, match=r"must hold prompts, got the empty file .*a.jsonl"):
        load(write(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b"{\xff}")
    with pytest.raises(ValueError, match=r"must hold UTF-8 text, got byte 0xff at offset 1 of .*b.jsonl"):
        load(tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match="prompts.size must be at most 1, got 2; .* has no more distinct questions"):
        load(write(tmp_path / "a.jsonl", {"id": "a", "prompt": "a?"}), size=2)


# --- the built-in task: the questions are read again, and worked out by other means


def worked_out(prompt):
    text = prompt.prompt
    if match := re.fullmatch(r"What is (\d+) ([-+*/]) (\d+)\?", text):
        return str(int(eval("".join(match.groups()))))
    if match := re.fullmatch(r"What is the greatest common divisor of (\d+) and (\d+)\?", text):
        a, b = map(int, match.groups())
        return str(next(d for d in range(a, 0, -1) if a % d == b % d == 0))
    if match := re.fullmatch(r'How many times does the letter "(.)" occur in the word "(\w+)"\?', text):
        return str(len(match[2].split(match[1])) - 1)
    return follows(text)


def follows(text):
    """Does the claim hold in every world that keeps the premises? A world: which of 8 places in 3 sets are taken."""
    match = re.fullmatch(r"(.+?)\. (.+?)\. Does it follow that (.+?)\? Answer yes or no\.", text)
    names = sorted(set(re.findall(r"(\w+) are (\w+)", match[1])[0]) | set(re.findall(r"(\w+) are (\w+)", match[2])[0]))

    def holds(claim, things):
        how, a, b = re.fullmatch(r"(all|no|some) (\w+) are (\w+)", claim.lower()).groups()
        both = [thing[names.index(b)] for thing in things if thing[names.index(a)]]
        return {"all": all(both), "no": not any(both), "some": any(both)}[how]

    kinds = [tuple(bool(n >> bit & 1) for bit in range(3)) for n in range(8)]
    worlds = [[kinds[i] for i in range(8) if world >> i & 1] for world in range(1, 256)]
    possible = [world for world in worlds if holds(match[1], world) and holds(match[2], world)]
    return "yes" if all(holds(match[3], world) for world in possible) else "no"


def test_the_small_kinds_are_all_there_is_and_the_answers_are_right():
    every = {kind: load(f"arith:{kind}") for kind in ("sum1", "arith1", "gcd", "letters")}
    assert {kind: len(found) for kind, found in every.items()} == {
        "sum1": 200,
        "arith1": 300 + sum(a % b == 0 for a in range(10) for b in range(1, 10)),
        "gcd": 29 * 28,
        "letters": len(every["letters"]),
    }
    for prompt in (prompt for found in every.values() for prompt in found):
        assert prompt.answer == worked_out(prompt), prompt
        assert prompt.verifier == "numeric"


def test_the_large_kinds_are_right_too():
    for prompt in load("arith:sum2", size=300):
        assert prompt.answer == worked_out(prompt), prompt
    syllogisms = load("arith:syll", size=200)
    assert {prompt.answer for prompt in syllogisms} == {"yes", "no"}
    for prompt in syllogisms:
        assert prompt.answer == worked_out(prompt), prompt
        assert (prompt.verifier, prompt.meta["choices"]) == ("choice", ["yes", "no"])
    orders = load("arith:order", size=300)
    for prompt in orders:
        pairs = re.findall(r"(\w+) is \w+ than (\w+)\.", prompt.prompt)
        above = {low: high for high, low in pairs}
        (first,) = {high for high, _ in pairs} - set(above)
        (last,) = set(above) - {high for high, _ in pairs}
        asked_for_first = any(word in prompt.prompt for word in ("tallest", "oldest", "fastest"))
        assert prompt.answer == (first if asked_for_first else last), prompt
        assert sorted({name for pair in pairs for name in pair}) == prompt.meta["choices"]


def test_a_mixture_has_equal_shares_as_far_as_they_reach():
    found = load("arith", size=400)
    assert Counter(prompt.meta["kind"] for prompt in found) == dict.fromkeys(("sum1", "arith1", "sum2", "gcd"), 100)
    found = load("arith:sum1,sum2", size=1000)
    assert Counter(prompt.meta["kind"] for prompt in found) == {"sum1": 200, "sum2": 800}


def test_no_question_comes_twice_and_ids_are_unique():
    found = load("arith:sum1,arith1,gcd,letters")
    assert len({prompt.prompt for prompt in found}) == len({prompt.id for prompt in found}) == len(found)
    assert len(found) < sum(len(load(f"arith:{kind}")) for kind in ("sum1", "arith1", "gcd", "letters"))


def test_an_unknown_kind_is_named():
    with pytest.raises(
        ValueError, match="prompts.path 'arith:...' must be a known name .*, got 'sum3'. Did you mean 'sum"
    ):
        load("arith:sum3")
    assert set(KINDS) == {"sum1", "sum2", "arith1", "gcd", "letters", "syll", "order"}


# --- the split


def side_of(prompts, **settings):
    heldout, train = split_prompts(prompts, Prompts(**settings))
    assert sorted(map(repr, heldout + train)) == sorted(map(repr, prompts))
    return {prompt.prompt.split("?")[0]: name for name, side in (("h", heldout), ("t", train)) for prompt in side}


def test_a_question_is_on_the_same_side_whatever_is_around_it():
    whole = side_of(load("arith:sum1,gcd,letters"))
    for settings in ({"size": 300}, {"size": 900, "instruction": " Reply with the answer only."}):
        part = side_of(load("arith:letters,gcd", **settings), **settings)
        assert part.items() <= whole.items()
        assert set(part.values()) == {"h", "t"}
    other = side_of(load("arith:sum1,gcd,letters"), seed=1)
    assert other != whole


def test_neither_the_instruction_nor_the_id_changes_the_side_of_a_question(tmp_path):
    texts = [f"Question {n}?" for n in range(40)]
    chats = [[CHAT[0], {"role": "user", "content": text}] for text in texts]
    path = write(tmp_path / "a.jsonl", *({"id": str(n), "prompt": prompt} for n, prompt in enumerate(texts + chats)))
    said = Prompts(path=path, instruction=" Number only.")
    plain = {prompt.id for prompt in split_prompts(load(path), Prompts())[0]}
    assert {prompt.id for prompt in split_prompts(load_prompts(said), said)[0]} == plain
    assert 0 < len(plain) < 80
    turned = [Prompt(f"x{prompt.id}", prompt.prompt) for prompt in load(path)]
    assert {prompt.id for prompt in split_prompts(turned, Prompts())[0]} == {f"x{name}" for name in plain}


def test_what_is_one_thing_to_know_is_on_one_side():
    side = side_of(load("arith:sum1,arith1,gcd"))
    for a in range(10):
        for b in range(10):
            for sign in "+*":
                assert side[f"What is {a} {sign} {b}"] == side[f"What is {b} {sign} {a}"]
    assert math.isclose(Counter(side.values())["h"] / len(side), 0.2, abs_tol=0.05)


def test_held_out_shares_grow_and_nothing_changes_sides_back(tmp_path):
    prompts = [Prompt(str(n), f"Question {n}?") for n in range(400)]
    few, many = (side_of(prompts, heldout_fraction=fraction) for fraction in (0.1, 0.4))
    assert {question for question, side in few.items() if side == "h"} < {q for q, side in many.items() if side == "h"}
    assert math.isclose(Counter(many.values())["h"], 160, abs_tol=40)


def test_a_side_that_stays_empty_is_refused_unless_nothing_is_to_be_held_out():
    prompts = [Prompt("a", "a?")]
    assert split_prompts(prompts, Prompts(heldout_fraction=0.0)) == ([], prompts)
    for fraction in (0.01, 0.99):
        with pytest.raises(ValueError, match="prompts.heldout_fraction must leave prompts on both sides, got 0"):
            split_prompts(prompts, Prompts(heldout_fraction=fraction))


# --- the fingerprint, the shares


def test_the_fingerprint_sees_every_field_and_no_order():
    prompts = [Prompt("a", "a?", "1", "numeric", {"tolerance": 0.1}), Prompt("b", tuple(CHAT))]
    changed = [
        [Prompt("c", *list(vars(prompts[0]).values())[1:]), prompts[1]],
        [Prompt("a", "A?", "1", "numeric", {"tolerance": 0.1}), prompts[1]],
        [Prompt("a", "a?", "2", "numeric", {"tolerance": 0.1}), prompts[1]],
        [Prompt("a", "a?", "1", "exact", {"tolerance": 0.1}), prompts[1]],
        [Prompt("a", "a?", "1", "numeric", {"tolerance": 0.2}), prompts[1]],
        [prompts[0], Prompt("b", tuple(CHAT[1:]))],
        prompts[:1],
    ]
    assert fingerprint(prompts) == fingerprint(prompts[::-1])
    assert len({fingerprint(prompts), *map(fingerprint, changed)}) == 1 + len(changed)
    assert re.fullmatch("[0-9a-f]{64}", fingerprint(prompts))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(0, 100))
def test_shares_are_as_equal_as_they_can_be(counts, size):
    size = min(size, sum(counts))
    shares = _shares(counts, size)
    assert sum(shares) == size
    assert all(0 <= share <= count for share, count in zip(shares, counts, strict=True))
    short = [share for share, count in zip(shares, counts, strict=True) if share < count]
    assert not short or max(shares) - min(short) <= 1  # only what is used up has much less


# --- reasoning-gym, with generators of our own in its place


@pytest.fixture
def gym(monkeypatch):
    module = types.ModuleType("reasoning_gym")
    module.factory = types.SimpleNamespace(DATASETS={"few": 1, "many": 1})

    def create_dataset(name, size, seed):
        limit = 5 if name == "few" else 10**6
        return [
            {"question": f"{name} {(seed * 7919 + n) % limit}?", "answer": "1", "metadata": {}} for n in range(size)
        ]

    module.create_dataset = create_dataset
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)


def test_reasoning_gym_gives_distinct_questions_with_their_entries(gym):
    found = load("reasoning_gym:many", size=12)
    assert len({prompt.prompt for prompt in found}) == len({prompt.id for prompt in found}) == 12
    assert found == load("reasoning_gym:many", size=12) != load("reasoning_gym:many", size=12, seed=1)
    for prompt in found:
        assert prompt.verifier == "reasoning_gym"
        about = prompt.meta["reasoning_gym"]
        assert (about["generator"], about["entry"]["question"]) == ("many", prompt.prompt)


@pytest.mark.parametrize(
    ("path", "size", "message"),
    [
        ("reasoning_gym:many", 0, "prompts.size must be positive for reasoning_gym, got 0"),
        ("reasoning_gym:few", 6, "prompts.size must be at most what the generators have, got 6; few gave 5 distinct"),
        ("reasoning_gym:", 6, "prompts.path must name generators after 'reasoning_gym:'"),
        (
            "reasoning_gym:man",
            6,
            "prompts.path 'reasoning_gym:...' must be a known name .*got 'man'. Did you mean 'many'",
        ),
    ],
)
def test_what_reasoning_gym_cannot_give_is_refused(gym, path, size, message):
    with pytest.raises(ValueError, match=message):
        load(path, size=size)


def test_without_reasoning_gym_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="got 'reasoning_gym:gcd'; .* Install it: pip install reasoning-gym"):
        load("reasoning_gym:gcd", size=3)
