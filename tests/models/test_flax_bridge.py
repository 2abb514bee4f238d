"""Bridged modules of the same maths as ours: same hidden states, same step, on any mesh; and what is refused."""

import dataclasses
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kdjax import loop, models
from kdjax.build import build, build_parts
from kdjax.config import Mesh
from kdjax.generation import Sampling, sample
from kdjax.generation.sampler import How, advance, begin, refill
from kdjax.models import flax_bridge, flax_models, hf_io, io, tokenizer
from kdjax.optim import decayed
from kdjax.sharding import Rules, make_rules
from kdjax.step import init_state, make_train_step
from tests.models import flax_tiny
from tests.step import step_bench

STUDENT = dataclasses.replace(step_bench.STUDENT, vocab_size=104, max_positions=64)
TEACHER = dataclasses.replace(step_bench.TEACHER, vocab_size=104, max_positions=64, layers=1)
CASE = {"data__seq_len": 24, "selection__fraction": 0.3, "optim__eps": 1e-2, "optim__weight_decay": 0.5}


def draw(cfg, seed):
    return models.init_params(dataclasses.replace(cfg, initializer_range=0.3), jax.random.key(seed))


@pytest.fixture(scope="module")
def native():
    return draw(STUDENT, 0), draw(TEACHER, 1)


@pytest.fixture
def module(native, monkeypatch):
    """The user's module: `bridged.student`, `bridged.teacher`, and what a test adds."""
    made = types.ModuleType("bridged")
    made.student = lambda: flax_tiny.nnx_bridge(STUDENT, native[0])
    made.teacher = lambda: flax_tiny.linen_bridge(TEACHER, native[1])
    monkeypatch.setitem(sys.modules, "bridged", made)
    return made


def load(name, rules=Rules(), dtype=jnp.float32):
    return io.load_model(f"flax:bridged:{name}", dtype=dtype, rules=rules, where=f"{name}.path")


def close(left, right, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), **tolerance), left, right)


def hidden_of(cfg, params, batch, **options):
    return models.hidden(cfg, params, batch.tokens, batch.segment_ids, batch.positions, **options)


# --- the same maths


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_hidden_states_and_head_are_those_of_the_native_model(module, native, name):
    cfg, params = (STUDENT, native[0]) if name == "student" else (TEACHER, native[1])
    batch, loaded = step_bench.ragged_batch(), load(name)
    wanted, found = (
        jax.jit(lambda c=c, p=p: hidden_of(c, p, batch))() for c, p in ((cfg, params), (loaded.cfg, loaded.params))
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5 * float(jnp.max(jnp.abs(wanted))))
    assert (loaded.cfg.vocab_size, loaded.cfg.width, loaded.cfg.tied) == (104, cfg.width, name == "student")
    heads = models.head(cfg, params), models.head(loaded.cfg, loaded.params)
    np.testing.assert_array_equal(heads[0].weight, heads[1].weight)
    assert heads[0].vocab_major == heads[1].vocab_major
    assert models.abstract_params(loaded.cfg)["flax"].keys() == loaded.params["flax"].keys()


def test_the_check_of_logits_sees_a_cut_at_the_wrong_place(native):
    module = flax_tiny.NnxLlama(STUDENT, native[0])
    module.eval()

    def logits(batch, module=module):
        return module(batch.tokens, batch.positions, flax_bridge.attention_mask(batch))

    def doubled(module, batch):
        module.unembed = lambda x: 2 * x
        return logits(batch, module)

    assert flax_bridge.check_logits(flax_tiny.nnx_bridge(STUDENT, native[0]), logits) < 1e-4
    assert flax_bridge.check_logits(flax_tiny.nnx_bridge(STUDENT, native[0], hidden=doubled), logits) > 1


def bridged_step(rules, batch, steps, case=CASE):
    """(state, losses) after `steps` SE-KD steps of the bridged student and teacher."""
    sides = load("student", rules), load("teacher", rules)
    parts = build_parts(step_bench.experiment(**case), sides[0].cfg, sides[1].cfg, rules)
    return run(parts, sides[0].params, sides[1].params, batch, steps)


