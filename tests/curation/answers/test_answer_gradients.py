"""Gradients of answers against a Llama written out once more, in float64; how they fall apart into positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import models
from kdjax.build.parts import language_model
from kdjax.config import Mesh, Optim
from kdjax.curation import snr
from kdjax.curation.answers import gradients
from kdjax.curation.answers.encode import Encoded, EncodedAnswer, Tokens
from kdjax.models import synthetic
from kdjax.optim import make_optimiser
from kdjax.sharding import Rules, make_rules
from tests.curation.answers import plain_llama as plain

QUESTION, VOCAB = 7, 50


def make_student(tied):
    cfg = dataclasses.replace(
        synthetic.config(), vocab_size=VOCAB, width=12, layers=2, heads=2, kv_heads=1, head_dim=6, mlp=10, tied=tied
    )
    rng = np.random.default_rng(1)
    specs = models.param_specs(cfg)
    params = jax.tree.map(
        lambda s: jnp.asarray(s.init.mean + s.init.std * rng.normal(size=s.shape), jnp.float32), specs
    )
    return cfg, params, language_model(cfg, Rules(), VOCAB, jnp.float32)


@pytest.fixture(scope="module")
def student():
    return make_student(tied=False)


def row(answer, seed=0):
    """A question of seven tokens, the fourth special, and `answer` tokens; (ids, A, Q)."""
    ids = np.random.default_rng(0).integers(0, VOCAB, QUESTION)
    ids = np.concatenate([ids, np.random.default_rng(seed).integers(0, VOCAB, answer)]).astype(np.int32)
    places = np.arange(len(ids))
    return ids, places >= QUESTION, (places < QUESTION) & (places != 3)


def in_float64(tree):
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), tree)


def inner(one, other):
    return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_norms_and_products_are_those_of_autodiff_in_float64(tied):
    cfg, params, model = make_student(tied)
    rows = [row(5), row(1, 2), row(17, 3)]
    leaves = {"up": gradients.last_layer(), "head": lambda p: p["embed" if tied else "head"]}
    run = gradients.make_gradient_pass(model, leaves=leaves, question=True, dimensions=64, seed=3)
    found = list(run(params, rows))

    @jax.jit
    def oracle(wide, tokens, answer, question):
        value = lambda p, mask: plain.mean_nll(cfg, p, tokens, mask)  # noqa: E731
        (d_a, a), (d_q, q) = (jax.value_and_grad(value)(wide, mask) for mask in (answer, question))
        both = jax.grad(lambda p: value(p, answer) + value(p, question))(wide)
        parts = {name: inner(part(a), part(a)) for name, part in leaves.items()}
        return a, parts, inner(both, both), jnp.stack([d_a, d_q, inner(a, a), inner(a, q), inner(q, q)])

    for each, (ids, *masks) in zip(found, rows, strict=True):
        with jax.enable_x64(True):
            padded = [np.pad(a, (0, 24 - len(a))) for a in (ids, *masks)]  # nothing looks ahead
            a, parts, both, want = jax.device_get(oracle(in_float64(params), *padded))
        told = [each.answer_nll, each.question_nll, each.norm, each.cross, each.question_norm]
        np.testing.assert_allclose(told, want, rtol=2e-5, atol=2e-5 * np.sqrt(want[2] * want[4]))
        assert told[2] + 2 * told[3] + told[4] == pytest.approx(both, rel=5e-5)
        for name in leaves:
            assert float(each.leaves[name]) == pytest.approx(parts[name], rel=2e-5), name
        projected = snr.project(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), a), 64, 3)
        np.testing.assert_allclose(each.projected, projected, atol=1e-4 * np.linalg.norm(projected))
    constant = [float(each.question_norm) for each in found]
    np.testing.assert_allclose(constant, constant[0], rtol=1e-5)  # whatever the answer is
    assert np.ptp([float(each.norm) for each in found]) > 0.1


def test_the_second_pass_is_left_out_and_rows_may_be_mapped(student):
    _, params, model = student
    rows = [row(5), row(9, 2)]
    whole = list(gradients.make_gradient_pass(model, question=True)(params, rows))
    run = gradients.make_gradient_pass(model)
    short = [each for one in rows for each in run(params, iter([one]))]
    assert all(each.cross is None and each.question_nll is None and each.projected is None for each in short)
    np.testing.assert_allclose([e.norm for e in short], [e.norm for e in whole], rtol=1e-6)
    padded = [[np.pad(a, (0, 20 - len(a))) for a in each] for each in rows]
    ids, answer, question = (jnp.asarray(np.stack(column)) for column in zip(*padded, strict=True))
    lengths = jnp.asarray([len(each[0]) for each in rows], jnp.int32)
    mapped = jax.vmap(gradients.make_answer_gradient(model, question=True), in_axes=(None, 0, 0, 0, 0))
    found = jax.jit(mapped)(params, ids, lengths, answer, question)
    for name in ("answer_nll", "norm", "cross", "question_norm"):
        np.testing.assert_allclose(
            getattr(found, name), [getattr(e, name) for e in whole], rtol=1e-4, atol=1e-5, err_msg=name
        )


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of a student of which eight devices may hold a part each: one row's gradient, the gains of two."""

    cfg: models.ModelConfig
    params: dict
    gradient: gradients.AnswerGradient
    gains: list[float]


