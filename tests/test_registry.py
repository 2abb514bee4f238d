"""Names to objects: tables, suggestions, and code that lives elsewhere."""

import math

import pytest

from kdjax.registry import MOST, did_you_mean, lookup

TABLE = {"forward_kl": 1, "reverse_kl": 2, "jsd": 3}


def test_a_name_of_the_table():
    assert [lookup(TABLE, name, "loss.terms") for name in TABLE] == [1, 2, 3]


def test_an_object_from_elsewhere():
    assert lookup(TABLE, "math:tau", "loss.tau") is math.tau
    assert lookup({}, "os.path:join", "x") is __import__("os").path.join


def test_the_table_wins_over_an_import():
    assert lookup({"math:tau": "mine"}, "math:tau", "x") == "mine"


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("forward_lk", "forward_kl"), ("revers_kl", "reverse_kl"), ("jds", "jsd"), ("FORWARD_KL", None), ("zzz", None)],
)
def test_unknown_name(name, suggestion):
    with pytest.raises(ValueError, match="^loss.terms must be a known name") as caught:
        lookup(TABLE, name, "loss.terms")
    text = str(caught.value)
    assert repr(name) in text
    assert text.endswith("Known: forward_kl, jsd, reverse_kl.")
    assert (f"Did you mean {suggestion!r}?" in text) if suggestion else ("Did you mean" not in text)


@pytest.mark.parametrize(
    "name", ["no_such_module_at_all:f", "math:no_such_function", "math:", ":f", ".relative:f", "math:tau:more"]
)
def test_what_cannot_be_imported(name):
    with pytest.raises(ValueError, match="^selection.signal must name an importable object, got ") as caught:
        lookup(TABLE, name, "selection.signal")
    assert repr(name) in str(caught.value)


def test_an_error_inside_the_imported_module_is_not_disguised(tmp_path, monkeypatch):
    (tmp_path / "kdjax_broken_plugin.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError):
        lookup(TABLE, "kdjax_broken_plugin:f", "x")


def test_did_you_mean_lists_what_is_known_in_order():
    assert did_you_mean("x", ["b", "a"]) == " Known: a, b."
    assert did_you_mean("stepz", ["seed", "steps"]) == " Did you mean 'steps'? Known: seed, steps."


def test_a_long_list_is_cut_and_still_has_the_close_name():
    known = [f"question {number:03}" for number in range(300)]
    said = did_you_mean("questoin 299", known)
    assert said.startswith(" Did you mean 'question 299'? Known: question 000, ")
    assert said.endswith(f"question {MOST - 1:03} and {300 - MOST} more.")
