"""What the yardstick makes of measured lines: which scores are compared, and how well they do."""

import numpy as np
import pytest
import scipy.stats

from kdjax.curation.answers.scores import SCORES
from kdjax.run.yardstick import compared

NAMES = {name for name in SCORES if not name.endswith("_no_diag")} | {"shortest"}


def measured(**changes):
    """Six questions with four answers each, of random figures; gain is what the Brier term says."""
    rng = np.random.default_rng(0)
    figures = sorted({"first_logp"} | {name for score in SCORES.values() for name in score.needs})
    lines = []
    for at in range(24):
        its = dict(zip(figures, rng.uniform(1, 2, len(figures)).tolist(), strict=True)) | changes
        line = {"id": f"q{at // 4}", "row": str(at), "teacher": "t", "figures": its}
        lines.append(line | {"gradient": its.get("gradient_norm", 1.0) ** 2, "gain": -its["brier"]})
    return lines


def test_every_score_is_compared():
    lines = measured()
    found = compared(lines, 0.5)
    assert set(found.gradient) == NAMES
    assert set(found.gain) == NAMES | {"gradient"}
    assert (found.gradient["grand"].mean, found.gradient["grand"].questions) == (pytest.approx(1), 6)
    assert found.gain["brier"].mean == pytest.approx(1), "the lowest is preferred, and gains most"
    for name, figure in (("lalp", "local_logp"), ("aslec_drop", "rest_logp")):  # the highest is preferred
        columns = np.array([[line["figures"][figure], line["gradient"]] for line in lines]).reshape(6, 4, 2)
        rho = [-scipy.stats.spearmanr(*columns[at].T).statistic for at in range(6)]
        assert found.gradient[name].mean == pytest.approx(np.mean(rho))


def test_figures_that_are_not_there():
    lines = measured()
    for line in lines:
        line["figures"] = {name: value for name, value in line["figures"].items() if name != "sim_aa"}
    assert NAMES - set(compared(lines, 0.5).gradient) == {"scas", "c_aa", "similarity"}
    lines = measured()
    lines[5]["figures"] |= {"local_logp": None, "rest_logp": None}  # null of a file: not defined
    assert compared(lines, 0.5).gradient["lalp"].questions == 6
    for line in lines:
        del line["figures"]["first_logp"], line["figures"]["first_share"]
    assert "aslec_casl" not in compared(lines, 0.5).gradient


def test_a_slope_that_is_not_determined_leaves_its_score_out():
    with pytest.warns(UserWarning, match="^aslec_casl is left out, for want of its slope: "):
        found = compared(measured(first_share=0.5), 0.5)
    assert NAMES - set(found.gradient) == {"aslec_casl"}
