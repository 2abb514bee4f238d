"""What figures may depend on, and what not; exact vectors; answers that cannot be scored; programs, laziness, work."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answer_problems import OWN, SIZES, VOCAB, question, questions, some

from kdjax import models
from kdjax.build.parts import language_model
from kdjax.config import Answers, Mesh
from kdjax.curation.answers import layout, scorer
from kdjax.curation.answers.encode import Encoded, EncodedAnswer, Tokens
from kdjax.curation.answers.layout import AnswerBatch
from kdjax.curation.answers.scorer import FIGURES, SIMILARITIES, USUAL, make_answer_scorer, make_answer_step
from kdjax.kernels import head_gradient
from kdjax.sharding import Rules, make_rules
from launch.bench_answers import matmul_flops

SEQ_LEN = 96
ROUNDING = {"rel": 1e-5, "abs": 1e-5}
PARTS = ("answer_nll", "question_nll", "sim_aa", "sim_aq", "sim_qq", "head_norm", "head_cross", "brier", "rank_sum")


@functools.cache
def student(family="llama", mesh=None, **changes):
    """(model, parameters, rules); the scale gives logits of a few nats. 8 heads, for tensor parallelism."""
    sizes = SIZES | {"num_attention_heads": 8, "num_key_value_heads": 4} | OWN.get(family, {}) | changes
    cfg = models.config_from_hf({"model_type": family, "initializer_range": 0.2, **sizes})
    rules = make_rules(mesh) if mesh else Rules()
    params = models.init_params(cfg, jax.random.key(0), rules)
    return language_model(cfg, rules, VOCAB, jnp.float32), params, rules


@functools.cache
def make(family="llama", mesh=None, room=256, **changes):
    model, _, rules = student(family, mesh)
    return make_answer_scorer(model, Answers(**changes), SEQ_LEN, rules, room=room)


def score(asked=None, params=None, family="llama", mesh=None, **options):
    """row -> Scored."""
    params = student(family, mesh)[1] if params is None else params
    found = list(make(family, mesh, **options)(params, questions() if asked is None else asked))
    assert len({each.row for each in found}) == len(found)
    return {each.row: each for each in found}


def assert_same(found, wanted, tolerance=ROUNDING):
    assert found.keys() == wanted.keys()
    for row, one in found.items():
        assert one.error == wanted[row].error
        for name, value in wanted[row].figures.items():
            assert one.figures[name] == pytest.approx(value, **tolerance, nan_ok=True), (row, name)


# --- what figures do not depend on


def test_shapes_order_and_neighbours_do_not_matter():
    wanted = score()
    assert_same(score(room=4096), wanted)  # other groups, more rows
    turned = [dataclasses.replace(one, answers=one.answers[::-1]) for one in questions()[::-1]]
    assert_same(score(turned), wanted)
    alone = {}
    for asked in questions():
        for answer in asked.answers:
            alone |= score([dataclasses.replace(asked, answers=(answer,))])
    assert_same(alone, wanted)


def test_padding_is_not_looked_at(monkeypatch):
    wanted = score()
    real = scorer.arrays_of

    def noisy(*args):
        batch = real(*args)
        return batch.replace(tokens=np.where(batch.segment_ids == 0, 7, batch.tokens))

    monkeypatch.setattr(scorer, "arrays_of", noisy)
    for row, one in score().items():
        assert one.figures == wanted[row].figures


def test_a_window_and_norms_of_heads():
    """The shared question against one answer a row, where local layers lose sight of it."""
    model, params, _ = student("gemma3_text")
    single = make_answer_scorer(
        dataclasses.replace(model, shared=None), Answers(), SEQ_LEN, figures=set(USUAL) - set(SIMILARITIES), room=256
    )
    wanted = {each.row: each for each in single(params, questions())}
    assert_same(score(family="gemma3_text"), wanted)
    assert "sim_aa" not in next(iter(wanted.values())).figures


def test_the_question_is_the_same_for_all_its_answers():
    rng = np.random.default_rng(3)
    asked = question("x", rng, 20, (9, 12, 16, 3, 4, 6, 10, 16))  # one row
    found = score([asked], room=512).values()
    for name in ("question_nll", "sim_qq", "head_question", "n_question"):
        assert len({each.figures[name] for each in found}) == 1  # bit for bit
    other = score([question("x", rng, 20, (9, 64))])  # rows of two shapes
    assert len({each.figures["sim_qq"] for each in other.values()}) <= 2
    first, second = (each.figures for each in other.values())
    assert first["question_nll"] == pytest.approx(second["question_nll"], abs=1e-6)
    assert first["sim_qq"] == pytest.approx(second["sim_qq"], abs=1e-6)


@pytest.mark.parametrize(
    "mesh", [Mesh("dp"), Mesh("fsdp"), Mesh("tp", "data:4,model:2"), Mesh("fsdp_tp", "data:2,model:4")], ids=str
)
def test_eight_devices_score_as_one(mesh):
    asked = [questions()[0], question("b", np.random.default_rng(1), 11, (4, 9, 2))]  # of one shape
    assert_same(score(asked, mesh=mesh), score(asked))


@pytest.mark.parametrize(("kernels", "ran"), [("pallas_tpu", "xla"), ("reference", "reference")])
def test_kernels_of_training_that_scores_have_not(kernels, ran, monkeypatch):
    """The head's gradient has no Pallas kernels: mesh.kernels leaves the choice to it then, and only then."""
    used = []
    for name, function in head_gradient.IMPLEMENTATIONS.items():
        counted = functools.partial(lambda name, function, *args: used.append(name) or function(*args), name, function)
        monkeypatch.setitem(head_gradient.IMPLEMENTATIONS, name, counted)
    asked, (model, params, _) = questions()[1:2], student()
    run = make_answer_scorer(model, Answers(), SEQ_LEN, make_rules(Mesh(kernels=kernels)), room=256)
    found = {each.row: each for each in run(params, asked)}
    assert set(used) == {ran}
    assert_same(found, score(asked))


