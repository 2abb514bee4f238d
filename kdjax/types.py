"""The contract: axis letters and the containers that flow between rooms.

Axis letters, everywhere and in einsum:
  B batch    T positions    S selected slots    D width    V vocabulary    K stored entries
  L layers   N query heads (in kernels: rows = B*S)    G key/value heads    H head size

Containers are `flax.struct` dataclasses: frozen pytrees, so they pass through `jit`, `grad`, `scan` and checkpoints.
Statistics and losses are in nats and float32; sizes are in tokens; fractions are in (0, 1].
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array
Params = Any  # a pytree of arrays, declared by `models.params`
Metrics = dict[str, tuple[Array, Array]]  # name -> (sum, count); see `metrics.py`


@flax.struct.dataclass
class Batch:
    """What every consumer of text receives.

    tokens:      int32 [B, T], token ids; padding holds any id.
    segment_ids: int32 [B, T], 1, 2, ... per document of the row, 0 = padding. Attention and loss stay in a segment.
    positions:   int32 [B, T], 0, 1, ... restarting with each segment (RoPE).
    loss_mask:   bool [B, T], True where the token *at this place* may be a target (see `targets_of`).
    row_id:      int32 [B], the row's index in the data set; the same in every epoch.
    epoch:       int32 [B], how often the data set was gone through before this row.
    weight:      float32 [B], the row's weight in the loss (sample axis); 1 by default.
    teacher:     what a cache holds of the teacher for these rows, the hidden states that a teacher on its own devices
                 found, or another text that the teacher reads in their place; None = it reads what the student reads.
    """

    tokens: Array
    segment_ids: Array
    positions: Array
    loss_mask: Array
    row_id: Array
    epoch: Array
    weight: Array
    teacher: CachedTeacher | TeacherHidden | TeacherText | None = None


@flax.struct.dataclass
class CachedTeacher:
    """The teacher's distribution at the positions of a batch, as `teacher/classes.py` drew or cut it.

    ids:        int32 [B, T, K]. codes: uint16 [B, T, K], 0 = empty entry; `ClassSampler.probs` says what a code means.
    stored:     bool [B, T], False where the cache holds nothing: not eligible, or not in the cached superset.
    entropy:    float32 [B, T], the teacher's, nats; label_logp: float32 [B, T], of the text's next token, nats. Both at
                the cache's temperature, both None if the cache does not hold them.
    """

    ids: Array
    codes: Array
    stored: Array
    entropy: Array | None = None
    label_logp: Array | None = None


@flax.struct.dataclass
class TeacherHidden:
    """hidden: [B, T, D_teacher], after the final norm, from a teacher on devices of its own (`teacher/apart.py`)."""

    hidden: Array


@flax.struct.dataclass
class TeacherText:
    """What the teacher reads where its prompt is not the student's, as in self-distillation; the answers are the same.

    tokens, segment_ids, positions: int32 [B, U], as in `Batch`. index: int32 [B, T], the place in the teacher's row
    that predicts what the student's place does; any where the student's predicts no answer.
    """

    tokens: Array
    segment_ids: Array
    positions: Array
    index: Array


@flax.struct.dataclass
class Head:
    """The last linear map of a language model, as every kernel takes it.

    weight:      [V, D] if `vocab_major` (tied embeddings) else [D, V].
    vocab_size:  columns >= vocab_size are padding: their logits count as -inf.
    logit_scale: multiplies the logits. soft_cap: if > 0, logits = soft_cap * tanh(logits / soft_cap), after the scale.
    vocab_axis:  inside a `shard_map`: the mesh axis over which the columns are split. weight is then this device's
                 equal, contiguous part of them, vocab_size still counts all; hidden states and labels are the same on
                 all devices of the axis. Kernels combine partial results [N]; nothing of size V is ever gathered.
    """

    weight: Array
    vocab_size: int = flax.struct.field(pytree_node=False)
    vocab_major: bool = flax.struct.field(pytree_node=False, default=False)
    logit_scale: float = flax.struct.field(pytree_node=False, default=1.0)
    soft_cap: float = flax.struct.field(pytree_node=False, default=0.0)
    vocab_axis: str | None = flax.struct.field(pytree_node=False, default=None)


@flax.struct.dataclass
class TokenStats:
    """Per-position statistics [B, T] in nats and float32, under stop-gradient; None = nobody asked for it.

    student_gradient_norm: of -log q[label] with respect to the logits, ||q - onehot||, in [0, sqrt 2]. kl = KL(teacher
    || student), reverse_kl = KL(student || teacher). hellinger: the distance of the two, in [0, 1].
    """

    student_entropy: Array | None = None
    student_ce: Array | None = None
    student_gradient_norm: Array | None = None
    teacher_entropy: Array | None = None
    teacher_ce: Array | None = None
    kl: Array | None = None
    reverse_kl: Array | None = None
    hellinger: Array | None = None


@flax.struct.dataclass
class Selection:
    """Fixed-size slots. index: int32 [B, S], ascending within a row; weight: float32 [B, S], 0 = empty slot.

    mass: float32 [B], what a row counts in the mean; None = the sum of its weights, as in any weighted mean. Importance
    weights have another: they estimate a sum over positions that were not drawn.
    given: float32 [B, S], a number of each slot for losses that ask for one, such as a temperature; see Policy.gives.
    """

    index: Array
    weight: Array
    mass: Array | None = None
    given: Array | None = None


@flax.struct.dataclass
class DenseTargets:
    """The teacher at the selected slots: hidden [B, S, D_teacher] and its head."""

    hidden: Array
    head: Head


@flax.struct.dataclass
class SparseTargets:
    """K entries of the teacher per selected slot, live or from a cache, for `kernels/sparse_divergence`.

    ids: int32 [B, S, K]; probs: float32 [B, S, K], 0 = empty; tail: float32 [B, S], the teacher's mass elsewhere;
    entropy: float32 [B, S], nats. kind: which of the kernel's KINDS they are.
    """

    ids: Array
    probs: Array
    tail: Array | None
    entropy: Array | None
    kind: str = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class LossOutput:
    """total: float32 [], a *sum*; count: float32 [], what it is to be divided by, once, globally."""

    total: Array
    count: Array
    metrics: Metrics


@flax.struct.dataclass
class TrainState:
    """All that a run must keep to go on bitwise, besides the data position."""

    step: Array  # int32 []
    params: Params
    opt_state: Any
    policy_state: Any
    key: Array  # typed PRNG key; never advanced, only folded into


def targets_of(batch: Batch) -> tuple[Array, Array]:
    """Labels and the one eligibility mask, both [B, T], for prediction at position t of the token at t + 1.

    A position is eligible if its *target* is in `loss_mask`, is not padding and belongs to the same segment. The last
    position of a row never is. KD, CE, statistics and evaluation all use this mask.
    """
    zeros = jnp.zeros_like(batch.tokens[:, :1])
    labels = jnp.concatenate([batch.tokens[:, 1:], zeros], 1)
    next_segment = jnp.concatenate([batch.segment_ids[:, 1:], zeros], 1)
    next_mask = jnp.concatenate([batch.loss_mask[:, 1:], zeros.astype(bool)], 1)
    eligible = next_mask & (next_segment == batch.segment_ids) & (batch.segment_ids > 0)
    return labels, eligible


def gather_slots(values: Array, index: Array) -> Array:
    """values[b, index[b, s]] for values [B, T] or [B, T, D] and index [B, S]; the gradient is scattered back."""
    return jnp.take_along_axis(values, index if values.ndim == 2 else index[:, :, None], axis=1)