def run(parts, params, teacher, batch, steps):
    columns = {name: np.asarray(getattr(batch, name)) for name in batch.__dataclass_fields__ if name != "teacher"}
    placed, losses = loop.place(columns, parts.rules, 1), []
    state = jax.jit(lambda p: init_state(parts, p, 3))(params)
    step = jax.jit(make_train_step(parts), donate_argnums=0)
    for _ in range(steps):
        state, report = step(state, teacher, placed)
        losses.append(float(report.metrics["loss"][0] / report.metrics["loss"][1]))
    assert step._cache_size() == 1
    return state, losses


def test_one_step_equals_the_native_one(module, native):
    """Loss, and every parameter: what is decayed, what is not, and what the selection chose besides."""
    batch = step_bench.ragged_batch()
    parts = build_parts(step_bench.experiment(**CASE), STUDENT, TEACHER, Rules())
    wanted, losses = run(parts, jax.tree.map(jnp.copy, native[0]), native[1], batch, 1)
    found, found_losses = bridged_step(Rules(), batch, 1)
    np.testing.assert_allclose(found_losses, losses, rtol=1e-5)
    expected = flax_tiny.nnx_bridge(STUDENT, wanted.params).params
    assert float(jnp.max(jnp.abs(expected["embed"] - native[0]["embed"]))) > 1e-5
    close(found.params, expected, atol=1e-7)


def test_vectors_and_norms_are_not_decayed(module):
    flags = decayed(load("student").params)
    assert flags["embed"]
    assert not flags["flax"]["final_norm"]
    layer = flags["flax"]["layers"]["0"]
    assert layer["wq"]
    assert not layer["attn_norm"]
    assert not decayed({"flax": {"stack": {"scale": jnp.ones((2, 3)), "bias": jnp.ones((2, 3))}}})["flax"]["stack"][
        "scale"
    ]


# --- meshes, checkpoints, dtypes


def test_eight_devices_equal_one(module):
    batch = step_bench.ragged_batch(16)
    one, losses = bridged_step(Rules(), batch, 2)
    for preset, parts in (("dp", 1), ("fsdp", 8)):
        eight, losses8 = bridged_step(make_rules(Mesh(preset)), batch, 2)
        np.testing.assert_allclose(losses8, losses, rtol=1e-5)
        close(eight.params, one.params, atol=1e-6)
        large = [leaf for leaf in jax.tree.leaves((eight.params, eight.opt_state)) if leaf.size >= 1000]
        assert len(large) >= 3 * 10
        assert all(leaf.addressable_shards[0].data.size == leaf.size // parts for leaf in large)


def test_where_parameters_are_split(module):
    specs = flax_models.open_model("flax:bridged:student").specs
    layer = specs["flax"]["layers"]["0"]
    assert specs["embed"].axes == ("vocab", "embed")
    assert layer["wq"].axes == ("embed", "mlp", None)  # metadata: fsdp, tp, none
    assert layer["wo"].axes == ("mlp", None, "embed")
    assert layer["w_down"].axes == ("embed", "embed")  # a name that nobody knows: as without any
    assert layer["wk"].axes == ("embed", None, "embed")  # no metadata: the two largest of 32, 2, 8
    assert layer["attn_norm"].axes == (None,)
    boxed = flax_models.open_model("flax:bridged:teacher").specs
    assert boxed["head"].axes == ("embed", "vocab")
    assert boxed["flax"]["layer_0"]["wq"].axes == ("embed", "mlp", None)
    never = flax_tiny.nnx_bridge(STUDENT, draw(STUDENT, 0), axes={"fsdp": None, "tp": None}).specs
    assert never["flax"]["layers"]["0"]["wq"].axes == (None, None, None)


def test_the_module_computes_in_the_compute_dtype(module, native):
    batch, loaded = step_bench.ragged_batch(), load("teacher", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.bfloat16)}
    found = jax.jit(lambda: hidden_of(loaded.cfg, loaded.params, batch, compute_dtype=jnp.bfloat16))()
    wanted = jax.jit(lambda: hidden_of(TEACHER, native[1], batch))()
    assert found.dtype == jnp.bfloat16
    assert float(jnp.mean(jnp.abs(found.astype(jnp.float32) - wanted))) < 0.05 * float(jnp.mean(jnp.abs(wanted)))


