"""The scorer's figures against whole logits and states of plain rows, by torch in float64; every family."""

import numpy as np
import pytest
from answer_problems import OWN, SIZES, oracle, questions

from kdjax import models
from kdjax.build.parts import language_model
from kdjax.config import Answers
from kdjax.curation.answers.scorer import FIGURES, make_answer_scorer
from kdjax.models import io
from kdjax.sharding import Rules

torch = pytest.importorskip("torch", reason="torch is the oracle of the parity tests; pip install torch==2.13.0")
transformers = pytest.importorskip("transformers")

SEQ_LEN = 96


def make_torch(family):
    config = transformers.AutoConfig.for_model(family, tie_word_embeddings=False, **SIZES | OWN.get(family, {}))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def plain_row(model, ids):
    """logits [T, V], what the head is given [T, D], what the last up-projection gives [T, F]; of one row."""
    kept = {}
    up = model.model.layers[-1].mlp.up_proj
    hooks = [
        up.register_forward_hook(lambda module, given, out: kept.update(up=out)),
        model.lm_head.register_forward_hook(lambda module, given, out: kept.update(hidden=given[0])),
    ]
    with torch.no_grad():
        logits = model(torch.tensor(ids.astype(np.int64))[None]).logits
    for hook in hooks:
        hook.remove()
    return [side[0].double().numpy() for side in (logits, kept["hidden"], kept["up"])]


@pytest.mark.parametrize("family", models.FAMILIES)
def test_figures_are_those_of_plain_rows(family, tmp_path):
    theirs = make_torch(family)
    theirs.save_pretrained(tmp_path)
    loaded = io.load_model(tmp_path)
    model = language_model(loaded.cfg, Rules(), loaded.cfg.vocab_size, np.float32)
    theirs = theirs.double()
    given = questions() if family == "llama" else questions()[:2]
    for alignment in ("token", "predictor") if family == "llama" else ("token",):
        scorer = make_answer_scorer(
            model, Answers(alignment=alignment), SEQ_LEN, figures=tuple(FIGURES), tokens=True, room=256
        )
        found = {each.row: each for each in scorer(loaded.params, given)}
        assert set(found) == {answer.row for asked in given for answer in asked.answers}
        for asked in given:
            for answer in asked.answers:
                row = plain_row(theirs, np.concatenate([asked.question.ids, answer.tokens.ids]))
                want, of_tokens = oracle(*row, asked.question, answer.tokens, alignment)
                got = found[answer.row]
                assert (got.id, got.teacher, got.error) == (asked.id, answer.teacher, "")
                assert set(got.figures) == set(FIGURES)
                for name in FIGURES:
                    assert got.figures[name] == pytest.approx(want[name], rel=3e-5, abs=1e-6), (name, answer.row)
                for name, values in of_tokens.items():
                    np.testing.assert_allclose(getattr(got.tokens, name), values, rtol=2e-4, atol=1e-5, err_msg=name)
        assert want["sim_aa"] < 0.99  # there is something to see
        assert max(max(each.tokens.rank) for each in found.values()) > 100  # where sums of ranks have it as 100
