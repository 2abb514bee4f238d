"""From an experiment to its parts: every source of a student, with and without a teacher, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import loop, models
from kdjax.build import build
from kdjax.config import default_config, from_config_dict
from kdjax.data import train_iterator
from kdjax.models import ModelConfig
from kdjax.models.hf_io import save_hf
from kdjax.sharding import DATA
from kdjax.step import make_train_step

SPECIAL = ("<|endoftext|>", "<|im_end|>")
ROWS = 264  # of the embeddings: 256 bytes, the special tokens and padding
TEACHER = ModelConfig("llama", ROWS, 32, 4, 4, 2, 8, 48, tied=False, initializer_range=0.3)
SOFT = {"loss__terms": (("cross_entropy", 1.0),)}


def make_tokenizer(swap=()):
    """One token per byte; `swap`: two tokens that exchange their ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL]
    ids = {token: index for index, token in enumerate(tokens)}
    if swap:
        ids[swap[0]], ids[swap[1]] = ids[swap[1]], ids[swap[0]]
    inner = Tokenizer(kinds.BPE(vocab=ids, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=SPECIAL[1], pad_token=SPECIAL[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text and Hugging Face directories: teacher, one with other ids, ones of other widths, one without tokenizer."""
    root = tmp_path_factory.mktemp("build")
    lines = [{"text": f"{i} green bottles hang on the wall, and if {i % 7} should fall."} for i in range(40)]
    (root / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def model(name, tokenizer, **changes):
        cfg = dataclasses.replace(TEACHER, **changes)
        draw = np.random.default_rng(len(name)).standard_normal
        params = jax.tree.map(
            lambda spec: spec.init.mean + spec.init.std * draw(spec.shape, np.float32), models.param_specs(cfg)
        )
        save_hf(root / name, cfg, params, tokenizer)

    own = make_tokenizer()
    model("teacher", own)
    model("swapped", make_tokenizer(swap=("a", "z")), width=24, layers=2)
    model("wider", own, width=24, layers=2, vocab_size=ROWS + 56, tied=True)
    model("narrow", own, width=24, layers=1, vocab_size=120)
    model("bare", None, width=24, layers=2)
    return root


@pytest.fixture
def experiment(folder):
    """experiment(**overrides): models by the name of their directory."""

    def make(**overrides):
        config = default_config()
        config.data.path = "text.jsonl"
        config.data.seq_len = 32
        config.optim.warmup = 0
        config.train.steps = 2
        config.teacher.path = "teacher"
        config.student.init.kind = "cut"
        config.student.init.layers = 2
        for name, value in overrides.items():
            *path, last = name.split("__")
            at = config
            for part in path:
                at = at[part]
            at[last] = value
        for group, name in (("teacher", "path"), ("student", "path"), ("data", "path"), ("data", "tokenizer")):
            if (folder / config[group][name]).exists() and config[group][name]:
                config[group][name] = str(folder / config[group][name])
        return from_config_dict(config)

    return make


def train(built, steps=1):
    """(state, metrics of each step, how often the step was compiled)."""
    e, state, reports = built.experiment, loop.fresh_state(built), []
    data = train_iterator(built.data.train, e.train.batch_size, e.train.seed)
    step = jax.jit(make_train_step(built.parts), donate_argnums=0)
    for _ in range(steps):
        batch = loop.place(next(data), built.rules, e.train.accumulate)
        state, report = step(state, built.teacher_params, batch)
        reports.append({name: float(total / count) for name, (total, count) in report.metrics.items()})
    return state, reports, step._cache_size()


def form(leaf):
    return leaf.shape, leaf.dtype, leaf.sharding.spec


def equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


# --- the student's weights


def test_own_weights(experiment, folder):
    from safetensors.numpy import load_file

    built = build(experiment(student__init__kind="own", student__path="wider"))
    stored = load_file(folder / "wider" / "model.safetensors")
    np.testing.assert_array_equal(built.student_params["embed"], stored["model.embed_tokens.weight"])
    np.testing.assert_array_equal(
        built.student_params["layers"]["w_up"][1], stored["model.layers.1.mlp.up_proj.weight"].T
    )
    assert "wider" in built.student_source
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(built.student_params))


@pytest.mark.parametrize(
    ("overrides", "keep"),
    [
        ({"student__init__keep": (0, 3)}, [0, 3]),
        ({"student__init__keep": (1, 2, 3), "teacher__dtype": "bfloat16"}, [1, 2, 3]),
        ({"student__init__layers": 1}, [0]),
        ({"student__init__layers": 4}, [0, 1, 2, 3]),  # the first three, then an even spread
    ],
)
def test_cut_keeps_these_layers_as_float32_copies(experiment, overrides, keep):
    built = build(experiment(**overrides))
    teacher, student = built.teacher_params, built.student_params
    assert built.student_cfg == dataclasses.replace(
        TEACHER, layers=len(keep), initializer_range=built.student_cfg.initializer_range
    )
    for name, leaf in teacher["layers"].items():
        np.testing.assert_array_equal(student["layers"][name], np.asarray(leaf, np.float32)[keep])
    for name in set(teacher) - {"layers"}:
        np.testing.assert_array_equal(student[name], np.asarray(teacher[name], np.float32))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(student))
    assert built.student_source == f"layers {', '.join(map(str, keep))} of the teacher's 4"


def test_the_state_that_is_donated_shares_no_memory_with_teacher_or_untrained_student(experiment):
    built = build(experiment(student__init__keep=(0, 1, 2, 3)))  # every layer
    trees = built.teacher_params, built.student_params, loop.fresh_state(built).params
    places = [{leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)} for tree in trees]
    assert len(set.union(*places)) == sum(map(len, places)) == 3 * len(jax.tree.leaves(built.student_params))


def test_random_weights_have_the_shape_and_follow_the_seed(experiment):
    overrides = {"student__init__kind": "random", "student__path": "swapped"}  # what its tokenizer is does not matter
    built, again, other = (build(experiment(train__seed=seed, **overrides)) for seed in (3, 3, 4))
    first = built.student_params
    equal(first, again.student_params)
    assert first["embed"].shape == (ROWS, 24)
    assert not np.array_equal(first["embed"], other.student_params["embed"])
    assert not np.array_equal(first["layers"]["w_up"][0], first["layers"]["w_up"][1])
    assert built.tokenizer("az")["input_ids"] == make_tokenizer()("az")["input_ids"]  # the teacher's


def stored_by_the_rules(spread, alone):
    """`spread` has the weights of `alone`, each where the rules say, and not whole on every device."""

    def check(leaf, other, spec):
        assert leaf.sharding.is_equivalent_to(spread.rules.storage(spec.axes, spec.shape), leaf.ndim)
        np.testing.assert_allclose(leaf, other, rtol=1e-6, atol=1e-7)

    jax.tree.map(check, spread.student_params, alone.student_params, models.param_specs(spread.student_cfg))
    assert spread.rules.batch_shards == 8
    assert DATA in spread.student_params["embed"].sharding.spec
    assert DATA in spread.teacher_params["head"].sharding.spec


@pytest.mark.parametrize("kind", ["own", "cut"])
def test_loaded_and_cut_weights_are_stored_by_the_rules_of_a_mesh(experiment, kind):
    overrides = {"student__init__kind": kind, "student__path": "wider"}
    stored_by_the_rules(build(experiment(mesh__preset="fsdp", **overrides)), build(experiment(**overrides)))


def test_random_weights_are_drawn_on_a_mesh_and_train_there_without_a_second_compilation(experiment):
    overrides = {"student__init__kind": "random", "student__path": "wider"}
    built = build(experiment(mesh__preset="fsdp", **overrides))
    stored_by_the_rules(built, build(experiment(**overrides)))
    state, (first, second), compiled = train(built, 2)
    assert compiled == 1
    assert 0 < first["loss"] < 20
    assert first["loss"] != second["loss"]
    assert jax.tree.map(form, state.params) == jax.tree.map(form, built.student_params)


# --- with and without a teacher


def test_without_a_teacher_cross_entropy_is_plain_fine_tuning(experiment):
    overrides = {"teacher__path": "", "student__path": "synthetic", "student__init__kind": "own", **SOFT}
    built = build(experiment(selection__policy="all", **overrides))
    assert built.teacher is None
    assert built.teacher_params == ()
    _, (report,), _ = train(built)

    rows = next(train_iterator(built.data.train, built.experiment.train.batch_size, 0))
    batch = loop.place(rows, built.rules, 1)
    hidden = jax.jit(built.parts.student.hidden)(built.student_params, jax.tree.map(lambda a: a[0], batch))
    logits = np.float64(hidden) @ np.float64(built.student_params["embed"]).T
    logp = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
    nll = -np.take_along_axis(logp[:, :-1], rows["tokens"][:, 1:, None], -1)[..., 0]
    here, after = rows["segment_ids"][:, :-1], rows["segment_ids"][:, 1:]
    expected = nll[(here == after) & (here > 0) & rows["loss_mask"][:, 1:]].mean()
    assert report["loss"] == pytest.approx(expected, rel=1e-5)


def test_without_a_teacher_divergences_and_its_signals_are_refused(experiment):
    alone = {"teacher__path": "", "student__path": "wider", "student__init__kind": "own"}
    for overrides in ({}, {**SOFT, "selection__signal": "teacher_entropy"}):
        with pytest.raises(ValueError, match=r"^teacher\.path must be set, got ''; the loss or the signal"):
            make_train_step(build(experiment(**alone, **overrides)).parts)
    built = build(experiment(**alone, **SOFT, selection__signal="teacher_entropy", selection__policy="all"))
    make_train_step(built.parts)  # nobody reads the signal


def test_a_signal_of_the_teacher_needs_no_loss_that_does(experiment):
    built = build(experiment(**SOFT, selection__signal="teacher_entropy"))
    step = make_train_step(built.parts)
    batch = loop.place(next(train_iterator(built.data.train, 8, 0)), built.rules, 1)
    traced = jax.eval_shape(lambda *a: step(*a)[1].metrics, loop.fresh_state(built), built.teacher_params, batch)
    assert {"cross_entropy", "teacher_entropy"} <= set(traced)
    assert not {"forward_kl", "student_entropy"} & set(traced)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"teacher__path": ""}, r"teacher\.path must be set, got ''; student\.init\.kind is 'cut'"),
        (
            {"student__init__kind": "own"},
            r"student\.path must be set, got ''; student\.init\.kind is 'own'\. Name a model, or set .* to 'cut'",
        ),
        ({"student__init__kind": "random"}, r"student\.path must be set, got ''; student\.init\.kind is 'random'"),
        ({"student__init__layers": 5}, r"student\.init\.layers must be in 1\.\.4"),
        ({"student__init__keep": (0, 4)}, r"student\.init\.keep must be ascending layers in 0\.\.3"),
        (
            {"student__init__kind": "own", "student__path": "./nix"},
            r"student\.path must be a path that exists, got './nix'",
        ),
        ({"teacher__path": "./nix"}, r"teacher\.path must be a path that exists, got './nix'"),
        ({"data__tokenizer": "./nix"}, r"data\.tokenizer must be a path that exists, got './nix'"),
        (
            {"data__path": "nix.jsonl"},
            r"data\.path must be a built-in corpus or an existing file or directory, got 'nix\.jsonl'",
        ),
    ],
)
def test_models_and_data_that_are_not_there(experiment, overrides, message):
    with pytest.raises(ValueError, match="^" + message):
        build(experiment(**overrides))


# --- names


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "selection__policy",
            "top_fracton",
            r"selection\.policy must be .*'top_fracton'\. Did you mean 'top_fraction'\? Known: adaptive, all,",
        ),
        (
            "selection__signal",
            "studnet_entropy",
            r"selection\.signal must be .*Did you mean 'student_entropy'\? Known: .*random,",
        ),
        (
            "loss__terms",
            (("forwardkl", 1.0),),
            r"loss\.terms must be .*Did you mean 'forward_kl'\? Known: .*cross_entropy,",
        ),
        (
            "loss__terms",
            (("tvd", ("liner", 1.0, 0.0, 9.0)),),
            r"loss\.terms must be .*Did you mean 'linear'\? Known: constant,",
        ),
        ("loss__tau", ("cosin", 1.0, 0.0, 9.0), r"loss\.tau must be .*Did you mean 'cosine'\? Known: constant,"),
        ("optim__schedule", "cosinus", r"optim\.schedule must be .*Did you mean 'cosine'\? Known: constant,"),
        ("mesh__preset", "fdsp", r"mesh\.preset must be .*Did you mean 'fsdp'\? Known: dp,"),
        ("student__remat", "ful", r"student\.remat must be 'none' or 'full' or 'dots', got 'ful'"),
        ("student__compute_dtype", "bf16", r"student\.compute_dtype must be 'float32' or 'bfloat16', got 'bf16'"),
        ("teacher__dtype", "f32", r"teacher\.dtype must be 'float32' or 'bfloat16', got 'f32'"),
        (
            "loss__terms",
            (("forward_kl", 1.0, 2.0),),
            r"loss\.terms must be a non-empty tuple of \(name, weight or schedule\)",
        ),
        (
            "loss__terms",
            (("tvd", 1.0), ("tvd", 2.0)),
            r"loss\.terms must name each loss once, got 'tvd' twice\. Add up",
        ),
        (
            "loss__terms",
            (("tvd", 0.0), ("jsd", 0)),
            r"loss\.terms must have a weight that is not 0, got .*nothing would be learned",
        ),
        (
            "loss__terms",
            (("tvd", ("linear", 1.0)),),
            r"loss\.terms must be a number or \(name, \*arguments\), got \('linear', 1\.0\)",
        ),
        (
            "loss__tau",
            ("linear", 2.0, 1.0, 0.0),
            r"loss\.tau must be a number or \(name, \*arguments\), got .*steps must be positive",
        ),
        ("optim__warmup", 2, r"optim\.warmup must be less than train\.steps = 2, got 2"),
    ],
)
def test_a_bad_name_is_said_before_a_model_is_looked_for(experiment, path, value, message):
    with pytest.raises(ValueError, match="^" + message):
        build(experiment(teacher__path="./nix", **{path: value}))


def test_a_term_of_weight_0_is_left_out_and_an_entry_of_elsewhere_is_taken(experiment):
    terms = (("jsd", 0.0), ("kdjax.losses:tvd", 1.0))
    built = build(
        experiment(loss__terms=terms, selection__policy="kdjax.selection.policies.all_positions:all_positions")
    )
    assert list(built.parts.objective.terms) == ["kdjax.losses:tvd"]
    assert built.parts.chooser.signal is None


@pytest.mark.parametrize(("rows", "accumulate", "got"), [(12, 1, 12), (16, 4, 4)])
def test_every_device_takes_the_same_number_of_rows(experiment, rows, accumulate, got):
    overrides = {"train__batch_size": rows, "train__accumulate": accumulate, "mesh__preset": "dp"}
    with pytest.raises(
        ValueError, match=rf"^train\.batch_size / train\.accumulate must be a multiple of .*8 parts.*, got {got};"
    ):
        build(experiment(**overrides))
    assert build(experiment(mesh__shape="data:4", **overrides)).rules.batch_shards == 4


# --- tokenizers and vocabularies

ANOTHER = r"must have the {}'s tokenizer, got another: '[az]' \((\d+) and (\d+)\), '[az]' \(\2 and \1\) \(ids of"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"student__init__kind": "own", "student__path": "swapped"},
            rf"student\.path {ANOTHER.format('teacher')} teacher and student\); .*Set a student of .* family\.",
        ),
        (
            {"data__tokenizer": "swapped"},
            rf"teacher\.path {ANOTHER.format('data')} data and teacher\); .*Set data\.tokenizer to .* teacher\.",
        ),
        (
            {"data__tokenizer": "teacher", "student__init__kind": "own", "student__path": "swapped"},
            rf"student\.path {ANOTHER.format('data')} data and student\); .*Set data\.tokenizer to .* student\.",
        ),
    ],
)
def test_another_tokenizer_is_refused_with_the_tokens_that_differ(experiment, overrides, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        build(experiment(**overrides))


def test_a_model_without_tokenizer_needs_the_users_word(experiment):
    overrides = {"student__init__kind": "own", "student__path": "bare"}
    with pytest.raises(ValueError, match=r"^student\.path must be a model with a tokenizer, .*Set data\.tokenizer"):
        build(experiment(**overrides))
    assert build(experiment(data__tokenizer="teacher", **overrides)).student_cfg.width == 24
    built = build(experiment(teacher__path="bare", data__tokenizer="teacher"))  # and the same for the teacher
    assert built.tokenizer.eos_token == "<|im_end|>"


def test_surplus_rows_of_the_embedding_do_not_matter(experiment):
    built = build(experiment(student__init__kind="own", student__path="wider"))
    assert built.student_cfg.vocab_size == ROWS + 56 > built.teacher.cfg.vocab_size == ROWS
    before = np.array(built.student_params["embed"])
    state, (report,), _ = train(built)
    assert 0 < report["loss"] < 20
    changed = np.any(np.asarray(state.params["embed"]) != before, axis=1)
    assert changed[:ROWS].all()  # tied: all columns that both have take part in the softmax
    assert not changed[ROWS:].any()


def test_ids_beyond_the_embedding_are_refused(experiment):
    message = (
        r"teacher and student must have an embedding row for each token, got 264 and 120 rows: none for .* more\. Set"
    )
    with pytest.raises(ValueError, match="^" + message):
        build(experiment(student__init__kind="own", student__path="narrow"))
    # Random weights, and a model alone, are looked at by the ids that the data really has: the end of a document.
    message = (
        r"data\.tokenizer must emit ids below the {0}'s vocabulary of 120, got 256; .* Set data\.tokenizer or {0}\.path"
    )
    with pytest.raises(ValueError, match="^" + message.format("student")):
        build(experiment(student__init__kind="random", student__path="narrow"))
    with pytest.raises(ValueError, match="^" + message.format("teacher")):
        build(experiment(teacher__path="narrow", student__init__layers=1))  # whose width a cut student has
