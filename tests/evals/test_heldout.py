"""The evaluation step against float64 numpy on models small enough to write out their whole logits."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import config
from kdjax.config import Mesh
from kdjax.evals import evaluate, make_eval_step, make_page_step
from kdjax.evals.evaluation import BINS, Estimate
from kdjax.losses.objective import Objective
from kdjax.schedules import make_schedule
from kdjax.selection import POLICIES, SIGNALS, Chooser
from kdjax.sharding import Rules, make_rules
from kdjax.step import LanguageModel, StepParts
from kdjax.types import Batch, Head

B, T, V, D = 8, 12, 37, 5


def bigram_model(rules=Rules()):
    """Hidden states are rows of a table: no attention, so the oracle needs none."""

    def hidden(params, batch):
        if rules.mesh is None:
            return params["table"][batch.tokens]
        return params["table"].at[batch.tokens].get(out_sharding=rules.batch(3))

    return LanguageModel(hidden, lambda params: Head(params["head"], vocab_size=V))


def make_parts(policy, signal, rules=Rules()):
    model, optimiser = bigram_model(rules), optax.sgd(0.1)
    chosen = POLICIES[policy](config.Selection(policy=policy, fraction=0.3))
    objective = Objective({}, {}, make_schedule(1.0, "loss.tau"), "token")
    chooser = Chooser(SIGNALS[signal] if signal else None, chosen)
    return StepParts(model, model, chooser, objective, optimiser, make_schedule(0.1, "x"), rules)


def make_params(seed, width=D, scale=1.5):
    rng = np.random.default_rng(seed)
    shapes = {"table": (V, width), "head": (width, V)}
    return {name: jnp.asarray(rng.normal(0, scale, shape), jnp.float32) for name, shape in shapes.items()}


def make_batch(seed=0, rows=B):
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(0, 4, (rows, T)), 1)  # 0 in front is padding too
    return Batch(
        tokens=jnp.asarray(rng.integers(0, V, (rows, T)), jnp.int32),
        segment_ids=jnp.asarray(segments, jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (rows, T)),
        loss_mask=jnp.asarray(rng.random((rows, T)) < 0.8),
        row_id=jnp.arange(rows, dtype=jnp.int32),
        epoch=jnp.zeros(rows, jnp.int32),
        weight=jnp.ones(rows, jnp.float32),
    )


def log_probs(params, token):
    logits = np.asarray(params["table"], np.float64)[token] @ np.asarray(params["head"], np.float64)
    return logits - np.logaddexp.reduce(logits)


def oracle(student, teacher, batch):
    """Every target in float64, one after another: a list of dicts with its row."""
    tokens, segments, mask = (np.asarray(a) for a in (batch.tokens, batch.segment_ids, batch.loss_mask))
    found = []
    for b in range(len(tokens)):
        for t in range(T - 1):
            if segments[b, t] == 0 or segments[b, t] != segments[b, t + 1] or not mask[b, t + 1]:
                continue
            label, q, p = tokens[b, t + 1], log_probs(student, tokens[b, t]), log_probs(teacher, tokens[b, t])
            one = {"row": b, "kl": np.sum(np.exp(p) * (p - q)), "agreement": q.argmax() == p.argmax()}
            for name, logs in (("student", q), ("teacher", p)):
                one |= {f"{name}_nll": -logs[label], f"{name}_entropy": -np.sum(np.exp(logs) * logs)}
                one |= {f"{name}_correct": logs.argmax() == label, f"{name}_confidence": np.exp(logs.max())}
            found.append(one)
    return found


@pytest.fixture(scope="module")
def case():
    student, teacher, batch = make_params(1), make_params(2, width=9), make_batch()
    return student, teacher, batch, oracle(student, teacher, batch)


def test_row_sums_match_float64(case):
    student, teacher, batch, want = case
    sums = make_eval_step(bigram_model(), bigram_model())(student, teacher, batch)
    rows = np.array([one["row"] for one in want])
    assert 20 < len(rows) < B * (T - 1)
    np.testing.assert_array_equal(sums["count"], np.bincount(rows, minlength=B))
    for name in want[0].keys() - {"row", "student_confidence", "teacher_confidence"}:
        expected = np.bincount(rows, [float(one[name]) for one in want], B)
        np.testing.assert_allclose(sums[name], expected, rtol=2e-5, atol=2e-5, err_msg=name)
    for model in ("student", "teacher"):
        confidence = np.array([one[f"{model}_confidence"] for one in want])
        correct = np.array([one[f"{model}_correct"] for one in want])
        expected = np.zeros((B, BINS, 3))
        at = np.digitize(confidence, np.arange(1, BINS) / BINS)
        np.add.at(expected, (rows, at), np.stack([np.ones(len(rows)), confidence, correct], 1))
        np.testing.assert_allclose(sums[f"{model}_bins"], expected, atol=1e-4)


def test_evaluate_over_batches(case):
    student, teacher, _, _ = case
    first, second = make_batch(3), make_batch(4)
    step = make_eval_step(bigram_model(), bigram_model())
    found = evaluate(step, student, teacher, [first, second], resamples=100)
    want = oracle(student, teacher, first) + oracle(student, teacher, second)
    assert found.tokens == len(want)

    def mean(name):
        return np.mean([one[name] for one in want])

    assert found.kl.value == pytest.approx(mean("kl"), rel=1e-5)
    assert found.agreement.value == pytest.approx(mean("agreement"))
    assert found.student.accuracy.value == pytest.approx(mean("student_correct"))
    assert found.teacher.perplexity.value == pytest.approx(np.exp(mean("teacher_nll")), rel=1e-5)
    assert found.student.entropy.value == pytest.approx(mean("student_entropy"), rel=1e-5)
    assert found.kl.low < found.kl.value < found.kl.high


def test_padding_does_not_count(case):
    student, teacher, batch, _ = case
    step = make_eval_step(bigram_model(), bigram_model())
    empty = jax.tree.map(lambda a: jnp.concatenate([a[:3], jnp.zeros_like(a[:5])]), batch)
    noisy = dataclasses.replace(empty, tokens=empty.tokens.at[3:].set(make_batch(9).tokens[3:]))
    want = evaluate(step, student, teacher, [jax.tree.map(lambda a: a[:3], batch)], resamples=50)
    assert evaluate(step, student, teacher, [noisy], resamples=50) == want
    assert want.rows == 3


def test_uniform_model_has_perplexity_v(case):
    _, teacher, batch, _ = case
    uniform = jax.tree.map(jnp.zeros_like, teacher)
    found = evaluate(make_eval_step(bigram_model()), uniform, None, [batch])
    assert dataclasses.astuple(found.student.perplexity) == pytest.approx((V, V, V), rel=1e-5)
    assert found.student.entropy.value == pytest.approx(np.log(V), rel=1e-5)
    assert found.teacher is None


def test_student_that_is_the_teacher(case):
    student, _, batch, _ = case
    found = evaluate(make_eval_step(bigram_model(), bigram_model()), student, student, [batch])
    assert abs(found.kl.value) < 1e-6
    assert found.agreement == Estimate(1.0, 1.0, 1.0)
    assert found.student == found.teacher


def test_one_compilation(case):
    student, teacher, _, _ = case
    step = make_eval_step(bigram_model(), bigram_model())
    evaluate(step, student, teacher, [make_batch(5), make_batch(6)], resamples=10)
    evaluate(step, student, teacher, [make_batch(7)], resamples=10)
    assert step._cache_size() == 1


def test_no_batches_is_an_error(case):
    student, teacher, _, _ = case
    with pytest.raises(ValueError, match="held-out batches must not be empty, got none. Set data.heldout_fraction"):
        evaluate(make_eval_step(bigram_model()), student, teacher, [])


@pytest.mark.parametrize("preset", ["dp", "fsdp"])
def test_mesh_gives_the_same(case, preset):
    student, teacher, batch, _ = case
    want = make_eval_step(bigram_model(), bigram_model())(student, teacher, batch)
    rules = make_rules(Mesh(preset))
    model = bigram_model(rules)
    if preset == "fsdp":  # a head that is stored in parts, V = 37 padded to 40 columns
        spec = rules.storage_spec(("embed", "vocab"), (3, 40))
        model = dataclasses.replace(model, head_spec=spec)
        student, teacher = (
            p | {"head": jnp.pad(p["head"], ((0, 0), (0, 3)), constant_values=9)} for p in (student, teacher)
        )
        assert "data" in spec

    def place(params):
        specs = {"table": jax.sharding.PartitionSpec(), "head": model.head_spec}
        return {name: jax.device_put(a, jax.NamedSharding(rules.mesh, specs[name])) for name, a in params.items()}

    placed = jax.tree.map(lambda a: jax.device_put(a, rules.batch(a.ndim)), batch)
    found = make_eval_step(model, model, rules)(place(student), place(teacher), placed)
    assert set(found) == set(want)
    for name in want:
        assert found[name].sharding.is_fully_replicated
        np.testing.assert_allclose(found[name], want[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("policy", "signal"), [("top_fraction", "student_entropy"), ("top_fraction", "teacher_entropy"), ("all", "")]
)
def test_page_step_shows_what_the_run_selects(case, policy, signal):
    student, teacher, batch, want = case
    made = make_page_step(make_parts(policy, signal))(student, teacher, batch, (), jax.random.key(0), jnp.int32(0))
    for b in range(B):
        targets = [one for one in want if one["row"] == b]
        places = np.flatnonzero(made["eligible"][b])
        assert len(places) == len(targets)
        for name, mine in (("student_entropy", "entropy"), ("student_nll", "nll")):
            np.testing.assert_allclose(made[mine][b, places], [one[name] for one in targets], rtol=1e-4)
        score = signal
        chosen = set(places)
        if score:
            order = np.argsort([-one[score] for one in targets], kind="stable")
            chosen = set(places[order[: -(-3 * len(targets) // 10)]])  # 30 %, rounded up
        assert set(np.flatnonzero(made["selected"][b])) == chosen


def test_page_step_on_a_mesh(case):
    student, teacher, batch, _ = case
    want = make_page_step(make_parts("random_fraction", "random"))(
        student, teacher, batch, (), jax.random.key(5), jnp.int32(0)
    )
    rules = make_rules(Mesh("dp"))
    parts = make_parts("random_fraction", "random", rules)
    everywhere = jax.NamedSharding(rules.mesh, jax.sharding.PartitionSpec())
    student, teacher, key, step = jax.device_put((student, teacher, jax.random.key(5), jnp.int32(0)), everywhere)
    batch = jax.tree.map(lambda a: jax.device_put(a, rules.batch(a.ndim)), batch)
    made = make_page_step(parts)(student, teacher, batch, (), key, step)
    np.testing.assert_array_equal(made["selected"], want["selected"])
    np.testing.assert_allclose(made["entropy"], want["entropy"], rtol=1e-5)
    assert 0 < made["selected"].sum() < made["eligible"].sum()


def test_page_step_needs_the_teacher_that_its_signal_reads():
    parts = dataclasses.replace(make_parts("top_fraction", "teacher_entropy"), teacher=None)
    with pytest.raises(ValueError, match=r"teacher\.path must be set, got ''; the signal reads the teacher"):
        make_page_step(parts)


def test_no_array_of_all_logits_exists():
    batch, positions, vocab = 4, 256, 49152
    model = LanguageModel(lambda p, b: p["table"][b.tokens], lambda p: Head(p["head"], vocab_size=vocab))
    shapes = {"table": (vocab, 8), "head": (8, vocab)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    whole = jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch, positions)[: a.ndim], a.dtype), make_batch())
    compiled = make_eval_step(model, model).lower(params, params, whole).compile()
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert vocab * 8 <= largest < batch * positions * vocab // 4
