"""HBM of one chip by kind, from shapes, from a compiled program, or from the compiler's refusal of one.

Temporaries by formula (they share memory over time, so their sum is no peak; they say what is large and what frees it):
    gradients       float32, stored as the student; twice with train.accumulate > 1
    kept            what the forward pass keeps for the backward one: tokens x layers x `kept_a_token`
    heads           gathered for the vocabulary kernels: V D of each side, and the float32 gradient of the student's
    layer           the gathered weights of one layer, student and teacher
"""

import dataclasses
import math
import re
from typing import Any

import jax

from kdjax.analysis.plan_traffic import Stored, stored
from kdjax.analysis.plan_work import Side, Work
from kdjax.sharding import Rules

GIB = 2**30
UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip. given: kind -> bytes of what goes in; temporaries, peak: as compiled, None if it was refused.

    peak: what is alive at once, as the compiler says. wanted: what is to be allocated, inputs, outputs, temporaries and
    code, which may be more. limit: what the compiler has for it, None if it did not say.
    """

    given: dict[str, int]
    temporaries: int | None
    peak: int | None
    wanted: int
    capacity: int
    limit: int | None = None
    refusal: str = ""

    @property
    def fits(self) -> bool:
        """Compiled, and within the chip's published capacity."""
        return not self.refusal and self.wanted <= self.capacity


def chip_bytes(tree: Any) -> int:
    """Bytes on one device of a tree of ShapeDtypeStruct, by their shardings."""
    return sum(math.prod(_on_chip(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def repeated(tree: Any, least: int = 2**24) -> list[tuple[str, int]]:
    """(path, bytes) of large arrays of which every device of a mesh has the whole, largest first."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        size = leaf.size * leaf.dtype.itemsize
        mesh = getattr(leaf.sharding, "mesh", None)
        if size >= least and mesh is not None and mesh.size > 1 and math.prod(_on_chip(leaf)) == leaf.size:
            found.append((jax.tree_util.keystr(path), size))
    return sorted(found, key=lambda entry: -entry[1])


def of_program(given: dict[str, int], analysis: Any, capacity: int) -> Memory:
    """From the `memory_analysis` of a compiled program."""
    temporaries = int(analysis.temp_size_in_bytes)
    kept = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    wanted = int(kept) + temporaries + int(analysis.generated_code_size_in_bytes)
    peak = int(getattr(analysis, "peak_memory_in_bytes", 0)) or wanted
    return Memory(given, temporaries, peak, max(peak, wanted), capacity)


def of_refusal(given: dict[str, int], message: str, capacity: int) -> Memory | None:
    """From the compiler's error, or None if that is about something else.

    Two forms: 'the total memory required for HLO temporaries (24.00G) exceeds available HBM (15.75G)' is about
    temporaries alone, to which come what goes in; 'Used 34.40G of 15.75G hbm' is about all.
    """
    only = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", message)
    if only:
        temporaries = _size(only[1], only[2])
        wanted = temporaries + sum(given.values())
        return Memory(given, temporaries, None, wanted, capacity, _size(only[3], only[4]), _first_line(message))
    every = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message)
    if every:
        wanted = _size(every[1], every[2])
        return Memory(given, None, None, wanted, capacity, _size(every[3], every[4]), _first_line(message))
    return None


def largest_allocations(message: str) -> list[tuple[int, str, str]]:
    """(bytes, shape, operation's name) of those that the compiler lists in its refusal, if it does."""
    found = []
    for part in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        size = re.match(r"([\d.]+)([KMGT]?)", part)
        shape, name = re.search(r"Shape: (\S+)", part), re.search(r'op_name="([^"]*)"', part)
        if size:
            found.append((_size(size[1], size[2]), shape[1] if shape else "", name[1] if name else ""))
    return found


def kept_a_token(side: Side, remat: str, length: int) -> float:
    """Bytes that the forward pass keeps for a token in one layer, for the backward one.

    full: the layer's input. dots: the products with weights too. none: the scores too, float32, of half the positions.
    """
    cfg, m = side.cfg, side.model_shards
    numbers = float(cfg.width)
    if remat != "full":
        inner = cfg.heads * cfg.head_dim + 2 * cfg.kv_heads * cfg.head_dim + 2 * cfg.mlp
        numbers += cfg.width + inner / m
    scores = 4.0 * cfg.heads / m * length / 2 if remat == "none" else 0.0
    return numbers * side.itemsize + scores


def temporaries(work: Work, rules: Rules, teacher_rules: Rules) -> dict[str, int]:
    """Kind -> bytes of one chip, by formula; see the module."""
    side = work.student
    leaves = stored(side.cfg, rules)
    own = sum(leaf.whole // leaf.parts for leaf in leaves.values())
    kept = kept_a_token(side, work.remat, work.length) * side.cfg.layers * work.local_tokens(side)
    found = {
        "gradients": 4 * own * (2 if work.accumulate > 1 else 1),
        "kept for the backward pass": int(kept),
        "student head": _head(side, leaves) * side.itemsize,
        "student head, gradient": _head(side, leaves) * 4,
        "student layer": _layer(side, leaves),
    }
    if work.teacher is not None:
        theirs = stored(work.teacher.cfg, teacher_rules)
        found["teacher head"] = _head(work.teacher, theirs) * work.teacher.itemsize
        found["teacher layer"] = _layer(work.teacher, theirs)
    return found


def _head(side: Side, leaves: dict[str, Stored]) -> int:
    return leaves["embed" if side.cfg.tied else "head"].whole


def _layer(side: Side, leaves: dict[str, Stored]) -> int:
    numbers = sum(leaf.whole for name, leaf in leaves.items() if name.startswith("layers."))
    return numbers // side.cfg.layers * side.itemsize


def _on_chip(leaf: Any) -> tuple[int, ...]:
    return leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)


def _size(number: str, unit: str) -> int:
    return int(float(number) * UNITS[unit])


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0]
