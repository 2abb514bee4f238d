"""A Llama written out once more, one row at a time and with all its logits: an oracle for figures and gradients.

It reads the parameters of ours and shares no code with them. In float64 under `jax.enable_x64`.
"""

import jax
import jax.numpy as jnp


def forward(cfg, params, tokens, nudge=None):
    """(logits [T, V], final states [T, D], inputs [L, T, D] and outputs [L, T, F] of the up-projections) of one row.

    nudge: [L, T, F], added to those outputs, so that a gradient with respect to it is one with respect to them.
    """
    length, half = len(tokens), cfg.head_dim // 2
    angles = jnp.arange(length)[:, None] * cfg.rope_theta ** (-jnp.arange(half) / half)[None, :]
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    causal = jnp.tril(jnp.ones((length, length), bool))[None]

    def norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + cfg.norm_eps) * scale[None]

    def turn(x):
        a, b = x[..., :half], x[..., half:]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def layer(x, inputs):
        w, push = inputs
        z = norm(x, w["attn_norm"])
        q, k, v = (jnp.einsum("td,dnh->tnh", z, w[name]) for name in ("wq", "wk", "wv"))
        k, v = (jnp.repeat(a, cfg.heads // cfg.kv_heads, 1) for a in (turn(k), v))
        looks = jnp.where(causal, jnp.einsum("tnh,unh->ntu", turn(q), k) / cfg.head_dim**0.5, -1e30)
        looks = jnp.exp(looks - looks.max(-1, keepdims=True))
        mixed = jnp.einsum("ntu,unh->tnh", looks / looks.sum(-1, keepdims=True), v)
        x = x + jnp.einsum("tnh,nhd->td", mixed, w["wo"])
        z = norm(x, w["mlp_norm"])
        gate, up = z @ w["w_gate"], z @ w["w_up"] + push
        return x + (gate / (1 + jnp.exp(-gate)) * up) @ w["w_down"], (z, up)

    push = jnp.zeros((cfg.layers, length, cfg.mlp)) if nudge is None else nudge
    x, (inputs, outputs) = jax.lax.scan(layer, params["embed"][tokens], (params["layers"], push))
    final = norm(x, params["final_norm"])
    return final @ (params["embed"].T if cfg.tied else params["head"]), final, inputs, outputs


def token_nll(logits, tokens):
    """[T - 1], of tokens 1, 2, ..."""
    top = logits.max(-1, keepdims=True)
    logp = logits - top - jnp.log(jnp.exp(logits - top).sum(-1, keepdims=True))
    return -jnp.take_along_axis(logp[:-1], tokens[1:, None], 1)[:, 0]


def mean_nll(cfg, params, tokens, mask, nudge=None):
    """L of the tokens of `mask` [T], the first one never counting."""
    counts = mask[1:].astype(params["embed"].dtype)
    return jnp.vdot(counts, token_nll(forward(cfg, params, tokens, nudge)[0], tokens)) / counts.sum()


def figures(cfg, params, tokens, answer, question):
    """The figures of an answer by their definitions, from whole logits and pairs of states; answer, question: [T]."""
    logits, final, _, outputs = forward(cfg, params, tokens)
    states = outputs[-1] / jnp.linalg.norm(outputs[-1], axis=-1, keepdims=True)
    cosines = states @ states.T
    a, q = answer.astype(logits.dtype), question.astype(logits.dtype)
    after_first = q.at[0].set(0)
    nll = jnp.concatenate([jnp.zeros(1), token_nll(logits, tokens)])
    p = jnp.exp(logits[:-1] - logits[:-1].max(-1, keepdims=True))
    p = p / p.sum(-1, keepdims=True)
    label = jax.nn.one_hot(tokens[1:], logits.shape[1])
    e, h, n = p - label, final[:-1], a.sum()
    own, asked = (jnp.einsum("t,tv,td->vd", w[1:] / w[1:].sum(), e, h) for w in (a, after_first))
    square = jnp.sum(e**2, -1)
    above = jnp.sum(logits[:-1] > jnp.take_along_axis(logits[:-1], tokens[1:, None], 1), -1)
    top = jax.lax.top_k(p, min(50, p.shape[1]))[0]
    in_top = jnp.where(above < 50, jnp.sum(p * label, -1), 0.0)
    top_brier = 1 - 2 * in_top / top.sum(-1) + jnp.sum(top**2, -1) / top.sum(-1) ** 2
    return {
        "n_answer": n,
        "n_question": q.sum(),
        "answer_nll": jnp.vdot(a, nll) / n,
        "question_nll": jnp.vdot(after_first, nll) / after_first.sum(),
        "sim_aa": a @ cosines @ a / n**2,
        "sim_aq": a @ cosines @ q / (n * q.sum()),
        "sim_qq": q @ cosines @ q / q.sum() ** 2,
        "brier": jnp.vdot(a[1:], square) / n,
        "el2n": jnp.vdot(a[1:], jnp.sqrt(square)) / n,
        "logit_norm": jnp.vdot(a[1:], square) / n**2,
        "head_diagonal": jnp.vdot(a[1:], square * jnp.sum(h**2, -1)) / n**2,
        "head_norm": jnp.vdot(own, own),
        "head_cross": jnp.vdot(own, asked),
        "head_question": jnp.vdot(asked, asked),
        "rank_sum": jnp.vdot(a[1:], jnp.minimum(above + 1, 100).astype(a.dtype)),
        "top_brier": jnp.vdot(a[1:], top_brier) / n,
    }
