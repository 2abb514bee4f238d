"""Gemma 3 against transformers + torch, beyond the contract of all families: real files, caps, windows, decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import models
from kdjax.generation import Sampling, sample
from kdjax.models import decoder, hf_io, io, prune
from kdjax.sharding import Rules

torch = pytest.importorskip("torch", reason="torch is the oracle of the parity tests; pip install torch==2.13.0")
transformers = pytest.importorskip("transformers")

LENGTH = 24
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64, "query_pre_attn_scalar": 5,
    "sliding_window": 6, "rope_theta": 300.0, "rope_local_base_freq": 20.0,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
}  # fmt: skip


def randomise(model):
    """Every parameter random, norms included, of a size that keeps attention far from uniform."""
    torch.manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0.0, 0.2)
    return model.eval()


def make_torch(**changes):
    config = transformers.AutoConfig.for_model("gemma3_text", **SIZES | changes)
    return randomise(transformers.AutoModelForCausalLM.from_config(config))


def token_ids(seed=1):
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (2, LENGTH)).astype(np.int32)


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids.astype(np.int64))).logits.float().numpy()


def our_logits(cfg, params, ids, dtype=jnp.float32):
    ids = jnp.asarray(ids)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    hidden = jax.jit(models.hidden, static_argnames=("cfg", "compute_dtype"))(
        cfg, params, ids, jnp.ones_like(ids), positions, compute_dtype=dtype
    )
    head = models.head(cfg, params, compute_dtype=dtype)
    weight = head.weight.T if head.vocab_major else head.weight
    logits = jnp.einsum("btd,dv->btv", hidden, weight, preferred_element_type=jnp.float32)
    return np.asarray(head.soft_cap * jnp.tanh(logits / head.soft_cap) if head.soft_cap else logits)


def assert_close(ours, theirs, tolerance=1e-4):
    assert np.max(np.abs(theirs)) > 1  # there is something to compare
    assert np.max(np.abs(ours - theirs)) <= tolerance


def test_text_and_images_in_one_checkpoint(tmp_path):
    """The published 4B, 12B and 27B: the config of the text is nested and sparse, its tensors are among others."""
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=SIZES, vision_config=vision, mm_tokens_per_image=4, eos_token_id=[1, 42]
    )
    model = randomise(transformers.Gemma3ForConditionalGeneration(config))
    model.save_pretrained(tmp_path / "in")
    loaded = io.load_model(tmp_path / "in")
    assert (loaded.cfg.family, loaded.cfg.tied, loaded.cfg.eos_ids) == ("gemma3_text", True, (1, 42))
    assert_close(our_logits(loaded.cfg, loaded.params, token_ids()), torch_logits(model, token_ids()))
    # What goes out is the text alone.
    out = hf_io.save_hf(tmp_path / "out", loaded.cfg, loaded.params)
    again = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(again).__name__ == "Gemma3ForCausalLM"
    assert_close(torch_logits(again, token_ids()), torch_logits(model, token_ids()))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_both_spellings_of_the_text_in_a_checkpoint_of_text_and_images(tmp_path, prefix):
    from safetensors.numpy import load_file, save_file

    make_torch().save_pretrained(tmp_path)
    expected = io.load_model(tmp_path)
    tensors = load_file(tmp_path / hf_io.WEIGHTS)
    renamed = {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    strange = {"vision_tower.x": np.zeros(1, np.float32), "multi_modal_projector.y": np.zeros(1, np.float32)}
    save_file(renamed | strange, tmp_path / hf_io.WEIGHTS)
    found = io.load_model(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


@pytest.mark.parametrize("attention", [0.0, 0.7])
@pytest.mark.parametrize("final", [0.0, 2.0])
def test_soft_caps(attention, final):
    """transformers' Gemma 3 leaves the cap of the scores out; its own attention function takes one all the same."""
    from transformers.models.gemma3 import modeling_gemma3

    def capped(module, *args, **kwargs):
        return modeling_gemma3.eager_attention_forward(module, *args, softcap=module.attn_logit_softcapping, **kwargs)

    transformers.AttentionInterface.register("capped", capped)
    transformers.AttentionMaskInterface.register("capped", transformers.masking_utils.eager_mask)
    model = make_torch(attn_logit_softcapping=attention or None, final_logit_softcapping=final or None)
    model.set_attn_implementation("capped")
    cfg = hf_io.make_config(model.config.to_dict(), "config")
    assert (cfg.attn_soft_cap, cfg.logit_soft_cap) == (attention, final)
    assert models.config_from_hf(models.config_to_hf(cfg)) == cfg
    params = from_torch(cfg, model)
    theirs = torch_logits(model, token_ids())
    assert_close(our_logits(cfg, params, token_ids()), theirs)
    if attention or final:  # the caps are felt
        other = dataclasses.replace(cfg, attn_soft_cap=0.0, logit_soft_cap=0.0)
        assert np.max(np.abs(our_logits(other, params, token_ids()) - theirs)) > 0.01


