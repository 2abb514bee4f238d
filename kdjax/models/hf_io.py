"""Weights in and out as Hugging Face directories: config.json and safetensors, one file or sharded. No torch.

Tensors go one by one from the file into the stacked leaf they belong to, in the wanted dtype, and each leaf goes to its
devices before the next is begun: besides what the devices hold, the host holds a few leaves, never the whole model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import models
from kdjax.models import prune
from kdjax.models.params import ModelConfig, TensorKey, from_file, to_file
from kdjax.sharding import Rules
from kdjax.types import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors dtypes that are weights -> numpy's name
IGNORED = ("rotary_emb.inv_freq",)  # buffers that old files carry; they follow from the config
# In a model of text and images (of transformers 4 or 5): what its decoder is called, and what is not read.
TEXT = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.lm_head.": "lm_head."}
IMAGES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id")  # of config.json, repeated in generation_config.json
SHARD_BYTES = 4 * 2**30


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: where it is (for messages), shapes by Hugging Face name, a reader, the dtypes it stores."""

    where: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    stored: tuple[str, ...] = ()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError naming the file if there is none."""
    if not path.is_file():
        raise ValueError(
            f"{path.parent} must hold {path.name}, got no such file; it is not a Hugging Face model. Set another path."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got a damaged file; {error}. Fetch it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}. Fetch it again.")
    return content


def make_config(content: dict[str, Any], where: str) -> ModelConfig:
    """The ModelConfig of a config.json; ValueError names the file besides the field."""
    try:
        return models.config_from_hf(content)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{where} must be a complete config, got one that cannot be read; {error!r}.") from error


def read_config(directory: str | Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory."""
    path = Path(directory) / CONFIG
    return make_config(read_json(path), str(path))


def weight_files(directory: str | Path) -> list[Path]:
    """The safetensors files of a directory, by name. Raises ValueError if there are none or a listed one is missing."""
    root = Path(directory)
    if (root / WEIGHTS).is_file():
        return [root / WEIGHTS]
    if not (root / INDEX).is_file():
        raise ValueError(
            f"{root} must hold {WEIGHTS} or {INDEX}, got neither; only safetensors are read. "
            "Save the model with transformers' save_pretrained first."
        )
    files = sorted({root / name for name in read_json(root / INDEX).get("weight_map", {}).values()})
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        raise ValueError(
            f"{root / INDEX} must list files that are there, got {missing or 'an empty list'}. Fetch them again."
        )
    return files


@contextlib.contextmanager
def open_checkpoint(directory: str | Path) -> Iterator[Checkpoint]:
    """The safetensors of a directory. Raises ValueError naming the file that is damaged or holds a foreign dtype."""
    from safetensors import SafetensorError, safe_open

    home: dict[str, tuple[Any, str]] = {}  # name -> the file that holds it, its name there
    shapes: dict[str, tuple[int, ...]] = {}
    stored = set()
    with contextlib.ExitStack() as stack:
        for path in weight_files(directory):
            try:
                handle = stack.enter_context(safe_open(path, framework="numpy"))
            except SafetensorError as error:
                raise ValueError(
                    f"{path} must be a complete safetensors file, got a damaged one; {error}. Fetch it again."
                ) from error
            names = handle.keys()
            for stored_name in names:
                name, view = _text_name(stored_name), handle.get_slice(stored_name)
                if name in home:
                    raise ValueError(f"{path} must not repeat tensor {name!r}; another file of {directory} holds it.")
                if name.endswith(IGNORED) or name.startswith(IMAGES):
                    continue
                if view.get_dtype() not in STORED:
                    raise ValueError(
                        f"{path} must hold tensors of the types {', '.join(STORED)}, got {view.get_dtype()} for "
                        f"{name!r}; other types are unsupported. Save the model as bfloat16 first."
                    )
                home[name], shapes[name] = (handle, stored_name), tuple(view.get_shape())
                stored.add(view.get_dtype())
        dtypes = tuple(STORED[kind] for kind in STORED if kind in stored)
        yield Checkpoint(str(directory), shapes, lambda name: home[name][0].get_tensor(home[name][1]), dtypes)


def _text_name(name: str) -> str:
    """The name of a tensor in a checkpoint of text alone."""
    return next((new + name.removeprefix(old) for old, new in TEXT.items() if name.startswith(old)), name)


def _check_names(keys: Mapping[str, TensorKey], found: Checkpoint, tied: bool) -> None:
    """The tensors of the file are exactly those of the key map, in name and shape; else ValueError naming one."""
    present = set(found.shapes)
    if tied and HEAD in present:
        if found.shapes.get(HEAD) != found.shapes.get(EMBED) or not np.array_equal(found.read(HEAD), found.read(EMBED)):
            raise ValueError(
                f"{found.where} must hold {HEAD!r} equal to {EMBED!r}, got another tensor; the config says that they "
                "are tied. Set tie_word_embeddings to false in config.json if they are not."
            )
        present.remove(HEAD)

    def refuse(names: list[str], what: str) -> None:
        if names:
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"{found.where} must hold the tensors of its config, got {what} {names[0]!r}{rest}. "
                "Set a path whose config.json and weights belong together."
            )

    refuse(sorted(present - set(keys)), "an unknown tensor,")
    refuse([name for name in keys if name not in present], "no tensor")
    for name, key in keys.items():
        if found.shapes[name] != key.file_shape:
            raise ValueError(
                f"{found.where} must hold {name!r} of shape {key.file_shape}, got {found.shapes[name]}. "
                "Set a path whose config.json and weights belong together."
            )


