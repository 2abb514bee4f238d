"""Text to batches: sources, tokenising and chat templates, packing, the split, the grain pipeline."""

from kdjax.data.load import LoadedData, load_data
from kdjax.data.packing import PACKINGS, Rows, eligible, ids_in, make_rows, take
from kdjax.data.pipeline import abstract_batch, as_batch, heldout_batches, to_batch, train_iterator
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
    "heldout_batches",
    "ids_in",
    "load_data",
    "make_rows",
    "read_documents",
    "take",
    "to_batch",
    "train_iterator",
]
