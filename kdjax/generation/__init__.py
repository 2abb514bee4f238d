"""Text out of models: sampling with a key/value cache, many prompts at a time; answers on disk; served teachers.

sampling.py   which token comes next: temperature, top-k, top-p, min-p
sampler.py    prompts and keys in, tokens and log-probabilities out, compiled
batching.py   many prompts of all lengths in, texts out as they finish
store.py      answers on disk
served.py     answers of an OpenAI-compatible endpoint, and what it says of texts that are given
logprobs.py   what such an endpoint says of its distribution, and sparse targets from it
generate.py   prompts in, whoever answers, files out
"""

from kdjax.generation.batching import Completion, Speaker, complete, encode, end_ids, rollouts, speaker
from kdjax.generation.sampler import Sampled, sample
from kdjax.generation.sampling import Sampling

__all__ = [
    "Completion",
    "Sampled",
    "Sampling",
    "Speaker",
    "complete",
    "encode",
    "end_ids",
    "rollouts",
    "sample",
    "speaker",
]
