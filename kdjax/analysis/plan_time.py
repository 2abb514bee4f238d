"""Estimates of time and disk: a roofline of the step from the vendor's figures, and what caches and checkpoints take.

The step takes at least the longest of three: computing at the peak of bfloat16, moving HBM bytes, sending bytes to
other chips. Real steps take longer: nothing reaches its peak, and the three overlap in part only.

HBM bytes of a chip per micro-batch, roughly: gathered weights are written once and read by forward, backward and
recomputation; activations of a layer are 6 D + 4 N H + 2 G H + 3 F numbers a token, written and read, by forward once,
by backward twice, by recomputation once; a head is read once per product and 512 rows, the float32 gradient of the
student's read and written. The optimiser reads parameter, two moments and gradient and writes three of them, float32.
"""

import dataclasses

from kdjax.analysis.plan_work import Flops, Side, Work, layer_weights
from kdjax.aot import CHIPS, Topology
from kdjax.config import Experiment

HEAD_ROWS = 512  # of a tile of the vocabulary kernels
DAY = 86400
# Bytes a position on disk, kind "sampled", 50 draws, entropies kept: measured with SmolLM2-135M (V = 49152) on the
# Factbook, rows as they come, 40,960 tokens (README.md). Widths of a word: kdjax/teacher/cache/words.py.
MEASURED, MEASURED_ENTRIES = 30.9, 50


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds per step of each bound; network: to other slices, None if the chip has no figure for it."""

    compute: float
    memory: float
    interconnect: float
    network: float | None = 0.0

    @property
    def step(self) -> float:
        """The longest."""
        return max(self.compute, self.memory, self.interconnect, self.network or 0.0)

    @property
    def bound(self) -> str:
        """By what."""
        return max(("compute", "memory", "interconnect", "network"), key=lambda name: getattr(self, name) or 0.0)


def roofline(
    topology: Topology, devices: int, flops: list[Flops], hbm: float, sent: float, sent_to_slices: float = 0.0
) -> Roofline:
    """flops: of all chips; the rest: bytes of one chip. sent: within a slice."""
    chip = CHIPS[topology.chip]
    network = None if sent_to_slices and chip.network is None else sent_to_slices / (chip.network or 1.0)
    executed = sum(line.executed for line in flops)
    return Roofline(executed / devices / chip.flops, hbm / chip.bandwidth, sent / chip.interconnect, network)


def hbm_bytes(work: Work, own: int) -> float:
    """Of one chip and step, roughly; own: student parameters that it stores. See the module."""
    student = work.accumulate * _hbm(work, work.student, trained=True)
    teacher = 0.0 if work.teacher is None else work.accumulate * _hbm(work, work.teacher, trained=False)
    return student + teacher + 7.0 * 4 * own


def _hbm(work: Work, side: Side, trained: bool) -> float:
    cfg, m = side.cfg, side.model_shards
    again = trained and work.remat == "full"
    weights = cfg.layers * layer_weights(cfg) / m * side.itemsize * (2 + (3 + again if trained else 0))
    inner = 4 * cfg.heads * cfg.head_dim + 2 * cfg.kv_heads * cfg.head_dim + 3 * cfg.mlp
    tokens = work.local_tokens(side)
    passes = 3 + again if trained else 1
    activations = 2.0 * cfg.layers * tokens * (6 * cfg.width + inner / m) * side.itemsize * passes
    slots = tokens // work.length * work.slots
    reads = side.passes * -(-tokens // HEAD_ROWS) + side.products * -(-slots // HEAD_ROWS)
    head = work.vocab * cfg.width / m * (reads * side.itemsize + (8 * -(-slots // HEAD_ROWS) if trained else 0))
    return weights + activations + head


@dataclasses.dataclass(frozen=True)
class Cache:
    """The teacher's cache on disk. least, most: bytes, equal if the figure is measured. positions: how many it has."""

    positions: int
    least: int
    most: int
    note: str


def cache_size(e: Experiment, vocab: int, tokens: int) -> Cache | None:
    """What the cache of an experiment takes for so many tokens of text, or None if it reads none.

    All positions count as eligible: an upper bound, as rows have gaps.
    """
    if e.teacher.source != "cache":
        return None
    positions = int(tokens * e.samples.fraction * (e.cache.superset or 1.0))
    beside = e.cache.entropy + 2 * e.cache.label_logp
    counts = e.classes.kind == "sampled" and e.classes.power == 1
    word = 3 if vocab <= 1 << 18 and counts and e.classes.entries <= 63 else 5
    if counts and word == 3 and e.classes.entries == MEASURED_ENTRIES:
        size = MEASURED + 2 * e.cache.label_logp
        note = f"{size:g} B a position, measured with 50 draws of SmolLM2-135M on the Factbook, deflated"
        return Cache(positions, int(size * positions), int(size * positions), note)
    entries = min(e.classes.entries, vocab)
    most = word * entries + beside
    note = f"at most {most} B a position: {entries} entries of {word} B, before rows are deflated"
    return Cache(positions, positions * (word + beside), positions * most, note)
