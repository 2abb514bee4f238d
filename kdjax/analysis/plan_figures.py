"""All figures of a plan for a topology, as the JSON of launch.plan: from work, sharding and compiled program."""

import dataclasses
from typing import Any

from kdjax.analysis import plan_advice, plan_hlo, plan_memory, plan_time, plan_traffic, plan_work
from kdjax.analysis.plan_work import Work
from kdjax.aot import CHIPS, Topology
from kdjax.config import Experiment
from kdjax.sharding import REPLICA, Rules

LISTED = 10  # collectives by name
SLICES = "slices"  # in the place of a mesh axis: over the network that joins slices


@dataclasses.dataclass(frozen=True)
class Program:
    """A step that was compiled, or refused for its memory.

    inputs: kind -> tree of ShapeDtypeStruct. text, analysis: of the compiled program, None if it was refused;
    refusal: the compiler's message then. seconds: of compiling.
    """

    inputs: dict[str, Any]
    text: str | None
    analysis: Any
    refusal: str
    seconds: float


def figures(
    e: Experiment,
    topology: Topology,
    program: Program,
    work: Work,
    rules: Rules,
    teacher_rules: Rules,
    notes: list[str],
) -> dict[str, Any]:
    """The sections that `plan_text.render` prints. Raises ValueError for a refusal that is not about memory."""
    devices = 1 if rules.mesh is None else rules.mesh.size
    given = {kind: plan_memory.chip_bytes(tree) for kind, tree in program.inputs.items()}
    memory = _memory(program, given, int(CHIPS[topology.chip].memory))
    parts = plan_memory.temporaries(work, rules, teacher_rules)
    large = (
        [plan_hlo.largest_arrays(program.text)] if program.text else [plan_memory.largest_allocations(program.refusal)]
    )
    repeated = [found for tree in program.inputs.values() for found in plan_memory.repeated(tree)]
    advice = plan_advice.advise(e, work, memory, parts, devices)
    flops = plan_work.step_flops(work)
    moved = _collectives(program.text, work, rules, teacher_rules)
    own = sum(leaf.whole // leaf.parts for leaf in plan_traffic.stored(work.student.cfg, rules).values())
    return {
        "target": {
            "topology": str(topology),
            "devices": devices,
            "mesh": {} if rules.mesh is None else dict(rules.mesh.shape),
            "preset": f"mesh.preset={e.mesh.preset}"
            + (f", teacher.preset={e.teacher.preset}" * bool(e.teacher.preset)),
            "compile_seconds": program.seconds,
        },
        "notes": notes,
        "memory": {
            "given": memory.given,
            "temporaries": memory.temporaries,
            "peak": memory.peak,
            "wanted": memory.wanted,
            "capacity": memory.capacity,
            "limit": memory.limit,
            "fits": memory.fits,
            "refusal": memory.refusal,
            "by_formula": parts,
            "repeated": repeated,
            "largest": large[0],
        },
        "collectives": moved,
        "flops": {
            "lines": [dataclasses.asdict(line) for line in flops],
            "model": sum(line.model for line in flops),
            "executed": sum(line.executed for line in flops),
        },
        "estimate": _estimate(e, topology, devices, flops, work, own, moved),
        "disk": _disk(e, program.inputs, work),
        "advice": {
            "entries": [dataclasses.asdict(one) for one in advice],
            "enough": [one.setting for one in plan_advice.enough(advice, memory)] if not memory.fits else [],
        },
    }


def _memory(program: Program, given: dict[str, int], capacity: int) -> plan_memory.Memory:
    if not program.refusal:
        return plan_memory.of_program(given, program.analysis, capacity)
    refused = plan_memory.of_refusal(given, program.refusal, capacity)
    if refused is None:
        raise ValueError(f"the step must compile for --topology, got an error of the compiler: {program.refusal}")
    return refused


def _collectives(text: str | None, work: Work, rules: Rules, teacher_rules: Rules) -> dict[str, Any]:
    implied = plan_traffic.implied(work, rules, teacher_rules)
    total = sum(one.sent for one in implied)
    sizes = {} if rules.mesh is None else dict(rules.mesh.shape)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    traffic = plan_hlo.traffic(text, rules.mesh.size) if text and rules.mesh is not None else plan_hlo.Traffic(())
    for one in traffic.collectives:
        axis = SLICES if one.network else plan_hlo.by_axis(one, sizes)
        line = found.setdefault((one.kind, axis), {"kind": one.kind, "axis": axis, "count": 0, "sent": 0.0})
        line["count"] += one.times
        line["sent"] += one.sent
    largest = sorted(traffic.collectives, key=lambda one: -one.sent)[:LISTED]
    names = ("kind", "bytes", "times", "sent", "where")
    return {
        "compiled": sorted(found.values(), key=lambda line: -line["sent"]),
        "largest": [{name: getattr(one, name) for name in names} for one in largest],
        "sent": traffic.sent,
        "unknown_loops": traffic.unknown_loops,
        "implied": [dataclasses.asdict(one) for one in implied],
        "implied_sent": total,
        "ratio": traffic.sent / total if total and text else None,
    }


def _estimate(
    e: Experiment,
    topology: Topology,
    devices: int,
    flops: list[plan_work.Flops],
    work: Work,
    own: int,
    moved: dict[str, Any],
) -> dict[str, Any]:
    slices = sum(line["sent"] for line in moved["compiled"] if _over_network(line["axis"], topology))
    sent = (moved["sent"] - slices) if moved["compiled"] else moved["implied_sent"]
    roof = plan_time.roofline(topology, devices, flops, plan_time.hbm_bytes(work, own), sent, slices)
    return {
        "compute": roof.compute,
        "memory": roof.memory,
        "interconnect": roof.interconnect,
        "network": roof.network,
        "step_seconds": roof.step,
        "bound": roof.bound,
        "tokens_a_day": work.tokens / roof.step * plan_time.DAY,
        "steps": e.train.steps,
        "hours": e.train.steps * roof.step / 3600,
    }


def _over_network(axis: str, topology: Topology) -> bool:
    """Whether what runs along an axis leaves its slice, or its host of GPUs; TPU programs say so themselves."""
    chip = CHIPS[topology.chip]
    if chip.platform == "tpu":
        return axis == SLICES
    return topology.chips > chip.host[0] and REPLICA in axis.split("+")


def _disk(e: Experiment, inputs: dict[str, Any], work: Work) -> dict[str, Any]:
    import jax

    kept = e.checkpoint.keep + e.checkpoint.keep_best
    saved = [inputs["student parameters"], inputs["optimiser and state"]]
    tokens = e.data.max_train_tokens or e.train.steps * work.tokens
    cache = plan_time.cache_size(e, work.vocab, tokens)
    return {
        "checkpoint": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved)),
        "checkpoints_kept": kept,
        "cache": None if cache is None else dataclasses.asdict(cache),
    }
