"""Questions with answers that can be checked: of a file, a pool of answers, a task or reasoning-gym; their split."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdjax import config, registry
from kdjax.data.tasks import arith

FIELDS = ("id", "prompt", "answer", "verifier", "meta")
REDRAWS = 20  # of a generator without end, before what it gave has to do
Messages = tuple[dict[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question, and what is known of its answer.

    id: unique in its list. prompt: the question, or {"role", "content"} messages. answer: the gold answer, None if
    there is none. verifier: who tells right from wrong (`kdjax/verifiers`); "" = prompts.verifier. meta: what the
    verifier reads besides ("tolerance", "choices", "tests", ...), and "group": one group is on one side of the split.
    """

    id: str
    prompt: str | Messages
    answer: str | None = None
    verifier: str = ""
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def load_prompts(prompts: config.Prompts, seed: int | None = None) -> list[Prompt]:
    """The prompts of `prompts.path`, each question once, `prompts.instruction` after each.

    seed: of the draw; None = prompts.seed. `prompts.size` of them are drawn, in equal shares of the kinds of a mixture
    as far as these reach, 0 takes all. The order is that of hash(seed, question): the same on every machine, and each
    beginning of the list is a random sample. Of equal questions with equal answers the first stays.
    Raises ValueError that names the file and line, or the field of the config, for whatever cannot be used.
    """
    seed = prompts.seed if seed is None else seed
    if not prompts.path:
        raise ValueError(
            "prompts.path must name the prompts, got ''; nothing can be asked without. Set it to a .jsonl file, to "
            f"{_known()}."
        )
    kinds = _read(prompts, seed)
    distinct = _once(kinds)
    most = sum(map(len, distinct))
    if prompts.size > most:
        raise ValueError(
            f"prompts.size must be at most {most}, got {prompts.size}; {prompts.path!r} has no more distinct "
            "questions. Lower it, or set it to 0 for all."
        )
    drawn = []
    for kind, share in zip(distinct, _shares([len(kind) for kind in distinct], prompts.size or most), strict=True):
        ranked = [(_digest(f"{seed}\0draw\0{question}"), prompt) for question, prompt in kind.items()]
        drawn += sorted(ranked, key=lambda pair: pair[0])[:share]
    drawn.sort(key=lambda pair: pair[0])
    return [_instructed(prompt, prompts.instruction) for _, prompt in drawn]


def split_prompts(
    loaded: Sequence[Prompt], prompts: config.Prompts, seed: int | None = None
) -> tuple[list[Prompt], list[Prompt]]:
    """(held-out, train): what `load_prompts(prompts, seed)` gave, split by question.

    A question, or meta["group"] where it is given, is held out if hash(seed, it) is below `prompts.heldout_fraction`:
    it is on the same side whatever the size, the mixture, the instruction or the id, and the held-out share is met up
    to chance. Raises ValueError if a side that is wanted stays empty.
    """
    seed = prompts.seed if seed is None else seed
    sides: tuple[list[Prompt], list[Prompt]] = ([], [])
    for prompt in loaded:
        part = prompt.meta.get("group") or question_of(prompt, prompts.instruction)
        place = int.from_bytes(_digest(f"{seed}\0split\0{part}")[:8], "big") / 2**64
        sides[place >= prompts.heldout_fraction].append(prompt)
    if not sides[1] or (prompts.heldout_fraction > 0 and not sides[0]):
        raise ValueError(
            f"prompts.heldout_fraction must leave prompts on both sides, got {prompts.heldout_fraction}, which holds "
            f"out {len(sides[0])} of {len(loaded)}; questions fall on a side by chance. Raise prompts.size or set "
            "another fraction or prompts.seed."
        )
    return sides


def fingerprint(prompts: Iterable[Prompt]) -> str:
    """sha256 hex of the prompts, field by field, whatever their order."""
    lines = sorted(json.dumps(dataclasses.asdict(prompt), sort_keys=True, default=repr) for prompt in prompts)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def question_digest(prompt: Prompt, instruction: str = "") -> str:
    """16 hex digits of what is asked, up to blanks and the form of characters, without the instruction at its end."""
    return _digest(question_of(prompt, instruction)).hex()[:16]


def messages(prompt: Prompt) -> list[dict[str, str]]:
    """The prompt as a chat: its messages, or its question as the turn of a user."""
    if isinstance(prompt.prompt, str):
        return [{"role": "user", "content": prompt.prompt}]
    return [dict(turn) for turn in prompt.prompt]


