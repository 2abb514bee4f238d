"""A student and questions for the tests of choices of answers."""

import pytest

from kdjax import offline
from kdjax.build import build
from kdjax.config import default_config, from_config_dict
from kdjax.data.prompts import load_prompts, split_prompts


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A student of one layer and twelve questions; the pool is for each test to write."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("\n\n".join(f"Bottle {i} stands beside bottle {i * i % 11} on the wall." for i in range(60)))
    config = default_config()
    for name, value in {
        "teacher.path": "synthetic",
        "student.init.kind": "cut",
        "student.init.layers": 1,
        "data.path": str(text),
        "data.seq_len": 64,
        "data.chat_template": False,
        "prompts.path": "arith:sum1",
        "prompts.size": 14,
        "prompts.answers": "pool",
        "answers.pool": ("nowhere.jsonl",),
        "answers.policy": "best_teacher",
        "answers.score": "car",
    }.items():
        config.update_from_flattened_dict({name: value})
    e = from_config_dict(config)
    return build(offline.to_answer(e)), split_prompts(load_prompts(e.prompts), e.prompts)[1]
