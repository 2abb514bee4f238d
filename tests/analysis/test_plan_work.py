"""Model FLOPs, bytes that a sharding implies, time and disk: formulas against numbers worked out by hand."""

import dataclasses

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from kdjax import aot, models
from kdjax.analysis import plan_time, plan_traffic, plan_work
from kdjax.analysis.plan_work import Side, Work
from kdjax.build import build_chooser, build_objective
from kdjax.config import default_config, from_config_dict
from kdjax.models import ModelConfig, known_configs
from kdjax.sharding import PRESETS, Rules

# D 8, L 3, N 4, G 2, H 2, F 16, V 32; the matrices of a layer: 2*8*4*2 + 2*8*2*2 + 3*8*16 = 128 + 64 + 384 = 576.
STUDENT = ModelConfig("llama", 32, 8, 3, 4, 2, 2, 16, tied=True)
TEACHER = ModelConfig("llama", 40, 16, 2, 4, 4, 4, 32, tied=False)
LAYER = 576


def work(**changes):
    student, teacher = Side(STUDENT, 2, passes=1, products=3, executed_products=5), Side(TEACHER, 4, products=1)
    teacher = dataclasses.replace(teacher, executed_products=3)
    return dataclasses.replace(Work(4, 10, 2, 32, student, teacher, 1, "full"), **changes)


def rules(preset, **sizes):
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Explicit,) * len(sizes))
    return Rules(mesh, PRESETS[preset])


def lines(found):
    return {line.name: (line.model, line.executed) for line in found}


def test_flops_by_hand():
    """4 rows of 10 positions, 2 slots each: 40 tokens, 4 * 55 = 220 pairs of query and key."""
    forward = 2 * 40 * 3 * LAYER + 4 * 3 * 4 * 2 * 220
    teacher_layer = 2 * 16 * 16 + 2 * 16 * 16 + 3 * 16 * 32
    theirs = 2 * 40 * 2 * teacher_layer + 4 * 2 * 4 * 4 * 220
    assert lines(plan_work.step_flops(work())) == {
        "student trunk, forward": (forward, forward),
        "student trunk, backward": (2 * forward, 2 * forward),
        "student trunk, again (remat full)": (0, forward),
        "teacher trunk, forward": (theirs, theirs),
        "student head, statistics at all positions": (2 * 40 * 32 * 8,) * 2,
        "student head, loss at 2 slots a row": (3 * 2 * 8 * 32 * 8, 5 * 2 * 8 * 32 * 8),
        "teacher head, loss at 2 slots a row": (2 * 8 * 32 * 16, 3 * 2 * 8 * 32 * 16),
    }


def test_what_is_recomputed():
    attention = 4 * 3 * 4 * 2 * 220
    for remat, again in (("none", None), ("dots", attention)):
        found = lines(plan_work.step_flops(work(remat=remat)))
        name = f"student trunk, again (remat {remat})"
        assert found.get(name) == (None if again is None else (0, again))


def test_layers_with_a_window_see_less():
    """5 positions, window 2: 1 + 2 + 2 + 2 + 2 = 9 pairs in a local layer, 15 in each of the other two."""
    local = dataclasses.replace(STUDENT, window=2, local_layers=(True, False, False))
    assert plan_work.trunk_flops(local, 1, 5)[1] == 4 * 4 * 2 * (9 + 2 * 15)
    assert plan_work.trunk_flops(STUDENT, 1, 5)[1] == 4 * 4 * 2 * 3 * 15


def described(teacher=True, **changes):
    config = default_config()
    config.update_from_flattened_dict({"data.seq_len": 10, "train.batch_size": 4} | changes)
    e = from_config_dict(config)
    side = Side(TEACHER, 4) if teacher else None
    return plan_work.describe(e, Side(STUDENT, 2), side, build_chooser(e.selection), build_objective(e.loss), "tpu")


def products(side):
    return None if side is None else (side.passes, side.products, side.executed_products)


def test_what_a_step_asks_of_the_heads():
    """(statistics, loss, loss as the Mosaic kernels do it) of student and teacher."""

    def of(**changes):
        found = described(**changes)
        return products(found.student), products(found.teacher)

    assert of() == ((1, 3, 5), (0, 1, 3))
    assert of(**{"mesh.kernels": "xla"}) == ((1, 3, 3), (0, 1, 1))
    assert of(**{"selection.policy": "all"}) == ((0, 3, 5), (0, 1, 3))
    assert of(**{"selection.signal": "kl"}) == ((1, 3, 5), (1, 1, 3))
    assert of(**{"selection.signal": "teacher_ce"}) == ((0, 3, 5), (1, 1, 3))
    sampled = {"classes.kind": "sampled"}
    assert of(**sampled) == ((1, 3, 5), (0, 1, 1))
    assert of(**sampled | {"classes.kind": "ghost_tail"}) == ((1, 3, 5), (0, 2, 2))
    both = {"loss.terms": (("forward_kl", 1.0), ("cross_entropy", 1.0))}
    assert of(**both) == ((1, 3, 5), (0, 1, 3))
    assert of(**both | sampled) == ((1, 6, 10), (0, 1, 1))
    assert of(teacher=False, **sampled | {"teacher.source": "cache"}) == ((1, 3, 5), None)
    assert of(**{"loss.terms": (("cross_entropy", 1.0),)}) == ((1, 3, 5), None)


