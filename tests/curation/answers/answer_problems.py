"""Questions and answers of random ids, and their figures by other means: whole logits in float64."""

import numpy as np

from kdjax.curation.answers.encode import Encoded, EncodedAnswer, Tokens

VOCAB = 160  # so that some ranks are beyond scorer.RANKS
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GEMMA = {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]}
OWN = {"gemma3_text": GEMMA | {"query_pre_attn_scalar": 8}}


def some(rng, length, share=0.8):
    """Random ids, of which about this share counts, the last one in any case."""
    counted = rng.random(length) < share
    counted[-1] = True
    return Tokens(rng.integers(3, VOCAB, length).astype(np.int32), counted)


def question(name, rng, length, lengths):
    answers = [EncodedAnswer(f"{name}-{at}", f"teacher{at}", some(rng, n)) for at, n in enumerate(lengths)]
    return Encoded(name, some(rng, length), tuple(answers))


def questions(seed=0):
    """Of lengths that fall into several shapes; one has a single answer, one of a single token."""
    rng = np.random.default_rng(seed)
    return [
        question("a", rng, 5, (3, 7, 16, 9)),
        question("b", rng, 11, (4,)),
        question("c", rng, 37, (1, 12, 21, 5, 40)),
    ]


def oracle(logits, hidden, states, asked, answer, alignment="token"):
    """The figures of one answer, from a plain row's logits [T, V], final states [T, D] and tapped states [T, F]."""
    logits, hidden, states = (np.asarray(side, np.float64) for side in (logits, hidden, states))
    ids = np.concatenate([asked.ids, answer.ids])
    n = len(asked.ids)
    q_at = np.flatnonzero(asked.counted)
    a_at = n + np.flatnonzero(answer.counted)
    told = q_at[q_at > 0]
    logp = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)

    def errors(places):
        e = np.exp(logp[places - 1])
        e[np.arange(len(places)), ids[places]] -= 1
        return e

    def nll(places):
        return -logp[places - 1, ids[places]]

    def gradient(places):  # of the mean NLL in the head, [V, D]
        return errors(places).T @ hidden[places - 1] / len(places)

    unit = states / np.linalg.norm(states, axis=-1, keepdims=True)
    shift = 0 if alignment == "token" else 1
    a_state = unit[a_at - shift]
    q_state = unit[(q_at if shift == 0 else told) - shift]
    e, h, k = errors(a_at), hidden[a_at - 1], len(a_at)
    ranks = np.array([1 + np.sum(logits[t - 1] > logits[t - 1, ids[t]]) for t in a_at])
    top = np.sort(np.exp(logp[a_at - 1]), -1)[:, ::-1][:, :50]
    chosen = np.where(ranks <= 50, np.exp(logp[a_at - 1, ids[a_at]]), 0) / top.sum(1)
    whole, asked_whole = gradient(a_at), gradient(told)
    size = np.sum(e**2, 1)
    figures = {
        "n_answer": k,
        "n_question": len(q_at),
        "answer_nll": nll(a_at).mean(),
        "question_nll": nll(told).mean(),
        "sim_aa": np.mean(a_state @ a_state.T),
        "sim_aq": np.mean(a_state @ q_state.T),
        "sim_qq": np.mean(q_state @ q_state.T),
        "brier": size.mean(),
        "el2n": np.sqrt(size).mean(),
        "logit_norm": size.sum() / k**2,
        "head_diagonal": np.sum(size * np.sum(h**2, 1)) / k**2,
        "head_norm": np.sum(whole**2),
        "head_cross": np.sum(whole * asked_whole),
        "head_question": np.sum(asked_whole**2),
        "rank_sum": np.minimum(ranks, 100).sum(),
        "top_brier": np.mean(np.sum((top / top.sum(1, keepdims=True)) ** 2, 1) - 2 * chosen + 1),
    }
    share = np.array([np.sum(np.outer(e[i], h[i]) / k * whole) for i in range(k)])
    return figures, {"nll": nll(a_at), "brier": size, "rank": ranks, "share": share}