OPTIONS = {"question": True, "dimensions": 64, "seed": 3}


def gains_of(model, params, rules):
    """Of two rows, on a probe of fewer rows than a batch has parts."""
    optimiser, _ = make_optimiser(Optim(learning_rate=1e-2, schedule="constant", warmup=0), 4)
    run = gradients.make_gain(model, optimiser, [row(5, 7), row(8, 1), row(3, 5)], rules)
    return list(run(params, [row(6), row(4, 2)]))


@pytest.fixture(scope="module")
def on_one(student):
    cfg = dataclasses.replace(student[0], width=16, kv_heads=2)
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda s: jnp.asarray(s.init.mean + s.init.std * rng.normal(size=s.shape)), models.param_specs(cfg)
    )
    model = language_model(cfg, Rules(), VOCAB, jnp.float32)
    (gradient,) = gradients.make_gradient_pass(model, **OPTIONS)(params, [row(5)])
    return Measured(cfg, params, gradient, gains_of(model, params, Rules()))


@pytest.fixture(params=[Mesh("dp"), Mesh("fsdp"), Mesh("fsdp_tp", "data:4,model:2")], ids=lambda mesh: mesh.preset)
def on_eight(request, on_one):
    """(model, parameters as the rules store them, rules)."""
    rules, specs = make_rules(request.param), models.param_specs(on_one.cfg)
    placed = jax.tree.map(lambda leaf, s: jax.device_put(leaf, rules.storage(s.axes, s.shape)), on_one.params, specs)
    whole = placed["embed"].addressable_shards[0].data.shape == placed["embed"].shape
    assert whole == (request.param.preset == "dp")
    return language_model(on_one.cfg, rules, VOCAB, jnp.float32), placed, rules


