"""Shapes of models that papers and configs name, for where the hub cannot be reached: to plan a run, not to load."""

from kdjax.models.io import load_config
from kdjax.models.params import ModelConfig, RopeScaling


def _qwen3(width: int, layers: int, heads: int, mlp: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        family="qwen3",
        vocab_size=151936,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        mlp=mlp,
        rope_theta=1e6,
        norm_eps=1e-6,
        tied=tied,
        max_positions=40960,
    )


def _llama3(width: int, layers: int, head_dim: int, mlp: int, factor: float, tied: bool) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=128256,
        width=width,
        layers=layers,
        heads=32,
        kv_heads=8,
        head_dim=head_dim,
        mlp=mlp,
        rope_theta=5e5,
        rope_scaling=RopeScaling("llama3", factor, 1.0, 4.0, 8192),
        norm_eps=1e-5,
        tied=tied,
        max_positions=131072,
    )


QWEN3_8B = _qwen3(4096, 36, 32, 12288, tied=False)
QWEN3_1_7B = _qwen3(2048, 28, 16, 6144, tied=True)
LLAMA_3_1_8B = _llama3(4096, 32, 128, 14336, 8.0, tied=False)
LLAMA_3_2_1B = _llama3(2048, 16, 64, 8192, 32.0, tied=True)
SMOLLM2_135M = ModelConfig(
    family="llama",
    vocab_size=49152,
    width=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    mlp=1536,
    rope_theta=1e5,
    norm_eps=1e-5,
    tied=True,
    max_positions=8192,
)

# What a config names -> its shape, as in the model's config.json. The tokens that begin, end and pad are left out.
KNOWN: dict[str, ModelConfig] = {
    "Qwen/Qwen3-8B": QWEN3_8B,
    "Qwen/Qwen3-1.7B": QWEN3_1_7B,
    "meta-llama/Llama-3.1-8B": LLAMA_3_1_8B,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_3_1_8B,
    "meta-llama/Llama-3.2-1B": LLAMA_3_2_1B,
    "meta-llama/Llama-3.2-1B-Instruct": LLAMA_3_2_1B,
    "smollm2-135m": SMOLLM2_135M,
}


def shape_of(path: str, *, where: str) -> tuple[ModelConfig, str]:
    """(the ModelConfig of a model's path, '' or a sentence: it comes from KNOWN because the path cannot be read).

    Raises ValueError, that of `load_config`, if it is neither to be had nor known.
    """
    try:
        return load_config(path, where=where), ""
    except ValueError:
        if path not in KNOWN:
            raise
        return KNOWN[path], f"{where} {path!r} cannot be reached; its shape is the one known to kdjax."
