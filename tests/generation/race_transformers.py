"""Greedy tokens a second against `transformers` generate on torch, in turn: a script, since speed is no test.

    PYTHONPATH=. python tests/generation/race_transformers.py [--rounds=5] [--batch=8] [--prompt=64] [--new=64]
        [--threads=2]

Both run SmolLM2-135M in float32 with a key/value cache, on the same tokens, without ends; what is made has to be the
same. Printed are tokens a second of wall time, prompts included, and tokens a second of processor time, and the median
over rounds of ours divided by theirs. On a machine with other work, threads that wait for each other spin: pin both to
one core with `taskset -c 0` and --threads=1 to see the work itself.
"""

import argparse
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from kdjax.generation import Sampling
from kdjax.generation.sampler import How, advance, begin, fast_params, refill
from kdjax.models import hf_io, io
from kdjax.models.tokenizer import load_tokenizer
from kdjax.sharding import Rules


def contestants(batch, prompt, new):
    """name -> a function that makes [batch, new] tokens."""
    loaded = io.load_model("smollm2-135m")
    cfg, params = loaded.cfg, loaded.params
    words = load_tokenizer("smollm2-135m")
    text = words("The history of the small town begins in 1784, when two brothers built a mill at the river. " * 99)
    tokens = np.asarray(text["input_ids"][: 7 * batch + prompt], np.int32)
    prompts = np.stack([tokens[7 * row : 7 * row + prompt] for row in range(batch)])
    with tempfile.TemporaryDirectory() as folder:
        hf_io.save_hf(folder, cfg, params)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    how, fast = How(Sampling(temperature=0), new), fast_params(cfg, Rules(), jnp.float32, params)
    keys, lengths = jax.random.split(jax.random.key(0), (batch, 1)), np.full(batch, prompt, np.int32)

    def ours():
        waiting = begin(cfg, how, params, prompts, lengths, keys, np.ones((batch, 1), bool))
        state = refill(cfg, how, None, waiting, np.arange(batch, dtype=np.int32))
        return np.asarray(
            advance(cfg, how, fast, state, jnp.int32(new), jnp.int32(0), np.zeros(batch, bool)).rows.tokens
        )

    def reference():
        ids = torch.tensor(prompts.astype(np.int64))
        settings = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "eos_token_id": None}
        with torch.no_grad():
            out = theirs.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, use_cache=True, **settings)
        return out[:, prompt:].numpy()

    return {"kdjax": ours, "transformers": reference}


def main():
    """Both in turn, once unmeasured."""
    parser = argparse.ArgumentParser()
    for name, default in (("rounds", 5), ("batch", 8), ("prompt", 64), ("new", 64), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs = contestants(options.batch, options.prompt, options.new)
    made = {name: run() for name, run in runs.items()}
    same = np.mean(made["kdjax"] == made["transformers"])
    print(f"batch {options.batch}, {options.prompt} + {options.new} tokens, {same:.1%} of the tokens are the same")
    times = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    tokens = options.batch * options.new
    for at, kind in enumerate(("wall", "processor")):
        speeds = {name: [tokens / each[at] for each in rounds] for name, rounds in times.items()}
        ratios = [ours / theirs for ours, theirs in zip(*speeds.values(), strict=True)]
        middle = ", ".join(f"{name} {statistics.median(each):.1f}" for name, each in speeds.items())
        print(f"tokens per second of {kind} time: {middle}; ratio {statistics.median(ratios):.2f}", end=" ")
        print(f"({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


if __name__ == "__main__":
    main()
