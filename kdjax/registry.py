"""Names to objects: explicit tables, a helpful error, and 'package.module:attribute' for code that lives elsewhere."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import TypeVar

Entry = TypeVar("Entry")
MOST = 80  # names that a message lists


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' if something close is known, then the list, the first `MOST` of it."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    more = f" and {len(known) - MOST} more" if len(known) > MOST else ""
    return f"{hint} Known: {', '.join(known[:MOST])}{more}."


def lookup(table: Mapping[str, Entry], name: str, where: str) -> Entry:
    """The entry called `name`, or the object that 'package.module:attribute' names.

    `where` is the config path the name came from; it leads the error message.
    """
    if name in table:
        return table[name]
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: '.x:y', ':y'
            raise ValueError(f"{where} must name an importable object, got {name!r}; {error}.") from error
    raise ValueError(
        f"{where} must be a known name or 'package.module:attribute', got {name!r}." + did_you_mean(name, table)
    )
