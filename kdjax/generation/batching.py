"""Many prompts of all lengths in, texts out as they finish: batches of one compiled shape, stop strings, cut texts.

Prompts are read a batch at a time; where an answer has finished, the next that waits takes its row. What an answer says
depends on its prompt, its name, its number and the seed; not on the answers beside it, but for rounding.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from kdjax.data.encode import end_of_turn
from kdjax.generation.sampler import How, State, advance, begin, fast_params, refill
from kdjax.generation.sampling import Sampling
from kdjax.models import ModelConfig
from kdjax.sharding import Rules
from kdjax.types import Array, Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
NARROWEST = 32  # tokens; the least to which prompts are padded
CHUNK = 16  # tokens between two looks at the texts, at most
FREE = 8  # answers that wait are let in when one of so many rows is free
PROMPTS_A_ROW = 4  # measured on CPU with SmolLM2-135M: prompts and answers of 64 tokens, 8 rows
STOP, LENGTH = "stop", "length"


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A model that answers; made by `speaker`.

    fast: params as `sampler.fast_params` makes them. ends: the tokens that end an answer. vocab_size: only ids below it
    are generated. rules: of the mesh by which params are stored, or none.
    """

    cfg: ModelConfig
    params: Params
    fast: Params
    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]
    vocab_size: int
    rules: Rules
    compute_dtype: Any


@dataclasses.dataclass(frozen=True)
class Completion:
    """One answer: its text, the tokens of it, and the sum of their log-probabilities in nats under the model itself.

    The end token is in none of them. After a stop string the text ends before it, and the tokens are the fewest that
    the text needs: the last may say more than the text. finish: "stop" or, after new_tokens tokens, "length".
    """

    text: str
    tokens: tuple[int, ...]
    logp: float
    finish: str


def speaker(
    cfg: ModelConfig,
    params: Params,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rules: Rules = Rules(),
    compute_dtype: Any = jnp.float32,
) -> Speaker:
    """The model as `rollouts` takes it. Padding columns, which the tokenizer does not know, are never generated.

    On one CPU the weights of the layers are held a second time, in another order.
    """
    size = min(cfg.vocab_size, max(tokenizer.get_vocab().values()) + 1)
    fast = fast_params(cfg, rules, compute_dtype, params)
    return Speaker(cfg, params, fast, tokenizer, end_ids(cfg, tokenizer), size, rules, compute_dtype)


