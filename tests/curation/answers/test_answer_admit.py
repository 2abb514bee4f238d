"""From files to the answers that may be selected: every row has one reason, nothing is judged twice, memory is flat."""

import dataclasses
import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
from written_pools import HELDOUT, QUESTIONS, SETTINGS, admitted, index, lines_of, right, row, write, write_teachers

from kdjax import verifiers
from kdjax.config import Answers, Data
from kdjax.curation.answers.encode import coding
from kdjax.curation.answers.loops import repeated_share
from kdjax.curation.answers.pool import NONE, REASONS, candidates, digest_of, open_pool, reader
from kdjax.curation.answers.verify import admit, admitted_answers, right_shares
from kdjax.data.prompts import Prompt, question_digest
from kdjax.generation.store import Rollout, open_store
from kdjax.models.synthetic import make_tokenizer
from kdjax.verifiers import Finding, Verdict

ONE = QUESTIONS[1]


@pytest.fixture
def judged(monkeypatch):
    """The (id, response) that the verifier 'says' was asked about: right unless the text says otherwise."""
    asked = []

    def says(response, prompt):
        asked.append((prompt.id, response))
        return Finding(Verdict(response.split()[0] if response.split()[0] in tuple(Verdict) else "right"), "", "why")

    monkeypatch.setitem(verifiers.VERIFIERS, "says", says)
    return asked


def texts(found, settings=SETTINGS):
    return {
        prompt.id: [(one.teacher, one.text) for one in answers] for prompt, answers in admitted_answers(found, settings)
    }


def test_every_row_has_one_reason_and_counts_add_up(tmp_path, judged):
    write(
        tmp_path / "pool" / "ada.jsonl",
        [
            "no json",
            json.dumps({"id": "q1"}),
            row(Prompt("who", "?"), "2"),
            row(HELDOUT[0], "18"),
            row(ONE, "  "),
            row(ONE, "wrong it is"),
            row(ONE, "undecided it is"),
            row(ONE, "round and round and round and round " * 9),
            row(ONE, "a first"),
            row(ONE, "a second"),
            row(QUESTIONS[2], "the same"),
        ],
    )
    write(tmp_path / "pool" / "bob.jsonl", [row(QUESTIONS[2], "the  same\n"), row(ONE, "b")])
    found = admitted(tmp_path, tmp_path / "pool", verifier="says")
    listed = lines_of(tmp_path / "answers" / "admitted.jsonl")
    assert [(one["teacher"], one["id"], one["reason"]) for one in listed] == [
        ("ada", "", "malformed"),
        ("ada", "", "malformed"),
        ("ada", "who", "unknown_question"),
        ("ada", "h0", "heldout"),
        ("ada", "q1", "empty"),
        ("ada", "q1", "wrong"),
        ("ada", "q1", "undecided"),
        ("ada", "q1", "loop"),
        ("ada", "q1", ""),
        ("ada", "q1", "duplicate"),
        ("bob", "q1", ""),
        ("ada", "q2", ""),
        ("bob", "q2", "identical"),
    ]
    assert listed[1]["where"].endswith("ada.jsonl:2")
    assert listed[1]["why"] == 'the field "teacher_output" or "output" is missing'
    assert (listed[5]["why"], listed[-1]["why"]) == ("why", "ada says the same")
    assert "where" not in listed[-2]
    counts = json.loads((tmp_path / "answers" / "admitted.manifest.json").read_text())["counts"]
    assert counts == found.counts
    assert counts["rows"] == sum(counts["reasons"].values()) == len(listed) == 13
    assert {name: sum(of[name] for of in counts["teachers"].values()) for name in REASONS} == counts["reasons"]
    assert counts["teachers"]["bob"]["identical"] == 1
    assert (counts["questions"], counts["questions_without_answer"]) == (6, 4)
    assert texts(found)["q1"] == [("ada", "a first"), ("bob", "b")]
    assert texts(found)["q0"] == []
    assert len({one["row"] for one in listed if one["row"]}) == 11
    assert sorted(set(judged)) == sorted(judged), "nothing is judged twice"
    assert len(judged) == 8


