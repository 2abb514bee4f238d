"""Arguments and results of the op."""

import flax.struct

from kdjax.types import Array

Rows = tuple[Array, Array, Array]  # hidden [..., T, D], labels [..., T], weights [..., T]


@flax.struct.dataclass
class HeadGradient:
    """Of R answers of T positions and P questions of U: float32, nats, rank int32; G_r = d L_r / d head.weight.

    norm: [R], ||G_r||^2, Frobenius. share: [R, T], what each position adds to norm, w_t <g_t, G_r> with g_t the
    gradient of its own -log q[label]: it may be negative and sums to norm. token_norm: [R, T], ||g_t||^2, no weight.
    label_logp: [R, T], log q[label]. brier: [R, T], ||q - onehot||^2, as in `linear_stats`.
    rank: [R, T], 1 + the number of logits above the label's by more than rounding: ties give the best rank. 0 for
    a label outside the vocabulary; None if not asked for.
    cross: [R], <G_r, G_p> with r's question. question_norm: [P], ||G_p||^2. question_label_logp, question_brier:
    [P, U]. These four are None without a question.
    """

    norm: Array
    share: Array
    token_norm: Array
    label_logp: Array
    brier: Array
    rank: Array | None = None
    cross: Array | None = None
    question_norm: Array | None = None
    question_label_logp: Array | None = None
    question_brier: Array | None = None
