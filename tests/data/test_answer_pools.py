"""Files of teachers' answers: what a line must be, which files a pool is, and the questions that are read from it."""

import json

import pytest

from kdjax.config import Prompts
from kdjax.data.answer_pools import PoolFile, holds_answers, lines, parse, pool_files, read_questions
from kdjax.data.prompts import load_prompts, split_prompts

ROW = {"id": "q1", "instruction": "1 + 1?", "teacher_output": "2"}
ROLLOUT = {"id": "q1", "sample": 0, "response": "2", "finish": "stop", "logp": -1.0}


def line(**changed):
    return json.dumps({name: value for name, value in {**ROW, **changed}.items() if value != "absent"}).encode()


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def of_file(path):
    return PoolFile(path, "ada", path.name == "rollouts.jsonl")


@pytest.fixture
def ada(tmp_path):
    return of_file(tmp_path / "ada.jsonl")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"id": "q1", ', "no JSON"),
        (b"\xff\xfe", "no JSON in UTF-8"),
        (b"[" * 100_000, "no JSON"),
        (b"[1]", "a list and no JSON object"),
        (b"null", "a NoneType"),
        (line(id="absent"), '"id" .* it is missing'),
        (line(id=""), "\"id\" .* got ''"),
        (line(id=1.5), '"id" .* got 1.5'),
        (line(id=True), '"id" .* got True'),
        (line(id={"a": 1}), '"id" .* got {'),
        (line(instruction="absent"), '"instruction" is missing'),
        (line(instruction=" \n"), '"instruction" is empty'),
        (line(instruction=7), '"instruction" must be a text, got 7'),
        (line(teacher_output="absent"), '"teacher_output" or "output" is missing'),
        (line(teacher_output=["2"]), '"teacher_output" must be a text, got \\['),
        (line(output=2), '"output" must be a text'),
        (line(teacher=3), '"teacher" must be a text'),
        (line(system=[]), '"system" must be a text'),
        (line(reference_answer=["2"]), '"reference_answer" must be a text'),
        (b'{"id": "q", "instruction": "?", "output": "\\ud800"}', "half of a character"),
    ],
)
def test_what_is_no_row_is_told(ada, content, why):
    with pytest.raises(ValueError, match=why):
        parse(content, ada)


@pytest.mark.parametrize(
    ("changed", "field", "value"),
    [
        ({}, "text", "2"),
        ({"teacher_output": "absent", "output": "two"}, "text", "two"),
        ({"teacher_output": "", "output": "two"}, "text", "two"),
        ({"teacher_output": " \n"}, "text", ""),
        ({}, "teacher", "ada"),
        ({"teacher": "eve"}, "teacher", "eve"),
        ({"teacher": "eve", "teacher_name": "fay"}, "teacher", "fay"),
        ({"teacher": "eve", "teacher_name": " "}, "teacher", "eve"),
        ({"teacher": "  ", "teacher_name": ""}, "teacher", ""),
        ({"teacher": None}, "teacher", "ada"),
        ({"id": 17}, "id", "17"),
        ({"reference_answer": 0.5}, "reference", "0.5"),
        ({"reference_answer": None}, "reference", None),
        ({"reference_answer": " 1/2 "}, "reference", "1/2"),
        ({"category": "algebra", "source_dataset": "math"}, "meta", {"category": "algebra", "dataset": "math"}),
        ({"nobody": "reads it", "is_common_correct": True}, "text", "2"),
    ],
)
def test_fields_of_a_row(ada, changed, field, value):
    assert getattr(parse(line(**changed), ada), field) == value
    assert getattr(parse(b"\xef\xbb\xbf" + line(**changed), ada), field) == value


def test_rollouts(tmp_path):
    file = of_file(tmp_path / "runs" / "rollouts.jsonl")
    found = parse(json.dumps(ROLLOUT | {"finish": "length"}).encode(), file)
    assert (found.id, found.teacher, found.text, found.cut_off) == ("q1", "ada", "2", True)
    failed = parse(json.dumps(ROLLOUT | {"finish": "failed", "reason": "HTTP 500"}).encode(), file)
    assert (failed.text, failed.failed) == ("", "HTTP 500")
    for wrong, why in (({"finish": "cut"}, '"finish" must be'), ({"response": None}, '"response" must be a text')):
        with pytest.raises(ValueError, match=why):
            parse(json.dumps(ROLLOUT | wrong).encode(), file)


