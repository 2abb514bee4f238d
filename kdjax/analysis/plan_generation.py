"""What a plan says of the student's own answers, which are written between steps, and what it leaves out."""

from kdjax.config import Experiment
from kdjax.generation.batching import padded_width
from kdjax.models import ModelConfig
from kdjax.selection.policies.base import enough_for

ITEM_BYTES = {"float32": 4, "bfloat16": 2}


def generation_figures(
    e: Experiment, student: ModelConfig, batch_shards: int = 1, model_shards: int = 1
) -> dict[str, int]:
    """Of on-policy training, {} without: tokens of a block, and bytes of keys and values of one device, both at most.

    A block is on_policy.block x train.batch_size answers, more of them if samples.fraction keeps a part, and
    generation.batch_size at a time, rounded up to one for each device along the batch. Bytes = 2 layers x answers x kv
    heads x head size x places: of the longest prompt that data.seq_len allows, padded, with generation.new_tokens; once
    more for prompts that were read and wait.
    """
    if e.on_policy.fraction == 0:
        return {}
    g = e.generation
    answers = enough_for(e.on_policy.block * e.train.batch_size, e.samples.fraction)
    width = padded_width(max(e.data.seq_len - g.new_tokens, 1))
    rows = -(-g.batch_size // batch_shards)
    heads = -(-student.kv_heads // model_shards)
    place = 2 * student.layers * heads * student.head_dim * ITEM_BYTES[e.student.compute_dtype]
    return {
        "own_answers_a_block": answers,
        "own_tokens_a_block_at_most": answers * g.new_tokens,
        "own_answers_cache_bytes_at_most": rows * place * (2 * width + g.new_tokens),
    }


def not_counted(e: Experiment, found: dict[str, int]) -> list[str]:
    """Sentences on what is outside the figures of a step; found: with those of `generation_figures`."""
    if e.on_policy.fraction == 0:
        return []
    steps = e.on_policy.block * e.on_policy.reuse
    scored = ""
    if e.samples.fraction < 1:
        scored = f" of {found['own_answers_a_block']:,}, and scores these (samples.fraction={e.samples.fraction})"
    return [
        f"not in the figures of a step: for every {'' if steps == 1 else f'{steps} '}step{'s' * (steps > 1)} on own "
        f"answers (on_policy.fraction={e.on_policy.fraction}) the student writes up to "
        f"{found['own_tokens_a_block_at_most']:,} tokens, one at a time for each answer{scored}. That takes time; "
        "and, while no step runs, a copy of the student's weights and, on each device, up to "
        f"{found['own_answers_cache_bytes_at_most']:,} bytes for keys and values"
    ]