# --- packing and state


def test_attention_mask_and_packing():
    batch = step_bench.ragged_batch(4, 12)
    segments, mask = np.asarray(batch.segment_ids), np.asarray(flax_bridge.attention_mask(batch))
    for b, t, s in np.ndindex(mask.shape):
        assert mask[b, t, s] == (s <= t and segments[b, s] == segments[b, t])


def test_state_that_is_not_trained_stays_as_it_is(module, native):
    """Dropout is off, so two calls agree; counters and keys of the user's own module do not move."""
    user = flax_tiny.NnxLlama(STUDENT, native[0])
    bridge = flax_tiny.nnx_bridge(STUDENT, native[0])
    batch = step_bench.ragged_batch(2, 8)
    np.testing.assert_array_equal(bridge.hidden(bridge.params, batch), bridge.hidden(bridge.params, batch))
    assert int(user.calls[...]) == 0
    assert not user.dropout.deterministic
    assert bridge.reads_segments
    assert "calls" not in bridge.params["flax"]


def test_too_much_state_is_refused(native, monkeypatch):
    monkeypatch.setattr(flax_bridge, "FROZEN_LIMIT", 16)
    with pytest.raises(
        ValueError, match="besides its parameters must be at most .* MiB, got .* constants of the program"
    ):
        flax_tiny.nnx_bridge(STUDENT, native[0])


def test_greedy_tokens_are_those_of_the_native_model(module, native):
    """In two rows that begin one after the other, and in one that another answer had before."""
    prompts, lengths = jnp.asarray([[5, 6, 7, 8], [9, 3, 0, 0]], jnp.int32), jnp.asarray([4, 2], jnp.int32)
    keys, greedy = jax.random.split(jax.random.key(0), (2, 1)), Sampling(temperature=0)
    wanted = sample(TEACHER, native[1], prompts, lengths, keys, settings=greedy, new_tokens=5).tokens[:, 0]
    loaded, how = load("teacher"), How(greedy, 5)
    cfg, params = loaded.cfg, loaded.params
    waiting, state = begin(cfg, how, params, prompts, lengths, keys, np.ones((2, 1), bool)), None
    for source, steps, made in (
        ([1, -1], 2, {0: (1, 3)}),
        ([-1, 0], 2, {0: (1, 5), 1: (0, 3)}),
        ([0, -1], 4, {0: (0, 5), 1: (0, 5)}),
    ):
        state = refill(cfg, how, state, waiting, np.asarray(source, np.int32))
        state = advance(cfg, how, params, state, jnp.int32(steps), jnp.int32(0), np.zeros(2, bool))
        for row, (prompt, count) in made.items():
            np.testing.assert_array_equal(state.rows.tokens[row, :count], wanted[prompt, :count])


def test_fingerprint_is_of_weights_and_version(native):
    def mark(params, **changes):
        return flax_models.fingerprint(flax_tiny.nnx_bridge(STUDENT, params, **changes))

    one = mark(native[0])
    assert one == mark(native[0])
    assert one != mark(native[0], version="2")
    assert one != mark(native[0], vocab_size=100)
    other = native[0] | {"final_norm": native[0]["final_norm"].at[3].add(1e-3)}
    assert one != mark(other)


