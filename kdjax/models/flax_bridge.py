"""Any Flax language model, NNX or linen, as teacher or student: `teacher.path = "flax:my_module:teacher"`.

my_module.py, where Python finds it (the current directory; a notebook is `__main__`):

    from kdjax.models import flax_bridge

    def teacher():
        def hidden(module, batch):          # `module` is a copy that may be changed
            module.lm_head = lambda x: x    # so that the call returns what goes into the head
            return module(batch.tokens, batch.positions, flax_bridge.attention_mask(batch))

        return flax_bridge.from_nnx(
            SomeModel(...), hidden=hidden, head=lambda module: module.lm_head.kernel,
            vocab_size=49152, max_positions=8192, tokenizer="smollm2-135m",
        )

kdjax needs hidden states and the head's weight apart, because it never makes logits [B, T, V]. A module that returns
only logits is cut as above, or by calling its parts one after the other; in linen with `nn.intercept_methods`, or
`method=`. An identity as head, [V, V], is refused: 9.7 GB for V = 49152, and the logits besides. `check_logits` says
whether hidden states times head are the module's own logits.

Parameters (nnx.Param, or linen's "params") become a tree of arrays: the head's weight is "embed" [V, D] or "head"
[D, V], the rest is under "flax". As for kdjax's own models, a student's are float32 masters, given to the module in
the compute dtype; optimiser and checkpoints work on the tree. All other state (random streams, statistics, caches,
tables) is constant, and NNX modules are in `eval` mode.

At rest a parameter is split as its partitioning metadata say (see AXES), else the two largest axes may be: the first of
them that the devices divide is. Its use is local: each device runs the module on its own rows, on plain arrays, with
whole parameters. So with fsdp all of them, in the compute dtype, are on each device for a while; where that does not
fit, or tensor parallelism is wanted, a family of kdjax is the way. The module recomputes what it says (nnx.remat).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.models.params import ModelConfig, Normal, ParamSpec
from kdjax.types import Array, Batch, Params

PREFIX = "flax:"
FROZEN_LIMIT = 64 * 2**20  # bytes of constant state: it is part of the compiled program
# Names in partitioning metadata, of logical or mesh axes -> the logical axis of kdjax that is split alike
AXES = {name: name for name in ("embed", "vocab", "mlp", "heads")} | {
    "fsdp": "embed",
    "data": "embed",
    "hidden": "mlp",
    "tp": "mlp",
    "tensor": "mlp",
    "model": "mlp",
    "q_heads": "heads",
}
UNDRAWN = Normal(0.0, 0.0)  # the module's own initialisers draw


@dataclasses.dataclass(frozen=True, eq=False)
class FlaxModel:
    """An external model; made by `from_nnx` or `from_linen`.

    params: its weights as they came. specs: their shapes and logical axes. hidden(params, batch) -> [B, T, D], on plain
    arrays. reads_segments: whether it can keep documents apart that share a row. tokenizer: where its tokenizer is, as
    data.tokenizer; "" = nowhere. constants: digest of all else that decides what it computes, as far as that is data.
    """

    cfg: ModelConfig
    params: Params
    specs: Any
    hidden: Callable[[Params, Batch], Array]
    reads_segments: bool
    tokenizer: str
    constants: str


@dataclasses.dataclass(frozen=True, eq=False)
class _Source:
    """A module taken apart.

    entries: (path, leaf) of each parameter; names: what its metadata call the axes, by path. rebuild(leaves) -> the
    module with these parameters. constants: digest of all other state.
    """

    entries: Sequence[tuple[Any, Any]]
    names: Mapping[str, Any]
    rebuild: Callable[[Sequence[Any]], Any]
    constants: str


def attention_mask(batch: Batch) -> Array:
    """bool [B, T, T], True where query t (second axis) may see key s: s <= t in the same segment.

    Padding sees padding, so every row has a key. Models that want [B, 1, T, T]: `attention_mask(batch)[:, None]`.
    """
    segments = batch.segment_ids
    at = jnp.arange(segments.shape[1])
    return (segments[:, :, None] == segments[:, None, :]) & (at[:, None] >= at[None, :])[None]


def from_nnx(
    module: Any,
    *,
    hidden: Callable[[Any, Batch], Array],
    head: Callable[[Any], Any],
    vocab_size: int,
    max_positions: int,
    tokenizer: str = "",
    axes: Mapping[str, str | None] | None = None,
    version: str = "",
    **fields: Any,
) -> FlaxModel:
    """A model from a `flax.nnx.Module`.

    hidden(module, batch) -> [B, T, D] after the final norm; head(module) -> the parameter that follows, [V, D] or
    [D, V], without bias. Both get a copy of the module. vocab_size: rows of the head that are tokens; the rest is
    padding. max_positions: tokens that it was made for. axes: more names for AXES; None = never split. version: any
    text; part of the identity of a cache of this teacher, to change when code changed and weights did not. fields:
    further ones of ModelConfig, such as eos_ids or, for reports, layers. Raises ValueError for what cannot work.
    """
    from flax import nnx

    if not isinstance(module, nnx.Module):
        raise ValueError(
            f"module must be a flax.nnx.Module, got {type(module).__name__}. Use from_linen for variables of linen."
        )
    parts: tuple[Any, ...] = nnx.split(module, nnx.Param, ...)
    graph, trained, rest = parts
    names = {
        path_name(path): variable.get_metadata("out_sharding", None) for path, variable in nnx.to_flat_state(trained)
    }
    thaw, digest = _freeze(rest)
    entries, tree = jax.tree_util.tree_flatten_with_path(trained)

    def rebuild(leaves: Sequence[Any]) -> Any:
        copy = nnx.merge(graph, jax.tree.unflatten(tree, leaves), thaw())
        copy.eval()
        return copy

    source = _Source(entries, names, rebuild, f"{version} {digest}")
    config = {"vocab_size": vocab_size, "max_positions": max_positions, **fields}
    return _bridge(source, hidden, head, axes or {}, tokenizer, config)


def from_linen(
    variables: Mapping[str, Any],
    *,
    hidden: Callable[[Any, Batch], Array],
    head: Callable[[Any], Any],
    vocab_size: int,
    max_positions: int,
    tokenizer: str = "",
    axes: Mapping[str, str | None] | None = None,
    version: str = "",
    **fields: Any,
) -> FlaxModel:
    """A model from the variables of a linen module, {"params": ..., other collections}, boxed or not.

    hidden(variables, batch), for example `lambda v, b: module.apply(v, b.tokens, b.positions, method="trunk")`;
    head(variables), for example `lambda v: v["params"]["embed"]["embedding"]`. The rest as in `from_nnx`.
    """
    from flax.core import meta

    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError(
            "variables must hold 'params', as module.init returns them, got "
            f"{sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__}. "
            "Pass {'params': params}."
        )
    boxes = jax.tree_util.tree_flatten_with_path(
        variables["params"], is_leaf=lambda x: isinstance(x, meta.AxisMetadata)
    )
    names = {path_name(path): getattr(box, "names", None) for path, box in boxes[0]}
    unboxed = meta.unbox(dict(variables))
    thaw, digest = _freeze({name: state for name, state in unboxed.items() if name != "params"})
    entries, tree = jax.tree_util.tree_flatten_with_path(unboxed["params"])

    def rebuild(leaves: Sequence[Any]) -> Any:
        return {"params": jax.tree.unflatten(tree, leaves)} | thaw()

    source = _Source(entries, names, rebuild, f"{version} {digest}")
    config = {"vocab_size": vocab_size, "max_positions": max_positions, **fields}
    return _bridge(source, hidden, head, axes or {}, tokenizer, config)


def check_logits(
    model: FlaxModel, logits: Callable[[Batch], Any], *, rows: int = 2, length: int = 32, seed: int = 0
) -> float:
    """The largest |difference| of hidden states times head from the module's own `logits(batch)` [B, T, V].

    On random tokens, two segments a row. In float32 of order 1e-4 for logits of order 10; more is a cut at the wrong
    place: before the final norm, a bias or a scale of the head, positions or mask that went to the wrong argument.
    """
    tokens = jax.random.randint(jax.random.key(seed), (rows, length), 0, model.cfg.vocab_size, jnp.int32)
    at = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], tokens.shape)
    second = at >= length // 3
    batch = batch_of(tokens, 1 + second.astype(jnp.int32), jnp.where(second, at - length // 3, at))
    weight = model.params["embed"].T if model.cfg.tied else model.params["head"]
    found = jnp.matmul(jax.jit(model.hidden)(model.params, batch), weight, precision="highest")
    return float(jnp.max(jnp.abs(found - logits(batch))[..., : model.cfg.vocab_size]))


def batch_of(tokens: Any, segment_ids: Any, positions: Any) -> Batch:
    """A batch of text alone, for `hidden`."""
    rows = jnp.zeros(tokens.shape[0], jnp.int32)
    return Batch(tokens, segment_ids, positions, segment_ids > 0, rows, rows, jnp.ones(rows.shape, jnp.float32))


def path_name(path: Sequence[Any]) -> str:
    """Keys joined by "/"; without the attribute in which an NNX variable holds its array."""
    keys = [str(next((getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a)), key)) for key in path]
    last = path[-1] if path else None
    return "/".join(keys[:-1] if isinstance(last, jax.tree_util.GetAttrKey) and last.name == "value" else keys)


def _freeze(state: Any) -> tuple[Callable[[], Any], str]:
    """(a function that gives `state` as constants of the program being traced, a digest of it)."""
    entries, tree = jax.tree_util.tree_flatten_with_path(state)
    digest = hashlib.sha256()
    held: list[tuple[np.ndarray, Any]] = []  # on the host; of typed keys the data and the implementation
    for path, leaf in entries:
        typed = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        if isinstance(leaf, jax.ShapeDtypeStruct):  # of a module without weights, which can be traced and not run
            leaf = jax.random.key(0) if typed else np.zeros(leaf.shape, leaf.dtype)
        data = np.asarray(jax.random.key_data(leaf) if typed else leaf)
        digest.update(f"{path_name(path)} {data.shape} {data.dtype}".encode() + data.tobytes())
        held.append((data, jax.random.key_impl(leaf) if typed else None))
    size = sum(data.nbytes for data, _ in held)
    if size > FROZEN_LIMIT:
        raise ValueError(
            f"the module's state besides its parameters must be at most {FROZEN_LIMIT / 2**20:g} MiB, got "
            f"{size / 2**20:.2g} MiB; it becomes constants of the program. Make the module without caches, and what is "
            "trained a parameter."
        )

    def thaw() -> Any:
        made = [
            jnp.asarray(data) if kind is None else jax.random.wrap_key_data(jnp.asarray(data), impl=kind)
            for data, kind in held
        ]
        return jax.tree.unflatten(tree, made)

    return thaw, digest.hexdigest()


def _bridge(
    source: _Source,
    hidden: Callable[[Any, Batch], Array],
    head: Callable[[Any], Any],
    axes: Mapping[str, str | None],
    tokenizer: str,
    config: Mapping[str, Any],
) -> FlaxModel:
    leaves = [leaf for _, leaf in source.entries]
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    of_head = _head_index(lambda leaves: head(source.rebuild(leaves)), shapes)
    width, reads_segments = _trace_hidden(lambda leaves, batch: hidden(source.rebuild(leaves), batch), shapes)
    tied = _is_vocab_major(leaves[of_head].shape, width, config["vocab_size"])
    paths, specs = [], []
    for index, (path, leaf) in enumerate(source.entries):
        name = path_name(path)
        at, logical = ("flax", *name.split("/")), _axes(leaf.shape, source.names.get(name), AXES | dict(axes))
        if index == of_head:
            at, logical = (("embed",), ("vocab", "embed")) if tied else (("head",), ("embed", "vocab"))
        paths.append(at)
        specs.append(ParamSpec(tuple(leaf.shape), logical, UNDRAWN))

    def run(params: Params, batch: Batch) -> Array:
        return hidden(source.rebuild([_get(params, path) for path in paths]), batch)

    given: dict[str, Any] = {"family": PREFIX, "width": width, "tied": tied, **config}
    for size in ("layers", "heads", "kv_heads", "head_dim", "mlp"):
        given.setdefault(size, 0)  # not known, and only reports ask
    cfg = ModelConfig(**given)
    return FlaxModel(
        cfg, _nested(paths, leaves), _nested(paths, specs), run, reads_segments, tokenizer, source.constants
    )


def _head_index(head: Callable[[Sequence[Any]], Any], shapes: list[Any]) -> int:
    """Which of the parameters the head is."""
    program = jax.make_jaxpr(lambda leaves: jax.tree.leaves(head(leaves)))(shapes).jaxpr
    inputs = {id(variable): index for index, variable in enumerate(program.invars)}
    if len(program.outvars) != 1 or id(program.outvars[0]) not in inputs:
        raise ValueError(
            "head must return one parameter of the module as it is, [V, D] or [D, V], got "
            f"{', '.join(str(v.aval) for v in program.outvars) or 'nothing'} that is none of them. Return it without "
            "transposing or scaling; a tied head is the embedding."
        )
    return inputs[id(program.outvars[0])]


def _trace_hidden(hidden: Callable[[Sequence[Any], Batch], Any], shapes: list[Any]) -> tuple[int, bool]:
    """(D, whether segment_ids are read), from a trace on 2 rows of 8 tokens."""
    text = jax.ShapeDtypeStruct((2, 8), jnp.int32)

    def run(leaves: Any, tokens: Array, segment_ids: Array, positions: Array) -> Any:
        batch = dataclasses.replace(batch_of(tokens, tokens, positions), segment_ids=segment_ids)
        return hidden(leaves, batch)

    program, out = jax.make_jaxpr(run, return_shape=True)(shapes, text, text, text)
    found = jax.tree.leaves(out)
    if len(found) != 1 or len(found[0].shape) != 3 or found[0].shape[:2] != text.shape:
        raise ValueError(
            "hidden must return one array [B, T, D], got "
            f"{', '.join(str(tuple(leaf.shape)) for leaf in found) or 'nothing'} for B = 2 and T = 8. Pick the hidden "
            "states out of what the module returns."
        )
    segments = program.jaxpr.invars[len(shapes) + 1]
    read = any(variable is segments for equation in program.jaxpr.eqns for variable in equation.invars)
    return found[0].shape[2], read


def _is_vocab_major(weight: tuple[int, ...], width: int, vocab_size: int) -> bool:
    """Whether the head is [V, D] and not [D, V]."""
    fitting = [
        by_rows
        for by_rows, shape in ((True, weight), (False, weight[::-1]))
        if len(shape) == 2 and shape[1] == width and shape[0] >= vocab_size
    ]
    if not fitting and width >= vocab_size and width in weight:
        raise ValueError(
            f"hidden must return what goes into the head, got {width} columns with vocab_size={vocab_size}: logits. "
            "Leave out the head, for example with `module.lm_head = lambda x: x` before the call, or call the module's "
            "parts; an identity as head would need a weight [V, V] and logits [B, T, V], which kdjax never makes."
        )
    if len(fitting) != 1:
        raise ValueError(
            f"head must be [V, D] or [D, V] with D = {width}, as hidden returns, and V >= vocab_size = {vocab_size}, "
            f"not square, got {list(weight)}. Return the weight that is multiplied with these hidden states."
        )
    return fitting[0]


def _axes(shape: tuple[int, ...], names: Any, known: Mapping[str, str | None]) -> tuple[str | None, ...]:
    """Logical axes: as the metadata say, else "embed" for the two largest; vectors are whole."""
    if len(shape) < 2:
        return (None,) * len(shape)
    if names is not None and len(names) == len(shape):
        found = tuple(known.get(name) if isinstance(name, str) else None for name in names)
        if any(found) or any(isinstance(name, str) and name in known for name in names):
            return found
    largest = sorted(range(len(shape)), key=lambda at: -shape[at])[:2]
    return tuple("embed" if at in largest else None for at in range(len(shape)))


def _nested(paths: Sequence[tuple[str, ...]], leaves: Sequence[Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        at = tree
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = leaf
    return tree


def _get(tree: Any, path: Sequence[str]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
