"""Does an answer repeat itself? Scores prefer one that does: what was said before is easy to predict."""

from __future__ import annotations

RUN = 8  # words: steps of a solution share shorter runs by chance


def repeated_share(text: str) -> float:
    """The share of its words, in [0, 1], that are part of a run of 8 words which occurs more than once.

    An answer written twice has 1, whatever its length: below 16 words it has 1 if it is one text again and again, as
    words or without blanks, else 0.
    """
    words = text.split()
    if len(words) < 2 * RUN:
        again = _periodic(words) or (len(words) >= 4 and _periodic("".join(words)))
        return float(again)
    first: dict[tuple[str, ...], int] = {}
    inside = bytearray(len(words))
    for at in range(len(words) - RUN + 1):
        before = first.setdefault(tuple(words[at : at + RUN]), at)
        if before != at:
            inside[before : before + RUN] = inside[at : at + RUN] = b"\1" * RUN
    return sum(inside) / len(words)


def _periodic(said: list[str] | str) -> bool:
    """Is it one part, two times or more?"""
    sizes = (size for size in range(1, len(said) // 2 + 1) if len(said) % size == 0)
    return any(said == said[:size] * (len(said) // size) for size in sizes)
