"""What one train step computes, in numbers: the work, and from it model FLOPs by formula.

cost_analysis of a compiled program counts the body of a loop once, so it says neither. A multiply and an add are two
FLOPs; B rows, T positions, S slots a row, V columns that both heads have; L, D, N, G, H, F as in kdjax/types.py.

    trunk, forward      2 B T L (2 D N H + 2 D G H + 3 D F) + 4 L N H B T (T + 1) / 2   causal; segments are not known,
                        layers with a window of W see W positions at most
    trunk, backward     twice that; recomputed by student.remat: "full" once, "dots" the attention, "none" nothing
    head, one product   2 n V D at n positions: statistics B T, one for each side; loss B S, student 3 (logits and two
                        gradients), teacher 1; drawing classes from a live teacher 1, its largest ones 2

"model" is what the method needs; "executed" counts recomputation and what a kernel computes anew.
"""

import dataclasses
from typing import Any

from kdjax.config import Experiment
from kdjax.kernels.shapes import PRODUCTS
from kdjax.models import ModelConfig
from kdjax.selection.stats import NEEDS_TEACHER, PAIR, STUDENT, SUMS, TEACHER

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Side:
    """A model in the step. itemsize: bytes of a number where it is used. shards: parts of the batch; of heads, MLP and
    vocabulary. passes: products of its head at all positions, for statistics; products: at the slots.
    """

    cfg: ModelConfig
    itemsize: int
    batch_shards: int = 1
    model_shards: int = 1
    passes: int = 0
    products: int = 0
    executed_products: int = 0


@dataclasses.dataclass(frozen=True)
class Work:
    """A step. rows: of the global batch; slots: of a row. teacher: None if none runs; its rows are `room` longer."""

    rows: int
    length: int
    slots: int
    vocab: int
    student: Side
    teacher: Side | None
    accumulate: int = 1
    remat: str = "none"
    room: int = 0

    @property
    def tokens(self) -> int:
        """Of a step, padding included."""
        return self.rows * self.length

    def local_tokens(self, side: Side) -> int:
        """Of one micro-batch on one device."""
        return -(-self.rows // (self.accumulate * side.batch_shards)) * self.length


@dataclasses.dataclass(frozen=True)
class Flops:
    """One line: of all chips, per step."""

    name: str
    model: float
    executed: float


def describe(
    e: Experiment, student: Side, teacher: Side | None, chooser: Any, objective: Any, platform: str, room: int = 0
) -> Work:
    """The work of an experiment's step. student, teacher: with shards; passes and products are filled in here.

    room: how much longer the rows are that a privileged teacher reads. chooser, objective: as kdjax/build makes them.
    platform: "tpu" or "gpu", whose kernels run with mesh.kernels="auto".
    """
    kept = {"teacher_entropy": e.cache.entropy, "teacher_ce": e.cache.label_logp} if teacher is None else {}
    needs = [name for name in chooser.needs if not kept.get(name)]
    sums = any(name in SUMS for name in needs)
    both = any(name in PAIR for name in needs)
    kernels = {"auto": f"pallas_{platform}"}.get(e.mesh.kernels, e.mesh.kernels)
    sparse = e.classes.kind != "all"
    reads_teacher = objective.needs_teacher
    alone = any(not term.teacher for term in objective.terms.values())
    dense, entries = ("linear_divergence+grad", kernels), ("sparse_divergence+grad", kernels)
    products = {dense: 0, entries: 0}
    products[entries] = int(sparse and reads_teacher)
    products[dense] = int(not sparse or alone or not reads_teacher)
    ours = 3 * sum(products.values())
    executed = sum(many * PRODUCTS.get(op, (3, 1))[0] for op, many in products.items())
    student = dataclasses.replace(
        student,
        passes=int(both or any(name in STUDENT for name in needs)) + sums,
        products=ours,
        executed_products=executed,
    )
    if teacher is not None:
        drawn = {"all": 0, "sampled": 1}.get(e.classes.kind, 2)
        theirs = drawn if sparse else int(reads_teacher)
        teacher = dataclasses.replace(
            teacher,
            passes=int(both or any(name in TEACHER for name in needs)) + sums,
            products=theirs,
            executed_products=theirs if sparse else theirs * PRODUCTS.get(dense, (3, 1))[1],
        )
        if not reads_teacher and not any(name in NEEDS_TEACHER for name in needs):
            teacher = None
    vocab = min(side.cfg.vocab_size for side in (student, teacher) if side is not None)
    length = e.data.seq_len
    return Work(
        e.train.batch_size,
        length,
        chooser.policy.slots(length),
        vocab,
        student,
        teacher,
        e.train.accumulate,
        e.student.remat,
        room,
    )


def layer_weights(cfg: ModelConfig) -> int:
    """Numbers in the matrices of one layer."""
    attention = 2 * cfg.width * cfg.heads * cfg.head_dim + 2 * cfg.width * cfg.kv_heads * cfg.head_dim
    return attention + 3 * cfg.width * cfg.mlp


def trunk_flops(cfg: ModelConfig, rows: int, length: int) -> tuple[float, float]:
    """(matrix products with weights, attention) of a forward pass."""
    linear = 2.0 * rows * length * cfg.layers * layer_weights(cfg)
    local, seen = sum(cfg.local_layers), min(cfg.window or length, length)
    near = seen * (seen + 1) / 2 + (length - seen) * seen  # pairs of a local layer
    pairs = (cfg.layers - local) * length * (length + 1) / 2 + local * near
    return linear, 4.0 * cfg.heads * cfg.head_dim * rows * pairs


def step_flops(work: Work) -> list[Flops]:
    """Line by line; lines that are 0 are left out."""
    linear, attention = trunk_flops(work.student.cfg, work.rows, work.length)
    forward = linear + attention
    again = {"full": forward, "dots": attention}.get(work.remat, 0.0)
    lines = [
        Flops("student trunk, forward", forward, forward),
        Flops("student trunk, backward", 2 * forward, 2 * forward),
        Flops(f"student trunk, again (remat {work.remat})", 0.0, again),
    ]
    if work.teacher is not None:
        theirs = sum(trunk_flops(work.teacher.cfg, work.rows, work.length + work.room))
        lines.append(Flops("teacher trunk, forward", theirs, theirs))
    for name, side in (("student", work.student), ("teacher", work.teacher)):
        if side is not None:
            product = 2.0 * work.vocab * side.cfg.width
            everywhere = side.passes * product * work.tokens
            at_slots = product * work.rows * work.slots
            lines.append(Flops(f"{name} head, statistics at all positions", everywhere, everywhere))
            lines.append(
                Flops(
                    f"{name} head, loss at {work.slots} slots a row",
                    side.products * at_slots,
                    side.executed_products * at_slots,
                )
            )
    return [line for line in lines if line.executed]
