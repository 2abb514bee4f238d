"""Which layers a cut student keeps, that it is a copy of them, and that a file gives it without the teacher."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdjax import models, sharding
from kdjax.config import Mesh
from kdjax.models import hf_io, io, prune

CFG = models.ModelConfig("qwen2", 11, 8, layers=5, heads=2, kv_heads=1, head_dim=4, mlp=12, attention_bias=True)


def parameters():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda spec: jnp.asarray(rng.standard_normal(spec.shape)), models.param_specs(CFG))


def test_the_piloted_student():
    assert prune.default_keep(30, 6) == (0, 1, 2, 10, 20, 29)


@given(st.data(), st.integers(1, 80))
def test_default_keep_has_the_first_three_the_last_and_even_steps(data, total):
    layers = data.draw(st.integers(1, total))
    keep = prune.default_keep(total, layers)
    assert len(keep) == layers == len(set(keep))
    assert list(keep) == sorted(keep)
    assert keep[:3] == tuple(range(min(3, layers)))
    assert keep[-1] == (total - 1 if layers > 3 else layers - 1)
    steps = np.diff(keep[3:])
    if total >= 3 * layers:  # room enough that no step is held back
        assert len(steps) == 0 or steps.max() - steps.min() <= 2


@pytest.mark.parametrize("layers", [0, -1, 31])
def test_default_keep_out_of_range(layers):
    with pytest.raises(ValueError, match=rf"student\.init\.layers must be in 1\.\.30, .*got {layers}"):
        prune.default_keep(30, layers)


def test_cut_copies_the_layers_and_all_the_rest():
    params = parameters()
    cfg, student = prune.cut(CFG, params, [0, 2, 4])
    assert cfg.layers == 3
    shapes = jax.tree.map(lambda spec: spec.shape, models.param_specs(cfg), is_leaf=lambda x: not isinstance(x, dict))
    assert jax.tree.map(jnp.shape, student) == shapes
    for name, leaf in student["layers"].items():
        np.testing.assert_array_equal(leaf, np.asarray(params["layers"][name])[[0, 2, 4]])
    for name in ("embed", "final_norm", "head"):
        np.testing.assert_array_equal(student[name], params[name])
        assert student[name].unsafe_buffer_pointer() != params[name].unsafe_buffer_pointer()  # the teacher may go


def test_cut_of_everything_is_the_teacher():
    params = parameters()
    cfg, student = prune.cut(CFG, params, range(5))
    assert cfg == CFG
    jax.tree.map(np.testing.assert_array_equal, student, params)


@pytest.mark.parametrize("keep", [(), (0, 5), (-1, 2), (2, 1), (1, 1)])
def test_a_cut_that_is_none_is_refused(keep):
    message = r"student\.init\.keep must be ascending layers in 0\.\.4, each once, got \("
    with pytest.raises(ValueError, match=message):
        prune.cut(CFG, parameters(), keep)
    with pytest.raises(ValueError, match=message):
        hf_io.assemble(CFG, hf_io.Checkpoint("nowhere", {}, lambda name: pytest.fail("it was read")), keep=keep)


# --- from a file


WIDE = {"vocab_size": 48, "width": 32, "layers": 5, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp": 64}


def hf_directory(tmp_path, tied):
    cfg = models.ModelConfig("qwen2", tied=tied, attention_bias=True, **WIDE)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda spec: rng.standard_normal(spec.shape, np.float32), models.param_specs(cfg))
    return hf_io.save_hf(tmp_path / "teacher", cfg, params, dtype="bfloat16", shard_bytes=40_000)


def gguf_file(tmp_path, tied):
    """A Llama in 8 bits: q and k are permuted and dequantised on the way in."""
    writer, rng = gguf.GGUFWriter(str(tmp_path / "teacher.gguf"), "llama"), np.random.default_rng(2)
    counts = {
        "embedding_length": 32, "block_count": 5, "feed_forward_length": 64, "attention.head_count": 4,
        "attention.head_count_kv": 2, "context_length": 128, "attention.key_length": 16,
    }  # fmt: skip
    for key, value in counts.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.attention.value_length", 16)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    shapes = {"token_embd": (48, 32), "output_norm": (32,)} | ({} if tied else {"output": (48, 32)})
    layer = {
        "attn_norm": (32,), "attn_q": (64, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 64),
        "ffn_norm": (32,), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64),
    }  # fmt: skip
    shapes |= {f"blk.{at}.{name}": shape for at in range(5) for name, shape in layer.items()}
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(rng.standard_normal(shape, np.float32), kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "teacher.gguf"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("make", [hf_directory, gguf_file])
@pytest.mark.parametrize("keep", [(0, 3), (4,), range(5)], ids=str)
def test_a_student_from_the_teachers_file(tmp_path, monkeypatch, make, tied, keep):
    """Bit for bit what is cut from the loaded teacher; nothing of the other layers is read but names and shapes."""
    path = make(tmp_path, tied)
    teacher = io.load_model(path)
    cfg, params = prune.cut(teacher.cfg, teacher.params, keep)
    read = []
    assemble = hf_io.assemble

    def spy(cfg, found, *rest):
        def listen(name):
            read.append(name)
            return found.read(name)

        return assemble(cfg, hf_io.Checkpoint(found.where, found.shapes, listen, found.stored), *rest)

    monkeypatch.setattr(hf_io, "assemble", spy)
    student = io.load_model(path, keep=keep)
    assert student.cfg == cfg
    assert (student.name, student.source, student.fingerprint) == (teacher.name, teacher.source, teacher.fingerprint)
    assert jax.tree.structure(student.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, student.params, params)
    layers = {int(name.split(".")[2]) for name in read if name.startswith("model.layers.")}
    assert layers == set(keep)
    rest = {name for name in read if not name.startswith("model.layers.")}
    assert rest == {"model.embed_tokens.weight", "model.norm.weight"} | (set() if tied else {"lm_head.weight"})


def test_a_student_of_the_synthetic_teacher():
    teacher = io.load_model("synthetic")
    student = io.load_model("synthetic", keep=(0, 7), dtype=jnp.bfloat16)
    cfg, params = prune.cut(teacher.cfg, teacher.params, (0, 7))
    assert (student.cfg, student.fingerprint) == (cfg, teacher.fingerprint)
    jax.tree.map(np.testing.assert_array_equal, student.params, jax.tree.map(lambda a: a.astype(jnp.bfloat16), params))


def test_a_student_from_the_file_goes_where_the_mesh_wants_it(tmp_path):
    path, rules = hf_directory(tmp_path, True), sharding.make_rules(Mesh("fsdp"))
    student = io.load_model(path, keep=(0, 2), rules=rules)
    plain = io.load_model(path, keep=(0, 2))
    jax.tree.map(np.testing.assert_array_equal, student.params, plain.params)
    assert student.params["layers"]["wq"].addressable_shards[0].data.shape == (2, 32 // 8, 4, 16)


@pytest.mark.parametrize("path", ["synthetic", hf_directory, gguf_file])
def test_keep_is_checked_before_anything_is_read(tmp_path, monkeypatch, path):
    path = path if isinstance(path, str) else path(tmp_path, True)
    if path != "synthetic":
        monkeypatch.setattr(hf_io, "from_file", lambda key, tensor: pytest.fail("it was read"))
    last = 7 if path == "synthetic" else 4
    with pytest.raises(
        ValueError, match=rf"student\.init\.keep must be ascending layers in 0\.\.{last}, .*got \(2, 9\)"
    ):
        io.load_model(path, keep=(2, 9))


@pytest.mark.parametrize("path", ["synthetic", hf_directory, gguf_file])
def test_the_fingerprint_of_a_path_needs_no_weights(tmp_path, monkeypatch, path):
    path = path if isinstance(path, str) else path(tmp_path, True)
    want = io.load_model(path).fingerprint
    for reader in ("open_model", "load_config"):
        monkeypatch.setattr(io, reader, lambda *a, **k: pytest.fail("it was opened"))
    assert io.fingerprint(path) == want


def test_the_fingerprint_of_nothing():
    with pytest.raises(ValueError, match=r"student\.path must be a path that exists, got '/no/such'"):
        io.fingerprint("/no/such", where="student.path")
