"""Compile-only devices of whole slices, and the plan of a tiny step that is compiled for one."""

import json
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import aot
from kdjax.analysis import plan_hlo, plan_memory, plan_text
from kdjax.config import default_config, from_config_dict


def needs(chip):
    reason = aot.unavailable(chip)
    if reason is not None:
        pytest.skip(reason)


def mesh_of(topology):
    devices = list(aot.topology_devices(aot.parse_topology(topology)))
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Explicit,), devices=devices)


SUCH = "Such as v5e:4x4, v6e:2x4, v4:2x2x2, v5p:4x4x4, tpu7x:2x2x1, h100:8; two slices: v5e:4x4:2."


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("v5x:4x4", "must begin with one of v4, v5e, v5p, v6e, tpu7x, h100"),
        ("", "must begin with one of v4, v5e, v5p, v6e, tpu7x, h100"),
        ("v5e", "of v5e must have two sizes behind the colon"),
        ("v5e:4", "of v5e must have two sizes behind the colon"),
        ("v5p:4x4", "of v5p must have three sizes behind the colon"),
        ("h100:8x2", "of h100 must have a number of GPUs behind the colon"),
        ("v5e:0x4", "of v5e must have two sizes behind the colon"),
        ("v5e:4x-4", "of v5e must have two sizes behind the colon"),
        ("v5e:3x4", "of v5e must be made of whole hosts of 2x2 chips, or be one chip"),
        ("h100:12", "of h100 must be made of whole hosts of 8 chips, or be one chip"),
        ("v5e:4x4:0", "may end with a colon and a number of slices"),
        ("v5e:4x4:", "may end with a colon and a number of slices"),
        ("v5e:4x4:2:2", "may end with a colon and a number of slices"),
    ],
)
def test_what_is_no_topology_is_told_what_one_is(text, problem):
    with pytest.raises(ValueError, match=re.escape(f"--topology {problem}, got {text!r}. {SUCH}")):
        aot.parse_topology(text)


@pytest.mark.parametrize(
    ("text", "chips", "devices", "slices"),
    [
        ("v5e:4x4", 16, 16, 1),
        ("v5e:1x1", 1, 1, 1),
        ("v6e:2x4", 8, 8, 1),
        ("v4:2x2x2", 8, 8, 1),
        ("v5p:2x2x1:2", 8, 8, 2),
        ("tpu7x:2x2x1", 4, 8, 1),
        ("h100:2", 2, 2, 1),
        ("h100:16", 16, 16, 1),
    ],
)
def test_devices_of_a_topology(text, chips, devices, slices):
    topology = aot.parse_topology(text)
    assert (topology.chips, topology.device_count, topology.slices, str(topology)) == (chips, devices, slices, text)
    needs(topology.chip)
    found = aot.topology_devices(topology)
    assert len(found) == devices
    if slices > 1:
        assert {device.slice_index for device in found} == set(range(slices))


def test_what_cannot_be_compiled_here_is_said(monkeypatch):
    monkeypatch.setattr(aot, "unavailable", lambda chip: "there is no compiler")
    message = r"^--topology must be one that can be compiled for here, got 'v5e:2x2'; there is no compiler\.$"
    with pytest.raises(ValueError, match=message):
        aot.topology_devices.__wrapped__(aot.parse_topology("v5e:2x2"))


def tiny(**changes):
    config = default_config()
    config.update_from_flattened_dict(
        {
            "teacher.path": "synthetic",
            "student.init.kind": "cut",
            "student.init.layers": 2,
            "student.remat": "full",
            "student.compute_dtype": "bfloat16",
            "teacher.dtype": "bfloat16",
            "data.path": "nowhere.txt",
            "data.seq_len": 128,
            "train.batch_size": 8,
            "train.steps": 3600,
            "mesh.preset": "fsdp",
            "mesh.kernels": "xla",
        }
        | changes
    )
    return from_config_dict(config)


