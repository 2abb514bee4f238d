"""The report of a run, or parts of it, inside a notebook. Imports neither JAX nor IPython."""

from __future__ import annotations

import dataclasses
import html
import os

from kdjax.analysis import report_page as page
from kdjax.analysis.report import read_run, sections, title
from kdjax.registry import did_you_mean

HEIGHTS = {"table": 520, "curves": 910, "text": 440, "completions": 780}  # in pixels; others 700
TIGHT = "main{padding:0 12px 12px}main>h2:first-child{margin-top:8px}"  # no margins of a page around a part of it


@dataclasses.dataclass(frozen=True)
class Inline:
    """A page that a notebook shows where it is the value of a cell, in a frame of its own: styles stay inside."""

    page: str
    height: int

    def _repr_html_(self) -> str:
        style = f"width:100%;height:{self.height}px;border:0"
        return f'<iframe srcdoc="{html.escape(self.page)}" style="{style}" title="kdjax report"></iframe>'


def show(workdir: str | os.PathLike[str], *names: str, height: int = 0) -> Inline:
    """Sections of the report of the run in `workdir` (`report.sections`), the whole page if none is named.

    height: of the frame in pixels, which scrolls; 0 = by the sections. Raises ValueError for a section that does not
    exist, and as write_report does.
    """
    metrics, evals, config, data = read_run(workdir)
    every = sections(metrics, evals, config, data)
    for name in names:
        if name not in every:
            raise ValueError(f"names must be sections of the report, got {name!r}.{did_you_mean(name, every)}")
    chosen = [every[name] for name in names or every]
    tall = sum(HEIGHTS.get(name, 700) for name in names) or 900
    return Inline(page.document(title(config), chosen, TIGHT if names else ""), height or tall)
