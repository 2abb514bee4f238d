"""Small pools of answers on disk, for the tests of their files."""

import json

from kdjax.config import Answers
from kdjax.curation.answers.pool import open_pool
from kdjax.curation.answers.verify import admit
from kdjax.data.prompts import Prompt

SETTINGS = Answers()
TEACHERS = ("ada", "bob", "cy")
QUESTIONS = [Prompt(f"q{number}", f"What is {number} + 1?", str(number + 1)) for number in range(6)]
HELDOUT = [Prompt("h0", "What is 9 + 9?", "18")]


def row(question, text, **more):
    return {"id": question.id, "instruction": question.prompt, "teacher_output": text, **more}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def right(question, style):
    """A right answer of so many words more."""
    said = " ".join(f"word{question.id}{number}" for number in range(style))
    return f"Adding one {said}: the answer is {question.answer}."


def write_teachers(folder, questions=QUESTIONS, teachers=TEACHERS, answer=right):
    for number, teacher in enumerate(teachers):
        write(folder / f"{teacher}.jsonl", [row(question, answer(question, number)) for question in questions])
    return folder


def index(*paths, train=QUESTIONS, heldout=HELDOUT):
    return open_pool([str(path) for path in paths], train, heldout)


def admitted(workdir, *paths, train=QUESTIONS, settings=SETTINGS, verifier="numeric", **more):
    return admit(workdir, index(*paths, train=train), settings, verifier, **more)


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
