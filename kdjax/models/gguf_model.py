"""The model in a GGUF file in Hugging Face's terms, so that one key map and one config reader serve both formats."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from kdjax.models import gguf_io
from kdjax.models.gguf_io import GgufFile

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
GEMMA_NAMES = LAYER_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class Architecture(NamedTuple):
    """How a file departs from a Hugging Face checkpoint of `model_type`.

    interleaved: rows of q and k are stored for interleaved RoPE. norm_shift: added to the scales of norms in the file.
    """

    model_type: str
    interleaved: bool = False
    layer_names: dict[str, str] = LAYER_NAMES
    norm_shift: float = 0.0


ARCHITECTURES: dict[str, Architecture] = {
    "gemma3": Architecture("gemma3_text", layer_names=GEMMA_NAMES, norm_shift=1.0),
    "llama": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
}
CONFIG_KEYS = {  # <architecture>.<key> -> key of config.json; all are required
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}
FRACTIONAL = ("attention.layer_norm_rms_epsilon", "rope.freq_base")
LARGEST_GEMMA3 = 62  # layers of the 27B model


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
        raise gguf_io.broken(file.path, f"it has no {', '.join(missing)}")

    def get(key: str, default: Any = None) -> Any:
        value = _short(meta.get(f"{architecture}.{key}", default))
        if type(value) not in ((int, float) if key in FRACTIONAL else (int,)) or value <= 0:
            raise gguf_io.broken(file.path, f"{architecture}.{key} is {value!r}")
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
        "model_type": ARCHITECTURES[architecture].model_type,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "hidden_act": "silu",
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, architecture, theta, head_dim),
    }
    if architecture == "gemma3":
        config |= _gemma3(file, config)
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
        stored = gguf_io.read_tensor(file, ROPE_FACTORS).reshape(-1)
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


def _gemma3(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """The fields that gemma3 adds. What a file does not say is built into its readers: the published values."""

    def get(key: str, kinds: tuple[type, ...], default: Any = None) -> Any:
        value = _short(file.metadata.get(f"gemma3.{key}", default))
        if value is not None and (type(value) not in kinds or (not value if type(value) is list else value <= 0)):
            raise gguf_io.broken(file.path, f"gemma3.{key} is {value!r}")
        return value

    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    pattern = get("attention.sliding_window_pattern", (int, list), 6)
    if isinstance(pattern, int):  # every n-th layer is global; else one flag for each: is it local?
        pattern = [(layer + 1) % pattern != 0 for layer in range(layers)]
    wide = layers == LARGEST_GEMMA3  # it divides scores by the root of the width per head
    return {
        "sliding_window": get("attention.sliding_window", (int,)),
        "layer_types": ["sliding_attention" if local else "full_attention" for local in pattern],
        "rope_local_base_freq": get("rope.freq_base_swa", (int, float), 10000.0),
        "query_pre_attn_scalar": config["hidden_size"] // heads if wide else config["head_dim"],
        "final_logit_softcapping": get("final_logit_softcapping", (int, float)),
    }


def hf_name(gguf_name: str, architecture: str = "llama") -> str | None:
    """The Hugging Face name of a tensor; None if it is not in the tables."""
    layer_names = ARCHITECTURES[architecture].layer_names
    if gguf_name in GLOBAL_NAMES:
        return GLOBAL_NAMES[gguf_name]
    parts = gguf_name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[1].isdigit() and parts[2] in layer_names:
        return f"model.layers.{parts[1]}.{layer_names[parts[2]]}.{parts[3]}"
    return None


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * H, ...] of q or k from the interleaved RoPE order to the half-split one."""
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def read_model_tensor(file: GgufFile, name: str) -> np.ndarray:
    """One tensor as a Hugging Face checkpoint holds it.

    float32, the rows of q and k in half-split RoPE order, the scales of norms without what converters add to them.
    """
    tensor, architecture = gguf_io.read_tensor(file, name), file.metadata["general.architecture"]
    part = name.split(".")[2] if name.startswith("blk.") else ""
    if ARCHITECTURES[architecture].norm_shift and name.endswith("norm.weight"):
        return tensor - np.float32(ARCHITECTURES[architecture].norm_shift)
    if not ARCHITECTURES[architecture].interleaved or part not in ("attn_q", "attn_k"):
        return tensor
    heads = file.metadata[f"{architecture}.attention.head_count"]
    return unpermute(
        tensor, heads if part == "attn_q" else file.metadata.get(f"{architecture}.attention.head_count_kv", heads)
    )
