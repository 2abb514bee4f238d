"""How fast answers are made: the suite "generation" of launch/bench.py.

Times prompts of 64 tokens and 32 more tokens of each at SmolLM2's shapes, for several batches, and in turn with them a
plain pass over as many bytes as the model has: a step of few rows cannot be faster than its weights are read. Weights
are random: the speed does not depend on them. Then answers of uneven length, one token in 24 an end and at most 64, as
`rollouts` makes them: finished rows make room for others, against batch after batch, each until its longest is done.
"""

import statistics
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdjax.models import ModelConfig
    from kdjax.types import Params

PROMPT, NEW = 64, 32
UNEVEN, ROWS, ENDS, LONGEST = 48, 8, 24, 64
BATCHES = (1, 8, 32)
SAMPLED = "drawn, top-p 0.95, batch 8"


def run(rounds: int) -> None:
    """Build, time in turn, print."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kdjax import models
    from kdjax.generation.sampler import How, advance, begin, fast_params, refill
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
        waiting = begin(cfg, how, params, prompts, lengths, keys, np.ones((batch, 1), bool))
        state = jax.block_until_ready(refill(cfg, how, None, waiting, np.arange(batch, dtype=np.int32)))
        middle = time.perf_counter()
        jax.block_until_ready(advance(cfg, how, fast, state, jnp.int32(NEW), jnp.int32(0), np.zeros(batch, bool)))
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
    uneven(cfg, params, fast, rounds)


def uneven(cfg: "ModelConfig", params: "Params", fast: "Params", rounds: int) -> None:
    """Time both ways in turn, print; answers are the same either way, ends are near enough as often as ids are."""
    import jax.numpy as jnp
    import numpy as np

    from kdjax.generation.batching import Speaker, rollouts
    from kdjax.generation.sampling import Sampling
    from kdjax.sharding import Rules

    class Silent:
        """Stands for a tokenizer: the texts are of no interest."""

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return ""

    words: Any = Silent()
    ends = tuple(range(0, cfg.vocab_size, ENDS))
    model = Speaker(cfg, params, fast, words, ends, cfg.vocab_size, Rules(), jnp.float32)
    prompts = np.random.default_rng(0).integers(0, cfg.vocab_size, (UNEVEN, PROMPT)).tolist()
    names = [str(at) for at in range(UNEVEN)]

    def lengths(size: int) -> list[int]:
        """Of the answers; `size` prompts are handed over at a time."""
        found = [0] * UNEVEN
        for at in range(0, UNEVEN, size):
            some, called = prompts[at : at + size], names[at : at + size]
            for index, _, made in rollouts(
                model, some, 1, Sampling(), new_tokens=LONGEST, names=called, batch_size=ROWS
            ):
                found[at + index] = len(made.tokens)
        return found

    made, times = lengths(UNEVEN), []
    for _ in range(rounds):
        pair = []
        for size in (ROWS, UNEVEN):
            start = time.perf_counter()
            lengths(size)
            pair.append(time.perf_counter() - start)
        times.append(pair)
    batches, refilled = (statistics.median(each) for each in zip(*times, strict=True))
    ratios = [one / other for one, other in times]
    print(
        f"{UNEVEN} answers of {min(made)} to {max(made)} tokens, {sum(made) / UNEVEN:.1f} on average, {ROWS} at a time:"
    )
    print(
        f"batch after batch {sum(made) / batches:.1f} tokens/s, finished rows make room {sum(made) / refilled:.1f};",
        end=" ",
    )
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
