"""Reading GGUF files: metadata, tensors and the model configuration, with numpy alone.

Layout, little-endian: magic, version, counts, metadata, tensor table, then the data from the next multiple of the
alignment. The table gives sizes innermost first; we turn them round, so a matrix is (out, in) as in a Hugging Face
file. Quantised tensors are rows of blocks of 32 elements with one or two float16 constants each; in the 4-bit types the
low nibbles are elements 0-15 and the high ones 16-31.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 1 counted in 32 bits and is long gone
MAX_DIMS = 4
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # metadata types


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)


def _f32(raw: np.ndarray) -> np.ndarray:
    return raw.copy().view(np.float32)


def _f16(raw: np.ndarray) -> np.ndarray:
    return raw.copy().view(np.float16).astype(np.float32)


def _bf16(raw: np.ndarray) -> np.ndarray:
    return (raw.copy().view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _q8_0(raw: np.ndarray) -> np.ndarray:
    """x = d q: float16 d, 32 x int8 q."""
    blocks = raw.reshape(-1, 34)
    return blocks[:, 2:].view(np.int8) * _half(blocks, 0)


def _q4_0(raw: np.ndarray) -> np.ndarray:
    """x = d (q - 8): float16 d, 16 bytes of nibbles q."""
    blocks = raw.reshape(-1, 18)
    values = _nibbles(blocks[:, 2:])
    values -= 8
    values *= _half(blocks, 0)
    return values


def _q4_1(raw: np.ndarray) -> np.ndarray:
    """x = d q + m: float16 d, float16 m, 16 bytes of nibbles q."""
    blocks = raw.reshape(-1, 20)
    values = _nibbles(blocks[:, 4:])
    values *= _half(blocks, 0)
    values += _half(blocks, 2)
    return values


@dataclasses.dataclass(frozen=True)
class TensorType:
    """One ggml storage type: `size` bytes hold `block` elements; `decode` maps uint8 [bytes] to float32 values."""

    name: str
    block: int
    size: int
    decode: Callable[[np.ndarray], np.ndarray]


TYPES: dict[int, TensorType] = {
    0: TensorType("F32", 1, 4, _f32),
    1: TensorType("F16", 1, 2, _f16),
    2: TensorType("Q4_0", 32, 18, _q4_0),
    3: TensorType("Q4_1", 32, 20, _q4_1),
    8: TensorType("Q8_0", 32, 34, _q8_0),
    30: TensorType("BF16", 1, 2, _bf16),
}
UNSUPPORTED = {  # so that the error can name what the file holds
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: shape outermost first, ggml type id, first byte in the file, number of bytes."""

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """An opened file: its path as given, all metadata, and where each tensor lies."""

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


