"""What a measurer may be asked for, and the slope of ASLEC-CASL over a few answers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.build import language_model
from kdjax.config import Answers, Data
from kdjax.curation.answers.encode import coding, encode
from kdjax.curation.answers.measure import fitted_context, make_measurer, measurable
from kdjax.curation.answers.pool import Candidate
from kdjax.curation.answers.scores import SCORES
from kdjax.data.prompts import Prompt
from kdjax.models import ModelConfig, init_params, synthetic
from kdjax.sharding import Rules

MODEL = language_model(ModelConfig("llama", 97, 32, 1, 4, 2, 8, 48, tied=True), Rules(), 97, jnp.float32)


def test_every_score_can_be_measured():
    assert {name for score in SCORES.values() for name in score.needs} <= set(measurable(MODEL))


def test_unknown_figures_are_refused():
    of = coding(synthetic.make_tokenizer(), Data(), Answers())
    with pytest.raises(ValueError, match="^needs must be a known name .*got 'local_logq'. Did you mean 'local_logp'"):
        make_measurer(MODEL, Answers(), of, needs=("brier", "local_logq"))
    with pytest.raises(ValueError, match="^answers.score must be a known name .*got 'lalq'"):
        make_measurer(MODEL, Answers(score="lalq"), of)


def test_steps_that_are_read_by_themselves_are_counted():
    """Three steps follow the first two; the second pass over them is told of too."""
    of = coding(synthetic.make_tokenizer(), Data(seq_len=64, chat_template=False), Answers())
    question, calls = Prompt("q", "Why?"), []
    one = Candidate(question, "ada", "We add. We see. We go. We end. Yes.", "0" * 16)
    cfg = ModelConfig("llama", 259, 32, 1, 4, 2, 8, 48, tied=True)
    model, params = language_model(cfg, Rules(), 259, jnp.float32), init_params(cfg, jax.random.key(0))
    measure = make_measurer(
        model, Answers(score="lalp"), of, on_call=lambda answers, places: calls.append((answers, places))
    )
    (found,) = measure(params, [(encode(question, [one], of), {one.row: one.text})])
    assert np.isfinite(found.figures["local_logp"])
    assert [answers for answers, _ in calls] == [1, 3]
    assert all(places >= 64 for _, places in calls)


def test_a_slope_that_is_not_determined_is_said():
    rng = np.random.default_rng(0)
    names = ("rest_logp", "first_logp", "first_share")
    made = [dict(zip(names, rng.normal(size=3), strict=True)) for _ in range(9)]
    made = [each | {"answer_nll": 1.7 * each["first_share"] - each["rest_logp"]} for each in made]
    context = fitted_context(0.3, made)
    assert (context.question_share, context.first_share_slope) == (0.3, pytest.approx(-1.7))
    with pytest.warns(
        UserWarning, match="^aslec_casl is left out, for want of its slope: figures must be of at least 5"
    ):
        assert math.isnan(fitted_context(0.3, made[:4]).first_share_slope)