def test_answers_of_nobody_and_to_other_questions(tmp_path, judged):
    """A name is missing where others have one, or blank; an id is one of the prompts', but another question's there."""
    paris = dataclasses.replace(ONE, prompt="What is the capital of France?")
    quick = dataclasses.replace(ONE, prompt=ONE.prompt + " Be quick.")
    turns = ({"role": "system", "content": "Add."}, {"role": "user", "content": QUESTIONS[2].prompt + " Be quick."})
    write(
        tmp_path / "p" / "all.jsonl",
        [
            row(ONE, "nameless"),
            row(ONE, "a", teacher="ada"),
            row(ONE, "blank", teacher="  "),
            row(paris, "b", teacher="bob"),
            row(quick, "c", teacher="cy"),
            row(QUESTIONS[2], "d", teacher="dee"),
        ],
    )
    write(tmp_path / "p" / "eve.jsonl", [row(ONE, "named by the file"), row(ONE, "blank", teacher="")])
    with open_store(tmp_path / "p" / "mid", {"model": "m"}, {}) as store:
        store.append(Rollout("q1", 0, "to this", "stop", asks=question_digest(ONE)))
        store.append(Rollout("q1", 1, "to another", "stop", asks=question_digest(paris)))
    train = [quick, dataclasses.replace(QUESTIONS[2], prompt=turns)]
    pool = open_pool([str(tmp_path / "p")], train, [], " Be quick.")
    found = admit(tmp_path, pool, Answers(), "says")
    assert texts(found) == {
        "q1": [("ada", "a"), ("cy", "c"), ("eve", "named by the file"), ("mid", "to this")],
        "q2": [("dee", "d")],
    }
    assert found.counts["reasons"] == dict.fromkeys(REASONS, 0) | {"": 5, "unknown_teacher": 3, "other_question": 2}
    assert found.counts["teachers"]["all"]["unknown_teacher"] == 2, "counted with the file"
    listed = lines_of(tmp_path / "answers" / "admitted.jsonl")
    refused = [(one["reason"], one["where"].rpartition("/")[2], one.get("why")) for one in listed if one["reason"]]
    assert refused == [
        ("unknown_teacher", "all.jsonl:1", None),
        ("unknown_teacher", "all.jsonl:3", None),
        ("other_question", "all.jsonl:4", "it asks 'What is the capital of France?'"),
        ("unknown_teacher", "eve.jsonl:2", None),
        ("other_question", "rollouts.jsonl:2", f"it asks {question_digest(paris)!r}"),
    ]


def test_row_digests_are_of_question_teacher_and_text(tmp_path):
    write(tmp_path / "ada.jsonl", [row(ONE, "2"), row(ONE, "2"), row(QUESTIONS[2], "2")])
    pool = index(tmp_path)
    with reader(pool) as read:
        found = [one.row for number in range(6) for one in candidates(pool, read, number)]
    assert found[0] == hashlib.blake2b(b"2 3 0 q1ada2", digest_size=8).hexdigest()
    assert len(set(found)) == 3, "the same answer given twice is two rows"
    said = [("q1", "ada", "2"), ("q", "1ada", "2"), ("q1a", "da", "2"), ("q1", "ad", "a2"), ("q1", "ada", " 2")]
    assert len({digest_of(*one) for one in said}) == 5


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (Answers(), [("ada", "x"), ("cy", "z")]),
        (Answers(identical="all"), [("ada", "x"), ("bob", "x"), ("cy", "z")]),
        (Answers(duplicates="all"), [("ada", "x"), ("ada", "x"), ("ada", "y"), ("cy", "z")]),
        (Answers(loops=1.0), [("ada", "x"), ("cy", "l l l")]),
        (
            Answers(official=True),
            [("ada", "x"), ("ada", "x"), ("ada", "y"), ("bob", "x"), ("cy", "l l l"), ("cy", "z")],
        ),
    ],
)
def test_what_is_there_twice(tmp_path, judged, settings, kept):
    write(tmp_path / "p" / "ada.jsonl", [row(ONE, "wrong"), row(ONE, "x"), row(ONE, "x"), row(ONE, "y")])
    write(tmp_path / "p" / "bob.jsonl", [row(ONE, "x")])
    write(tmp_path / "p" / "cy.jsonl", [row(ONE, "l l l"), row(ONE, "z")])
    assert texts(admitted(tmp_path, tmp_path / "p", settings=settings, verifier="says"))["q1"] == kept


