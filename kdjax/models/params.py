"""One declaration per parameter: shape, logical axes, initial draw; abstract trees, init and name maps derive from it.

The tree of a decoder (N query heads, G key/value heads, H head size, D width, F mlp, V vocabulary, L layers):
  embed [V, D], final_norm [D], head [D, V] if untied,
  layers: attn_norm [L, D], wq [L, D, N, H], wk, wv [L, D, G, H], wo [L, N, H, D], mlp_norm [L, D],
          w_gate, w_up [L, D, F], w_down [L, F, D] and what the family adds (bq, bk, bv; q_norm, k_norm [L, H];
          post_attn_norm, post_mlp_norm [L, D]).
Leaves of `layers` are stacked over L for `lax.scan`.
"""

import dataclasses
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.sharding import Rules
from kdjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How RoPE frequencies are stretched beyond the pretraining context.

    kind "linear": every frequency is divided by `factor`. kind "llama3": only those of wavelengths above
    original_positions / low_frequency_factor; those below original_positions / high_frequency_factor are kept, with a
    blend between that is linear in the number of turns.
    """

    kind: str
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 0  # tokens


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only language model. Hashable, so it can be a static argument of `jit`.

    A local layer sees the last `window` positions, its own included, and has plain RoPE of base `local_rope_theta`.
    """

    family: str  # a key of models.FAMILIES
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int  # need not be width / heads
    mlp: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tied: bool = False  # the head is the transposed embedding
    max_positions: int = 2048  # tokens; what the model was trained for
    attention_bias: bool = False  # q, k and v have a bias (Qwen2)
    initializer_range: float = 0.02  # standard deviation of matrices at random init
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    norm_offset: float = 0.0  # a norm multiplies by this + its scale
    embed_scale: float = 1.0  # multiplies the embeddings, rounded to the compute dtype
    activation: str = "silu"  # of the gate, a key of layers.ACTIVATIONS
    query_pre_attn_scalar: float = 0.0  # scores are divided by its square root; 0: by that of head_dim
    attn_soft_cap: float = 0.0  # c: scores become c tanh(scores / c); 0 = none
    logit_soft_cap: float = 0.0  # the same for the logits, see types.Head
    window: int = 0  # positions; 0 = local layers see all
    local_layers: tuple[bool, ...] = ()  # one for each layer; () = none is local
    local_rope_theta: float = 10000.0


class Normal(NamedTuple):
    """mean + std * standard normal; std 0 is a constant."""

    mean: float
    std: float


ONES = Normal(1.0, 0.0)
ZEROS = Normal(0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, the logical name of each axis (see sharding.py) and its distribution at init."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Normal


@dataclasses.dataclass(frozen=True)
class TensorKey:
    """Where a named checkpoint tensor lives in the tree: `path`, at `layer` of the stacked leaf (None: not stacked).

    The file holds `file_shape`; the tree holds `shape` (of this layer). From the file: transpose if `transpose` (linear
    maps are stored [out, in]), then reshape. See `from_file` and `to_file`.
    """

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    file_shape: tuple[int, ...]
    transpose: bool


def from_file(key: TensorKey, tensor: np.ndarray) -> np.ndarray:
    """A checkpoint tensor in the form of the tree, as a view where possible. Raises ValueError on a wrong shape."""
    if tuple(tensor.shape) != key.file_shape:
        raise ValueError(f"tensor of {'.'.join(key.path)} must be {key.file_shape}, got {tuple(tensor.shape)}.")
    return (tensor.T if key.transpose else tensor).reshape(key.shape)


def to_file(key: TensorKey, tensor: np.ndarray) -> np.ndarray:
    """The inverse of `from_file`: one layer's tensor of the tree as the checkpoint holds it, contiguous."""
    if tuple(tensor.shape) != key.shape:
        raise ValueError(f"tensor of {'.'.join(key.path)} must be {key.shape}, got {tuple(tensor.shape)}.")
    flat = tensor.reshape(key.file_shape[::-1] if key.transpose else key.file_shape)
    return np.ascontiguousarray(flat.T if key.transpose else flat)


def abstract(specs: Any, rules: Rules = Rules(), dtype: Any = jnp.float32) -> Any:
    """A tree of ShapeDtypeStruct like `specs`, with storage shardings when there is a mesh."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype, sharding=rules.storage(s.axes, s.shape)), specs)


def init(specs: Any, key: Array, rules: Rules = Rules()) -> Params:
    """Random float32 parameters, stored as `rules` says. Draws depend on path and shape only, but for rounding."""

    def one(path: Any, spec: ParamSpec) -> Array:
        leaf_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        # The sharding belongs to the program, so that every device draws its own part only.
        return jax.jit(_draw, static_argnums=1, out_shardings=rules.storage(spec.axes, spec.shape))(leaf_key, spec)

    return jax.tree_util.tree_map_with_path(one, specs)


def _draw(key: Array, spec: ParamSpec) -> Array:
    if not spec.init.std:
        return jnp.full(spec.shape, spec.init.mean, jnp.float32)
    return spec.init.mean + spec.init.std * jax.random.normal(key, spec.shape, jnp.float32)