def test_a_misspelt_kernel_is_refused():
    run = make_answer_scorer(student()[0], Answers(), SEQ_LEN, Rules(kernels="palas_tpu"))
    with pytest.raises(ValueError, match="^implementation of head_gradient must be a known name .*got 'palas_tpu'"):
        next(run(student()[1], questions()[1:2]))


# --- what they are


def batch_of(asked, answer):
    """One question, one answer: places of a row of states."""
    n, k = len(asked), len(answer)
    place = np.arange(n + k)
    told = np.arange(n) > 0
    row = np.zeros((1, n + k), np.int32)
    inside = [np.ones((1, 1, k), bool), np.ones((1, n), bool)]
    at = [
        place[None, None, n:],
        place[None, None, n:] - 1,
        inside[0],
        place[None, :n],
        np.maximum(place[None, :n] - 1, 0),
    ]
    return jax.tree.map(jnp.asarray, AnswerBatch(row, row, row, *at, inside[1], told[None]))


def similarities(asked, answer, alignment="token"):
    states = jnp.asarray([[*asked, *answer]], jnp.float32)
    found = scorer._similarities(states, batch_of(asked, answer), alignment, None)
    return {name: float(value[0, 0]) for name, value in found.items()}


def test_similarities_by_hand():
    found = similarities([[1, 0]], [[1, 0], [0, 1]])
    assert found == pytest.approx({"sim_aa": 0.5, "sim_aq": 0.5, "sim_qq": 1.0})
    found = similarities([[4, 3]], [[3, 4], [-3, -4]])
    assert found == pytest.approx({"sim_aa": 0.0, "sim_aq": 0.0, "sim_qq": 1.0}, abs=1e-7)
    found = similarities([[1, 0], [0, 2]], [[1, 0], [9, 9]], "predictor")  # [0, 2] and [1, 0] predict the answer
    assert found == pytest.approx({"sim_aa": 0.5, "sim_aq": 0.5, "sim_qq": 1.0})
    found = similarities([[1, 0]], [[0, 0]])  # no direction
    assert found == pytest.approx({"sim_aa": 0.0, "sim_aq": 0.0, "sim_qq": 1.0})


def test_similarities_are_of_directions_in_any_basis():
    rng = np.random.default_rng(0)
    asked, answer = rng.normal(size=(7, 5)), rng.normal(size=(4, 5))
    wanted = similarities(asked, answer)
    assert 0 <= wanted["sim_aa"] <= 1
    basis, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    sizes = rng.uniform(0.1, 50, (11, 1))
    assert similarities(asked @ basis * sizes[:7], answer @ basis * sizes[7:]) == pytest.approx(wanted, abs=1e-6)


def test_a_head_of_zeros_knows_nothing():
    params = student()[1]
    found = score(params=params | {"head": jnp.zeros_like(params["head"])})
    for each in found.values():
        assert each.figures["answer_nll"] == pytest.approx(math.log(VOCAB), rel=1e-6)
        assert each.figures["question_nll"] == pytest.approx(math.log(VOCAB), rel=1e-6)
        assert each.figures["brier"] == pytest.approx(1 - 1 / VOCAB, rel=1e-5)
        assert each.figures["rank_sum"] == each.figures["n_answer"]  # ties: the best rank


def test_a_token_and_a_question_of_which_none_counts():
    rng = np.random.default_rng(0)
    silent = Tokens(some(rng, 6).ids, np.zeros(6, bool))
    asked = Encoded("x", silent, (EncodedAnswer("r", "t", Tokens(np.array([5], np.int32), np.ones(1, bool))),))
    figures = score([asked])["r"].figures
    assert (figures["n_answer"], figures["n_question"]) == (1, 0)
    assert figures["sim_aa"] == pytest.approx(1.0, abs=1e-6)
    for name in ("sim_aq", "sim_qq", "question_nll", "head_cross", "head_question"):
        assert figures[name] == 0
    assert figures["answer_nll"] > 0


# --- what is not scored