@pytest.fixture(scope="module")
def planned(plan, little_effort):
    needs("v5e")
    return plan.topology_figures(tiny(), "v5e:2x2")


def test_the_memory_of_a_compiled_step(planned):
    memory, sizes = planned["memory"], (planned["student_parameters"], planned["teacher_parameters"])
    split = memory["given"]["student parameters"]
    assert sizes[0] < split < 1.3 * sizes[0], "a quarter of 4 bytes, but norms"
    assert memory["given"]["optimiser and state"] == pytest.approx(2 * split, abs=64)
    assert memory["given"]["teacher parameters"] == pytest.approx(sizes[1] / 2, rel=0.1)
    assert memory["temporaries"] == planned["step_temporary_bytes"]
    assert sum(memory["given"].values()) <= planned["step_argument_bytes"], "and what tiles are filled up with"
    assert planned["step_argument_bytes"] + memory["temporaries"] < memory["wanted"] < memory["capacity"] == 16e9
    assert memory["fits"] is True
    assert (memory["repeated"], planned["advice"]["entries"]) == ([], [])


def test_the_collectives_of_a_compiled_step(planned):
    """Layers are gathered as often as there are layers: what is in a scan is not counted once."""
    moved = planned["collectives"]
    assert moved["unknown_loops"] == 0
    assert {line["axis"] for line in moved["compiled"] if line["kind"] != "collective-permute"} == {"data"}
    gathered = sum(line["sent"] for line in moved["compiled"] if line["kind"] == "all-gather")
    implied = {line["name"]: line["sent"] for line in moved["implied"]}
    wanted = implied["student: parameters gathered"] + implied["teacher: parameters gathered"]
    # The compiler gathers the tied table once, for the look-up and the head.
    assert gathered == pytest.approx(wanted, rel=0.05)
    assert 0.9 < moved["ratio"] < 1.3


def test_two_slices_reduce_gradients_over_the_network(plan, little_effort):
    """Each chip sends its quarter of the gradients to its counterpart once; all else stays in the slice."""
    needs("v5e")
    found = plan.topology_figures(tiny(), "v5e:2x2:2")
    assert found["target"]["mesh"] == {"replica": 2, "data": 4}
    (over,) = [line for line in found["collectives"]["compiled"] if line["axis"] == "slices"]
    (own,) = [line["sent"] for line in found["collectives"]["implied"] if line["name"] == "student: gradients reduced"]
    assert over["kind"] == "all-reduce"
    # Reduced within a slice, 3/4, and then a quarter of it between two; so small arrays are filled up to whole tiles.
    assert own / 4 <= over["sent"] < 1.5 * own / 4
    assert found["estimate"]["network"] == pytest.approx(over["sent"] / 3.1e9)
    assert "over slices" in plan_text.render(found)


def test_eight_gpus_send_what_is_implied(plan):
    needs("h100")
    found = plan.topology_figures(tiny(**{"mesh.attention": "xla"}), "h100:8")  # cuDNN may not be here
    assert found["target"]["mesh"] == {"data": 8}
    assert found["memory"]["fits"]
    moved = found["collectives"]
    assert {line["kind"] for line in moved["compiled"]} == {"all-gather", "reduce-scatter", "all-reduce"}
    assert moved["ratio"] == pytest.approx(1, abs=0.01)


def test_the_page_says_it_all(planned):
    page = plan_text.render(planned)
    for said in (
        "v5e:2x2: 4 devices, mesh {'data': 4}, mesh.preset=fsdp",
        "0% used: fits",
        "all-gather",
        "program / implied",
        "teacher trunk, forward",
        "ESTIMATE of a step, from published figures: no less than",
        "hours for 3,600 steps, at least",
        "a checkpoint",
        "Rows and targets of the text: not known here",
    ):
        assert said in page
    assert planned["text"] is None
    json.dumps(planned, allow_nan=False)
    hours, seconds = planned["estimate"]["hours"], planned["estimate"]["step_seconds"]
    assert hours == pytest.approx(seconds)
    assert planned["estimate"]["tokens_a_day"] == pytest.approx(8 * 128 / seconds * 86400)


