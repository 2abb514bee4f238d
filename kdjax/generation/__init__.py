"""Text out of models: greedy decoding with a key/value cache."""

from kdjax.generation.sampler import complete, greedy

__all__ = ["complete", "greedy"]
