"""The train step as a function: objective, normalisation, masks, selection, and what it compiles to."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.config import Mesh
from kdjax.kernels import linear_divergence, linear_stats
from kdjax.sharding import make_rules
from kdjax.step import make_supervise, make_train_step
from kdjax.types import targets_of

DENSE = {"selection__policy": "all"}
GOLDEN = {  # name -> (sum, count)
    "forward_kl": (58.27758, 22.0),
    "loss": (81.820435, 22.0),
    "grad_norm": (4.72959, 1.0),
    "learning_rate": (0.0004, 1.0),
    "selected_fraction": (22.0, 100.0),
    "student_entropy": (333.288147, 100.0),
}


def loss_of(report) -> float:
    total, count = report.metrics["loss"]
    return float(total) / float(count)


def gradients(bench, batch):
    """(loss sum, count, gradient of the sum) of one micro-batch."""
    supervise = make_supervise(bench.parts)
    state = bench.state()

    def total(params):
        output, _, _ = supervise(params, bench.teacher_params, batch, state.policy_state, state.key, state.step)
        return output.total, output.count

    (value, count), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(bench.params)
    return float(value), float(count), gradient


def largest_difference(left, right) -> float:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return max(float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)))) for a, b in pairs)


def test_dense_loss_is_the_mean_kl_of_whole_logits(bench, batch):
    made = bench(**DENSE)
    hidden, teacher_hidden = (
        model.hidden(params, batch)
        for model, params in ((made.parts.student, made.params), (made.parts.teacher, made.teacher_params))
    )
    vocab = made.parts.student.head(made.params).vocab_size
    zs = np.asarray(hidden, np.float64) @ np.asarray(made.params["embed"], np.float64).T
    zt = (np.asarray(teacher_hidden, np.float64) @ np.asarray(made.teacher_params["head"], np.float64))[..., :vocab]
    logq = zs - np.log(np.exp(zs - zs.max(-1, keepdims=True)).sum(-1, keepdims=True)) - zs.max(-1, keepdims=True)
    logp = zt - np.log(np.exp(zt - zt.max(-1, keepdims=True)).sum(-1, keepdims=True)) - zt.max(-1, keepdims=True)
    kl = (np.exp(logp) * (logp - logq)).sum(-1)
    tokens, segments, mask = (np.asarray(a) for a in (batch.tokens, batch.segment_ids, batch.loss_mask))
    total = count = 0.0
    for row in range(tokens.shape[0]):  # the mask, spelled out once more from its definition
        for t in range(tokens.shape[1] - 1):
            if mask[row, t + 1] and segments[row, t] == segments[row, t + 1] > 0:
                total += float(batch.weight[row]) * kl[row, t]
                count += 1
    value, slots, _ = gradients(made, batch)
    assert slots == count
    assert value == pytest.approx(total, rel=2e-5)


@pytest.mark.parametrize(("policy", "reduction"), [("top_fraction", "token"), ("random_fraction", "sample")])
def test_fraction_one_is_dense(bench, batch, policy, reduction):
    dense = gradients(bench(**DENSE, loss__reduction=reduction), batch)
    chosen = gradients(bench(selection__policy=policy, selection__fraction=1.0, loss__reduction=reduction), batch)
    assert chosen[0] == pytest.approx(dense[0], rel=1e-6)
    assert chosen[1] == dense[1]
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(dense[2]))
    assert largest_difference(dense[2], chosen[2]) < 1e-6 * scale


@pytest.mark.parametrize(
    ("selection", "reduction"), [(DENSE, "token"), ({"selection__fraction": 0.3}, "sample")], ids=["dense", "se_kd"]
)
def test_one_batch_of_eight_is_four_of_two(bench, batch, selection, reduction):
    # With a large eps Adam is linear in small gradients: rounding is not blown up to whole steps.
    overrides = selection | {"loss__reduction": reduction, "optim__eps": 1e-2}
    one, four = (bench(**overrides, train__accumulate=count).run(batch, 2) for count in (1, 4))
    for left, right in zip(one[1], four[1], strict=True):
        assert loss_of(left) == pytest.approx(loss_of(right), rel=1e-6)
        assert float(left.metrics["grad_norm"][0]) == pytest.approx(float(right.metrics["grad_norm"][0]), rel=1e-6)
    assert largest_difference(one[0].params, four[0].params) < 1e-6


def test_the_named_kernels_run(bench, batch, monkeypatch):
    """mesh.kernels reaches loss and statistics: the other implementation gives the same, and it is the one that ran."""
    plain, named = (bench(rules=make_rules(Mesh(kernels=kernels))) for kernels in ("auto", "reference"))
    assert loss_of(named.run(batch)[1][0]) == pytest.approx(loss_of(plain.run(batch)[1][0]), rel=1e-5)
    for op in (linear_divergence, linear_stats):

        def refuse(*args, op=op, **options):
            raise RuntimeError(f"{op.__name__} ran")

        with monkeypatch.context() as patch:
            patch.setitem(op.IMPLEMENTATIONS, "reference", refuse)
            with pytest.raises(RuntimeError, match=f"{op.__name__} ran"):
                named.run(batch)


def test_student_equal_to_teacher_has_no_loss_and_no_gradient(bench, batch, student_cfg):
    made = bench(teacher=student_cfg, **DENSE)
    made.teacher_params = made.params
    value, count, gradient = gradients(made, batch)
    assert abs(value / count) < 1e-6
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient)) / count < 1e-6


@pytest.mark.parametrize("selection", [DENSE, {}, {"selection__signal": "student_ce"}])
def test_padding_and_masked_targets_move_nothing(bench, batch, selection):
    made = bench(**selection)
    before = gradients(made, batch)
    padding = batch.segment_ids == 0
    # A token that is the last of its segment and masked as a target is seen by nobody.
    last = jnp.concatenate([batch.segment_ids[:, 1:] != batch.segment_ids[:, :-1], jnp.ones((8, 1), bool)], 1)
    unseen = padding | (last & ~batch.loss_mask)
    assert int(unseen.sum()) > int(padding.sum()) > 0
    after = gradients(made, dataclasses.replace(batch, tokens=jnp.where(unseen, 7, batch.tokens)))
    assert after[:2] == pytest.approx(before[:2], rel=1e-6)
    assert largest_difference(before[2], after[2]) < 1e-5


def test_documents_of_a_row_do_not_see_each_other(bench, batch):
    made = bench(**DENSE)
    first = batch.segment_ids == 1
    other = dataclasses.replace(batch, tokens=jnp.where(first, (batch.tokens + 5) % 97, batch.tokens))
    only_later = batch.loss_mask & ~first
    left, right = (gradients(made, dataclasses.replace(b, loss_mask=only_later)) for b in (batch, other))
    assert left[0] == pytest.approx(right[0], rel=1e-6)


def test_a_batch_without_a_target_changes_nothing(bench, batch):
    made = bench()
    empty = dataclasses.replace(batch, loss_mask=jnp.zeros_like(batch.loss_mask))
    state, reports = made.run(empty, 1)
    assert reports[0].metrics["loss"] == (0.0, 0.0)
    assert float(reports[0].metrics["grad_norm"][0]) == 0.0
    assert largest_difference(state.params, made.params) == 0.0


def test_the_optimiser_rests_in_a_step_without_a_gradient(bench, batch):
    """Rows of weight 0: neither decay nor momentum moves anything (PACED, V11)."""
    made = bench(**DENSE, optim__weight_decay=0.1, optim__learning_rate=1e-2)
    moving, _ = made.run(batch, 2)
    weightless = dataclasses.replace(batch, weight=jnp.zeros_like(batch.weight))
    step = jax.jit(make_train_step(made.parts))
    state, report = step(moving, made.teacher_params, jax.tree.map(lambda a: a[None], weightless))
    assert float(report.metrics["loss"][0]) == 0
    assert float(report.metrics["grad_norm"][0]) == 0
    for name in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(moving, name))
    assert int(state.step) == int(moving.step) + 1


def test_a_non_finite_step_keeps_the_old_state_and_names_the_rows(bench, batch, student_cfg):
    # Untied: a tied head would make the logits of all rows NaN.
    made = bench(student=dataclasses.replace(student_cfg, tied=False), **DENSE)
    made.params["embed"] = made.params["embed"].at[96].set(jnp.nan)
    batch = dataclasses.replace(batch, tokens=jnp.minimum(batch.tokens, 95).at[2, 1].set(96))
    state, reports = made.run(batch, 1)
    assert not np.isfinite(loss_of(reports[0]))
    assert np.flatnonzero(~np.asarray(reports[0].finite_rows[0])).tolist() == [2]
    fresh = made.state()
    for kept, was in zip(
        jax.tree.leaves((state.params, state.opt_state)), jax.tree.leaves((fresh.params, fresh.opt_state)), strict=True
    ):
        np.testing.assert_array_equal(kept, was)


def test_student_signal_follows_the_student_alone(bench, batch):
    made = bench()

    def selected(params, teacher_params):
        from kdjax.selection import token_stats

        hidden, head = made.parts.student.hidden(params, batch), made.parts.student.head(params)
        teacher = made.parts.teacher.hidden(teacher_params, batch), made.parts.teacher.head(teacher_params)
        labels, eligible = targets_of(batch)
        stats = token_stats(made.parts.chooser.needs, (hidden, head), teacher, labels)
        return made.parts.chooser(stats, batch, eligible, (), jax.random.key(0), jnp.int32(0))[0].index

    def shaken(params, seed):
        return jax.tree.map(lambda a: a + 0.3 * jax.random.normal(jax.random.key(seed), a.shape), params)

    plain = selected(made.params, made.teacher_params)
    assert not np.array_equal(plain, selected(shaken(made.params, 1), made.teacher_params))
    np.testing.assert_array_equal(plain, selected(made.params, shaken(made.teacher_params, 1)))


def test_rows_longer_than_a_model_was_made_for_are_refused(bench, student_cfg):
    short = dataclasses.replace(student_cfg, max_positions=64)
    with pytest.raises(ValueError, match=r"data.seq_len must be at most the 64 positions that the teacher .*, got 128"):
        bench(teacher=short)


def test_compiles_once(bench, batch):
    made = bench()
    step = jax.jit(make_train_step(made.parts), donate_argnums=0)
    state = made.state()
    for seed in range(3):
        shuffled = jax.tree.map(lambda a, s=seed: jnp.roll(a, s, 0)[None], batch)
        state, _ = step(state, made.teacher_params, shuffled)
    assert step._cache_size() == 1
    assert re.search("donated|aliasing", step.lower(state, made.teacher_params, shuffled).as_text())


def test_golden_metrics_of_one_tiny_step(bench, batch):
    # These move only if the objective, the selection, the masks or the initial weights do.
    _, reports = bench().run(batch, 1)
    assert reports[0].metrics.keys() == GOLDEN.keys()
    for name, pair in reports[0].metrics.items():
        assert tuple(map(float, pair)) == pytest.approx(GOLDEN[name], rel=2e-5), name
