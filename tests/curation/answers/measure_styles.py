"""Figures and exact gradients of the answers in styles.jsonl, by SmolLM2-135M: a script that rewrites that file.

    PYTHONPATH=. python tests/curation/answers/measure_styles.py

Eight questions, each with 13 right answers in other styles. Figures are those of plain_llama.py, from whole logits;
gradients are those of kdjax/curation/answers/gradients.py. About ten minutes on two cores that others use too.
test_answer_correlation.py reads the file, and measures one answer anew as a run does.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.build.parts import language_model
from kdjax.curation.answers import gradients
from kdjax.models import io
from kdjax.models.tokenizer import load_tokenizer
from kdjax.sharding import Rules
from tests.curation.answers import plain_llama as plain

FILE = pathlib.Path(__file__).with_name("styles.jsonl")
ABOUT = 32  # widths are multiples of it


def read():
    return [json.loads(line) for line in FILE.read_text("utf-8").splitlines()]


def encode(words, line):
    """(ids, A, Q): the chat up to the assistant's turn, then the text by itself; special tokens are in neither."""
    turns = [{"role": "user", "content": line["question"]}]
    asked = words(words.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)).input_ids
    ids = np.array([*asked, *words(line["text"], add_special_tokens=False).input_ids], np.int32)
    counts, places = ~np.isin(ids, words.all_special_ids), np.arange(len(ids))
    return ids, counts & (places >= len(asked)), counts & (places < len(asked))


def measure(lines):
    """Each line with "figures", to seven digits."""
    loaded, words = io.load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    cfg, params = loaded.cfg, loaded.params
    rows = [encode(words, line) for line in lines]
    model = language_model(cfg, Rules(), cfg.vocab_size, jnp.float32)
    yardstick = gradients.make_gradient_pass(model, leaves={"up": gradients.last_layer()})(params, rows)
    oracle = jax.jit(lambda p, *row: plain.figures(cfg, p, *row))
    for line, row, gradient in zip(lines, rows, yardstick, strict=True):
        room = -len(row[0]) % ABOUT
        found = jax.device_get(oracle(params, *(jnp.asarray(np.pad(a, (0, room))) for a in row)))
        found |= {"gradient_square": gradient.norm, "up_square": gradient.leaves["up"]}
        np.testing.assert_allclose(gradient.answer_nll, found["answer_nll"], rtol=1e-4)
        yield line | {"figures": {name: float(f"{value:.7g}") for name, value in found.items()}}


def main():
    found = []
    for line in measure(read()):
        found.append(json.dumps(line, ensure_ascii=False) + "\n")
        print(len(found), line["style"], line["figures"]["n_answer"], flush=True)
    FILE.write_text("".join(found), "utf-8")


if __name__ == "__main__":
    main()