def test_answers_that_are_cut_off_are_listed_and_counted(tmp_path, judged):
    """Those that are kept so; a stop in between loses no count."""
    write_teachers(tmp_path / "p", answer=lambda question, number: "so " * 2**number)
    data = Data(seq_len=len(f"{ONE.prompt}\nso so "), chat_template=False)

    def counts(truncated):
        settings = Answers(truncated=truncated, loops=1.0)
        of = coding(make_tokenizer(), data, settings)
        return admitted(tmp_path, tmp_path / "p", settings=settings, verifier="says", of=of).counts

    assert (counts("drop")["truncated"], counts("drop")["reasons"]["truncated"]) == (0, 12)
    kept = counts("keep")
    assert (kept["truncated"], kept["reasons"][""], kept["reasons"]["truncated"]) == (12, 18, 0)
    path = tmp_path / "answers" / "admitted.jsonl"
    assert {one["teacher"] for one in lines_of(path) if one.get("truncated")} == {"bob", "cy"}
    path.write_bytes(path.read_bytes()[:900])
    assert counts("keep") == kept


def test_loops():
    steps = " ".join(
        f"Step {n}: add {n} to {n * n} to get {n + n * n}, so the sum is now {n + n * n}." for n in range(20)
    )
    latex = "\\[ x^2 + 3x + 2 = 0 \\] We factor it: \\[ (x + 1)(x + 2) = 0 \\] so \\( x = -1 \\) or \\( x = -2 \\)."
    for answer in ("7", "7 + 7", "x = x", "1 11", "1, 1", "2 + 2 = 4", steps, latex, f"{latex} {steps}"):
        assert repeated_share(answer) <= 0.5, answer
        if len(answer.split()) > 1:
            for between in (" ", "\n\n"):
                assert repeated_share(answer + between + answer) == 1.0
        if len(answer.split()) > 4:
            assert repeated_share(answer + answer) > 0.5
    assert repeated_share(steps + " wait, let me check that once more from the start" * 40) > 0.5
    assert repeated_share(" ".join(map(str, range(100)))) == 0.0
    # 10 words twice, among 40: 20 of 40
    assert repeated_share(" ".join([*"abcdefghij", *map(str, range(20)), *"abcdefghij"])) == 0.5


def test_rollouts_of_a_run_are_a_teacher(tmp_path, judged):
    depends = {"model": "m"}
    with open_store(tmp_path / "mid", depends, {}) as store:
        store.append(Rollout("q1", 0, "wrong", "stop"))
        store.append(Rollout("q1", 1, "undecided", "length"))
        store.append(Rollout("q1", 2, "", "failed", reason="HTTP 500"))
        store.append(Rollout("q1", 3, "2 and then", "length"))
        store.append(Rollout("q1", 4, "2", "stop"))
    found = admitted(tmp_path, tmp_path / "mid", settings=Answers(duplicates="all"), verifier="says")
    listed = lines_of(tmp_path / "answers" / "admitted.jsonl")
    assert [(one["teacher"], one["reason"]) for one in listed] == [
        ("mid", "empty"),
        ("mid", "wrong"),
        ("mid", "wrong"),  # cut off, and nothing says that it is right
        ("mid", ""),
        ("mid", ""),
    ]
    assert listed[0]["why"] == "HTTP 500"
    answers = next(answers for prompt, answers in admitted_answers(found, Answers()) if prompt.id == "q1")
    assert [(one.text, one.cut_off) for one in answers] == [("2 and then", True), ("2", False)]


