"""Load a model by its path: a Hugging Face directory or hub id, a GGUF file, `smollm2-135m` or `synthetic`."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.models import fetch, flax_models, gguf_io, gguf_model, hf_io, prune, synthetic
from kdjax.models.params import ModelConfig
from kdjax.sharding import Rules
from kdjax.types import Params


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    name: short, for tables. source: what it is, in words. tokenizer_path: for tokenizer.load_tokenizer.
    fingerprint: sha256 hex over all bytes of config and weights as stored; the dtype in memory does not matter, nor
    which layers were kept.
    """

    cfg: ModelConfig
    params: Params
    name: str
    source: str
    tokenizer_path: str
    fingerprint: str


def load_model(
    path: str | Path,
    *,
    dtype: Any = jnp.float32,
    rules: Rules = Rules(),
    where: str = "teacher.path",
    keep: Sequence[int] | None = None,
) -> LoadedModel:
    """Config and weights in `dtype`, stored as `rules` says. `where` is the config path that leads the error messages.

    With `keep` the student that `prune.cut` would cut from the model, bit for bit, of which the other layers are never
    read. Raises ValueError for a path that leads nowhere, for a file or tensor that is damaged, missing or unsupported,
    and for a `keep` that `prune.cut` refuses.
    """
    found = fetch.locate(path, where=where)
    if found.kind == "flax":
        flax_models.refuse_init("own" if keep is None else "cut", found.name)
        cfg, params, digest = flax_models.load(found.name, dtype, rules, where)
        return LoadedModel(cfg, params, found.name, f"the Flax model {found.name}", str(path), digest)
    if found.kind == "synthetic":
        cfg, source, params = synthetic.config(), synthetic.SOURCE, synthetic.make_params(rules)
        params = params if keep is None else prune.cut(cfg, params, keep)[1]
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    else:
        with open_model(found) as (cfg, checkpoint, source):
            params = hf_io.assemble(cfg, checkpoint, dtype, rules, keep)
    cfg = cfg if keep is None else prune.cut_config(cfg, keep)
    return LoadedModel(cfg, params, found.name, source, str(path), _fingerprint(found))


def fingerprint(path: str | Path, *, where: str = "teacher.path") -> str:
    """The `LoadedModel.fingerprint` of a path: its files are hashed, no weights are loaded.

    Raises ValueError for a path that leads nowhere.
    """
    return _fingerprint(fetch.locate(path, where=where))


def load_config(path: str | Path, *, where: str = "teacher.path") -> ModelConfig:
    """The ModelConfig alone; no weights are read, nor downloaded from the hub."""
    found = fetch.locate(path, weights=False, where=where)
    if found.kind == "flax":
        return flax_models.open_model(found.name, where).cfg
    if found.kind == "synthetic":
        return synthetic.config()
    if found.kind == "gguf":
        return _gguf_config(gguf_io.open_gguf(found.path))
    return hf_io.read_config(found.path)


@contextlib.contextmanager
def open_model(found: fetch.Located) -> Iterator[tuple[ModelConfig, hf_io.Checkpoint, str]]:
    """Config, open checkpoint and source in words of a located directory or GGUF file."""
    if found.kind == "gguf":
        file = gguf_io.open_gguf(found.path)
        yield _gguf_config(file), gguf_checkpoint(file), f"{_stem(found.path)}, {gguf_io.describe(file)}"
        return
    cfg = hf_io.read_config(found.path)
    with hf_io.open_checkpoint(found.path) as checkpoint:
        yield cfg, checkpoint, f"{found.name}, Hugging Face checkpoint in {' and '.join(checkpoint.stored)}"


def _gguf_config(file: gguf_io.GgufFile) -> ModelConfig:
    return hf_io.make_config(gguf_model.hf_config(file), file.path)


def gguf_checkpoint(file: gguf_io.GgufFile) -> hf_io.Checkpoint:
    """The tensors of a GGUF file under their Hugging Face names; unknown ones keep theirs, to be refused by it."""
    kind = file.metadata["general.architecture"]
    tensors = [name for name in file.tensors if name != gguf_model.ROPE_FACTORS]
    names = {gguf_model.hf_name(name, kind) or name: name for name in tensors}
    shapes = {name: file.tensors[original].shape for name, original in names.items()}
    return hf_io.Checkpoint(file.path, shapes, lambda name: gguf_model.read_model_tensor(file, names[name]))


def _stem(path: Path) -> str:
    """The file name without .gguf and without the type it ends in."""
    stem, _, last = path.stem.rpartition(".")
    return stem if stem and last.upper() in {entry.name for entry in gguf_io.TYPES.values()} else path.stem


def _fingerprint(found: fetch.Located) -> str:
    if found.kind == "flax":
        return flax_models.fingerprint_of(found.name)
    if found.kind == "synthetic":
        return _synthetic_fingerprint()
    if found.kind == "gguf":
        return fetch.sha256(found.path)
    files = [found.path / hf_io.CONFIG, *hf_io.weight_files(found.path)]
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        digests = list(pool.map(fetch.sha256, files))
    return hashlib.sha256(
        "\n".join(f"{path.name} {digest}" for path, digest in zip(files, digests, strict=True)).encode()
    ).hexdigest()


def _synthetic_fingerprint() -> str:
    digest = hashlib.sha256(repr(synthetic.config()).encode())
    for leaf in jax.tree.leaves(synthetic.make_params()):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