def test_a_step_that_does_not_fit_is_told_what_to_change(plan, monkeypatch):
    """The compiler's refusal, without compiling: what it wants, and what each setting frees."""
    needs("v5e")
    refusal = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (24.00G) exceeds "
        "available HBM (15.75G)."
    )

    def refused(step, rules):
        return plan.refused_program(step, refusal, 1.0)

    monkeypatch.setattr(plan, "compile_step", refused)
    found = plan.topology_figures(tiny(**{"student.remat": "none", "teacher.dtype": "float32"}), "v5e:2x2")
    memory = found["memory"]
    assert (memory["fits"], memory["peak"], memory["temporaries"]) == (False, None, 24 * 2**30)
    assert memory["wanted"] == 24 * 2**30 + sum(memory["given"].values())
    settings = [one["setting"] for one in found["advice"]["entries"]]
    assert {"student.remat=full", "data.seq_len=64", "teacher.dtype=bfloat16"} <= set(settings)
    page = plan_text.render(found)
    # 24 GiB are not the tiny model's.
    for said in ("DOES NOT FIT", refusal, "student.remat=full", "All of it would not be enough"):
        assert said in page
    assert math.isfinite(found["estimate"]["step_seconds"])
    json.dumps(found, allow_nan=False)


def test_another_error_of_the_compiler_stays_an_error(plan, monkeypatch):
    needs("v5e")
    monkeypatch.setattr(plan, "compile_step", lambda step, rules: plan.refused_program(step, "INTERNAL: a bug", 1.0))
    message = r"^the step must compile for --topology, got an error of the compiler: INTERNAL: a bug$"
    with pytest.raises(ValueError, match=message):
        plan.topology_figures(tiny(), "v5e:2x2")


def test_single_is_planned_on_one_chip(plan):
    needs("v5e")
    rules = plan.target_rules(tiny(**{"mesh.preset": "single"}), aot.parse_topology("v5e:2x2"))
    assert rules.mesh.size == 1
    assert jax.tree.leaves(rules.mesh.devices.tolist())[0].device_kind == "TPU v5 lite"


def test_a_real_refusal_is_read():
    """The compiler itself, asked for a sort of more than there is."""
    needs("v5e")
    mesh = mesh_of("v5e:2x2")
    x = jax.ShapeDtypeStruct((65536, 131072), jnp.float32, sharding=NamedSharding(mesh, P("data", None)))
    with jax.set_mesh(mesh), pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.jit(lambda a: jnp.sort(a, 1)[:, ::-1] * jnp.sum(a)).lower(x).compile()
    found = plan_memory.of_refusal({"x": 2**33}, str(caught.value), 16 * 10**9)
    assert found.wanted >= 2**33 + found.limit > 2**33 + 15 * 2**30
    assert not found.fits


def test_the_parser_reads_the_program_of_another_chip():
    """A reduction over 4 chips of v5p in a scan of 6."""
    needs("v5p")
    mesh = mesh_of("v5p:2x2x1")

    def body(x, _):
        return jnp.tanh(jax.lax.psum(x, "data")), None

    def function(x):
        return jax.lax.scan(body, x, None, length=6)[0]

    x = jax.ShapeDtypeStruct((1024, 256), jnp.float32, sharding=NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        whole = jax.shard_map(function, in_specs=P(), out_specs=P(), check_vma=False)
        text = jax.jit(whole).lower(x).compile().as_text()
    traffic = plan_hlo.traffic(text, 4)
    assert sum(one.times * one.bytes for one in traffic.collectives) == 6 * 1024 * 256 * 4
    assert traffic.sent == 6 * 1024 * 256 * 4 * 2 * 3 / 4