def test_folders_of_one_name_must_be_of_one_model(tmp_path):
    for folder, model in (("a", "m"), ("b", "m"), ("c", "other")):
        with open_store(tmp_path / folder / "big", {"model": model}, {}) as store:
            store.append(Rollout("q1", 0, "2", "stop"))
    assert index(tmp_path / "a" / "big", tmp_path / "b" / "big").teachers == ("big",)
    with pytest.raises(ValueError, match="name each teacher's folder differently, got '.*a/big' and '.*c/big'"):
        index(tmp_path / "a" / "big", tmp_path / "c" / "big")
    (tmp_path / "a" / "big" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="directories of launch.generate, got '.*a/big' without a whole manifest.json"):
        index(tmp_path / "a")


def test_the_index_is_the_same_whatever_the_order_of_files_and_prompts(tmp_path):
    write_teachers(tmp_path / "one")
    rows = [row(question, right(question, 5), teacher="dee") for question in QUESTIONS]
    write(tmp_path / "dee.jsonl", [*rows, "bad"])
    paths = [tmp_path / "one", tmp_path / "dee.jsonl"]
    first, second = index(*paths), index(*paths[::-1], train=QUESTIONS[::-1])
    for name in ("file", "line", "offset", "question", "teacher", "reason", "first"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name
    assert first.teachers == ("ada", "bob", "cy", "dee")
    assert len(first) == 25
    assert list(first.of(NONE)) == [0]
    assert [len(first.of(number)) for number in range(6)] == [4] * 6
    assert first.content == second.content


def test_a_question_that_its_verifier_cannot_check_has_undecided_answers(tmp_path):
    bare = Prompt("q9", "Why?")
    write(tmp_path / "p" / "ada.jsonl", [row(ONE, "2"), row(bare, "so")])
    admitted(tmp_path, tmp_path / "p", train=[*QUESTIONS, bare])
    last = lines_of(tmp_path / "answers" / "admitted.jsonl")[-1]
    assert (last["id"], last["reason"]) == ("q9", "undecided")
    assert 'must have an "answer"' in last["why"]


def test_what_is_wrong_with_all_of_it_is_an_error(tmp_path):
    write(tmp_path / "p" / "ada.jsonl", [row(ONE, "3"), "bad"])
    with pytest.raises(ValueError, match=r"must hold right answers .* none in 2 rows \(malformed 1, wrong 1\)"):
        admitted(tmp_path, tmp_path / "p")
    for verifier, message in (("", "prompts.verifier must be set"), ("numerik", "Did you mean 'numeric'")):
        with pytest.raises(ValueError, match=message):
            admitted(tmp_path, tmp_path / "p", verifier=verifier)


def test_a_second_run_judges_nothing_and_other_settings_judge_anew(tmp_path, judged):
    write_teachers(tmp_path / "p")
    first = admitted(tmp_path, tmp_path / "p", verifier="says")
    path = tmp_path / "answers" / "admitted.jsonl"
    before = path.read_bytes()
    assert len(judged) == 18
    again = admitted(tmp_path, tmp_path / "p", verifier="says")
    assert len(judged) == 18
    assert path.read_bytes() == before
    assert again.counts == first.counts
    assert np.array_equal(again.reason, first.reason)
    admitted(tmp_path, tmp_path / "p", settings=Answers(loops=0.9), verifier="says")
    assert len(judged) == 36
    write(tmp_path / "p" / "dee.jsonl", [row(ONE, "2")])
    admitted(tmp_path, tmp_path / "p", verifier="says")
    assert len(judged) == 36 + 19


def test_a_kill_at_any_byte_loses_and_repeats_nothing(tmp_path, judged):
    write_teachers(tmp_path / "p", answer=lambda question, number: "same" if number < 2 else "other")
    write(tmp_path / "p" / "bob2.jsonl", ["bad", *(row(question, "more", teacher="bob") for question in QUESTIONS)])
    whole = admitted(tmp_path, tmp_path / "p", verifier="says")
    assert whole.counts["reasons"] | {} == dict.fromkeys(REASONS, 0) | {
        "": 18,
        "malformed": 1,
        "identical": 6,
    }, "bob's first right answer is ada's, so his second counts"
    path = tmp_path / "answers" / "admitted.jsonl"
    content = path.read_bytes()
    for cut in [0, 1, *random.Random(0).sample(range(len(content)), 20), len(content) - 1]:
        path.write_bytes(content[:cut])
        judged.clear()
        found = admitted(tmp_path, tmp_path / "p", verifier="says")
        assert path.read_bytes() == content
        assert found.counts == whole.counts
        assert len(judged) == 24 - max(0, content[:cut].count(b"\n") - 1)


def test_lines_of_another_hand_are_refused(tmp_path):
    write_teachers(tmp_path / "p")
    admitted(tmp_path, tmp_path / "p")
    path = tmp_path / "answers" / "admitted.jsonl"
    path.write_text(path.read_text().replace('"ada"', '"eve"'))
    with pytest.raises(ValueError, match="line 1 must be of row 1 of the pool, got .*'eve'"):
        admitted(tmp_path, tmp_path / "p")


def test_a_file_that_changes_meanwhile_is_told(tmp_path):
    write_teachers(tmp_path / "p")
    pool = index(tmp_path / "p")
    write(tmp_path / "p" / "bob.jsonl", [row(question, "?" * 400) for question in QUESTIONS])
    message = "must not change while it is read, got another line at .*bob.jsonl:2"
    with reader(pool) as read, pytest.raises(ValueError, match=message):
        candidates(pool, read, 1)


def test_candidates_are_drawn_by_seed_and_question(tmp_path):
    write_teachers(tmp_path / "p", teachers=[f"t{number}" for number in range(9)])
    found = admitted(tmp_path, tmp_path / "p")

    def drawn(**settings):
        said = texts(found, Answers(**settings))
        return {name: [teacher for teacher, _ in answers] for name, answers in said.items()}

    three = drawn(candidates=3)
    assert three == drawn(candidates=3)
    assert all(len(names) == 3 and names == sorted(names) for names in three.values())
    assert len({tuple(names) for names in three.values()}) > 1
    assert three != drawn(candidates=3, seed=1)
    assert drawn(candidates=20) == drawn()


def test_the_share_of_right_answers(tmp_path, judged):
    write(tmp_path / "p" / "ada.jsonl", [row(ONE, "a"), row(ONE, "b"), row(QUESTIONS[2], "wrong")])
    write(tmp_path / "p" / "bob.jsonl", [row(ONE, "a"), row(QUESTIONS[2], "l l l"), row(HELDOUT[0], "a")])
    write(tmp_path / "p" / "cy.jsonl", ["bad"])
    found = admitted(tmp_path, tmp_path / "p", verifier="says")
    # identical texts and loops are right answers; two questions are answered in all
    assert right_shares(found) == {"ada": 0.5, "bob": 1.0, "cy": 0.0}
    write(tmp_path / "p" / "ada.jsonl", [row(ONE, "a"), *[row(ONE, "wrong")] * 2, row(QUESTIONS[2], "")])
    write(tmp_path / "p" / "cy.jsonl", [row(QUESTIONS[2], "a"), row(QUESTIONS[2], "b")])
    found = admitted(tmp_path, tmp_path / "p", verifier="says")
    # a third of ada's answers to one question, and none to the other; both of cy's to one
    assert right_shares(found) == {"ada": pytest.approx(1 / 6), "bob": 1.0, "cy": 0.5}


SLOW = """
import sys
from pathlib import Path
from written_pools import admitted
from kdjax import verifiers
from kdjax.data.prompts import Prompt
from kdjax.verifiers import Finding, Verdict

def slow(response, prompt):
    with open(sys.argv[2] + "/asked", "a") as file:
        file.write(response + "\\n")
    return Finding(Verdict.RIGHT, response)

verifiers.VERIFIERS["slow"] = slow
train = [Prompt(f"q{number}", "?", "1") for number in range(300)]
said = lambda done, total: print(done, flush=True)
admitted(Path(sys.argv[2]), sys.argv[1], train=train, verifier="slow", on_progress=said)
"""


def script(tmp_path, source, *arguments):
    """A command that runs this source; a verifier must have a file of its own."""
    (tmp_path / "script.py").write_text(source)
    return [sys.executable, str(tmp_path / "script.py"), *map(str, arguments)]


def environment():
    here = pathlib.Path(__file__)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parents[3]), str(here.parent)])}


