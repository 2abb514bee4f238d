"""The page that launch.plan prints for a topology: plain text from the figures of its JSON."""

from typing import Any

GIB = 2**30


def render(plan: dict[str, Any]) -> str:
    """All sections of the plan that are there."""
    sections = (_head, _memory, _collectives, _flops, _time, _disk, _text, _advice)
    return "\n\n".join(said for section in sections if (said := section(plan))) + "\n"


def _row(name: str, value: str, rest: str = "") -> str:
    return f"  {name:44}{value:>14}" + (f"  {rest}" if rest else "")


def _size(size: float) -> str:
    return f"{size / GIB:,.3f} GiB" if size >= 2**20 else f"{size:,.0f} B"


def _head(plan: dict[str, Any]) -> str:
    target = plan["target"]
    lines = [
        f"{target['topology']}: {target['devices']} devices, mesh {target['mesh']}, {target['preset']}",
        f"  compiled, not run: {target['compile_seconds']:.0f} s here; figures are of one device, one optimiser step",
    ]
    return "\n".join([*lines, *(f"  {note}" for note in plan["notes"])])


def _memory(plan: dict[str, Any]) -> str:
    memory = plan["memory"]
    lines = ["HBM of a chip"]
    lines += [_row(kind, _size(size)) for kind, size in memory["given"].items()]
    if memory["temporaries"] is not None:
        lines.append(_row("temporaries (activations, gathered weights, ...)", _size(memory["temporaries"])))
    if memory["peak"] is not None:
        lines.append(_row("alive at once", _size(memory["peak"])))
    lines.append(_row("to be allocated", _size(memory["wanted"])))
    verdict = "fits" if memory["fits"] else "DOES NOT FIT"
    share = f"{memory['wanted'] / memory['capacity']:.0%} used: {verdict}"
    lines.append(_row("the chip has (published)", f"{memory['capacity'] / 1e9:,.0f} GB", share))
    if memory["refusal"]:
        lines.append(f"  the compiler: {memory['refusal']}")
    lines.append("  temporaries by formula; they are not all there at once:")
    lines += [_row("  " + kind, _size(size)) for kind, size in memory["by_formula"].items()]
    if memory["repeated"]:
        lines.append("  whole on every chip, and large:")
        lines += [_row("  " + name, _size(size)) for name, size in memory["repeated"]]
    if memory["largest"]:
        lines.append("  largest arrays that the program makes:")
        lines += [f"    {_size(size):>12}  {shape}  {where}" for size, shape, where in memory["largest"]]
    return "\n".join(lines)


def _collectives(plan: dict[str, Any]) -> str:
    found = plan["collectives"]
    lines = ["Sent by a chip to others per step"]
    for one in found["compiled"]:
        rest = f"{one['count']:,} x, over {one['axis'] or 'some chips'}"
        lines.append(_row(one["kind"], _size(one["sent"]), rest))
    if found["compiled"]:
        lines.append(_row("all of the program", _size(found["sent"])))
    for one in found["largest"]:
        lines.append(
            f"    {_size(one['sent']):>12}  {one['times']:>4} x {one['kind']} of {_size(one['bytes'])}  {one['where']}"
        )
    if found["unknown_loops"]:
        lines.append(f"  {found['unknown_loops']} loops of unknown length, whose bodies count once")
    lines += [_row(one["name"], _size(one["sent"]), one["formula"]) for one in found["implied"]]
    lines.append(_row("all that the sharding implies", _size(found["implied_sent"])))
    if found["ratio"] is not None:
        lines.append(_row("program / implied", f"{found['ratio']:.3f}"))
    return "\n".join(lines)


def _flops(plan: dict[str, Any]) -> str:
    lines = ["FLOPs of all chips per step, by formula" + " " * 14 + "model" + " " * 8 + "executed"]
    for one in plan["flops"]["lines"]:
        lines.append(f"  {one['name']:44}{one['model']:>14.3e}{one['executed']:>16.3e}")
    lines.append(f"  {'all':44}{plan['flops']['model']:>14.3e}{plan['flops']['executed']:>16.3e}")
    return "\n".join(lines)


def _time(plan: dict[str, Any]) -> str:
    time = plan["estimate"]
    lines = [
        f"ESTIMATE of a step, from published figures: no less than {time['step_seconds']:.3g} s, by {time['bound']}"
    ]
    for name in ("compute", "memory", "interconnect", "network"):
        if time[name]:
            lines.append(_row(name, f"{time[name]:.3g} s"))
    if time["network"] is None:
        lines.append(_row("network to other slices", "not known"))
    lines.append(_row("tokens a day, at most", f"{time['tokens_a_day']:,.0f}", "padding included"))
    lines.append(_row(f"hours for {time['steps']:,} steps, at least", f"{time['hours']:.2f}"))
    return "\n".join(lines)


def _disk(plan: dict[str, Any]) -> str:
    disk = plan["disk"]
    lines = ["Disk"]
    kept = disk["checkpoints_kept"]
    lines.append(
        _row("a checkpoint", _size(disk["checkpoint"]), f"{kept} are kept, {_size(kept * disk['checkpoint'])}")
    )
    cache = disk["cache"]
    if cache is not None:
        size = _size(cache["most"])
        least = "" if cache["least"] == cache["most"] else f"at least {_size(cache['least'])}; "
        lines.append(_row("the teacher's cache", size, f"{cache['positions']:,} positions; {least}{cache['note']}"))
    return "\n".join(lines)


def _text(plan: dict[str, Any]) -> str:
    if plan["text"] is None:
        return "Rows and targets of the text: not known here, text or tokenizer are not at hand"
    rows = [_row(name.replace("_", " "), f"{value:,}") for name, value in plan["text"].items()]
    return "\n".join(["Text", *rows])


def _advice(plan: dict[str, Any]) -> str:
    advice = plan["advice"]
    if not advice["entries"]:
        return ""
    lines = ["To make room, about:"]
    lines += [f"  {_size(one['frees']):>14}  {one['setting']} ({one['cost']})" for one in advice["entries"]]
    if advice["enough"]:
        lines.append(f"  By these figures this is enough: {'; '.join(advice['enough'])}")
    elif not plan["memory"]["fits"]:
        lines.append("  All of it would not be enough: take chips with more memory, or many more of them.")
    return "\n".join(lines)
