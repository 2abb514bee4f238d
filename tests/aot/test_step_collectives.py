"""What the paper's step sends between chips, collective by collective, at its real widths.

Qwen3-8B into 1.7B, SE-KD, T = 2048, on v5e:4x4 with the default mesh; two layers of each model, because layers are
scanned: more of them turn the same loops more often. For the time that it takes the compiler makes little effort, which
changes no collective here, and vocabulary kernels are XLA's; they run on a chip's own rows.
"""

import collections
import dataclasses
import math

import pytest

from configs.paper.se_kd.qwen3_8b_to_1_7b import get_config
from kdjax import aot, models
from kdjax.analysis import plan_hlo, plan_memory, plan_traffic, plan_work
from kdjax.build import build_chooser, build_objective
from kdjax.config import from_config_dict
from kdjax.models.known_configs import QWEN3_1_7B, QWEN3_8B

LAYERS, LENGTH, ROWS = 2, 2048, 16
FILLED = 1.07  # some reduce-scatters are filled up to whole tiles
SMALL = 2**21  # bytes: norms, metrics, what filling up moves, token ids


def few_layers(cfg, **changes):
    return dataclasses.replace(cfg, layers=LAYERS, **changes)


def compiled(plan, topology, student, teacher, **changes):
    """(rules, step, collectives, lines that the sharding implies)"""
    reason = aot.unavailable("v5e")
    if reason is not None:
        pytest.skip(reason)
    config = get_config("se_kd")
    config.update_from_flattened_dict({"data.path": "nowhere.txt", "mesh.kernels": "xla"} | changes)
    e = from_config_dict(config)
    rules = plan.target_rules(e, aot.parse_topology(topology))
    step = plan.abstract_step(e, student, teacher, rules)
    program = plan.compile_step(step, rules)
    assert not program.refusal
    ours, theirs = (plan_work.Side(cfg, 2, rules.batch_shards, rules.model_shards) for cfg in (student, teacher))
    work = plan_work.describe(e, ours, theirs, build_chooser(e.selection), build_objective(e.loss), "tpu")
    traffic = plan_hlo.traffic(program.text, rules.mesh.size)
    assert traffic.unknown_loops == 0
    return rules, step, traffic.collectives, plan_traffic.implied(work, rules, rules)


@pytest.fixture(scope="module")
def sekd(plan, little_effort):
    student, teacher = few_layers(QWEN3_1_7B), few_layers(QWEN3_8B)
    return compiled(plan, "v5e:4x4", student, teacher, **{"data.seq_len": LENGTH})


def matrices(cfg):
    """Bytes of every matrix of a layer, and of the head, in bfloat16."""
    specs = models.param_specs(cfg)
    layer = [2 * math.prod(spec.shape[1:]) for spec in specs["layers"].values() if len(spec.shape) > 2]
    return layer, 2 * cfg.vocab_size * cfg.width


def expected():
    """(kind, axis, bytes) -> times: 4 x 4 chips, a weight is gathered from 1/16 to 1/4 over model, then over data."""
    found = collections.Counter()
    for cfg, turns in ((few_layers(QWEN3_1_7B), 2), (few_layers(QWEN3_8B), 1)):  # the student's again for the way back
        layer, head = matrices(cfg)
        for size, times in [*((size, LAYERS * turns) for size in layer), (head, 1)]:
            found["all-gather", "data", size] += times
            found["all-gather", "model", size // 4] += times
    layer, head = matrices(few_layers(QWEN3_1_7B))
    for size, times in [*((size, LAYERS) for size in layer), (head, 1)]:
        found["reduce-scatter", "data", size] += times
        found["reduce-scatter", "model", size // 4] += times
    # What has the shape of hidden states: rows of the split tables on their way to their tokens, and gradients back.
    for cfg, kinds in ((QWEN3_1_7B, ("reduce-scatter", "all-gather")), (QWEN3_8B, ("reduce-scatter",))):
        for kind in kinds:
            rows = 2 * ROWS * LENGTH * cfg.width
            found[kind, "data", rows] += 1
            found[kind, "model", rows // 4] += 1
    return found


def test_parameters_are_gathered_and_gradients_scattered_and_nothing_else(sekd):
    rules, _, found, _ = sekd
    wanted, seen = expected(), collections.Counter()
    for one in found:
        axis = plan_hlo.by_axis(one, rules.mesh.shape)
        if one.bytes > SMALL or (one.kind, axis, one.bytes) in wanted:
            near = [size for kind, at, size in wanted if (kind, at) == (one.kind, axis) and size <= one.bytes]
            size = max((size for size in near if one.bytes <= FILLED * size), default=one.bytes)
            seen[one.kind, axis, size] += one.times
    assert seen == wanted


def test_what_is_left_is_small(sekd):
    rules, _, found, _ = sekd
    wanted = expected()
    rest = [
        one
        for one in found
        if one.bytes <= SMALL and (one.kind, plan_hlo.by_axis(one, rules.mesh.shape), one.bytes) not in wanted
    ]
    assert sum(one.sent for one in rest) < 0.002 * sum(one.sent for one in found)


def test_the_step_sends_what_the_sharding_implies(sekd):
    _, _, found, implied = sekd
    assert sum(one.sent for one in found) <= 1.05 * sum(line.sent for line in implied)


def test_nothing_large_is_repeated(sekd):
    _, step, _, _ = sekd
    assert [found for tree in step.inputs.values() for found in plan_memory.repeated(tree, least=2**16)] == []


def test_tensor_parallelism_sends_what_the_formula_says(plan, little_effort):
    """Two layers of 512 x 8192 columns, fsdp_tp on data:2,model:4: sums of hidden states, gathers over data."""
    sizes = {"vocab_size": 8192, "width": 512, "mlp": 2048, "heads": 8, "kv_heads": 4, "head_dim": 64}
    student = few_layers(QWEN3_1_7B, **sizes)
    changes = {"mesh.preset": "fsdp_tp", "mesh.shape": "data:2,model:4", "data.seq_len": 512, "train.batch_size": 8}
    rules, _, found, implied = compiled(plan, "v5e:2x4", student, few_layers(QWEN3_8B, **sizes), **changes)
    hidden = 2 * 4 * 512 * 512  # 4 rows of 512 tokens
    sums = [one for one in found if one.kind == "all-reduce" and one.bytes >= hidden]
    assert {plan_hlo.by_axis(one, rules.mesh.shape) for one in sums} == {"model"}
    assert sum(one.times * one.bytes for one in sums) == hidden * (LAYERS * (5 + 2) + 3 + 1)
    assert sum(one.sent for one in found) == pytest.approx(sum(line.sent for line in implied), rel=0.05)
