"""What a compiled program moves between chips, read from its HLO text: every collective, as often as it runs.

    while loops      what is in the body counts as often as the loop turns
    start / done     one collective; so are the pieces that TPU cuts an asynchronous one into (one chain_id)
    fused ones       TPU writes a reduce-scatter as a fusion "all-reduce-scatter" of an all-reduce and a slice
    slices           what goes to other TPU slices over the hosts' network is a "send" that says which collective it is

Bytes are what one chip sends if the n chips of a group stand in a ring, for an array of b bytes (the whole of it):
    all-gather, reduce-scatter, all-to-all  b (n - 1) / n      all-reduce  2 b (n - 1) / n      collective-permute  b
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
DTYPE_BITS = {"pred": 8, "token": 0, "opaque": 0}  # the others have their bits in their name: bf16, s32, f8e4m3fn
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
FOOTER = re.compile(r'^\}(, execution_thread="[^"]*")?\s*$')
FIRST = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = ")
CALLED = re.compile(r"\b(calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")
OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?[\])}]) ([a-z][\w\-]*)\((.*)$")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program. bytes: of its whole array; times: per step; group: chips that take part in one.

    members: the ids of one group, which say along which mesh axis it runs; where: the operation's name in the source.
    network: it runs between TPU slices, whose chips have no ids here.
    """

    kind: str
    bytes: int
    group: int
    times: int
    members: tuple[int, ...] = ()
    where: str = ""
    network: bool = False

    @property
    def sent(self) -> float:
        """Bytes that one chip sends per step."""
        return self.times * sent_bytes(self.kind, self.bytes, self.group)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives, and how many loops of unknown length there are: their bodies count once."""

    collectives: tuple[Collective, ...]
    unknown_loops: int = 0

    @property
    def sent(self) -> float:
        """Bytes that one chip sends per step."""
        return sum(collective.sent for collective in self.collectives)


def sent_bytes(kind: str, size: float, group: int) -> float:
    """See the module."""
    if group <= 1:
        return 0.0
    if kind == "collective-permute":
        return float(size)
    return size * (group - 1) / group * (2 if kind == "all-reduce" else 1)


def traffic(text: str, devices: int) -> Traffic:
    """The collectives of a compiled program's text, on so many devices."""
    program = _computations(text)
    entry = next((name for name, lines in program.items() if lines and lines[0] == "ENTRY"), None)
    if entry is None:
        raise ValueError("the program's text must have an ENTRY computation, got none; it is no HLO.")
    found: list[Collective] = []
    unknown = _walk(program, entry, 1, set(), found, devices)
    return Traffic(tuple(found), unknown)


