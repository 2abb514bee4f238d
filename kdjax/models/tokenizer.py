"""Tokenizers: of a Hugging Face directory, from a GGUF file's metadata alone, the synthetic one; and comparing two.

Everything returned is a transformers tokenizer, `PreTrainedTokenizerFast` if we build it, with its chat template.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdjax.models import fetch, flax_models, gguf_io, synthetic

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
)  # a directory without any of them has no tokenizer
PREFIX = "tokenizer.ggml."
CONTROL, USER_DEFINED, UNUSED, BYTE = 3, 4, 5, 6  # tokenizer.ggml.token_type

# How text is split before BPE, by tokenizer.ggml.pre. The patterns are those the models were trained with.
_CONTRACTION, _REST = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
GPT2, DIGITS = "gpt2", "digits"  # ByteLevel's own pattern; the same after cutting out each digit
PRE_TOKENIZERS = {
    "gpt-2": GPT2,
    "smollm": DIGITS,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}


def has_tokenizer(path: str | Path, *, where: str = "data.tokenizer") -> bool:
    """Whether a model path (see fetch.locate) comes with a tokenizer; a Hugging Face directory may lack it."""
    found = fetch.locate(path, weights=False, where=where)
    if found.kind == "flax":
        return bool(flax_models.open_model(found.name, where).tokenizer)
    return found.kind != "hf" or any((found.path / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(path: str | Path, *, where: str = "data.tokenizer") -> PreTrainedTokenizerBase:
    """The tokenizer of a model path (see fetch.locate). Raises ValueError that names the path if it has none."""
    found = fetch.locate(path, weights=False, where=where)
    if found.kind == "flax":
        return load_tokenizer(flax_models.tokenizer_of(found.name, where), where=where)
    if found.kind == "synthetic":
        return synthetic.make_tokenizer()
    if found.kind == "gguf":
        return from_gguf(gguf_io.open_gguf(found.path))
    if not has_tokenizer(path, where=where):
        raise ValueError(
            f"{where} must be a model with a tokenizer, got {str(path)!r}, which holds none of "
            f"{', '.join(TOKENIZER_FILES)}. Set data.tokenizer to a directory that does."
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(found.path))
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise ValueError(
            f"{where} must be a model with a readable tokenizer, got {str(path)!r}; {error}. Fetch it again."
        ) from error


def from_gguf(file: gguf_io.GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file. Raises ValueError naming the file and what of its tokenizer is not supported."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    meta = {key.removeprefix(PREFIX): value for key, value in file.metadata.items() if key.startswith(PREFIX)}
    builder = {"gpt2": _byte_level, "llama": _sentencepiece}.get(meta.get("model", ""))
    if builder is None or "tokens" not in meta:
        raise ValueError(
            f"{file.path} must hold a tokenizer of the model gpt2 or llama, got {meta.get('model')!r}; no other is "
            "supported. Set data.tokenizer to a Hugging Face directory of this model."
        )
    tokens = list(meta["tokens"])
    kinds = list(meta.get("token_type", [1] * len(tokens)))
    while kinds and kinds[-1] == UNUSED:  # padding rows of the embedding, which no text gives
        del tokens[-1], kinds[-1]
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(kinds) != len(tokens):
        raise ValueError(f"{file.path} must hold each token once, got a damaged tokenizer. Fetch or convert it again.")
    try:
        inner = builder(file.path, meta, vocab)
    except ValueError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception for merges that do not fit
        raise ValueError(f"{file.path} must hold a consistent tokenizer, got a damaged one; {error}.") from error
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        chosen = [
            AddedToken(token, special=special, normalized=False)
            for token, k in zip(tokens, kinds, strict=True)
            if k == kind
        ]
        inner.add_special_tokens(chosen) if special else inner.add_tokens(chosen)
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named = {
        role: tokens[meta[f"{key}_token_id"]]
        for role, key in roles.items()
        if meta.get(f"{key}_token_id", len(tokens)) < len(tokens)
    }
    if "eos_token" in named:
        named.setdefault("pad_token", named["eos_token"])
    _add_bos(inner, meta, named.get("bos_token"), vocab)
    template = file.metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template=template, clean_up_tokenization_spaces=False, **named
    )


def _byte_level(path: str, meta: dict[str, Any], vocab: dict[str, int]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = meta.get("pre", "")
    if pre not in PRE_TOKENIZERS or "merges" not in meta:
        raise ValueError(
            f"{path} must hold merges and one of the pre-tokenizers {', '.join(PRE_TOKENIZERS)}, got {pre!r}; no other "
            "is supported. Set data.tokenizer to a Hugging Face directory of this model."
        )
    pattern = PRE_TOKENIZERS[pre]
    merges = [tuple(pair.split(" ")) for pair in meta["merges"]]
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pattern == _LLAMA3))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern in (GPT2, DIGITS))]
    if pattern == DIGITS:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif pattern != GPT2:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pattern == _QWEN2:
        inner.normalizer = normalizers.NFC()
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentencepiece(path: str, meta: dict[str, Any], vocab: dict[str, int]) -> Tokenizer:
    """Llama 2: BPE over characters with byte tokens as fallback; the better-scored piece is merged first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    if len(meta.get("scores", ())) < len(vocab):
        raise ValueError(
            f"{path} must hold a score for each token, got a damaged tokenizer. Fetch or convert it again."
        )
    ranked = sorted(vocab, key=lambda token: (-meta["scores"][vocab[token]], vocab[token]))
    pairs = ((token[:at], token[at:]) for token in ranked for at in range(1, len(token)))
    merges = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
    names = {index: token for token, index in vocab.items()}
    unknown = names.get(meta.get("unknown_token_id", 0))
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if meta.get("add_space_prefix", True) else []
    inner.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return inner


