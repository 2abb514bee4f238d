"""What must fit together in an experiment, said before any weight is read."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kdjax.config import Experiment
from kdjax.data import LoadedData, ids_in
from kdjax.models import ModelConfig
from kdjax.models import tokenizer as tokenizers
from kdjax.selection import Chooser
from kdjax.selection.stats import NEEDS_TEACHER
from kdjax.sharding import Rules

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_paths(experiment: Experiment) -> None:
    """Raises ValueError if the models that the experiment needs are not named."""
    kind = experiment.student.init.kind
    if kind == "cut" and not experiment.teacher.path:
        raise ValueError("teacher.path must be set, got ''; student.init.kind is 'cut' and cuts layers out of it.")
    if kind != "cut" and not experiment.student.path:
        raise ValueError(
            f"student.path must be set, got ''; student.init.kind is {kind!r}. Name a model, or set student.init.kind "
            "to 'cut' to cut the student from the teacher."
        )


def check_tokenizers(
    experiment: Experiment,
    tokenizer: "PreTrainedTokenizerBase",
    teacher_cfg: ModelConfig | None,
    student_cfg: ModelConfig,
) -> None:
    """The ids of the data mean to every model what they meant when it was trained; random weights know none."""
    e = experiment
    source = e.data.tokenizer or e.teacher.path or e.student.path
    sides = {} if teacher_cfg is None else {"teacher": (e.teacher.path, teacher_cfg.vocab_size)}
    if e.student.init.kind == "own":
        sides["student"] = (e.student.path, student_cfg.vocab_size)
    for name, (path, rows) in sides.items():
        where = f"{name}.path"
        # Where a model comes without a tokenizer, data.tokenizer is the user's word for it.
        if path == source or (e.data.tokenizer and not tokenizers.has_tokenizer(path, where=where)):
            continue
        other = tokenizers.load_tokenizer(path, where=where)
        first, first_rows = ("data", rows) if e.data.tokenizer else ("teacher", sides.get("teacher", (path, rows))[1])
        tokenizers.check_same_tokenizer(tokenizer, other, first_rows, rows, (first, name))


def check_ids(data: LoadedData, student_cfg: ModelConfig, teacher_cfg: ModelConfig | None) -> None:
    """Raises ValueError if the data has an id that a model has no row for."""
    widths = ({} if teacher_cfg is None else {"teacher": teacher_cfg.vocab_size}) | {"student": student_cfg.vocab_size}
    largest = int(np.max(np.concatenate([ids_in(data.train), ids_in(data.heldout)])))
    for name, width in widths.items():
        if largest >= width:
            raise ValueError(
                f"data.tokenizer must emit ids below the {name}'s vocabulary of {width}, got {largest}; it is not the "
                f"tokenizer of the {name}. Set data.tokenizer or {name}.path."
            )


def check_cached(e: Experiment, chooser: Chooser) -> None:
    """A cache can serve this experiment. Raises ValueError that says what it cannot know."""
    if e.classes.kind == "all":
        raise ValueError(
            "classes.kind must be 'sampled' or a top-k kind with teacher.source='cache', got 'all'; a cache holds a "
            "few entries per position. Set classes.kind='sampled'."
        )
    if not isinstance(e.loss.tau, float):
        raise ValueError(
            f"loss.tau must be a number with teacher.source='cache', got {e.loss.tau!r}; the entries were drawn at one "
            "temperature. Set a number."
        )
    held = {"teacher_entropy": e.cache.entropy and e.loss.tau == 1, "teacher_ce": e.cache.label_logp}
    for name in chooser.needs:
        if name in NEEDS_TEACHER and not held.get(name, False):
            how = {
                "teacher_entropy": "Set cache.entropy=True and loss.tau=1.0",
                "teacher_ce": "Set cache.label_logp=True",
            }
            raise ValueError(
                f"selection.signal must not need {name!r} of the teacher with this cache, got {e.selection.signal!r}; "
                f"the cache does not hold it. {how.get(name, 'Set another signal')} or teacher.source='live'."
            )


def check_fresh(e: Experiment, sampled: Sequence[str], where: str) -> None:
    """Losses of `where` that take the labels for draws of the student get such. Raises ValueError if they do not.

    The ratio of the student's probability now to the one when it drew is then 1; nothing keeps the latter per token.
    """
    o, g = e.on_policy, e.generation
    rules: dict[str, tuple[object, object, str]] = {
        "on_policy.block": (o.block, 1, "later answers of a block are an older student's"),
        "on_policy.reuse": (o.reuse, 1, "the student has moved when it sees an answer again"),
        "on_policy.truncated": (o.truncated, "keep", "what is left is not what the student says"),
        "samples.fraction": (e.samples.fraction, 1.0, "which answers are kept depends on what was drawn"),
        "generation.temperature": (g.temperature, 1.0, "that is another distribution"),
        "generation.top_p": (g.top_p, 1.0, "that is another distribution"),
        "generation.top_k": (g.top_k, 0, "that is another distribution"),
        "generation.min_p": (g.min_p, 0.0, "that is another distribution"),
        "generation.stop": (g.stop, (), "the end of such an answer is not drawn"),
    }
    if where != "on_policy.terms":
        rules = {"on_policy.fraction": (o.fraction, 1.0, "other text is not the student's")} | rules
    for name, (value, needed, why) in rules.items() if sampled else ():
        if value != needed:
            raise ValueError(
                f"{name} must be {needed!r} with the loss {sampled[0]!r}, got {value!r}; it learns from tokens that "
                f"the student draws from its whole distribution at once before the step: {why}. Set it so, or name "
                f"'reverse_kl' in {where}."
            )


def keeps_rows(e: Experiment) -> bool:
    """Whether launch.curate chooses rows of the given text; own answers are chosen block by block in training."""
    return e.samples.fraction < 1 and e.on_policy.fraction != 1


def is_served(e: Experiment) -> bool:
    """Whether the cache is of what a server said: of its own answers, or of the text. No teacher is loaded."""
    return said_answers(e) or scores_text(e)


def said_answers(e: Experiment) -> bool:
    """Whether the cache is of what a server said of its answers when it gave them, by `launch.generate`."""
    return e.teacher.source == "cache" and e.served.top_logprobs > 0


def scores_text(e: Experiment) -> bool:
    """Whether the cache is of what a server says of the training text, which `launch.cache_teacher` asks."""
    return e.teacher.source == "cache" and e.served.prompt_logprobs > 0


def check_served(e: Experiment) -> None:
    """What a server lists can fill the cache of this experiment. Raises ValueError that says what it does not know."""
    if said_answers(e) and scores_text(e):
        raise ValueError(
            f"served.prompt_logprobs must be 0 with served.top_logprobs={e.served.top_logprobs}, got "
            f"{e.served.prompt_logprobs}; a cache is of what the server said of its answers as it gave them "
            "(top_logprobs), or of what it says of the text when launch.cache_teacher asks (prompt_logprobs). Set one."
        )
    way, listed, answers = "top_logprobs", e.served.top_logprobs, e.prompts.answers
    top = ("renormalised", "ghost_tail", "zero_tail")
    unknown = "no server says what it is of the tokens that it does not list"
    own_answers = answers not in ("", "gold", "pool")
    rules: dict[str, tuple[object, bool, str, str]] = {
        "prompts.answers": (answers, own_answers, "a directory of launch.generate", "it has them"),
        "cache.label_logp": (e.cache.label_logp, not e.cache.label_logp, "False", "an answer's end may have none"),
    }
    if scores_text(e):
        way, listed, name = "prompt_logprobs", e.served.prompt_logprobs, e.served.model
        rules = {"served.model": (name, bool(name), "the model's name there", "it tells caches apart")}
    rules |= {
        "classes.kind": (
            e.classes.kind,
            e.classes.kind in top,
            f"one of {', '.join(top)}",
            "a server lists the largest",
        ),
        "classes.entries": (e.classes.entries, e.classes.entries <= listed, f"at most {listed}", "no more are listed"),
        "loss.tau": (e.loss.tau, e.loss.tau == 1, "1.0", "a server says them at temperature 1"),
        "cache.entropy": (e.cache.entropy, not e.cache.entropy, "False", unknown),
    }
    for name, (value, good, rule, why) in rules.items():
        if not good:
            raise ValueError(
                f"{name} must be {rule} with the log-probabilities of a server, got {value!r}; {why}. Set it so, or "
                f"served.{way} to 0 for a teacher that is loaded."
            )


def check_rows(experiment: Experiment, rules: Rules, of_teacher: Rules) -> None:
    """Raises ValueError if the rows of a micro-batch cannot be shared out evenly, the student's or the teacher's."""
    rows = experiment.train.batch_size // experiment.train.accumulate
    shards = math.lcm(rules.batch_shards, of_teacher.batch_shards)
    if rows % shards:
        raise ValueError(
            f"train.batch_size / train.accumulate must be a multiple of the {shards} parts that the mesh cuts a batch "
            f"into, got {rows}; each takes the same number of rows. Change train.batch_size or mesh.shape."
        )
