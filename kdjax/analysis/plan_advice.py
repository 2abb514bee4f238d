"""Which setting frees how much HBM of a chip, computed from the shapes; for a plan that does not fit, or hardly."""

import dataclasses

from kdjax.analysis.plan_memory import Memory, kept_a_token
from kdjax.analysis.plan_work import Work
from kdjax.config import Experiment

CLOSE = 0.9  # of the capacity: more than that is worth a word


@dataclasses.dataclass(frozen=True)
class Advice:
    """setting: what to type; frees: bytes of one chip, about; cost: what is given for it."""

    setting: str
    frees: int
    cost: str


def advise(e: Experiment, work: Work, memory: Memory, parts: dict[str, int], devices: int) -> list[Advice]:
    """What frees most first; nothing if it fits with room. parts: `plan_memory.temporaries`."""
    if memory.fits and memory.wanted <= CLOSE * memory.capacity:
        return []
    found = [
        *_remat(e, work),
        *_rows(e, work, parts),
        *_teacher(e, work, memory, parts),
        *_mesh(e, work, memory, parts),
    ]
    if devices > 1 or e.mesh.preset != "single":
        found.append(_more_chips(e, memory, parts))
    return sorted((one for one in found if one.frees > 0), key=lambda one: -one.frees)


def enough(advice: list[Advice], memory: Memory) -> list[Advice]:
    """The shortest beginning of the list that would make it fit, or [] if all of it would not."""
    missing = memory.wanted - min(memory.capacity, memory.limit or memory.capacity)
    for many in range(1, len(advice) + 1):
        if sum(one.frees for one in advice[:many]) >= missing:
            return advice[:many]
    return []


def _remat(e: Experiment, work: Work) -> list[Advice]:
    if work.remat == "full":
        return []
    tokens, layers = work.local_tokens(work.student), work.student.cfg.layers
    here, there = (kept_a_token(work.student, remat, work.length) for remat in (work.remat, "full"))
    return [Advice("student.remat=full", int((here - there) * layers * tokens), "a third more work in the student")]


def _rows(e: Experiment, work: Work, parts: dict[str, int]) -> list[Advice]:
    side = work.student
    found = []
    inner = 2 * max(2 * side.cfg.mlp, side.cfg.width) // side.model_shards * side.itemsize * work.local_tokens(side)
    by_token = parts["kept for the backward pass"] + inner
    rows = work.rows // (work.accumulate * side.batch_shards)
    if rows > 1:
        many = work.accumulate * next(n for n in range(2, rows + 1) if rows % n == 0)
        # The first split keeps the sum of the gradients beside those of a micro-batch.
        second = parts["gradients"] if work.accumulate == 1 else 0
        freed = int(by_token * (1 - work.accumulate / many)) - second
        found.append(Advice(f"train.accumulate={many}", freed, "weights are gathered as many times more often"))
    if e.data.seq_len > 1:
        cost = "shorter context; with packing the same text in twice as many rows"
        found.append(Advice(f"data.seq_len={e.data.seq_len // 2}", by_token // 2, cost))
    return found


def _teacher(e: Experiment, work: Work, memory: Memory, parts: dict[str, int]) -> list[Advice]:
    if work.teacher is None:
        return []
    params = memory.given.get("teacher parameters", 0)
    temporary = parts.get("teacher head", 0) + parts.get("teacher layer", 0)
    found = []
    if e.teacher.dtype == "float32":
        found.append(Advice("teacher.dtype=bfloat16", (params + temporary) // 2, "the teacher is rounded"))
    entries = "" if e.classes.kind != "all" else ", classes.kind=sampled"
    cost = "launch.cache_teacher runs before; disk"
    found.append(Advice(f"teacher.source=cache{entries}", params + temporary, cost))
    return found


def _mesh(e: Experiment, work: Work, memory: Memory, parts: dict[str, int]) -> list[Advice]:
    stored = sum(size for kind, size in memory.given.items() if kind != "batch") + parts["gradients"]
    shards = work.student.batch_shards * work.student.model_shards
    found = []
    if e.mesh.preset == "dp" and shards > 1:
        cost = "weights are gathered at every use"
        found.append(Advice("mesh.preset=fsdp", stored * (shards - 1) // shards, cost))
    if e.mesh.preset == "fsdp" and shards % 2 == 0:
        whole = sum(size for name, size in parts.items() if "head" in name or "layer" in name)
        shape = f"mesh.shape=data:{shards // 2},model:2"
        cost = "hidden states are summed over 2 chips in every layer"
        found.append(Advice(f"mesh.preset=fsdp_tp, {shape}", whole // 2, cost))
    if e.mesh.preset in ("tp", "fsdp_tp") and not e.mesh.sequence:
        kept = parts["kept for the backward pass"]
        m = work.student.model_shards
        found.append(Advice("mesh.sequence=True", kept * (m - 1) // m, "none known: the same bytes are sent"))
    return found


def _more_chips(e: Experiment, memory: Memory, parts: dict[str, int]) -> Advice:
    """Twice the chips halve what is split over them; with dp the rows alone."""
    split = parts["kept for the backward pass"]
    if e.mesh.preset != "dp":
        split += sum(size for kind, size in memory.given.items() if kind != "batch") + parts["gradients"]
    return Advice("twice the chips", split // 2, "money; train.batch_size must be a multiple of the batch's parts")