def test_the_work_of_an_experiment():
    found = described(**{"train.accumulate": 2, "student.remat": "dots", "selection.fraction": 0.2})
    assert (found.rows, found.length, found.slots, found.vocab) == (4, 10, 2, 32)
    assert (found.accumulate, found.remat, found.tokens) == (2, "dots", 40)
    assert found.local_tokens(dataclasses.replace(found.student, batch_shards=2)) == 10


# --- bytes between chips


def test_how_parameters_are_stored():
    """fsdp over 4: the embedding by its vocabulary, wq by its width; norms are repeated."""
    found = plan_traffic.stored(STUDENT, rules("fsdp", data=4))
    assert found["embed"] == plan_traffic.Stored(32 * 8, 4, 1)
    assert found["layers.wq"] == plan_traffic.Stored(3 * 8 * 4 * 2, 4, 1)
    assert found["layers.mlp_norm"] == plan_traffic.Stored(3 * 8, 1, 4)
    assert plan_traffic.stored(STUDENT, Rules())["embed"] == plan_traffic.Stored(32 * 8, 1, 1)
    # Tensor parallelism keeps its half; the other axis is gathered; replicas hold the same.
    found = plan_traffic.stored(STUDENT, rules("fsdp_tp", replica=2, data=2, model=2))
    assert found["layers.w_up"] == plan_traffic.Stored(3 * 8 * 16 // 2, 2, 2)


def test_bytes_of_fsdp_by_hand():
    """Student in 2 bytes, teacher in 4, over 4 chips; every gather and scatter sends 3/4."""
    matrices, norms = 3 * LAYER, 3 * 2 * 8
    found = {one.name: one.sent for one in plan_traffic.implied(work(), rules("fsdp", data=4), rules("fsdp", data=4))}
    assert found == {
        "student: parameters gathered": 0.75 * 2 * (2 * matrices + 2 * 32 * 8),
        "student: gradients reduced": 0.75 * (2 * matrices + (4 + 2) * 32 * 8 + 2 * 4 * (norms + 8)),
        "teacher: parameters gathered": 0.75 * 4 * (2 * (2 * 16 * 16 + 2 * 16 * 16 + 3 * 16 * 32) + 2 * 40 * 16),
    }
    twice = plan_traffic.implied(work(rows=8, accumulate=2), rules("fsdp", data=4), rules("fsdp", data=4))
    assert {one.name: one.sent for one in twice} == {name: 2 * sent for name, sent in found.items()}


def test_few_tokens_move_their_rows_and_not_the_table():
    """28 tokens against 32 entries, and 32 against 40, over 2 replicas of 2 chips: a half of them in each."""
    split = rules("fsdp", replica=2, data=2)
    every = (plan_traffic.implied(work(rows=4, length=size), split, split) for size in (8, 7))
    table, rows = ({one.name: one.sent for one in found} for found in every)
    table_back = 0.5 * 32 * 8 * 4 + 2 * 0.5 * 32 * 8 * 4 / 2
    assert rows["student: parameters gathered"] - table["student: parameters gathered"] == 0.5 * 2 * (14 - 32) * 8
    assert rows["teacher: parameters gathered"] - table["teacher: parameters gathered"] == 0.5 * 4 * (14 - 16) * 16
    gradients = rows["student: gradients reduced"] - table["student: gradients reduced"]
    assert gradients == 0.5 * 2 * 14 * 8 + 2 * 0.5 * 32 * 8 * 4 / 2 - table_back


def test_bytes_of_dp_are_those_of_the_gradients():
    numbers = 3 * LAYER * 2 + 32 * 8 * (4 + 2) + 4 * (3 * 2 * 8 + 8)
    (found,) = plan_traffic.implied(work(teacher=None), rules("dp", data=4), rules("dp", data=4))
    assert found.sent == pytest.approx(2 * 0.75 * numbers)


def test_bytes_of_tensor_parallelism_are_those_of_hidden_states():
    """tp over 2: 40 tokens of width 8; 5 sums a layer with remat full, look-up there and back, head back."""
    side = dataclasses.replace(work().student, model_shards=2)
    (found,) = [
        one
        for one in plan_traffic.implied(work(student=side, teacher=None), rules("tp", model=2), rules("tp", model=2))
        if "hidden" in one.name
    ]
    assert found.sent == 40 * 8 * 2 * (5 * 3 + 2 + 1)


# --- time and disk


def test_the_longest_bound_is_the_time():
    topology = aot.parse_topology("v5e:2x2")
    flops = [plan_work.Flops("a", 1.0, 197e12 * 4)]
    roof = plan_time.roofline(topology, 4, flops, 0.82e12 * 0.5, 200e9 * 0.25)
    assert (roof.compute, roof.memory, roof.interconnect, roof.network) == (1.0, 0.5, 0.25, 0.0)
    assert (roof.step, roof.bound) == (1.0, "compute")
    slow = plan_time.roofline(topology, 4, flops, 0.0, 0.0, sent_to_slices=3.1e9 * 2)
    assert (slow.step, slow.bound) == (2.0, "network")
    assert plan_time.roofline(aot.parse_topology("v4:2x2x1"), 4, flops, 0.0, 0.0, 1.0).network is None


def test_bytes_of_hbm_grow_with_what_is_read():
    plain = plan_time.hbm_bytes(work(teacher=None, remat="none"), 0)
    # matrices in 2 bytes: written, read forward, backward, and the gradient twice; activations of 40 tokens; heads.
    activations = 2 * 3 * 40 * (6 * 8 + 4 * 8 + 2 * 4 + 3 * 16) * 2 * 3
    heads = 32 * 8 * (2 * (1 + 3) + 8)
    assert plain == 3 * LAYER * 2 * 5 + activations + heads
    assert plan_time.hbm_bytes(work(teacher=None, remat="none"), 100) - plain == 2800
    assert plan_time.hbm_bytes(work(teacher=None), 0) > plain


def experiment(**changes):
    config = default_config()
    config.update_from_flattened_dict(changes)
    return from_config_dict(config)


CACHED = {"teacher.source": "cache", "classes.kind": "sampled", "classes.entries": 50}


def test_the_cache_takes_what_was_measured_where_it_was_measured():
    found = plan_time.cache_size(experiment(**CACHED), 151936, 1_000_000)
    assert found.least == found.most == 30_900_000
    assert found.positions == 1_000_000
    assert "measured" in found.note
    part = plan_time.cache_size(experiment(**CACHED | {"samples.fraction": 0.2}), 151936, 1_000_000)
    assert part.most == 6_180_000
    assert plan_time.cache_size(experiment(), 151936, 1_000_000) is None


def test_elsewhere_the_cache_has_bounds():
    """Ids above 2^18 need words of 5 bytes; so do probabilities."""
    found = plan_time.cache_size(experiment(**CACHED), 262144 + 1, 1000)
    assert (found.least, found.most) == (6000, 251000)
    top = experiment(**CACHED | {"classes.kind": "ghost_tail", "classes.entries": 8, "cache.label_logp": True})
    assert plan_time.cache_size(top, 49152, 1000).most == 1000 * (8 * 5 + 1 + 2)
    assert plan_time.cache_size(experiment(**CACHED | {"classes.entries": 20}), 49152, 1000).most == 61000


def test_parameters_of_known_models():
    """As their makers count them: 8.19, 1.72 (its embedding once), 8.03 and 1.24 thousand million."""

    def count(name):
        return sum(leaf.size for leaf in jax.tree.leaves(models.abstract_params(known_configs.KNOWN[name])))

    assert count("Qwen/Qwen3-8B") == 8_190_735_360
    assert count("Qwen/Qwen3-1.7B") == 1_720_574_976
    assert count("meta-llama/Llama-3.1-8B") == 8_030_261_248
    assert count("meta-llama/Llama-3.2-1B") == 1_235_814_400


def test_a_known_shape_stands_in_for_a_hub_that_cannot_be_reached(monkeypatch):
    def unreachable(path, *, where):
        raise ValueError(f"{where} must be a reachable hub id, got {path!r}.")

    monkeypatch.setattr(known_configs, "load_config", unreachable)
    cfg, note = known_configs.shape_of("Qwen/Qwen3-1.7B", where="student.path")
    assert cfg is known_configs.QWEN3_1_7B
    assert note == "student.path 'Qwen/Qwen3-1.7B' cannot be reached; its shape is the one known to kdjax."
    with pytest.raises(ValueError, match=r"^teacher\.path must be a reachable hub id, got 'nobody/nothing'\.$"):
        known_configs.shape_of("nobody/nothing", where="teacher.path")


def test_a_model_that_is_here_is_read(monkeypatch):
    monkeypatch.setattr(known_configs, "load_config", lambda path, *, where: STUDENT)
    assert known_configs.shape_of("Qwen/Qwen3-1.7B", where="student.path") == (STUDENT, "")
