"""HBM by kind, what the compiler says when it refuses, and which setting frees how much."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.analysis import plan_advice, plan_memory
from kdjax.analysis.plan_memory import GIB, Memory
from kdjax.analysis.plan_work import Side, Work
from kdjax.config import default_config, from_config_dict
from kdjax.models import ModelConfig
from kdjax.sharding import PRESETS, Rules

STUDENT = ModelConfig("llama", 32, 8, 3, 4, 2, 2, 16, tied=True)
TEACHER = ModelConfig("llama", 32, 16, 2, 4, 4, 4, 32, tied=False)
WORK = Work(16, 10, 2, 32, Side(STUDENT, 2, 4), Side(TEACHER, 4, 4), 1, "none")
MESH = AbstractMesh((4,), ("data",), axis_types=(AxisType.Explicit,))
RULES = Rules(MESH, PRESETS["fsdp"])
GIVEN = {"student parameters": 400, "optimiser and state": 800, "teacher parameters": 1000, "batch": 10}

TEMPORARIES = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (24.00G) exceeds "
    "available HBM (15.75G)."
)
ALL = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 34.40G of 15.75G hbm. Exceeded by 18.65G.

Total hbm usage >= 34.90G:
    reserved        258.00M
    program          18.00G
    arguments        16.40G

  Largest program allocations in hbm:

  1. Size: 8.00G
     Operator: op_name="jit(train_step)/jvp()/dot_general" source_file="a.py"
     Shape: f32[65536,32768]{1,0:T(8,128)}
     Unpadded size: 8.00G
     ==========================

  2. Size: 512.5M
     Operator: op_name="jit(train_step)/add"
     Shape: bf16[16,1024]{1,0}
     ==========================
"""


def array(shape, *spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(MESH, P(*spec)))


def test_bytes_of_a_chip_follow_the_sharding():
    tree = {"split": array((8, 6), "data", None), "whole": array((5,), None, dtype=jnp.bfloat16)}
    assert plan_memory.chip_bytes(tree) == 2 * 6 * 4 + 5 * 2
    assert plan_memory.chip_bytes(jax.ShapeDtypeStruct((3,), jnp.int32)) == 12


