"""How fast answers are made: the suite "generation" of launch/bench.py.

Times prompts of 64 tokens and 32 more tokens of each at SmolLM2's shapes, for several batches, and in turn with them a
plain pass over as many bytes as the model has: a step of few rows cannot be faster than its weights are read. Weights
are random: the speed does not depend on them.
"""

import statistics
import time

PROMPT, NEW = 64, 32
BATCHES = (1, 8, 32)
SAMPLED = "drawn, top-p 0.95, batch 8"


def run(rounds: int) -> None:
    """Build, time in turn, print."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kdjax import models
    from kdjax.generation.sampler import How, advance, begin, fast_params
    from kdjax.generation.sampling import Sampling
    from kdjax.sharding import Rules

    cfg = models.ModelConfig("llama", 49152, 576, 30, 9, 3, 64, 1536, rope_theta=1e5, norm_eps=1e-5, tied=True)
    params = models.init_params(cfg, jax.random.key(0))
    fast = fast_params(cfg, Rules(), jnp.float32, params)
    as_large = jnp.ones(sum(leaf.size for leaf in jax.tree.leaves(params)), jnp.float32)
    read = jax.jit(jnp.sum)
    cases = {f"greedy, batch {batch}": (batch, Sampling(temperature=0)) for batch in BATCHES}
    cases[SAMPLED] = (8, Sampling(top_p=0.95))

    def once(batch: int, settings: Sampling) -> tuple[float, float]:
        """Seconds of the prompts and of a step."""
        how = How(settings, NEW)
        prompts = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, PROMPT)).astype(np.int32)
        keys, lengths = jax.random.split(jax.random.key(0), (batch, 1)), np.full(batch, PROMPT, np.int32)
        start = time.perf_counter()
        state = jax.block_until_ready(begin(cfg, how, params, prompts, lengths, keys, np.ones((batch, 1), bool)))
        middle = time.perf_counter()
        jax.block_until_ready(advance(cfg, how, fast, state, jnp.int32(NEW), np.zeros(batch, bool)))
        return middle - start, (time.perf_counter() - middle) / (NEW - 1)

    reads: list[float] = []
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for at in range(rounds + 1):  # the first compiles
        start = time.perf_counter()
        jax.block_until_ready(read(as_large))
        reads += [time.perf_counter() - start] if at else []
        for name, case in cases.items():
            figures = once(*case)
            times[name] += [figures] if at else []
    device = jax.devices()[0].device_kind
    print(f"{device}, prompts of {PROMPT} tokens and {NEW} new ones, float32, {rounds} rounds in turn")
    megabytes, milliseconds = 4e-6 * as_large.size, 1e3 * statistics.median(reads)
    print(f"a plain pass over the {megabytes:.0f} MB of the weights: {milliseconds:.1f} ms")
    print(f"{'':30}{'prompts ms':>12}{'step ms':>10}{'of the pass':>13}{'tokens/s':>10}")
    for name, (batch, _) in cases.items():
        prompts, step = (statistics.median(each) for each in zip(*times[name], strict=True))
        ratio = statistics.median(each[1] / whole for each, whole in zip(times[name], reads, strict=True))
        print(f"{name:30}{1e3 * prompts:12.1f}{1e3 * step:10.1f}{ratio:13.2f}{batch / step:10.1f}")