def assemble(
    cfg: ModelConfig,
    found: Checkpoint,
    dtype: Any = jnp.float32,
    rules: Rules = Rules(),
    keep: Sequence[int] | None = None,
) -> Params:
    """The parameter tree of a checkpoint in `dtype`, stored as `rules` says; ValueError names a wrong tensor.

    cfg: of the checkpoint. With `keep` the tree of `prune.cut_config(cfg, keep)`; other layers are not read.
    """
    keep = range(cfg.layers) if keep is None else keep
    specs = models.param_specs(prune.cut_config(cfg, keep))
    keys = models.key_map(cfg)
    _check_names(keys, found, cfg.tied)
    places = {layer: at for at, layer in enumerate(keep)}
    parts: dict[tuple[str, ...], list[tuple[str, TensorKey]]] = {}
    for name, key in keys.items():
        if key.layer is None or key.layer in places:
            parts.setdefault(key.path, []).append((name, key))
    wanted = jnp.dtype(dtype)

    def load(path: Any, spec: models.ParamSpec) -> jax.Array:
        host = np.empty(spec.shape, wanted)
        for name, key in parts[tuple(entry.key for entry in path)]:
            host[... if key.layer is None else places[key.layer]] = from_file(key, found.read(name))
        sharding = rules.storage(spec.axes, spec.shape)
        if sharding is None:
            leaf = jax.device_put(host)
        else:
            leaf = jax.make_array_from_callback(spec.shape, sharding, lambda index: host[index])
        return jax.block_until_ready(leaf)  # else the copies on their way pile up on the host

    return jax.tree_util.tree_map_with_path(load, specs)


def read_hf(directory: str | Path, dtype: Any = jnp.float32, rules: Rules = Rules()) -> tuple[ModelConfig, Params]:
    """Config and parameters of a Hugging Face directory (config.json with safetensors in bf16, f16 or f32).

    Raises ValueError naming the file or the tensor that is missing, unknown, misshaped or damaged.
    """
    cfg = read_config(directory)
    with open_checkpoint(directory) as found:
        return cfg, assemble(cfg, found, dtype, rules)


def save_hf(
    out: str | Path,
    cfg: ModelConfig,
    params: Params,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a directory that transformers' AutoModelForCausalLM and AutoTokenizer load; sharded above `shard_bytes`.

    It is made beside `out` and renamed when whole, so a kill leaves no half-made `out`. Raises ValueError if `out`
    exists and is not an empty directory, or if `params` is not the tree of `cfg`.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"out must be a new or empty directory, got {str(out)!r}, which has content. Set another or remove it."
        )
    if dtype not in STORED.values():
        raise ValueError(f"dtype must be one of {', '.join(STORED.values())}, got {dtype!r}; transformers reads these.")
    _check_tree(cfg, params)
    partial = out.absolute().parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    try:
        config = models.config_to_hf(cfg) | {"torch_dtype": dtype}
        _write_json(partial / CONFIG, config)
        ids = {name: config[name] for name in GENERATION if config.get(name) is not None}
        _write_json(partial / "generation_config.json", ids)
        _write_weights(partial, cfg, params, np.dtype(jnp.dtype(dtype)), shard_bytes)
        if tokenizer is not None:
            _write_tokenizer(partial, tokenizer)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _check_tree(cfg: ModelConfig, params: Params) -> None:
    want = jax.tree_util.tree_flatten_with_path(models.param_specs(cfg))[0]
    shapes = {
        jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    expected = {jax.tree_util.keystr(path): spec.shape for path, spec in want}
    for path in sorted(set(expected) | set(shapes)):
        if expected.get(path) != shapes.get(path):
            raise ValueError(
                f"params{path} must have shape {expected.get(path)}, got {shapes.get(path)} (None = no such leaf); "
                "cfg is of another model. Pass the cfg that the parameters were made with."
            )


def _shards(cfg: ModelConfig, itemsize: int, limit: int) -> list[list[tuple[str, TensorKey]]]:
    """The tensors in file order, cut so that no shard exceeds `limit` bytes unless one tensor does."""
    shards: list[list[tuple[str, TensorKey]]] = [[]]
    filled = 0
    for name, key in models.key_map(cfg).items():
        size = int(np.prod(key.file_shape)) * itemsize
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append((name, key))
        filled += size
    return shards


def _write_weights(directory: Path, cfg: ModelConfig, params: Params, dtype: np.dtype, limit: int) -> None:
    from safetensors.numpy import save_file

    shards = _shards(cfg, dtype.itemsize, limit)
    files = (
        [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        if len(shards) > 1
        else [WEIGHTS]
    )
    held: tuple[tuple[str, ...], np.ndarray] = ((), np.zeros(0))  # one leaf on the host; tensors come leaf by leaf
    weight_map, total = {}, 0
    for file, shard in zip(files, shards, strict=True):
        tensors = {}
        for name, key in shard:
            if held[0] != key.path:
                leaf = params
                for part in key.path:
                    leaf = leaf[part]
                held = (key.path, np.asarray(jax.device_get(leaf)))
            value = held[1] if key.layer is None else held[1][key.layer]
            tensors[name] = to_file(key, value.astype(dtype, copy=False))
            weight_map[name], total = file, total + tensors[name].nbytes
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_tokenizer(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = read_json(path)
    if settings.get("tokenizer_class") == "TokenizersBackend":  # transformers 4 knows this class by its old name only
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(path, settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