def test_errors_have_no_figures_and_touch_nobody():
    bad = 90  # its embedding is no number
    params = student()[1]
    broken = params | {"embed": params["embed"].at[bad].set(jnp.nan)}
    rng = np.random.default_rng(0)

    def clean(length, *at):
        ids = rng.integers(3, 80, length).astype(np.int32)
        ids[list(at)] = bad
        return Tokens(ids, np.ones(length, bool))

    empty = Tokens(np.zeros(0, np.int32), np.zeros(0, bool))
    answers = [clean(6), clean(6, 2), clean(9), clean(9, 0)]
    asked = Encoded("x", clean(12), tuple(EncodedAnswer(str(at), "t", one) for at, one in enumerate(answers)))
    refused = EncodedAnswer("4", "t", empty, "truncated")
    lost = Encoded("y", clean(5, 1), (EncodedAnswer("5", "t", clean(4)), EncodedAnswer("6", "t", empty, "too_long")))
    given = [dataclasses.replace(asked, answers=(*asked.answers, refused)), lost]
    found = score(given, broken)
    errors = {row: each.error for row, each in found.items()}
    assert errors == {
        "0": "",
        "1": "not_finite",
        "2": "",
        "3": "not_finite",
        "4": "truncated",
        "5": "not_finite",
        "6": "too_long",
    }
    for each in found.values():
        assert set(each.figures) == set(USUAL)
        assert each.error == "" or all(map(math.isnan, each.figures.values()))
    kept = dataclasses.replace(asked, answers=(asked.answers[0], asked.answers[2]))
    assert_same({row: found[row] for row in ("0", "2")}, score([kept], params))


def test_nothing_left_to_score():
    empty = Tokens(np.zeros(0, np.int32), np.zeros(0, bool))
    refused = Encoded("x", some(np.random.default_rng(0), 4), (EncodedAnswer("r", "t", empty, "altered"),))
    assert [each.error for each in score([refused]).values()] == ["altered"]
    assert score([]) == {}


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"shared": None},
            {},
            "^answers.score must not need sim_aa, .*Flax module; .*Set it to 'head_norm' or 'grape'",
        ),
        ({}, {"figures": ("sim_aa", "head_nrm")}, "^figures must be a known name .*got 'head_nrm'. Did you mean"),
        ({}, {"tap": "down"}, "^answers.tap must be a known name .*got 'down'. Known: block_output, up, up_input"),
    ],
)
def test_what_is_refused(changes, options, message):
    model = dataclasses.replace(student()[0], **changes)
    with pytest.raises(ValueError, match=message):
        make_answer_scorer(model, Answers(tap=options.pop("tap", "")), SEQ_LEN, **options)


# --- what it costs


def test_figures_that_nobody_wants_are_not_computed():
    model, params, rules = student()
    asked = questions()[0]
    shape, group = layout.groups_of(asked, SEQ_LEN, 256)[0]
    batch = jax.tree.map(jnp.asarray, layout.arrays_of([group], shape, 1, True))

    def work(figures):
        step = make_answer_step(model, Answers(), rules, figures, False)
        return step.lower(params, batch).compile().cost_analysis()["flops"]

    few = set(USUAL) - {*SIMILARITIES, "rank_sum"}
    assert work(few) < work({*few, *SIMILARITIES}) < work(tuple(FIGURES))


def test_programs_are_few_and_the_stream_is_lazy(monkeypatch):
    steps, real = [], scorer.make_answer_step
    monkeypatch.setattr(scorer, "make_answer_step", lambda *args: steps.append(real(*args)) or steps[-1])
    model, params, _ = student()
    calls = []
    rng = np.random.default_rng(0)
    taken = itertools.count()

    def endless():
        for at in taken:
            yield question(str(at), rng, int(rng.integers(4, 32)), rng.integers(1, 32, 3))

    run = make_answer_scorer(model, Answers(), SEQ_LEN, room=256)
    first = list(itertools.islice(run(params, endless(), lambda *call: calls.append(call)), 90))
    assert len(first) == 90
    assert sum(count for count, _ in calls) < 90 + 40
    assert next(taken) < 100  # 300 answers
    # widths of answers 16, 32, answers 1, 2, 4 (of three)
    assert 2 <= steps[0]._cache_size() <= 6
    assert steps[0]._cache_size() < len(calls)


def test_sharing_the_question_spares_work():
    """M = 8 answers as long as the question: 9/16 of the tokens, and attention without the question's queries."""
    model, params, rules = student(hidden_size=64, intermediate_size=192)
    asked = question("x", np.random.default_rng(0), 32, (32,) * 8)
    ((shape, group),) = layout.groups_of(asked, SEQ_LEN, 512)
    assert (shape.answers, shape.tokens) == (8, 9 * 32)
    single = layout.groups_of(asked, SEQ_LEN, 512, 1)
    step = make_answer_step(model, Answers(), rules, USUAL, False)

    def work(groups, shape):
        batch = jax.tree.map(jnp.asarray, layout.arrays_of(groups, shape, len(groups), True))
        return matmul_flops(step.trace(params, batch).jaxpr.jaxpr)

    assert work([group], shape) <= 0.6 * work([one for _, one in single], single[0][0])
