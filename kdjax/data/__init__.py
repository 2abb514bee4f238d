"""Text to batches: sources, tokenising and chat templates, packing, the split, the grain pipeline."""

from kdjax.data.load import LoadedData, load_data
from kdjax.data.packing import PACKINGS, Rows, eligible, ids_in, make_rows, take
from kdjax.data.pipeline import (
    abstract_batch,
    as_batch,
    fed_places,
    heldout_batches,
    on_mesh,
    to_batch,
    train_iterator,
)
from kdjax.data.sources import SOURCES, Document, read_documents

__all__ = [
    "PACKINGS",
    "SOURCES",
    "Document",
    "LoadedData",
    "Rows",
    "abstract_batch",
    "as_batch",
    "eligible",
    "fed_places",
    "heldout_batches",
    "ids_in",
    "load_data",
    "make_rows",
    "on_mesh",
    "read_documents",
    "take",
    "to_batch",
    "train_iterator",
]