def from_torch(cfg, model):
    state = model.state_dict()
    checkpoint = hf_io.Checkpoint(
        "torch", {name: tuple(value.shape) for name, value in state.items()}, lambda name: state[name].numpy()
    )
    return hf_io.assemble(cfg, checkpoint)


def test_bfloat16_is_as_close_as_that_of_transformers():
    """The scale of the embeddings is rounded to bfloat16 there too: sqrt(32) = 5.657 to 5.65625."""
    model = make_torch(num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    cfg = hf_io.make_config(model.config.to_dict(), "config")
    params = from_torch(cfg, model)
    exact = torch_logits(model, token_ids())
    theirs = torch_logits(model.to(torch.bfloat16), token_ids())
    ours = our_logits(cfg, params, token_ids(), jnp.bfloat16)
    embedded = decoder.embed(cfg, params, jnp.asarray(token_ids()), Rules(), jnp.bfloat16)
    with torch.no_grad():
        rows = model.model.embed_tokens(torch.tensor(token_ids().astype(np.int64)))
    np.testing.assert_array_equal(embedded.astype(jnp.float32), rows.float().numpy())
    scale = np.linalg.norm(exact)
    assert np.linalg.norm(ours - exact) / scale <= 1.5 * np.linalg.norm(theirs - exact) / scale < 0.05


def test_a_cut_student_is_the_model_of_its_layers(tmp_path):
    """Layers of a pattern keep their kind wherever they land; transformers, given the same, agrees."""
    make_torch().save_pretrained(tmp_path / "teacher")
    keep = (0, 3, 5, 6)
    student = io.load_model(tmp_path / "teacher", keep=keep)
    assert student.cfg.local_layers == (True, True, False, True)
    teacher = io.load_model(tmp_path / "teacher")
    assert prune.cut_config(teacher.cfg, keep) == student.cfg
    out = hf_io.save_hf(tmp_path / "student", student.cfg, student.params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert theirs.config.layer_types == ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"]
    assert_close(our_logits(student.cfg, student.params, token_ids()), torch_logits(theirs, token_ids()))


@pytest.mark.parametrize("keep", [(0, 1, 2), (5,)], ids=["only local", "only global"])
def test_a_cut_to_layers_of_one_kind(tmp_path, keep):
    make_torch().save_pretrained(tmp_path / "teacher")
    student = io.load_model(tmp_path / "teacher", keep=keep)
    out = hf_io.save_hf(tmp_path / "student", student.cfg, student.params)
    assert io.load_config(out) == student.cfg
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert_close(our_logits(student.cfg, student.params, token_ids()), torch_logits(theirs, token_ids()))


def test_greedy_decoding_says_what_transformers_says():
    """Prompts of different lengths, far beyond the window; rows that end are not gone on with."""
    model = make_torch(final_logit_softcapping=3.0)
    cfg = hf_io.make_config(model.config.to_dict(), "config")
    prompts, lengths, new = token_ids(), np.array([LENGTH, 9], np.int32), 12
    keys, settings = jax.random.split(jax.random.key(0), (2, 1)), Sampling(temperature=0)
    made = sample(cfg, from_torch(cfg, model), prompts, lengths, keys, settings=settings, new_tokens=new)
    assert made.counts.tolist() == [[new], [new]]
    for row, length, prompt in zip(np.asarray(made.tokens[:, 0]), lengths, prompts, strict=True):
        ids = torch.tensor(prompt[None, :length].astype(np.int64))
        settings = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "eos_token_id": None}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)
        assert out[0, length:].tolist() == row.tolist()