def test_which_files_a_pool_is(tmp_path):
    """The released layout, a directory of launch.generate, a single file; whatever the order they are named in."""
    one = write(tmp_path / "pool" / "data" / "math" / "qwen.jsonl", ROW)
    two = write(tmp_path / "pool" / "data" / "deep" / "phi_teacher_responses_evaluated.jsonl", ROW)
    write(tmp_path / "pool" / "metadata" / "stats.json", {})
    write(tmp_path / "pool" / ".cache" / "old.jsonl", ROW)
    own = write(tmp_path / "big" / "rollouts.jsonl", ROLLOUT)
    write(tmp_path / "big" / "verified.jsonl", {})
    named = [str(tmp_path / "big"), str(tmp_path / "pool"), str(one)]
    found = pool_files(named)
    assert [(file.path, file.teacher, file.rollouts) for file in found] == [
        (own, "big", True),
        (two, "phi", False),
        (one, "qwen", False),
    ]
    assert pool_files(named[::-1]) == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nix.jsonl", "answers.pool must name existing .* got '.*nix.jsonl', which does not exist"),
        ("a.txt", "got '.*a.txt', no .jsonl file"),
        ("empty", "got '.*empty' without one"),
    ],
)
def test_a_pool_that_is_not_there_is_named(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=message):
        pool_files([str(tmp_path / name)])


def test_lines_begin_where_they_say(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one\n\n  \nt\xc3\xbco\r\nlast")
    content = path.read_bytes()
    found = list(lines(PoolFile(path, "a")))
    assert [(number, line) for number, _, line in found] == [(1, b"one\n"), (4, b"t\xc3\xbco\r\n"), (5, b"last")]
    assert all(content[offset:].startswith(line) for _, offset, line in found)


def question(number, **more):
    return {"id": f"q{number}", "instruction": f"{number} + 1?", "teacher_output": "long ago " * number, **more}


def test_a_pool_as_prompts(tmp_path):
    write(
        tmp_path / "b.jsonl",
        *(question(number, reference_answer=number + 1, category="sums") for number in range(20)),
        b"no json",
        {"id": "q99", "instruction": "0  +  1?", "output": "1"},  # the question of q0 again
    )
    write(tmp_path / "a.jsonl", *(question(number, dataset="made") for number in reversed(range(20))))
    settings = Prompts(path=str(tmp_path), seed=3)
    loaded = load_prompts(settings)
    by_id = {prompt.id: prompt for prompt in loaded}
    assert sorted(by_id) == sorted(f"q{number}" for number in range(20))
    assert by_id["q7"].answer == "8", "of the file that has it"
    assert by_id["q7"].prompt == "7 + 1?"
    assert by_id["q7"].meta == {"category": "sums", "dataset": "made"}
    assert holds_answers(str(tmp_path / "a.jsonl"))
    assert [prompt.id for prompt in load_prompts(Prompts(path=str(tmp_path / "a.jsonl"), seed=3))] == [
        prompt.id for prompt in loaded
    ], "the order is that of the questions"
    heldout, train = split_prompts(loaded, settings)
    assert len(heldout) + len(train) == 20
    assert load_prompts(Prompts(path=str(tmp_path), size=5))[0].prompt


def test_the_system_text_on_which_all_agree_is_the_first_turn(tmp_path):
    write(tmp_path / "a.jsonl", question(1, system="Be brief."), question(2, system="Be brief."), question(3))
    write(tmp_path / "b.jsonl", question(1, system="Be brief."), question(2, system="Be long."), question(3))
    found = {prompt.id: prompt.prompt for prompt in read_questions(str(tmp_path))}
    turns = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"})
    assert found == {"q1": turns, "q2": "2 + 1?", "q3": "3 + 1?"}


def test_a_file_of_questions_is_no_pool(tmp_path):
    path = write(tmp_path / "p.jsonl", b"", b"{", {"id": "a", "prompt": "1 + 1?"}, ROW)
    assert not holds_answers(str(path))
    assert not holds_answers("arith")
    assert holds_answers(str(write(tmp_path / "r.jsonl", b"{", ROW)))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            question(1, instruction="What?"),
            "one question to an id, got two for 'q1', at .*a.jsonl:1 and at .*b.jsonl:1",
        ),
        (question(1, reference_answer="3"), "one gold answer to a question, got '2' for 'q1' at .*a.jsonl:1 and '3'"),
    ],
)
def test_files_that_contradict_each_other_are_refused(tmp_path, other, message):
    write(tmp_path / "a.jsonl", question(1, reference_answer="2"))
    write(tmp_path / "b.jsonl", other)
    with pytest.raises(ValueError, match=message):
        load_prompts(Prompts(path=str(tmp_path)))


def test_a_pool_without_a_question_is_refused(tmp_path):
    write(tmp_path / "rollouts.jsonl", ROLLOUT)
    with pytest.raises(ValueError, match="prompts.path must hold questions, got '.*' without a row"):
        load_prompts(Prompts(path=str(tmp_path)))