def test_eight_devices_give_the_same_gradients(on_one, on_eight):
    """The copies of a row on its devices add up to one."""
    model, params, rules = on_eight
    (found,), want = gradients.make_gradient_pass(model, rules, **OPTIONS)(params, [row(5)]), on_one.gradient
    for name in ("answer_nll", "question_nll", "norm", "cross", "question_norm"):
        np.testing.assert_allclose(getattr(found, name), getattr(want, name), rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(found.projected, want.projected, atol=1e-5 * np.linalg.norm(want.projected))


def test_eight_devices_give_the_same_gains(on_one, on_eight):
    np.testing.assert_allclose(gains_of(*on_eight), on_one.gains, rtol=1e-5, atol=1e-5)
    assert np.abs(on_one.gains).min() > 1e-2


def test_the_last_up_projection_falls_apart_into_positions(student):
    """||grad_W L_A||^2 = n^-2 sum <delta_s, delta_t> <z, z'>, states taken where a token is predicted."""
    cfg, params, model = student
    ids, answer, question = row(6)
    run = gradients.make_gradient_pass(model, leaves={"up": gradients.last_layer()})
    (found,) = run(params, [(ids, answer, question)])

    @jax.jit
    def oracle(wide, tokens):
        rest = jnp.zeros((cfg.layers, len(ids), cfg.mlp))
        delta = jax.jacrev(lambda push: plain.token_nll(plain.forward(cfg, wide, tokens, push)[0], tokens))(rest)
        whole = jax.grad(lambda p: plain.mean_nll(cfg, p, tokens, jnp.asarray(answer)))(wide)["layers"]["w_up"]
        return delta, plain.forward(cfg, wide, tokens)[2], jnp.vdot(whole[-1], whole[-1])

    with jax.enable_x64(True):
        delta, states, exact = jax.device_get(oracle(in_float64(params), jnp.asarray(ids)))
    delta = delta[answer[1:]]  # [A, L, T, F]
    at = np.flatnonzero(answer)
    n = len(at)
    assert np.abs(np.delete(delta[0, -1], at[0] - 1, axis=0)).max() == 0, "behind the last attention nothing is mixed"
    assert np.abs(np.delete(delta[0, 0], at[0] - 1, axis=0)).max() > 1e-6, "before it, it is"
    errors = delta[np.arange(n), -1, at - 1]
    kernels = {shift: states[-1][at - shift] @ states[-1][at - shift].T for shift in (0, 1)}
    predictor, token = (float(np.sum(errors @ errors.T * kernels[shift])) / n**2 for shift in (1, 0))
    assert predictor == pytest.approx(exact, rel=1e-10)
    assert abs(token / exact - 1) > 1e-3
    assert float(found.leaves["up"]) == pytest.approx(exact, rel=1e-5)


def test_rows_without_a_loss_are_refused(student):
    _, params, model = student
    ids, answer, question = row(3)
    nothing = np.zeros_like(answer)
    for masks, options, name in (((nothing, question), {}, "A"), ((answer, nothing), {"question": True}, "Q")):
        with pytest.raises(
            ValueError, match=rf"rows must have positions with a loss in {name}, got none in row 1 of 10"
        ):
            list(gradients.make_gradient_pass(model, **options)(params, [(ids, answer, question), (ids, *masks)]))
    broken = params | {"embed": params["embed"].at[ids[0]].set(jnp.nan)}
    with pytest.raises(ValueError, match=r"rows must have finite gradients, got one that is not in row 0"):
        list(gradients.make_gradient_pass(model)(broken, [(ids, answer, question)]))
    (found,) = gradients.make_gradient_pass(model, finite=False)(broken, [(ids, answer, question)])
    assert not np.isfinite(found.norm)


def test_a_gain_is_what_one_update_lowers(student):
    """By plain numbers: the loss of the probe before, and after parameters that were moved by hand."""
    cfg, params, model = student
    rows, probe = [row(6), row(4, 2)], [row(5, 7), row(8, 1), row(3, 5)]
    run = gradients.make_gain(model, optax.sgd(0.5), probe)
    found = list(run(params, rows))

    def loss(p, some):
        return sum(plain.mean_nll(cfg, p, jnp.asarray(ids), jnp.asarray(answer)) for ids, answer, _ in some) / len(some)

    for one, gain in zip(rows, found, strict=True):
        own = jax.jit(jax.grad(lambda p: loss(p, [one])))(params)  # noqa: B023
        moved = jax.tree.map(lambda p, g: p - 0.5 * g, params, own)
        assert gain == pytest.approx(float(loss(params, probe) - loss(moved, probe)), abs=2e-5)
        assert abs(gain) > 1e-3
    with pytest.raises(ValueError, match="^probe must hold rows, got none"):
        gradients.make_gain(model, optax.sgd(0.5), [])


def test_rows_of_encoded_questions():
    def tokens(ids, counted):
        return Tokens(np.array(ids, np.int32), np.array(counted, bool))

    question = tokens([5, 6, 7], [True, False, True])
    answers = (
        EncodedAnswer("r1", "a", tokens([8, 9], [True, False])),
        EncodedAnswer("r2", "b", tokens([], []), "truncated"),
        EncodedAnswer("r3", "c", tokens([4], [True])),
    )
    found = [[part.tolist() for part in each] for each in gradients.rows_of(Encoded("q", question, answers))]
    t, f = True, False
    assert found == [[[5, 6, 7, 8, 9], [f, f, f, t, f], [t, f, t, f, f]], [[5, 6, 7, 4], [f, f, f, t], [t, f, t, f]]]