def test_kill_9_of_a_process_that_verifies(tmp_path):
    """What was judged is in the file but for the one answer it died at."""
    questions = [Prompt(f"q{number}", "?", "1") for number in range(300)]
    write_teachers(tmp_path / "p", questions, answer=lambda question, number: f"{question.id} {number}")
    command = script(tmp_path, SLOW, tmp_path / "p", tmp_path)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    for _ in range(40):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    path = tmp_path / "answers" / "admitted.jsonl"
    there = path.read_bytes().count(b"\n")
    assert 120 <= there < 900
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment())
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(set(asked)) == 900
    assert len(asked) <= 901
    assert len(lines_of(path)) == 900


MEMORY = """
import resource, sys
from pathlib import Path
from kdjax import verifiers
from kdjax.config import Answers
from kdjax.curation.answers.pool import open_pool
from kdjax.curation.answers.scored import open_scored
from kdjax.curation.answers.selected import select
from kdjax.curation.answers.verify import admit, admitted_answers
from kdjax.data.prompts import Prompt
from kdjax.verifiers import Finding, Verdict

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

folder, questions, settings = Path(sys.argv[1]), int(sys.argv[2]), Answers()
right = Finding(Verdict.RIGHT, "x")
verifiers.VERIFIERS["yes"] = lambda response, prompt: right
train = [Prompt(f"q{n}", "?", "1") for n in range(questions)]
before = peak()
pool = open_pool([str(folder / "p")], train, [])
found = admit(folder, pool, settings, "yes")
with open_scored(folder / "answers" / "scored-0.jsonl", {}) as scored:
    for prompt, answers in admitted_answers(found, settings):
        for one in answers:
            scored.append(one.row, prompt.id, one.teacher, {"answer_nll": len(one.teacher) + 1.0, "n_answer": 9.0})
    counts = select(folder, found, Answers(score="grape"), scored=scored)
print(len(pool), counts["rows"], peak() - before)
"""


def test_a_hundred_thousand_answers_in_flat_memory(tmp_path):
    """125 MB of answers take a few bytes each of memory, from the files to the selection."""
    questions, filler = 10_000, "x" * 1200
    (tmp_path / "p").mkdir()
    for number in range(10):
        with open(tmp_path / "p" / f"t{number}.jsonl", "w", encoding="utf-8") as file:
            for at in range(questions):
                file.write(f'{{"id": "q{at}", "instruction": "?", "output": "{number} {at}{filler}"}}\n')
    command = script(tmp_path, MEMORY, tmp_path, questions)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment())
    rows, selected, grown = done.stdout.split()
    assert (int(rows), int(selected)) == (100_000, questions)
    assert float(grown) < 40, f"{grown} MB for 125 MB of answers"
