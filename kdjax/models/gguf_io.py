"""Reading GGUF files: metadata and tensors, with numpy alone.

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
            raise broken(self.path, f"it ends inside its header, at byte {len(self.data)}")
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
            raise broken(self.path, f"the string at byte {start} is not UTF-8") from error

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
            raise broken(self.path, f"metadata type {kind} near byte {self.at} is unknown")
        return SCALARS[kind]


def broken(path: str, why: str) -> ValueError:
    """The error of a damaged file."""
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
            raise broken(name, f"tensor {tensor!r} has {dims} dimensions")
        shape = tuple(cursor.take("Q") for _ in range(dims))[::-1]
        table.append((tensor, shape, cursor.take("I"), cursor.take("Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise broken(name, f"general.alignment is {alignment!r}")
    base = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for tensor, shape, kind, offset in table:
        if tensor in tensors:
            raise broken(name, f"tensor {tensor!r} appears twice")
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
        raise broken(path, f"{tensor!r} of shape {shape} is not made of {entry.name} blocks of {entry.block}")
    size = math.prod(shape) // entry.block * entry.size
    if start + size > end:
        raise broken(path, f"the data of {tensor!r} ends at byte {start + size}, the file at {end}")
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


def describe(file: GgufFile) -> str:
    """How the weights were stored, in words: the type of most bytes, "dequantised from" it if it is quantised."""
    total: dict[int, int] = {}
    for info in file.tensors.values():
        total[info.kind] = total.get(info.kind, 0) + info.size
    most = TYPES[max(total, key=lambda kind: total[kind])]
    return f"dequantised from {most.name}" if most.block > 1 else f"GGUF in {most.name}"
