"""A round of training on what was selected makes answers of the pool cheaper for the student, S included."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.build import build
from kdjax.config import Answers, Data, Eval, Experiment, Loss, Prompts, Selection, StudentInit
from kdjax.curation.answers.encode import coding, encode
from kdjax.curation.answers.pool import Candidate
from kdjax.curation.answers.scorer import make_answer_scorer
from kdjax.curation.answers.scores import rate
from kdjax.curation.answers.selected import read_selected
from kdjax.data import heldout_batches, to_batch
from kdjax.data.prompts import load_prompts, split_prompts
from kdjax.data.styles import STYLES, scripted
from kdjax.offline import to_answer
from kdjax.run.answers import AnswerChoice
from kdjax.step import init_state, make_train_step

TEACHERS = ("sentence", "equation", "words", "bare")
STEPS, ROWS = 24, 8


@pytest.fixture(scope="module")
def round_of(tmp_path_factory):
    """(built, answers to held-out questions, the answers that are trained on), after the untrained student's choice."""
    folder = tmp_path_factory.mktemp("round")
    text, pool = folder / "text.jsonl", folder / "pool"
    text.write_text("\n".join(json.dumps({"text": f"{i} bottles of beer on the wall."}) for i in range(20)))
    prompts = Prompts(path="arith:sum1", size=60, heldout_fraction=0.3, instruction="", answers="pool")
    heldout, train = split_prompts(load_prompts(prompts), prompts)
    pool.mkdir()
    for name in TEACHERS:
        rows = [{"id": q.id, "instruction": q.prompt, "teacher_output": scripted(q, STYLES[name])} for q in train]
        (pool / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    e = Experiment()
    e = dataclasses.replace(
        e,
        teacher=dataclasses.replace(e.teacher, path="synthetic"),
        student=dataclasses.replace(e.student, init=StudentInit("cut", layers=1)),
        data=Data(path=str(text), seq_len=96, chat_template=False, max_train_tokens=0),
        prompts=prompts,
        answers=Answers(pool=(str(pool),)),
        selection=Selection(policy="all"),
        loss=Loss(terms=(("cross_entropy", 1.0),)),
        eval=Eval(prompts=0, completions=0),
        optim=dataclasses.replace(e.optim, learning_rate=3e-3, schedule="constant", warmup=0),
        train=dataclasses.replace(e.train, batch_size=ROWS, steps=STEPS),
    )
    AnswerChoice(choosing := build(to_answer(e)), folder)(choosing.student_params)
    built = build(e, folder)
    text_of = {one.row: one for one in read_selected(folder)}
    by_id = {q.id: q for q in train}
    chosen = [Candidate(by_id[one.id], one.teacher_name, one.text, row) for row, one in text_of.items()]
    others = [Candidate(q, name, scripted(q, STYLES[name]), f"{q.id} {name}") for q in heldout for name in TEACHERS]
    return built, others, chosen


def trained(built, step, change=lambda tokens: tokens):
    """The student's parameters after steps on the selected answers, whose tokens may be changed."""
    state = init_state(built.parts, jax.tree.map(jnp.copy, built.student_params), 0)
    batches = list(heldout_batches(built.train, ROWS))
    for columns in (batches * STEPS)[:STEPS]:
        batch = to_batch(columns)
        batch = dataclasses.replace(batch, tokens=change(batch.tokens))
        state, _ = step(state, (), jax.tree.map(lambda a: a[None], batch))
    return state.params


def test_what_was_trained_on_gets_cheaper_and_what_is_like_it(round_of):
    """S falls over the selected answers, and over those of all teachers to held-out questions; not by any training."""
    built, heldout, chosen = round_of
    settings = built.experiment.answers
    of = coding(built.tokenizer, built.experiment.data, settings)
    scorer = make_answer_scorer(built.parts.student, settings, of.seq_len, built.rules)

    def mean_score(params, candidates):
        found = list(scorer(params, [encode(one.question, [one], of) for one in candidates]))
        assert len(found) == len(candidates)
        return np.mean([rate("scas", [each.figures])[0] for each in found])

    letters = jnp.asarray(np.random.default_rng(0).permutation(built.vocab_size), jnp.int32)
    step = jax.jit(make_train_step(built.parts))
    after, otherwise = trained(built, step), trained(built, step, lambda tokens: letters[tokens])
    for candidates, most in ((heldout, 0.75), (chosen, 0.3)):
        before = mean_score(built.student_params, candidates)
        assert mean_score(after, candidates) < most * before
        assert mean_score(otherwise, candidates) > before, "of the same answers in other letters"