def test_a_name_that_stands_for_something_else_is_opened_anew(module, native):
    before = flax_models.open_model("flax:bridged:student").cfg
    assert flax_models.open_model("flax:bridged:student").cfg is before
    module.student = lambda: flax_tiny.nnx_bridge(STUDENT, native[0], max_positions=32)
    after = flax_models.open_model("flax:bridged:student").cfg
    assert (before.max_positions, after.max_positions) == (64, 32)
    assert before.family != after.family
    first, second = load("student"), load("student")  # the weights are let go of, and made again
    close(first.params, second.params, atol=0)


# --- the whole path


@pytest.fixture
def experiment(tmp_path, native, module):
    """experiment(**overrides): synthetic tokenizer, one file of text, bridged teacher and student."""
    wide = {"vocab_size": 264}
    module.student = lambda: flax_tiny.nnx_bridge(
        dataclasses.replace(STUDENT, **wide), draw(dataclasses.replace(STUDENT, **wide), 0)
    )
    module.teacher = lambda: flax_tiny.linen_bridge(
        dataclasses.replace(TEACHER, **wide), draw(dataclasses.replace(TEACHER, **wide), 1)
    )
    lines = [{"text": f"{i} green bottles hang on the wall, and if {i % 7} should fall."} for i in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def make(**overrides):
        given = {
            "teacher__path": "flax:bridged:teacher",
            "student__path": "flax:bridged:student",
            "data__path": str(tmp_path / "text.jsonl"),
            "data__seq_len": 32,
            "train__steps": 2,
            "eval__rows": 4,
            "eval__completions": 1,
            "eval__new_tokens": 3,
            "log__tensorboard": False,
        }
        return step_bench.experiment(**(given | overrides))

    return make


def test_a_run_from_config_to_checkpoint(experiment, tmp_path):
    built = build(experiment(mesh__preset="fsdp"))
    assert built.student_source == "the Flax model flax:bridged:student"
    assert built.teacher.fingerprint == io.fingerprint("flax:bridged:teacher")
    assert (built.vocab_size, built.student_cfg.tied) == (264, True)
    outcome = loop.run(built, tmp_path / "run")
    assert outcome.step == 2
    state, step = loop.restore(built, tmp_path / "run")
    assert step == 2
    assert float(jnp.max(jnp.abs(state.params["embed"] - built.student_params["embed"]))) > 0
    assert (tmp_path / "run" / "report.html").is_file()
    with pytest.raises(
        ValueError, match="must be of a family of kdjax to be written as a Hugging Face directory, got 'flax:"
    ):
        hf_io.save_hf(tmp_path / "export", built.student_cfg, state.params, built.tokenizer)


REFUSED = {
    "packing": (
        {"teacher__path": "flax:bridged:blind"},
        "data.packing must be 'row' with teacher.path='flax:bridged:blind', got 'pack'",
    ),
    "cut": (
        {"student__path": "", "student__init__kind": "cut"},
        "student.init.kind must be 'own' with 'flax:bridged:teacher'",
    ),
    "random": ({"student__init__kind": "random"}, "must be 'own' with 'flax:bridged:student', got 'random'"),
    "length": ({"data__seq_len": 128}, "data.seq_len must be at most the 64 positions"),
    "tensor": (
        {"mesh__preset": "tp", "mesh__shape": "data:4,model:2", "teacher__path": "synthetic"},
        "mesh.preset must be 'dp' or 'fsdp' with a Flax model",
    ),
    "tensor teacher": (
        {"mesh__preset": "fsdp", "mesh__shape": "model:8", "teacher__preset": "tp"},
        "teacher.preset must be 'dp' or 'fsdp' with a Flax model",
    ),
    "integers": ({"student__path": "flax:bridged:whole"}, "floating-point parameters, got int8 in 'flax/table'"),
    "shapes alone": ({"teacher__path": "flax:bridged:hollow"}, "must be a model with weights, got shapes alone"),
    "no tokenizer": (
        {"teacher__path": "flax:bridged:mute"},
        "teacher.path must be a model with a tokenizer, got 'flax:bridged:mute'",
    ),
    "no module": ({"teacher__path": "flax:nowhere:x"}, "teacher.path must name an importable object, got 'nowhere:x'"),
    "no model": (
        {"teacher__path": "flax:bridged:number"},
        "must name a FlaxModel or a function .* got 'flax:bridged:number' with int",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_the_build(experiment, module, case):
    wide = dataclasses.replace(STUDENT, vocab_size=264)
    params = draw(wide, 0)

    def blind(m, batch):
        m.unembed = lambda x: x
        size = batch.tokens.shape[1]
        return m(batch.tokens, batch.positions, jnp.tri(size, dtype=bool)[None])

    whole = flax_tiny.NnxLlama(wide, params)
    whole.table = nnx.Param(jnp.ones((2, 2), jnp.int8))
    graph, state = nnx.split(flax_tiny.NnxLlama(wide, params))
    hollow = nnx.merge(graph, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state))
    module.blind = lambda: flax_tiny.nnx_bridge(wide, params, hidden=blind)
    module.whole = lambda: flax_tiny.nnx_bridge(wide, params, whole)
    module.hollow = lambda: flax_tiny.nnx_bridge(wide, params, hollow)
    module.mute = lambda: flax_tiny.nnx_bridge(wide, params, tokenizer="")
    module.number = 3
    overrides, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        build(experiment(**overrides))


def test_recomputing_is_the_modules_own_affair(experiment):
    built, batch = build(experiment(student__remat="full")), step_bench.ragged_batch(8, 16)
    with pytest.raises(ValueError, match="student.remat must be 'none' with 'flax:bridged:student', got 'full'"):
        built.parts.student.hidden(built.student_params, batch)


def test_rows_of_one_document_need_no_segments(experiment, module):
    module.blind = lambda: dataclasses.replace(module.teacher(), reads_segments=False)
    assert build(experiment(teacher__path="flax:bridged:blind", data__packing="row")).teacher is not None


def test_tokenizer_comes_from_where_the_bridge_says(experiment):
    assert tokenizer.has_tokenizer("flax:bridged:teacher")
    ours, theirs = (
        tokenizer.fingerprint(tokenizer.load_tokenizer(path)) for path in ("synthetic", "flax:bridged:teacher")
    )
    assert ours == theirs


BAD_CUTS = {
    "logits": (
        {"hidden": lambda m, b: m(b.tokens, b.positions, flax_bridge.attention_mask(b))},
        "got 104 columns .* logits",
    ),
    "a tuple": (
        {"hidden": lambda m, b: (b.tokens, b.positions)},
        "one array \\[B, T, D\\], got \\(2, 8\\), \\(2, 8\\)",
    ),
    "two axes": ({"hidden": lambda m, b: b.tokens}, "one array \\[B, T, D\\], got \\(2, 8\\) for"),
    "transposed": ({"head": lambda m: m.embed[...].T}, "one parameter of the module as it is.*got float32\\[32,104\\]"),
    "several": ({"head": lambda m: m.layers[0]}, "one parameter of the module as it is"),
    "wrong weight": (
        {"head": lambda m: m.layers[0].w_down},
        "head must be \\[V, D\\] or \\[D, V\\] with D = 32.*got \\[48, 32\\]",
    ),
}


@pytest.mark.parametrize("case", BAD_CUTS)
def test_a_wrong_cut_is_refused(native, case):
    changes, message = BAD_CUTS[case]
    with pytest.raises(ValueError, match=message):
        flax_tiny.nnx_bridge(STUDENT, native[0], **changes)


def test_what_is_no_module_is_refused(native):
    _, variables = flax_tiny.linen_module(TEACHER, native[1])
    sizes = {"hidden": print, "head": print, "vocab_size": 104, "max_positions": 64}
    with pytest.raises(ValueError, match="module must be a flax.nnx.Module, got dict. Use from_linen"):
        flax_bridge.from_nnx(variables, **sizes)
    with pytest.raises(ValueError, match="variables must hold 'params'.*got \\['embed'"):
        flax_bridge.from_linen(variables["params"], **sizes)
