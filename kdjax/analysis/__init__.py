"""What a run tells afterwards: the report page. Renders plain files and imports no JAX."""

from kdjax.analysis.report import render, write_report

__all__ = ["render", "write_report"]