def test_large_arrays_that_every_chip_has_are_named():
    tree = {"a": array((8, 4), "data", None), "b": {"c": array((8, 4), None, None)}, "d": array((2,), None)}
    assert plan_memory.repeated(tree, least=100) == [("['b']['c']", 128)]
    alone = {"c": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
    assert plan_memory.repeated(alone, least=100) == []


def test_a_program_says_its_peak():
    analysis = types.SimpleNamespace(
        temp_size_in_bytes=500,
        argument_size_in_bytes=300,
        output_size_in_bytes=200,
        alias_size_in_bytes=150,
        generated_code_size_in_bytes=7,
    )
    found = plan_memory.of_program(GIVEN, analysis, 1000)
    assert (found.temporaries, found.peak, found.wanted, found.fits) == (500, 857, 857, True)
    analysis.peak_memory_in_bytes = 600
    assert plan_memory.of_program(GIVEN, analysis, 1000).wanted == 857, "what is allocated"
    analysis.peak_memory_in_bytes = 1001
    assert plan_memory.of_program(GIVEN, analysis, 1000).fits is False


def test_a_refusal_for_temporaries_adds_what_goes_in():
    found = plan_memory.of_refusal(GIVEN, TEMPORARIES, 16 * 10**9)
    assert (found.temporaries, found.wanted) == (24 * GIB, 24 * GIB + 2210)
    assert (found.limit, found.peak, found.fits) == (int(15.75 * GIB), None, False)
    assert found.refusal == TEMPORARIES


def test_a_refusal_for_all_lists_the_largest():
    found = plan_memory.of_refusal(GIVEN, ALL, 16 * 10**9)
    assert (found.temporaries, found.wanted, found.limit) == (None, int(34.4 * GIB), int(15.75 * GIB))
    assert plan_memory.largest_allocations(ALL) == [
        (8 * GIB, "f32[65536,32768]{1,0:T(8,128)}", "jit(train_step)/jvp()/dot_general"),
        (int(512.5 * 2**20), "bf16[16,1024]{1,0}", "jit(train_step)/add"),
    ]
    assert plan_memory.largest_allocations(TEMPORARIES) == []


def test_other_errors_of_the_compiler_are_no_refusal():
    assert plan_memory.of_refusal(GIVEN, "INTERNAL: Mosaic failed to compile TPU kernel", 16 * 10**9) is None


def test_what_the_forward_pass_keeps_by_hand():
    """D 8, N H = 8, 2 G H = 8, 2 F = 32 in 2 bytes; the scores of 4 heads over half of 10 positions in 4."""
    side = WORK.student
    assert plan_memory.kept_a_token(side, "full", 10) == 2 * 8
    assert plan_memory.kept_a_token(side, "dots", 10) == 2 * (8 + 8 + 8 + 8 + 32)
    assert plan_memory.kept_a_token(side, "none", 10) == 2 * (8 + 8 + 8 + 8 + 32) + 4 * 4 * 5
    halved = dataclasses.replace(side, model_shards=2)
    assert plan_memory.kept_a_token(halved, "none", 10) == 2 * (8 + 8 + 4 + 4 + 16) + 4 * 2 * 5


def test_temporaries_by_hand():
    """4 rows a chip; the gradients of 576 * 3 + 256 numbers over 4 chips, norms (56) whole."""
    found = plan_memory.temporaries(WORK, RULES, RULES)
    assert found == {
        "gradients": 4 * ((576 * 3 + 256) // 4 + 56),
        "kept for the backward pass": (2 * 64 + 80) * 3 * 40,
        "student head": 2 * 256,
        "student head, gradient": 4 * 256,
        "student layer": 2 * (576 + 16),
        "teacher head": 4 * 32 * 16,
        "teacher layer": 4 * (2 * 256 + 2 * 256 + 3 * 512 + 32),
    }
    split = plan_memory.temporaries(dataclasses.replace(WORK, accumulate=2, teacher=None), RULES, RULES)
    assert split["gradients"] == 2 * found["gradients"]
    assert split["kept for the backward pass"] == found["kept for the backward pass"] / 2
    assert "teacher head" not in split


# --- advice


def experiment(**changes):
    config = default_config()
    config.update_from_flattened_dict({"data.seq_len": 10, "train.batch_size": 16, "mesh.preset": "fsdp"} | changes)
    return from_config_dict(config)


PARTS = plan_memory.temporaries(WORK, RULES, RULES)
SHORT = Memory(GIVEN, 90_000, 100_000, 100_000, 50_000)


def advised(work=WORK, memory=SHORT, parts=PARTS, **changes):
    return {one.setting: one.frees for one in plan_advice.advise(experiment(**changes), work, memory, parts, 4)}


def test_what_each_setting_frees_by_hand():
    kept = (2 * 64 + 80) * 3 * 40
    inner = 2 * 32 * 2 * 40  # gate and up of one layer, and their product's gradient
    teacher = 1000 + PARTS["teacher head"] + PARTS["teacher layer"]
    whole = PARTS["student head"] * 3 + PARTS["student layer"] + PARTS["teacher head"] + PARTS["teacher layer"]
    assert advised() == {
        "student.remat=full": (2 * 64 + 80 - 16) * 3 * 40,
        "train.accumulate=2": (kept + inner) // 2 - PARTS["gradients"],
        "data.seq_len=5": (kept + inner) // 2,
        "teacher.dtype=bfloat16": teacher // 2,
        "teacher.source=cache, classes.kind=sampled": teacher,
        "mesh.preset=fsdp_tp, mesh.shape=data:2,model:2": whole // 2,
        "twice the chips": (kept + 2200 + PARTS["gradients"]) // 2,
    }


def test_what_frees_most_comes_first():
    found = plan_advice.advise(experiment(), WORK, SHORT, PARTS, 4)
    assert [one.frees for one in found] == sorted((one.frees for one in found), reverse=True)


def test_what_is_set_already_is_not_advised():
    full = dataclasses.replace(WORK, remat="full")
    assert "student.remat=full" not in advised(full)
    one_row = dataclasses.replace(WORK, rows=4)
    assert not any("accumulate" in setting for setting in advised(one_row))
    bfloat = {"teacher.dtype": "bfloat16", "classes.kind": "sampled"}
    assert "teacher.dtype=bfloat16" not in advised(**bfloat)
    assert "teacher.source=cache" in advised(**bfloat)
    alone = dataclasses.replace(WORK, teacher=None)
    assert not any("teacher" in setting for setting in advised(alone))
    assert advised(**{"mesh.preset": "dp"})["mesh.preset=fsdp"] == (2200 + PARTS["gradients"]) * 3 // 4


def test_with_room_there_is_no_advice():
    assert advised(memory=Memory(GIVEN, 1, 100, 100, 1000)) == {}
    assert advised(memory=Memory(GIVEN, 1, 950, 950, 1000)) != {}


def test_how_much_advice_is_enough():
    advice = [plan_advice.Advice("a", 300, ""), plan_advice.Advice("b", 200, ""), plan_advice.Advice("c", 100, "")]
    enough = plan_advice.enough
    assert enough(advice, Memory({}, 0, 0, 1400, 1000)) == advice[:2]
    assert enough(advice, Memory({}, 0, 0, 2000, 1000)) == []
    assert enough(advice, Memory({}, 0, 0, 1400, 1000, limit=900)) == advice[:2]


@pytest.mark.parametrize("preset", ["tp", "fsdp_tp"])
def test_sequence_sharding_is_advised_with_tensor_parallelism(preset):
    side = dataclasses.replace(WORK.student, model_shards=2, batch_shards=2)
    found = advised(dataclasses.replace(WORK, student=side), **{"mesh.preset": preset, "mesh.shape": "data:2,model:2"})
    assert found["mesh.sequence=True"] == PARTS["kept for the backward pass"] // 2