def end_ids(cfg: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end an answer: the model's, the tokenizer's, and the one that the chat template puts there."""
    ends = (*cfg.eos_ids, tokenizer.eos_token_id, end_of_turn(tokenizer))
    return tuple(sorted({end for end in ends if end is not None}))


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message]) -> list[int]:
    """The tokens of a text to go on with, or of chat messages that are to be answered, by the tokenizer's template."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    chat = [dict(message) for message in prompt]
    ids: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    return list(ids)


def padded_width(length: int) -> int:
    """To how many tokens a prompt is padded: 32, 48, 64, 96, 128, 192, ...; at most 1.5 times its length from 22 on."""
    width = NARROWEST
    while width < length:
        width = width * 3 // 2 if width & (width - 1) == 0 else width * 4 // 3
    return width


def samples_at_once(counts: Sequence[int], batch_size: int) -> int:
    """How many samples of a prompt share a reading of it: at most batch_size, so that the whole costs least.

    counts: samples of each prompt. A prompt with fewer leaves rows empty, one with more is read again; a row is taken
    to cost as much as reading PROMPTS_A_ROW prompts.
    """

    def cost(each: int) -> int:
        units = sum(-(-count // each) for count in counts)
        return units * (PROMPTS_A_ROW * each + 1)

    return min(range(min(max(counts, default=1), batch_size), 0, -1), key=cost, default=1)


def rollouts(
    speaker: Speaker,
    prompts: Sequence[Sequence[int]],
    samples: int | Sequence[Sequence[int]],
    settings: Sampling,
    *,
    new_tokens: int,
    names: Sequence[str] | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    batch_size: int = 16,
) -> Iterator[tuple[int, int, Completion]]:
    """(prompt index, sample number, completion) of every answer as it finishes.

    prompts: token ids. samples: how many of each, or the sample numbers that are wanted of each prompt. names: of the
    prompts, part of what their draws depend on; by default their indices. stop: texts that end an answer. batch_size:
    answers at a time, at least one for each device along the batch.
    With several processes all have to call; all get everything. Raises ValueError for a prompt without tokens, or one
    that with its answer is longer than the model's context.
    """
    names = [str(index) for index in range(len(prompts))] if names is None else names
    numbers = [range(samples)] * len(prompts) if isinstance(samples, int) else samples
    _check(prompts, speaker.cfg, new_tokens)
    each = samples_at_once([len(wanted) for wanted in numbers], batch_size)
    shards = speaker.rules.batch_shards
    count = -(-max(1, batch_size // each) // shards) * shards
    how = How(settings, new_tokens, speaker.ends, speaker.vocab_size, speaker.compute_dtype, speaker.rules)
    units = [
        (index, tuple(wanted[at : at + each]))
        for index, wanted in enumerate(numbers)
        for at in range(0, len(wanted), each)
    ]
    by_width: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
    for unit in units:
        by_width.setdefault(padded_width(len(prompts[unit[0]])), []).append(unit)
    for width in sorted(by_width):
        group = by_width[width]
        batches = (
            _start(speaker, how, prompts, names, seed, group[at : at + count], (count, each, width))
            for at in range(0, len(group), count)
        )
        for (index, number), completion in _answers(speaker, how, batches, count * each, tuple(stop)):
            yield index, number, completion


def complete(
    cfg: ModelConfig,
    params: Params,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[Message]],
    new_tokens: int,
    *,
    compute_dtype: Any = jnp.float32,
    batch_size: int = 8,
) -> list[str]:
    """Greedy completions, without their prompts and special tokens.

    A prompt is a text to go on with, or a list of chat messages that is to be answered; see `encode`. Runs on one
    device: `params` are brought there if they are split over several; with several processes all have to call. Raises
    ValueError as `rollouts` does.
    """
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    with jax.set_mesh(None):  # a mesh that the caller may have set is none of this program's business
        model = speaker(cfg, _on_one_device(params), tokenizer, compute_dtype=compute_dtype)
        size = min(batch_size, max(1, len(ids)))
        found = {
            index: completion.text
            for index, _, completion in rollouts(
                model, ids, 1, Sampling(temperature=0), new_tokens=new_tokens, batch_size=size
            )
        }
    return [found[index] for index in range(len(ids))]


# --- batches of one width


def _start(
    speaker: Speaker,
    how: How,
    prompts: Sequence[Sequence[int]],
    names: Sequence[str],
    seed: int,
    batch: Sequence[tuple[int, tuple[int, ...]]],
    shape: tuple[int, int, int],
) -> tuple[State, dict[int, tuple[int, int]]]:
    """A batch that waits, and row -> (prompt index, sample number) of the rows that are wanted."""
    count, each, width = shape
    tokens, lengths = np.zeros((count, width), np.int32), np.ones(count, np.int32)
    marks, numbers = np.zeros(count, np.uint32), np.zeros((count, each), np.int32)
    rows: dict[int, tuple[int, int]] = {}
    for at, (index, wanted) in enumerate(batch):
        tokens[at, : len(prompts[index])] = prompts[index]
        lengths[at], marks[at] = len(prompts[index]), zlib.crc32(names[index].encode())
        numbers[at, : len(wanted)] = wanted
        rows |= {at * each + place: (index, number) for place, number in enumerate(wanted)}
    keys = _keys(jax.random.key(seed), marks, numbers)
    wanted_rows = np.isin(np.arange(count * each), list(rows)).reshape(count, each)
    inputs = [_placed(part, speaker.rules) for part in (tokens, lengths, keys, wanted_rows)]
    return begin(speaker.cfg, how, speaker.params, *inputs), rows


@jax.jit
def _keys(key: Array, marks: Array, numbers: Array) -> Array:
    """[P, n]: by the name of the prompt and the number of the sample."""
    by_name = jax.vmap(jax.random.fold_in, (None, 0))(key, marks)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(by_name, numbers)


def _answers(
    speaker: Speaker,
    how: How,
    batches: Iterator[tuple[State, dict[int, tuple[int, int]]]],
    size: int,
    stop: tuple[str, ...],
) -> Iterator[tuple[tuple[int, int], Completion]]:
    """((prompt index, sample number), completion) as they finish: `size` rows, refilled from batches of as many.

    A batch waits until all of it is under way, then the next is read; on a mesh an answer stays on the device that read
    its prompt. Texts are looked at every CHUNK tokens, and when rows are free for others.
    """
    state: State | None = None
    waiting: State | None = None
    queue: dict[int, tuple[int, int]] = {}  # by row of `waiting`
    under_way: dict[int, tuple[int, int]] = {}  # by row of `state`
    more = True
    while True:
        while len(under_way) < size and (queue or more):
            if not queue:
                waiting, queue = next(batches, (None, {}))
                more = waiting is not None
            seats = _seats(under_way, queue, size // how.rules.batch_shards)
            if waiting is None or not seats:
                break
            source = np.full(size, -1, np.int32)
            for row, at in seats.items():
                source[row] = at % (size // how.rules.batch_shards)
                under_way[row] = queue.pop(at)
            state = refill(speaker.cfg, how, state, waiting, _placed(source, how.rules))
            waiting = waiting if queue else None  # its memory is free for the next
        if state is None or not under_way:
            return
        halted = np.array([row not in under_way for row in range(size)])
        enough = max(len(under_way) - max(1, size // FREE), 0) if queue or more else 0
        steps = (jnp.int32(CHUNK), jnp.int32(enough), _placed(halted, how.rules))
        state = advance(speaker.cfg, how, speaker.fast, state, *steps)
        seen = state.rows
        tokens, logp, counts, stopped = (_host(part) for part in (seen.tokens, seen.logp, seen.counts, seen.stopped))
        for row in sorted(under_way):
            ids, finish = tokens[row, : counts[row]].tolist(), LENGTH if counts[row] >= how.new_tokens else ""
            found = _completion(
                speaker.tokenizer, ids, logp[row, : counts[row]], STOP if stopped[row] else finish, stop
            )
            if found is not None:
                yield under_way.pop(row), found


def _seats(under_way: Mapping[int, Any], queue: Mapping[int, Any], each: int) -> dict[int, int]:
    """Free row -> row of the queue that takes it, on the same device; each: rows of a device."""
    found: dict[int, int] = {}
    for shard in {at // each for at in queue}:
        free = (row for row in range(shard * each, (shard + 1) * each) if row not in under_way)
        found |= zip(free, (at for at in sorted(queue) if at // each == shard), strict=False)
    return found


def _completion(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], logp: np.ndarray, finish: str, stop: tuple[str, ...]
) -> Completion | None:
    """The answer, if it is finished or a stop string is in it."""
    if not finish and not stop:
        return None

    def text_of(count: int) -> str:
        # Always from the first token on: one token may be a part of a character.
        return str(tokenizer.decode(ids[:count], skip_special_tokens=True))

    text, count = text_of(len(ids)), len(ids)
    places = [at for at in map(text.find, stop) if at >= 0]
    if places:
        text, finish = text[: min(places)], STOP
        count = next(count for count in range(len(ids) + 1) if text_of(count).startswith(text))
    if not finish:
        return None
    return Completion(text, tuple(ids[:count]), float(np.sum(logp[:count], dtype=np.float64)), finish)


# --- odds and ends


def _check(prompts: Sequence[Sequence[int]], cfg: ModelConfig, new_tokens: int) -> None:
    for number, row in enumerate(prompts):
        if not len(row):
            raise ValueError(f"prompts[{number}] must have at least one token, got none. Add some text.")
        if len(row) + new_tokens > cfg.max_positions:
            raise ValueError(
                f"prompts[{number}] must leave room for the answer, got {len(row)} tokens + {new_tokens} new ones; the "
                f"model's context is {cfg.max_positions}. Shorten the prompt or lower new_tokens."
            )


def _placed(array: Any, rules: Rules) -> Any:
    """The whole array, which every process has, split by rows."""
    sharding = rules.batch(array.ndim)
    if sharding is None:
        return array
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):  # keys cannot be taken to the devices of others
        return jax.random.wrap_key_data(_placed(np.asarray(jax.random.key_data(array)), rules))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _host(array: Array) -> np.ndarray:
    if not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _on_one_device(params: Params) -> Params:
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(params)):
        from jax.experimental import multihost_utils

        params = multihost_utils.process_allgather(params, tiled=True)
    # With a bare device instead of a sharding the arrays would keep the mesh in their type.
    return jax.device_put(params, SingleDeviceSharding(jax.local_devices()[0]))
