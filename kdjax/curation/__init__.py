"""The sample axis: a score per row of the training text, the rows with the highest ones, and the file that names them.

Runs outside the step: `launch.curate` writes the choice once, training and the teacher's cache read it. The weights of
prompts by their pass rates are in modules of their own: chain.py leads through them.
"""

from kdjax.curation.samples import (
    Basis,
    Chosen,
    basis,
    kept_rows,
    load_samples,
    params_fingerprint,
    positions_of,
    reusable,
    write_samples,
)
from kdjax.curation.scores import SCORES, Score, Scorer, agreement, keep, make_scorer, overlap

__all__ = [
    "SCORES",
    "Basis",
    "Chosen",
    "Score",
    "Scorer",
    "agreement",
    "basis",
    "keep",
    "kept_rows",
    "load_samples",
    "make_scorer",
    "overlap",
    "params_fingerprint",
    "positions_of",
    "reusable",
    "write_samples",
]
