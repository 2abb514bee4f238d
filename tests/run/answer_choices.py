"""Choices from small pools of answers, which each test writes for the questions of the fixture `base`."""

import dataclasses
import json

from kdjax.run.answers import AnswerChoice


def said_by(teacher, question):
    """A right answer in the manner of a teacher, the length of which is not that of the others."""
    a = question.answer
    return {"ada": a, "bob": f"It is {a}, I think: {a}.", "cy": f"We add both numbers, so the sum is {a}"}[teacher]


def write_pool(folder, questions, said):
    """said: teacher -> {number of a question: text, None = a right one; a tuple of them for several rows}."""
    folder.mkdir(exist_ok=True)
    for teacher, texts in said.items():
        rows = []
        for number, text in texts.items():
            one = questions[number]
            for each in text if isinstance(text, tuple) else (text,):
                each = said_by(teacher, one) if each is None else each
                rows.append({"id": one.id, "instruction": one.prompt, "teacher_output": each})
        (folder / f"{teacher}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def choice_among(base, workdir, said, **changes):
    """An `AnswerChoice`. said: as of `write_pool`; changes: of the settings of answers."""
    built, questions = base
    workdir.mkdir(exist_ok=True)
    pool = (write_pool(workdir / "pool", questions, said),)
    answers = dataclasses.replace(built.experiment.answers, pool=pool, **changes)
    e = dataclasses.replace(built.experiment, answers=answers)
    return AnswerChoice(dataclasses.replace(built, experiment=e), workdir)
