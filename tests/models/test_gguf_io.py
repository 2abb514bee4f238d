"""GGUF files, against the package `gguf` that wrote them: values bit for bit, metadata, configs, damage by message."""

import struct

import gguf
import numpy as np
import pytest

from kdjax import models
from kdjax.models import gguf_io, gguf_model, io

RNG = np.random.default_rng(0)
KIND = gguf.GGMLQuantizationType
SUPPORTED = [KIND.F32, KIND.F16, KIND.BF16, KIND.Q8_0, KIND.Q4_0, KIND.Q4_1]


def write(path, metadata, tensors, arch="llama", alignment=None):
    """tensors: name -> (array as stored, type). metadata: a function that takes the writer."""
    writer = gguf.GGUFWriter(str(path), arch)
    if alignment:
        writer.add_custom_alignment(alignment)
    metadata(writer)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(values, kind):
    return gguf.quants.quantize(np.asarray(values, np.float32), kind), kind


def oracle(path):
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(str(path)).tensors}


def assert_same_bits(ours, theirs):
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    np.testing.assert_array_equal(ours.view(np.uint32), np.ascontiguousarray(theirs).view(np.uint32))


@pytest.mark.parametrize("kind", SUPPORTED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("alignment", [None, 64])
def test_values_equal_the_reference_package_bit_for_bit(tmp_path, kind, alignment):
    wide = RNG.standard_normal((6, 96)) * np.geomspace(1e-6, 1e4, 6)[:, None]
    tensors = {
        "vector": RNG.standard_normal(32),
        "wide": wide,
        "cube": RNG.standard_normal((2, 3, 64)),
        "zero": np.zeros((2, 32)),
    }
    path = write(
        tmp_path / "m.gguf", lambda w: None, {n: stored(v, kind) for n, v in tensors.items()}, alignment=alignment
    )
    file = gguf_io.open_gguf(path)
    theirs = oracle(path)
    assert list(file.tensors) == list(tensors)
    for name in tensors:
        assert_same_bits(gguf_io.read_tensor(file, name), theirs[name])


@pytest.mark.parametrize("kind", SUPPORTED, ids=lambda kind: kind.name)
def test_any_bytes_decode_as_the_reference_package_does(tmp_path, kind):
    """Every nibble, byte and sign; block scales that are infinite or not a number included."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = RNG.integers(0, 256, (32, 8 * size), np.uint8)
    if block == 1:
        raw = raw.view({2: np.float16, 4: np.float32}[size]) if kind != KIND.BF16 else raw
    path = write(tmp_path / "m.gguf", lambda w: None, {"any": (raw, kind)})
    with np.errstate(all="ignore"):
        ours, theirs = gguf_io.read_tensor(gguf_io.open_gguf(path), "any"), oracle(path)["any"]
    assert ours.shape == (32, 8 * block)
    np.testing.assert_array_equal(ours, theirs)  # nan equals nan; which nan does not matter


def test_metadata_of_every_kind(tmp_path):
    values = {
        "u8": 200,
        "i8": -5,
        "u16": 60000,
        "i16": -300,
        "u32": 4_000_000_000,
        "i32": -70000,
        "u64": 2**60,
        "i64": -(2**60),
    }
    names = {"u": "uint", "i": "int"}

    def metadata(writer):
        for name, value in values.items():
            getattr(writer, f"add_{names[name[0]]}{name[1:]}")(name, value)
        writer.add_float32("f32", 0.25)
        writer.add_float64("f64", 1e-300)
        writer.add_bool("yes", True)
        writer.add_string("text", "Grüße ▁")
        writer.add_array("strings", ["a", "", "ü"])
        writer.add_array("ints", [1, -2, 3])

    found = gguf_io.open_gguf(write(tmp_path / "m.gguf", metadata, {})).metadata
    expected = values | {
        "f32": 0.25,
        "f64": 1e-300,
        "yes": True,
        "text": "Grüße ▁",
        "strings": ["a", "", "ü"],
        "ints": [1, -2, 3],
    }
    assert {name: found[name] for name in expected} == expected
    assert found["general.architecture"] == "llama"


def small_model(writer, arch="llama", **changes):
    settings = {
        "embedding_length": 32, "block_count": 2, "feed_forward_length": 64, "attention.head_count": 4,
        "attention.head_count_kv": 2, "context_length": 128, "rope.dimension_count": 8,
    } | changes  # fmt: skip
    for key, value in settings.items():
        if value is not None:
            add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
            add(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{arch}.rope.freq_base", 500000.0)


EMBED = {"token_embd.weight": stored(np.zeros((48, 32)), KIND.F32)}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_config_of_each_architecture(tmp_path, arch):
    head_dim = 16 if arch == "qwen3" else 8

    def metadata(writer):
        small_model(writer, arch, **{"attention.key_length": head_dim, "rope.dimension_count": head_dim})
        for role, index in (("bos", 1), ("eos", 2), ("eot", 5), ("padding", 3)):
            writer.add_uint32(f"tokenizer.ggml.{role}_token_id", index)

    cfg = io.load_config(write(tmp_path / "m.gguf", metadata, EMBED, arch))
    assert cfg == models.ModelConfig(
        family=arch, vocab_size=48, width=32, layers=2, heads=4, kv_heads=2, head_dim=head_dim, mlp=64,
        rope_theta=500000.0, norm_eps=1e-5, tied=True, max_positions=128, attention_bias=arch == "qwen2",
        bos_id=1, eos_ids=(2, 5), pad_id=3,
    )  # fmt: skip


GEMMA3 = {"attention.key_length": 16, "rope.dimension_count": 16, "attention.sliding_window": 6, "block_count": 7}


def gemma3(tmp_path, flags=None, **changes):
    def metadata(writer):
        small_model(writer, "gemma3", **GEMMA3 | changes)
        if flags is not None:
            writer.add_array("gemma3.attention.sliding_window_pattern", flags)

    return io.load_config(write(tmp_path / "m.gguf", metadata, EMBED, "gemma3"))


def test_what_a_gemma3_file_leaves_out_is_as_published(tmp_path):
    cfg = gemma3(tmp_path)
    assert cfg.local_layers == (True,) * 5 + (False, True)
    assert (cfg.family, cfg.window, cfg.local_rope_theta, cfg.query_pre_attn_scalar) == ("gemma3_text", 6, 1e4, 16.0)
    assert (cfg.norm_offset, cfg.activation, cfg.logit_soft_cap) == (1.0, "gelu_tanh", 0.0)
    assert gemma3(tmp_path, block_count=62).query_pre_attn_scalar == 32 / 4  # the 27B: the width per head
    assert gemma3(tmp_path, **{"attention.sliding_window": None}).window == 0


def test_what_a_gemma3_file_says_is_heard(tmp_path):
    said = {"rope.freq_base_swa": 500.0, "final_logit_softcapping": 30.0, "attention.sliding_window_pattern": 2}
    cfg = gemma3(tmp_path, **said)
    assert cfg.local_layers == (True, False) * 3 + (True,)
    assert (cfg.local_rope_theta, cfg.logit_soft_cap) == (500.0, 30.0)
    assert gemma3(tmp_path, [False, True, True], block_count=3).local_layers == (False, True, True)
    with pytest.raises(ValueError, match=r"m\.gguf.*layer_types must have an entry for each of the 7 layers, got 3"):
        gemma3(tmp_path, [False, True, True])
    with pytest.raises(ValueError, match=r"m\.gguf .*gemma3\.attention\.sliding_window is 2\.5"):
        gemma3(tmp_path, **{"attention.sliding_window": 2.5})


def llama3_factors(theta, head_dim, factor, low, high, original):
    """One factor per frequency, by the rule of the Llama 3.1 release, frequency by frequency."""
    factors = []
    for i in range(head_dim // 2):
        wavelength = 2 * np.pi * theta ** (2 * i / head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama3_rope_factors_become_the_config(tmp_path):
    sizes = {"embedding_length": 256, "attention.head_count": 4, "rope.dimension_count": 64}
    factors = llama3_factors(500000.0, 64, 32.0, 1.0, 4.0, 8192)
    assert np.any((factors > 1) & (factors < 32))
    tensors = EMBED | {"rope_freqs.weight": (factors, KIND.F32)}
    cfg = io.load_config(write(tmp_path / "m.gguf", lambda w: small_model(w, **sizes), tensors))
    assert cfg.rope_scaling == models.RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)

    tensors["rope_freqs.weight"] = (factors[::-1].copy(), KIND.F32)
    with pytest.raises(ValueError, match=r"other\.gguf must have RoPE factors of the Llama 3 form"):
        io.load_config(write(tmp_path / "other.gguf", lambda w: small_model(w, **sizes), tensors))


def test_linear_rope_scaling_is_read_and_other_kinds_are_refused(tmp_path):
    def metadata(writer, kind):
        small_model(writer, **{"rope.scaling.type": kind})
        writer.add_float32("llama.rope.scaling.factor", 2.5)

    cfg = io.load_config(write(tmp_path / "m.gguf", lambda w: metadata(w, "linear"), EMBED))
    assert cfg.rope_scaling == models.RopeScaling("linear", 2.5)
    with pytest.raises(ValueError, match=r"yarn\.gguf.*rope_type.*'yarn'"):
        io.load_config(write(tmp_path / "yarn.gguf", lambda w: metadata(w, "yarn"), EMBED))


def test_unpermute_pairs_up_the_halves():
    """Interleaved RoPE turns rows (2i, 2i+1) of a head together, half-split RoPE rows (i, i + H/2)."""
    heads, size = 3, 8
    stored_rows = np.arange(heads * size)[:, None] + np.zeros((1, 2), int)
    found = gguf_model.unpermute(stored_rows, heads)
    for head in range(heads):
        for i in range(size // 2):
            assert found[head * size + i, 0] == head * size + 2 * i
            assert found[head * size + i + size // 2, 0] == head * size + 2 * i + 1


def test_names_map_one_to_one():
    names = [
        *gguf_model.GLOBAL_NAMES,
        *(f"blk.{layer}.{part}.weight" for layer in (0, 11) for part in gguf_model.LAYER_NAMES),
    ]
    found = [gguf_model.hf_name(name) for name in names]
    assert len(set(found)) == len(names)
    assert gguf_model.hf_name("blk.3.attn_q.bias") == "model.layers.3.self_attn.q_proj.bias"
    assert gguf_model.hf_name("blk.3.ffn_gate_exps.weight") is None


@pytest.fixture
def good(tmp_path):
    tensors = EMBED | {
        "output_norm.weight": stored(np.ones(32), KIND.F32),
        "blk.0.attn_q.weight": stored(np.ones((32, 32)), KIND.Q4_0),
    }
    return write(tmp_path / "good.gguf", small_model, tensors)


def damaged(good, content):
    path = good.with_name("bad.gguf")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"bad\.gguf must be a GGUF file, got one that starts with b''"),
        (b"PK\x03\x04 something else", r"bad\.gguf must be a GGUF file, got one that starts with b'PK"),
        (b"GGUF", r"bad\.gguf must be a complete GGUF file.*ends inside its header, at byte 4"),
        (
            b"GGUF" + struct.pack("<I", 1),
            r"bad\.gguf must be a little-endian GGUF file of version 2 or 3, got version 1",
        ),
        (b"GGUF" + struct.pack(">I", 3), r"bad\.gguf must be a little-endian GGUF file"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), r"ends inside its header"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2) + b"\xff\xff", r"string at byte 32 is not UTF-8"),
        (b"GGUF" + struct.pack("<IQQQcI", 3, 0, 1, 1, b"k", 77), r"metadata type 77 .* unknown"),
        (b"GGUF" + struct.pack("<IQQQcII", 3, 1, 0, 1, b"t", 9, 0), r"tensor 't' has 9 dimensions"),
    ],
)
def test_what_is_no_gguf_file_is_named(good, content, message):
    with pytest.raises(ValueError, match=message):
        gguf_io.open_gguf(damaged(good, content))


def test_truncation_anywhere_is_an_error_that_names_the_file(good):
    content = good.read_bytes()
    for end in range(0, len(content), 97):
        with pytest.raises(ValueError, match=r"bad\.gguf must be a"):
            gguf_io.open_gguf(damaged(good, content[:end]))
    with pytest.raises(ValueError, match=r"data of 'blk\.0\.attn_q\.weight' ends at byte \d+, the file at"):
        gguf_io.open_gguf(damaged(good, content[:-20]))


def test_flipped_bytes_never_give_anything_but_a_value_error(good):
    content = good.read_bytes()
    header = gguf_io.open_gguf(good).tensors["token_embd.weight"].start
    messages = []
    for at in range(header):
        flipped = bytearray(content)
        flipped[at] ^= int(RNG.integers(1, 256))
        try:
            io.load_config(damaged(good, bytes(flipped)))
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > header // 4
    assert all("bad.gguf" in message for message in messages)


@pytest.mark.parametrize("kind", [KIND.Q5_0, KIND.Q6_K, KIND.IQ4_NL], ids=lambda kind: kind.name)
def test_an_unsupported_type_is_named(tmp_path, kind):
    _, size = gguf.GGML_QUANT_SIZES[kind]
    path = write(tmp_path / "k.gguf", lambda w: None, {"w": (np.zeros((2, size), np.uint8), kind)})
    with pytest.raises(ValueError, match=rf"k\.gguf must hold tensors of the types F32, .*got {kind.name} for 'w'"):
        gguf_io.open_gguf(path)


@pytest.mark.parametrize(
    ("arch", "changes", "tensors", "message"),
    [
        ("phi3", {}, EMBED, "must be of architecture gemma3, llama, qwen2, qwen3, got 'phi3'"),
        ("llama", {"block_count": None}, EMBED, r"it has no llama\.block_count"),
        ("llama", {}, {}, r"it has no token_embd\.weight"),
        ("llama", {"rope.dimension_count": 4}, EMBED, r"rope\.dimension_count equal to the head size 8, got 4"),
        ("llama", {"attention.value_length": 16}, EMBED, r"attention\.value_length equal to the head size 8, got 16"),
        ("llama", {"attention.head_count": 0}, EMBED, r"attention\.head_count is 0"),
        ("llama", {"block_count": 2.0}, EMBED, r"block_count is 2\.0"),
        ("llama", {"embedding_length": "wide"}, EMBED, r"embedding_length is 'wide'"),
    ],
)
def test_a_model_that_cannot_be_had_is_refused(tmp_path, arch, changes, tensors, message):
    path = write(tmp_path / "odd.gguf", lambda w: small_model(w, arch, **changes), tensors, arch)
    with pytest.raises(ValueError, match=rf"odd\.gguf .*{message}"):
        io.load_config(path)


def test_unknown_missing_and_misshaped_tensors_are_named(tmp_path, good):
    with pytest.raises(
        ValueError, match=r"good\.gguf must hold the tensors of its config, got no tensor 'model\.layers\.0"
    ):
        io.load_model(good)
    extra = EMBED | {"blk.0.ffn_gate_exps.weight": stored(np.ones((2, 32)), KIND.F32)}
    with pytest.raises(ValueError, match=r"got an unknown tensor, 'blk\.0\.ffn_gate_exps\.weight'"):
        io.load_model(write(tmp_path / "moe.gguf", small_model, extra))