def read_jsonl(path: str) -> list[Prompt]:
    """The prompts of a UTF-8 file with one JSON object a line, with the fields of `Prompt`; only id and prompt must be.

    Raises ValueError that names file and line.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"prompts.path must be an existing .jsonl file or {_known()}, got {path!r}; no such file.")
    try:
        text = file.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"prompts.path must hold UTF-8 text, got byte 0x{error.object[error.start]:02x} at offset {error.start} of "
            f"{file}; {error.reason}. Convert the file, e.g. with iconv -t UTF-8."
        ) from error
    found: list[Prompt] = []
    lines: dict[str, int] = {}
    for at, line in enumerate(text.split("\n"), start=1):  # not splitlines(): a string may hold U+2028 and its like
        if line.strip():
            prompt = _parse(line, f"{file}:{at}")
            if prompt.id in lines:
                raise ValueError(
                    f'prompts.path must hold each "id" once, got {prompt.id!r} at {file}:{lines[prompt.id]} and at '
                    f"{file}:{at}; answers are kept by id. Rename one."
                )
            lines[prompt.id] = at
            found.append(prompt)
    if not found:
        raise ValueError(f"prompts.path must hold prompts, got the empty file {file}. Write one JSON object a line.")
    return found


def reasoning_gym(names: Sequence[str], size: int, seed: int) -> list[list[Prompt]]:
    """About `size` distinct questions in equal shares of these generators of reasoning-gym, with its default settings.

    meta["reasoning_gym"] = {"generator", "entry"}: what the verifier of the same name scores against.
    """
    try:
        import reasoning_gym as gym
    except ImportError as error:
        raise ValueError(
            f"prompts.path must name prompts that can be had here, got 'reasoning_gym:{','.join(names)}'; {error}. "
            "Install it: pip install reasoning-gym."
        ) from error
    if not size:
        raise ValueError(
            "prompts.size must be positive for reasoning_gym, got 0; its generators have no end. Set it to a number."
        )
    made = []
    for number, name in enumerate(names):
        registry.lookup(dict.fromkeys(gym.factory.DATASETS, name), name, "prompts.path 'reasoning_gym:...'")
        wanted, kind = -(-size // len(names)), dict[str, Prompt]()
        for again in range(REDRAWS):
            if len(kind) >= wanted:
                break
            for entry in gym.create_dataset(name, size=wanted, seed=seed * REDRAWS * 2 + again):
                entry = dict(entry)
                key = _plain(entry["question"])
                if key not in kind and len(kind) < wanted:
                    about = {"reasoning_gym": {"generator": name, "entry": entry}}
                    gold = None if entry.get("answer") is None else str(entry["answer"])
                    identity = f"{name}/{_digest(key).hex()[:12]}"
                    kind[key] = Prompt(identity, entry["question"], gold, "reasoning_gym", about)
        made.append(list(kind.values()))
        if number == len(names) - 1 and sum(map(len, made)) < size:
            raise ValueError(
                f"prompts.size must be at most what the generators have, got {size}; {', '.join(names)} gave "
                f"{sum(map(len, made))} distinct questions in {REDRAWS} draws each. Lower it or name more generators."
            )
    return made


# name before the colon -> (what follows it, prompts.size, seed) -> lists of prompts, one a kind
BUILT_IN: dict[str, Callable[[Sequence[str], int, int], list[list[Prompt]]]] = {
    "arith": lambda kinds, size, seed: [[Prompt(**made) for made in kind] for kind in arith(kinds)],
    "reasoning_gym": reasoning_gym,
}


def _known() -> str:
    return 'a directory of answers, "arith", "arith:<kind>,<kind>" or "reasoning_gym:<generator>,<generator>"'


def _read(prompts: config.Prompts, seed: int) -> list[list[Prompt]]:
    name, _, rest = prompts.path.partition(":")
    if name in BUILT_IN and not Path(prompts.path).is_file():
        names = [part.strip() for part in rest.split(",") if part.strip()]
        if name == "reasoning_gym" and not names:
            raise ValueError(
                f"prompts.path must name generators after 'reasoning_gym:', got {prompts.path!r}; each is a task of "
                "its own. Set it to, for example, 'reasoning_gym:chain_sum,gcd'."
            )
        return BUILT_IN[name](names, prompts.size, seed)
    from kdjax.data.answer_pools import holds_answers, read_questions  # it reads Prompt from here

    if holds_answers(prompts.path):
        return [read_questions(prompts.path)]
    if Path(prompts.path).suffix != ".jsonl":
        raise ValueError(
            f"prompts.path must be a .jsonl file or {_known()}, got {prompts.path!r}."
            + registry.did_you_mean(name, BUILT_IN)
        )
    return [read_jsonl(prompts.path)]


def _once(kinds: Sequence[Sequence[Prompt]]) -> list[dict[str, Prompt]]:
    """Of each kind: question -> prompt, for the questions that no earlier prompt has."""
    seen: dict[str, Prompt] = {}
    distinct = []
    for kind in kinds:
        kept = {}
        for prompt in kind:
            question = question_of(prompt)
            first = seen.setdefault(question, prompt)
            if first is prompt:
                kept[question] = prompt
            elif first.answer != prompt.answer:
                raise ValueError(
                    f"prompts.path must hold one answer to a question, got {first.answer!r} for {first.id!r} and "
                    f"{prompt.answer!r} for {prompt.id!r}; one of them would be marked wrong. Mend or remove one."
                )
        distinct.append(kept)
    return distinct


def _shares(counts: Sequence[int], size: int) -> list[int]:
    """Equal parts of `size`, but no more than there are of a kind; what is short is made up by the larger kinds."""
    shares, left = [0] * len(counts), size
    order = sorted(range(len(counts)), key=lambda kind: (counts[kind], kind))
    for done, kind in enumerate(order):
        shares[kind] = min(counts[kind], left // (len(order) - done))
        left -= shares[kind]
    return shares


def _instructed(prompt: Prompt, instruction: str) -> Prompt:
    if not instruction:
        return prompt
    if isinstance(prompt.prompt, str):
        return dataclasses.replace(prompt, prompt=prompt.prompt + instruction)
    *before, last = prompt.prompt
    return dataclasses.replace(prompt, prompt=(*before, {**last, "content": last["content"] + instruction}))


def question_of(prompt: Prompt, instruction: str = "") -> str:
    """What is asked, up to blanks and the form of characters, without the instruction at its end."""
    if isinstance(prompt.prompt, str):
        return _plain(prompt.prompt.removesuffix(instruction))
    turns = messages(prompt)
    turns[-1]["content"] = turns[-1]["content"].removesuffix(instruction)
    if len(turns) == 1 and turns[0]["role"] == "user":  # a message alone is the same question as its text
        return _plain(turns[0]["content"])
    return "\0".join(f"{turn['role']}: {_plain(turn['content'])}" for turn in turns)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _parse(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"prompts.path must hold one JSON object per line, got bad JSON at {where}; {error}. Mend or remove "
            "the line."
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"prompts.path must hold one JSON object per line, got a {type(row).__name__} at {where}.")
    for name in row:
        if name not in FIELDS:
            raise ValueError(
                f'prompts.path must hold rows with the fields {", ".join(FIELDS)}, got "{name}" at {where}; what a '
                'verifier reads besides goes into "meta". Rename or move it.'
            )
    row = {name: value for name, value in row.items() if value is not None}
    for name, kind in (("id", str), ("answer", str), ("verifier", str), ("meta", dict)):
        if not isinstance(row.get(name, kind()), kind):
            shown = "a JSON object" if kind is dict else "a string"
            raise ValueError(
                f'the field "{name}" must be {shown}, got {row[name]!r:.60} at {where}; it is read as it stands. '
                "Put it in quotation marks."
                if kind is str
                else f'the field "{name}" must be {shown}, got {row[name]!r:.60} at {where}.'
            )
    if not row.get("id"):
        raise ValueError(f'the field "id" must be a non-empty string, got none at {where}; answers are kept by id.')
    row["prompt"] = _content(row.get("prompt"), where)
    return Prompt(**row)


def _content(given: Any, where: str) -> str | Messages:
    if isinstance(given, str) and given.strip():
        return given
    if not isinstance(given, list) or not given:
        raise ValueError(
            f'the field "prompt" must be a non-empty text or a list of messages, got {given!r:.60} at {where}.'
        )
    for turn in given:
        if not (isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content"))):
            raise ValueError(
                f'each message of "prompt" must be {{"role": text, "content": text}}, got {turn!r:.80} at {where}.'
            )
    if given[-1]["role"] == "assistant":
        raise ValueError(
            f'the last message of "prompt" must not be of the assistant, got {given[-1]["content"]!r:.60} at {where}; '
            'the answer is generated. Put the gold answer into "answer".'
        )
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in given)