def by_axis(collective: Collective, mesh: Mapping[str, int]) -> str:
    """The mesh axes along which a collective runs, such as 'data', or '' if it cannot be told.

    mesh: axis -> size in the order of the mesh, whose devices are numbered row by row.
    """
    ids = sorted(collective.members)
    if len(ids) < 2:
        return ""
    steps = {name: math.prod(list(mesh.values())[at + 1 :]) for at, name in enumerate(mesh)}
    moved = [name for name in mesh if len({one // steps[name] % mesh[name] for one in ids}) > 1]
    whole = math.prod(mesh[name] for name in moved) == len(ids) or collective.kind == "collective-permute"
    return "+".join(moved) if whole else ""


def largest_arrays(text: str, count: int = 8, least: int = 2**20) -> list[tuple[int, str, str]]:
    """(bytes, shape, operation's name) of the largest different arrays in HBM that the program writes, largest first.

    Not an allocation: what is in a fusion's inside, in fast memory or only another view is left out.
    """
    program = _computations(text)
    inside = {name for lines in program.values() for line in lines for name in _fused(line)}
    found: dict[tuple[int, str], str] = {}
    for name, lines in program.items():
        if name in inside:
            continue
        for line in lines:
            matched = OPERATION.match(line)
            if matched is None or matched[3] in ("parameter", "tuple", "get-tuple-element", "bitcast", "while"):
                continue
            for shape in re.findall(r"[a-z]\w*\[[\d,]*\](?:\{[^}]*\})?", matched[2]):
                if "S(" in shape:
                    continue
                size = array_bytes(shape)
                if size >= least:
                    found.setdefault((size, shape.split("{")[0]), _named(line))
    rows = [(size, shape, where) for (size, shape), where in found.items()]
    return sorted(rows, reverse=True)[:count]


def array_bytes(shape: str) -> int:
    """Bytes of 'f32[2,3]', or of all arrays of a tuple's text."""
    total = 0
    for dtype, sizes in ARRAY.findall(shape):
        bits = DTYPE_BITS.get(dtype)
        if bits is None:
            digits = re.search(r"\d+", dtype)
            if digits is None:
                continue
            bits = int(digits[0])
        total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return total


def _computations(text: str) -> dict[str, list[str]]:
    """Name -> its lines; of the entry computation 'ENTRY' is the first."""
    found: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in text.splitlines():
        header = HEADER.match(line)
        if header is not None:
            lines = found.setdefault(header[2], ["ENTRY"] if header[1] else [])
        elif FOOTER.match(line):
            lines = None
        elif lines is not None and (FIRST.match(line) or not lines):
            lines.append(line)
        elif lines is not None:  # what a kernel says of itself may have lines, and these may begin as a footer does
            lines[-1] += " " + line
    return found


def _walk(
    program: Mapping[str, list[str]], name: str, times: int, chains: set[str], found: list[Collective], devices: int
) -> int:
    """Adds the collectives of a computation and of what it calls; the number of loops whose length is not known."""
    unknown = 0
    for line in program.get(name, ()):
        matched = OPERATION.match(line)
        if matched is None:
            continue
        operation, called = matched[3], dict(CALLED.findall(line))
        if operation == "while":
            turns = trip_count(program, line, program[name])
            unknown += turns is None
            body = called.get("body", "").lstrip("%")
            unknown += _walk(program, body, times * (1 if turns is None else turns), set(), found, devices)
            continue
        kind = next((kind for kind in KINDS if operation in (kind, f"{kind}-start")), None)
        if operation == "send":
            found += _between_slices(matched[2], line, times)
        elif kind is not None:
            chain = re.search(r'chain_id="(\d+)"', line)
            if chain is None or chain[1] not in chains:
                found.append(_collective(kind, matched[2], line, name, times, devices))
            chains |= {chain[1]} if chain else set()
        elif not operation.endswith(("-done", "-update")):  # what an asynchronous call runs counts at its start
            for key in ("calls", "to_apply", "branch_computations", "called_computations"):
                for inner in re.findall(r"[\w.\-]+", called.get(key, "")):
                    unknown += _walk(program, inner, times, chains, found, devices)
    return unknown


def _collective(kind: str, result: str, line: str, computation: str, times: int, devices: int) -> Collective:
    group, members = _group(line, devices)
    size = array_bytes(result)
    if f" {kind}-start(" in line and kind in ("all-gather", "collective-permute", "reduce-scatter"):
        # The result of a start is (operands, results, ...): of a gather the whole is the largest half.
        size = _started(kind, result, group)
    elif kind == "reduce-scatter":
        size *= group
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    return Collective(kind, size, group, times, members, _named(line))


def _between_slices(result: str, line: str, times: int) -> list[Collective]:
    """The collective that a send to the hosts' network begins; of a gather it has one slice's part. Else none."""
    stated = re.search(r'_xla_megascale_transfer_type="(\w+)"', line)
    if stated is None:
        return []
    kind = "collective-permute" if stated[1] == "ONE_TO_ONE" else stated[1].lower().replace("_", "-")
    slices = re.search(r"_xla_megascale_target=\"?\{\{?([\d,]+)", line)
    group = 2 if kind == "collective-permute" or slices is None else slices[1].count(",") + 1
    size = array_bytes(result.split(", u32[]")[0]) * (group if kind == "all-gather" else 1)
    named = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', line)
    return [Collective(kind, size, group, times, (), named[1] if named else "", True)]


def _started(kind: str, result: str, group: int) -> int:
    """Of (operands, results, contexts): a gather's operands are 1 / group of its results, a scatter's group times."""
    total = array_bytes(re.sub(r"\b[su]32\[\]", "", result))
    if kind == "collective-permute":
        return total // 2
    return total * group // (group + 1)


def _group(line: str, devices: int) -> tuple[int, tuple[int, ...]]:
    """(chips of a group, the ids of the first group), of the forms in which XLA writes replica_groups."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        ids = tuple(int(one) for one in listed[1].split(","))
        return len(ids), ids
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        sizes = [int(size) for size in iota[3].split(",")]
        order = [int(axis) for axis in iota[4].split(",")] if iota[4] else list(range(len(sizes)))
        return int(iota[2]), tuple(_transposed(sizes, order)[: int(iota[2])])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:,? ?device_ids=\S+)? ?\{([^}]*)\}", line)
    if named:
        axes = {key: int(size) for key, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        moved = [key for key in re.findall(r"'([^']+)'", named[2]) if key in axes]
        steps = {key: math.prod(list(axes.values())[at + 1 :]) for at, key in enumerate(axes)}
        ids = (0,)
        for key in moved:
            ids = tuple(one + place * steps[key] for one in ids for place in range(axes[key]))
        return len(ids), tuple(sorted(ids))
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line)
    if pairs:
        return 2, (int(pairs[1]), int(pairs[2]))
    return devices, tuple(range(devices))


def _transposed(sizes: list[int], order: list[int]) -> list[int]:
    """The numbers 0, 1, ... in an array of `sizes`, read with its axes in another order."""
    steps = [math.prod(sizes[at + 1 :]) for at in range(len(sizes))]
    ids = [0]
    for axis in order:
        ids = [one + place * steps[axis] for one in ids for place in range(sizes[axis])]
    return ids


def trip_count(program: Mapping[str, list[str]], line: str, around: list[str]) -> int | None:
    """How often a while loop turns: as the compiler says, else by a condition `counter < constant`; None = unknown."""
    stated = re.search(r'"?known_trip_count"?\s*[:=]\s*\{"?n"?\s*[:=]\s*"?(\d+)', line)
    if stated:
        return int(stated[1])
    called = dict(CALLED.findall(line))
    condition = program.get(called.get("condition", "").lstrip("%"), [])
    inner = [other for one in condition for name in _fused(one) for other in program.get(name, [])]
    limits = [
        int(one) for text in (*condition, *inner) for one in re.findall(r"= [su]\d+\[\]\S* constant\((\d+)\)", text)
    ]
    below = any(re.search(r"\bcompare\(.*direction=LT", text) for text in (*condition, *inner))
    if not below or len(limits) != 1:
        return None
    return limits[0] - _first(condition, line, around)


def _first(condition: list[str], line: str, around: list[str]) -> int:
    """What a loop's counter begins with, 0 if that cannot be read."""
    place = re.search(r"get-tuple-element\(.*index=(\d+)", "\n".join(condition))
    operand = re.search(r" while\(%?([\w.\-]+)\)", line)
    if place is None or operand is None:
        return 0
    defined = {matched[1]: matched for text in around if (matched := OPERATION.match(text))}
    made = defined.get(operand[1])
    if made is None or made[3] != "tuple":
        return 0
    names = re.findall(r"%([\w.\-]+)", made[4].split("), ")[0])
    start = defined.get(names[int(place[1])]) if int(place[1]) < len(names) else None
    while start is not None and start[3] in ("copy", "bitcast", "convert"):
        inner = re.search(r"%([\w.\-]+)", start[4])
        start = defined.get(inner[1]) if inner else None
    number = re.match(r"(-?\d+)\)", start[4]) if start is not None and start[3] == "constant" else None
    return int(number[1]) if number else 0


def _fused(line: str) -> Iterator[str]:
    """The computations that a fusion on this line is made of."""
    if " fusion(" in line:
        yield from (value.lstrip("%") for key, value in CALLED.findall(line) if key == "calls")


def _named(line: str) -> str:
    found = re.search(r'op_name="([^"]*)"', line)
    return found[1].replace("\\'", "'") if found else ""
