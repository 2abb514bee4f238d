"""The bytes that a sharding implies, by formula, to compare with what the compiled program moves (`plan_hlo.py`).

Per micro-batch, sent by one chip in a ring; n: parts that a parameter is gathered from, r: devices of the batch that
repeat it, m: parts of tensor parallelism, which stay split; w: what a chip holds of it when it is gathered.
    gathering       w (n - 1) / n for every use: a layer of the student forward and, since gathered weights are never
                    kept, backward; of the teacher forward; the head at the vocabulary
    look-up         the embedding likewise; or, if a micro-batch has fewer tokens than the vocabulary entries, which are
                    split, the rows that are looked up instead: (n - 1) / n of them forward, and of their gradient back
    gradients       w (n - 1) / n, reduced and scattered; then 2 (w / n) (r - 1) / r where it is repeated
    tensor          2 (m - 1) / m of the hidden states: two a layer forward, two backward, one again with remat "full";
                    at the look-up one forward, one backward; one backward of the head
In the dtype of the computation; the gradient of the embedding is added up in float32, as are those of norms. (A program
may move less: a TPU multiplies float32 matrices in bfloat16 unless it is told otherwise, and gathers them so.)
"""

import dataclasses
import math
from typing import Any

import jax

from kdjax import models
from kdjax.analysis.plan_hlo import sent_bytes
from kdjax.analysis.plan_work import Side, Work
from kdjax.sharding import Rules


@dataclasses.dataclass(frozen=True)
class Implied:
    """One line: bytes that a chip sends per step, and how they come about."""

    name: str
    sent: float
    formula: str


@dataclasses.dataclass(frozen=True)
class Stored:
    """A parameter on the mesh. whole: numbers on a chip once gathered; parts: it is gathered from; copies: repeated."""

    whole: int
    parts: int
    copies: int

    def gathered(self, itemsize: int) -> float:
        """Bytes that a chip sends to gather it once."""
        return sent_bytes("all-gather", self.whole * itemsize, self.parts)

    def reduced(self, itemsize: int) -> float:
        """Bytes that a chip sends to add its gradient up."""
        rest = sent_bytes("all-reduce", self.whole * itemsize / self.parts, self.copies)
        return sent_bytes("reduce-scatter", self.whole * itemsize, self.parts) + rest


def stored(cfg: models.ModelConfig, rules: Rules) -> dict[str, Stored]:
    """Leaf -> how it is stored under these rules; leaves of layers stand for all layers, named 'layers.<leaf>'."""
    found = {}
    for path, spec in jax.tree_util.tree_leaves_with_path(
        models.param_specs(cfg), is_leaf=lambda s: hasattr(s, "axes")
    ):
        name = ".".join(str(key.key) for key in path)
        sizes = dict(rules.mesh.shape) if rules.mesh is not None else {}
        used = [one for entry in rules.storage_spec(spec.axes, spec.shape) for one in _names(entry)]
        split = [one for one in used if one in rules.batch_axes]
        inner = math.prod(sizes[one] for one in used if one not in rules.batch_axes)
        parts = math.prod(sizes[one] for one in split)
        copies = math.prod(sizes[one] for one in rules.batch_axes if one not in split)
        found[name] = Stored(math.prod(spec.shape) // inner, parts, copies)
    return found


def implied(work: Work, rules: Rules, teacher_rules: Rules) -> list[Implied]:
    """Line by line; lines that are 0 are left out."""
    lines = [*_student(work, rules)]
    if work.teacher is not None:
        side, leaves = work.teacher, stored(work.teacher.cfg, teacher_rules)
        layers = [leaf for name, leaf in leaves.items() if name.startswith("layers.")]
        head = leaves["embed" if side.cfg.tied else "head"]
        gathered = sum(leaf.gathered(side.itemsize) for leaf in [*layers, head])
        gathered += _look_up(work, side, leaves["embed"], teacher_rules)[0]
        lines += [
            Implied("teacher: parameters gathered", gathered, "layers, embedding and head once"),
            *_tensor("teacher", work, side, 2),
        ]
    return [dataclasses.replace(line, sent=line.sent * work.accumulate) for line in lines if line.sent]


def _student(work: Work, rules: Rules) -> list[Implied]:
    side, leaves = work.student, stored(work.student.cfg, rules)
    layers = {name: leaf for name, leaf in leaves.items() if name.startswith("layers.")}
    embed, head = leaves["embed"], leaves["embed" if side.cfg.tied else "head"]
    size = side.itemsize
    forward, back = _look_up(work, side, embed, rules)
    gathered = sum(2 * leaf.gathered(size) for leaf in layers.values()) + forward + head.gathered(size)
    # Norm scales are used in float32.
    reduced = sum(leaf.reduced(4 if name.endswith("norm") else size) for name, leaf in layers.items())
    reduced += back + head.reduced(size) + leaves["final_norm"].reduced(4)
    return [
        Implied("student: parameters gathered", gathered, "layers forward and backward, embedding and head once"),
        Implied("student: gradients reduced", reduced, "layers, head; embedding in float32"),
        *_tensor("student", work, side, 2 + 2 + (work.remat == "full")),
    ]


def _look_up(work: Work, side: Side, embed: Stored, rules: Rules) -> tuple[float, float]:
    """Bytes (forward, back) of the embedding: of the table, or of its rows; see `Rules.embed`."""
    tokens = work.tokens // work.accumulate
    by_rows = not rules.preset.tensor and side.cfg.vocab_size % embed.parts == 0 and tokens < side.cfg.vocab_size
    if embed.parts == 1 or not by_rows:
        return embed.gathered(side.itemsize), embed.reduced(4)
    rows = sent_bytes("reduce-scatter", tokens / embed.copies * side.cfg.width * side.itemsize, embed.parts)
    return rows, rows + sent_bytes("all-reduce", embed.whole * 4 / embed.parts, embed.copies)


def _tensor(name: str, work: Work, side: Side, a_layer: int) -> list[Implied]:
    m = side.model_shards
    hidden = work.local_tokens(side) * side.cfg.width
    others = 3 if name == "student" else 1
    summed = sent_bytes("all-reduce", hidden * side.itemsize, m) * (a_layer * side.cfg.layers + others)
    formula = f"{a_layer} a layer, look-up" + " there and back, head back" * (others == 3)
    return [Implied(f"{name}: partial sums of hidden states", summed, formula)]


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