def _add_bos(inner: Tokenizer, meta: dict[str, Any], bos: str | None, vocab: dict[str, int]) -> None:
    """A leading bos where the file asks for one; files that do not say mean the habit of their tokenizer."""
    from tokenizers.processors import TemplateProcessing

    habit = meta["model"] == "llama" or PRE_TOKENIZERS.get(meta.get("pre", "")) == _LLAMA3
    if bos is not None and meta.get("add_bos_token", habit):
        inner.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )


def token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Token -> id of everything in the vocabulary, added tokens included."""
    return dict(tokenizer.get_vocab())


def emit_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Token -> id of what tokenised text can hold: all but a token that is for padding alone (padding is masked)."""
    pad, other = tokenizer.pad_token, (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token)
    return {token: index for token, index in token_ids(tokenizer).items() if token != pad or token in other}


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 hex over what decides a text's ids: token -> id, merges, added tokens, normaliser, pre-tokenizer."""
    content: dict[str, Any] = {"vocab": sorted(token_ids(tokenizer).items())}
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is not None:
        spec = json.loads(inner.to_str())
        content["merges"] = spec["model"].get("merges")
        content |= {part: spec.get(part) for part in ("added_tokens", "normalizer", "pre_tokenizer")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_same_tokenizer(
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    teacher_vocab: int,
    student_vocab: int,
    names: tuple[str, str] = ("teacher", "student"),
) -> None:
    """Every id that the teacher's tokenizer (which cuts the data) can emit means the same token to both models.

    teacher_vocab, student_vocab: rows of the embeddings; they may differ, the surplus rows are padding. Tokens that
    only the student's tokenizer has do not matter. ValueError names up to five tokens that differ, with both ids.
    names: what the messages call the two, ("data", "teacher") if data.tokenizer cuts the data.
    """
    first, second = names
    student_ids, rows = token_ids(student), min(teacher_vocab, student_vocab)
    emitted = sorted(emit_ids(teacher).items(), key=lambda item: item[1])
    differ = [(token, index, student_ids.get(token)) for token, index in emitted if student_ids.get(token) != index]
    if differ:
        shown = ", ".join(
            f"{token!r} ({index} and {other if other is not None else 'absent'})" for token, index, other in differ[:5]
        )
        rest = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        family = f"Set a {second} of the {first}'s family."
        advice = f"Set data.tokenizer to that of the {second}." if first == "data" else family
        raise ValueError(
            f"{second}.path must have the {first}'s tokenizer, got another: {shown}{rest} (ids of {first} and "
            f"{second}); a distribution over ids can be matched only if they mean the same. {advice}"
        )
    beyond = [(token, index) for token, index in emitted if index >= rows]
    if beyond:
        shown = ", ".join(f"{token!r} ({index})" for token, index in beyond[:5])
        rest = f" and {len(beyond) - 5} more" if len(beyond) > 5 else ""
        raise ValueError(
            f"{first} and {second} must have an embedding row for each token, got {teacher_vocab} and {student_vocab} "
            f"rows: none for {shown}{rest}. Set a teacher and a student whose vocab_size covers the tokenizer."
        )