class _Cursor:
    """Reads values off the front of a buffer; every step is checked against its end."""

    def __init__(self, path: str, data: memoryview):
        self.path, self.data, self.at = path, data, 0

    def skip(self, size: int) -> int:
        """The offset of the next `size` bytes, which are consumed."""
        start = self.at
        if size > len(self.data) - start:
            raise _broken(self.path, f"it ends inside its header, at byte {len(self.data)}")
        self.at = start + size
        return start

    def take(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        size = self.take("Q")
        start = self.skip(size)
        try:
            return str(self.data[start : start + size], "utf-8")
        except UnicodeDecodeError as error:
            raise _broken(self.path, f"the string at byte {start} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner, count = self.take("I"), self.take("Q")
            if inner == STRING:
                return [self.text() for _ in range(count)]
            code = self.code(inner)
            return list(
                struct.unpack_from(f"<{count}{code}", self.data, self.skip(count * struct.calcsize("<" + code)))
            )
        return self.take(self.code(kind))

    def code(self, kind: int) -> str:
        if kind not in SCALARS:
            raise _broken(self.path, f"metadata type {kind} near byte {self.at} is unknown")
        return SCALARS[kind]


def _broken(path: str, why: str) -> ValueError:
    return ValueError(f"{path} must be a complete GGUF file, got a damaged one; {why}. Fetch or convert it again.")


def open_gguf(path: str | Path) -> GgufFile:
    """Metadata and the tensor table; no tensor data is read.

    Raises ValueError naming the file if it is no GGUF file, is truncated or damaged, or holds an unsupported type.
    """
    name = str(path)
    size = Path(path).stat().st_size
    data = memoryview(np.memmap(path, np.uint8, "r").data) if size else memoryview(b"")
    if bytes(data[:4]) != MAGIC:
        raise ValueError(f"{name} must be a GGUF file, got one that starts with {bytes(data[:4])!r}. Set another path.")
    cursor = _Cursor(name, data)
    cursor.skip(4)
    version = cursor.take("I")
    if version not in VERSIONS:
        raise ValueError(
            f"{name} must be a little-endian GGUF file of version 2 or 3, got version {version}. Convert it again."
        )
    tensor_count, metadata_count = cursor.take("Q"), cursor.take("Q")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.take("I"))
    table = []
    for _ in range(tensor_count):
        tensor, dims = cursor.text(), cursor.take("I")
        if dims > MAX_DIMS:
            raise _broken(name, f"tensor {tensor!r} has {dims} dimensions")
        shape = tuple(cursor.take("Q") for _ in range(dims))[::-1]
        table.append((tensor, shape, cursor.take("I"), cursor.take("Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise _broken(name, f"general.alignment is {alignment!r}")
    base = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for tensor, shape, kind, offset in table:
        if tensor in tensors:
            raise _broken(name, f"tensor {tensor!r} appears twice")
        tensors[tensor] = _locate(name, tensor, shape, kind, base + offset, size)
    return GgufFile(name, metadata, tensors)


def _locate(path: str, tensor: str, shape: tuple[int, ...], kind: int, start: int, end: int) -> TensorInfo:
    if kind not in TYPES:
        known = ", ".join(entry.name for entry in TYPES.values())
        held = UNSUPPORTED.get(kind, f"type {kind}")
        raise ValueError(
            f"{path} must hold tensors of the types {known}, got {held} for {tensor!r}; "
            "other quantisations are unsupported. Convert the model to Q8_0 or F16 and set its path."
        )
    entry = TYPES[kind]
    if not shape or shape[-1] % entry.block:
        raise _broken(path, f"{tensor!r} of shape {shape} is not made of {entry.name} blocks of {entry.block}")
    size = math.prod(shape) // entry.block * entry.size
    if start + size > end:
        raise _broken(path, f"the data of {tensor!r} ends at byte {start + size}, the file at {end}")
    return TensorInfo(shape, kind, start, size)


def read_tensor(file: GgufFile, name: str) -> np.ndarray:
    """One tensor as float32, sizes outermost first. Quantised types give the exact float32 value of each element."""
    info = file.tensors[name]
    raw = (
        np.memmap(file.path, np.uint8, "r", offset=info.start, shape=(info.size,))
        if info.size
        else np.zeros(0, np.uint8)
    )
    return TYPES[info.kind].decode(np.asarray(raw)).reshape(info.shape)


# The model in Hugging Face's terms, so that one key map and one config reader per family serve both formats.

GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {  # of blk.N.<name>.weight or .bias -> model.layers.N.<name>
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3 RoPE scaling as one factor per frequency; becomes part of the config
# architecture -> (model_type, whether rows of q and k are stored for interleaved RoPE)
ARCHITECTURES = {"llama": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}
CONFIG_KEYS = {  # <architecture>.<key> -> key of config.json; all are required
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}
FRACTIONAL = ("attention.layer_norm_rms_epsilon", "rope.freq_base")


def hf_config(file: GgufFile) -> dict[str, Any]:
    """The content of a Hugging Face config.json for the model in the file.

    Raises ValueError naming the file if the architecture is not supported or the metadata is incomplete.
    """
    meta = file.metadata
    architecture = meta.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{file.path} must be of architecture {', '.join(ARCHITECTURES)}, got {architecture!r}; "
            "no other one is mapped. Set another path, or a Hugging Face directory of this model."
        )
    missing = [f"{architecture}.{key}" for key in CONFIG_KEYS if f"{architecture}.{key}" not in meta]
    missing += [name for name in ("token_embd.weight",) if name not in file.tensors]
    if missing:
        raise _broken(file.path, f"it has no {', '.join(missing)}")

    def get(key: str, default: Any = None) -> Any:
        value = _short(meta.get(f"{architecture}.{key}", default))
        if type(value) not in ((int, float) if key in FRACTIONAL else (int,)) or value <= 0:
            raise _broken(file.path, f"{architecture}.{key} is {value!r}")
        return value

    config = {name: get(key) for key, name in CONFIG_KEYS.items()}
    heads = config["num_attention_heads"]
    head_dim = get("attention.key_length", config["hidden_size"] // heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        if get(key, head_dim) != head_dim:
            raise ValueError(
                f"{file.path} must have {architecture}.{key} equal to the head size {head_dim}, got {get(key)}; "
                "partial RoPE and values of another size are unsupported. Set another path."
            )
    theta = get("rope.freq_base", 10000.0)
    config |= {
        "model_type": ARCHITECTURES[architecture][0],
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "hidden_act": "silu",
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, architecture, theta, head_dim),
    }
    ids = {name: meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot")}
    ends = [ids[name] for name in ("eos", "eot") if ids[name] is not None]
    config["bos_token_id"] = ids["bos"]
    config["eos_token_id"] = list(dict.fromkeys(ends)) or None
    config["pad_token_id"] = meta.get("tokenizer.ggml.padding_token_id")
    return config


def _short(value: Any) -> Any:
    """The shortest decimal of a float32, so that 1e-5 is not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope_scaling(file: GgufFile, architecture: str, theta: float, head_dim: int) -> dict[str, Any] | None:
    if ROPE_FACTORS in file.tensors:
        stored = read_tensor(file, ROPE_FACTORS).reshape(-1)
        # The file keeps the factors, not what they were made from; all published Llama 3 models share the last three.
        scaling = {
            "rope_type": "llama3",
            "factor": float(stored.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
        scaling["original_max_position_embeddings"] = 8192
        if stored.shape != (head_dim // 2,) or not np.allclose(
            stored, _llama3_factors(theta, head_dim, scaling), rtol=1e-4
        ):
            raise ValueError(
                f"{file.path} must have RoPE factors of the Llama 3 form in {ROPE_FACTORS!r}, got others; the config "
                "cannot express them. Set a Hugging Face directory of this model."
            )
        return scaling
    kind = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if kind == "none":
        return None
    return {"rope_type": kind, "factor": _short(file.metadata.get(f"{architecture}.rope.scaling.factor", 1.0))}


def _llama3_factors(theta: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray:
    """Per frequency, what Llama 3 divides it by: 1 below a wavelength, `factor` above another, smooth between."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((scaling["original_max_position_embeddings"] / wavelength - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def hf_name(gguf_name: str) -> str | None:
    """The Hugging Face name of a tensor; None if it is not in the tables."""
    if gguf_name in GLOBAL_NAMES:
        return GLOBAL_NAMES[gguf_name]
    parts = gguf_name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[1].isdigit() and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    return None


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * H, ...] of q or k from the interleaved RoPE order to the half-split one."""
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def read_model_tensor(file: GgufFile, name: str) -> np.ndarray:
    """One tensor as a Hugging Face checkpoint holds it: float32, the rows of q and k in half-split RoPE order."""
    tensor, architecture = read_tensor(file, name), file.metadata["general.architecture"]
    part = name.split(".")[2] if name.startswith("blk.") else ""
    if not ARCHITECTURES[architecture][1] or part not in ("attn_q", "attn_k"):
        return tensor
    heads = file.metadata[f"{architecture}.attention.head_count"]
    return unpermute(
        tensor, heads if part == "attn_q" else file.metadata.get(f"{architecture}.attention.head_count_kv", heads)
    )


def describe(file: GgufFile) -> str:
    """How the weights were stored, in words: the type of most bytes, "dequantised from" it if it is quantised."""
    total: dict[int, int] = {}
    for info in file.tensors.values():
        total[info.kind] = total.get(info.kind, 0) + info.size
    most = TYPES[max(total, key=lambda kind: total[kind])]
    return f"dequantised from {most.name}" if most.block > 1 else f"GGUF in {most.name}"
