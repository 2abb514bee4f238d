"""From rollouts to weights: the files, what a kill leaves, what is made anew and what is refused."""

import dataclasses
import hashlib
import json
import os

import numpy as np
import pytest

from kdjax import verifiers
from kdjax.config import PassRates as Settings
from kdjax.curation import chain
from kdjax.curation.paced import load_weights, rates_of_weights, training_weights, weigh
from kdjax.curation.pass_rates import load_pass_rates, write_pass_rates
from kdjax.data.prompts import Prompt
from kdjax.generation.store import Rollout, open_store
from kdjax.verifiers import Finding, Verdict
from kdjax.verifiers.code_tests import ALLOWED

PROMPTS = [Prompt(name, f"What is {name}?", name) for name in ("1", "2", "3", "4")]
SAID = {"1": "1111", "2": "1212", "3": "?133", "4": "0000"}  # four answers to each
DEPENDS = {"model": "a" * 64, "prompts": "b", "temperature": 1.0, "seed": 5, "samples": 4}


@pytest.fixture
def judged(monkeypatch):
    """The (id, response) that the verifier 'same' was asked about."""
    asked = []

    def same(response, prompt):
        asked.append((prompt.id, response))
        verdicts = {"?": Verdict.UNDECIDED, prompt.answer: Verdict.RIGHT}
        return Finding(verdicts.get(response, Verdict.WRONG), response)

    monkeypatch.setitem(verifiers.VERIFIERS, "same", same)
    return asked


def answer(workdir, said=SAID, depends=DEPENDS, finish="stop"):
    with open_store(workdir / "rollouts", depends, {}) as store:
        for name, letters in said.items():
            for sample, letter in enumerate(letters):
                if (name, sample) not in store.done:
                    store.append(Rollout(name, sample, letter, finish, tokens=(1, 2)))


def run(workdir, prompts=PROMPTS, verifier="same", settings=None, **options):
    return chain.curate(workdir, prompts, verifier, settings or Settings(weight="paced"), **options)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def digests(workdir):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in workdir.glob("*.json*")}


def test_the_whole_chain(tmp_path, judged):
    answer(tmp_path)
    found = run(tmp_path)
    assert found.rates.right.tolist() == [4, 2, 2, 0]
    assert found.rates.tried.tolist() == [4, 4, 3, 4]
    assert found.rates.undecided.tolist() == [0, 0, 1, 0]
    # unequal numbers of answers: k (K - k) / (K (K - 1)), then mean 1 over what is kept
    assert found.weights.weight.tolist() == pytest.approx([0, 1, 1, 0])
    assert (found.tokens, found.rates.seeds) == (32, (5,))
    verified = lines(tmp_path / "verified.jsonl")
    assert len(verified) == len(judged) == 16
    assert {(line["id"], line["sample"]): line["verdict"] for line in verified}["3", 0] == "undecided"
    assert verified[0]["extracted"] == "1"
    rates, weights = load_pass_rates(tmp_path), load_weights(tmp_path)
    assert rates.basis["model"] == "a" * 64
    assert "seed" not in rates.basis
    assert weights.by_id() == found.weights.by_id()
    manifest = json.loads((tmp_path / "weights.manifest.json").read_text())
    assert manifest["basis"]["pass_rates"] == found.sha256
    assert found.sha256 == hashlib.sha256((tmp_path / "pass_rates.jsonl").read_bytes()).hexdigest()


def test_a_second_run_judges_nothing_and_changes_nothing(tmp_path, judged):
    answer(tmp_path)
    run(tmp_path)
    before = digests(tmp_path)
    judged.clear()
    run(tmp_path)
    assert judged == []
    assert digests(tmp_path) == before


def test_a_kill_at_any_byte_of_the_verdicts_loses_and_repeats_nothing(tmp_path, judged):
    answer(tmp_path)
    run(tmp_path)
    path, before = tmp_path / "verified.jsonl", digests(tmp_path)
    whole = path.read_bytes()
    for cut in [0, 1, len(whole) // 3, whole.index(b"\n"), whole.index(b"\n") + 1, len(whole) - 1]:
        path.write_bytes(whole[:cut])
        for name in ("pass_rates.jsonl", "weights.jsonl", "weights.manifest.json"):
            (tmp_path / name).unlink()
        judged.clear()
        run(tmp_path)
        assert len(judged) == 16 - whole[:cut].count(b"\n")
        assert digests(tmp_path) == before


def test_a_verifier_that_stops_the_run_is_asked_again_where_it_stopped(tmp_path, judged, monkeypatch):
    answer(tmp_path)
    real = verifiers.VERIFIERS["same"]

    def stops(response, prompt):
        if prompt.id == "3":
            raise KeyboardInterrupt
        return real(response, prompt)

    with monkeypatch.context() as patch:
        patch.setitem(verifiers.VERIFIERS, "same", stops)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert len(judged) == 8
    run(tmp_path)
    assert sorted(judged) == sorted((name, letter) for name, letters in SAID.items() for letter in letters)


def test_more_answers_are_judged_alone_and_failed_ones_count_nowhere(tmp_path, judged):
    answer(tmp_path)
    run(tmp_path)
    judged.clear()
    with open_store(tmp_path / "rollouts", DEPENDS, {}) as store:
        store.append(Rollout("4", 4, "4", "length", tokens=(1,)))
        store.append(Rollout("4", 5, "", "failed", reason="the server is gone"))
    found = run(tmp_path)
    assert judged == [("4", "4")]
    assert (found.rates.right[3], found.rates.tried[3], found.rates.truncated[3]) == (1, 5, 1)
    assert "1 of 18 answers failed and count nowhere; the first: the server is gone" in found.notes


@pytest.mark.parametrize("change", ["answers", "prompts", "verifier", "code"])
def test_verdicts_on_something_else_are_not_kept(tmp_path, judged, monkeypatch, change):
    answer(tmp_path)
    run(tmp_path)
    judged.clear()
    prompts, verifier = PROMPTS, "same"
    if change == "answers":
        path = tmp_path / "rollouts" / "rollouts.jsonl"
        path.write_text(path.read_text().replace('"response": "0"', '"response": "4"', 1))
    if change == "prompts":
        prompts = [Prompt("4", "What is 4?", "0"), *PROMPTS[:3]]
    if change == "verifier":
        monkeypatch.setitem(verifiers.VERIFIERS, "other", verifiers.VERIFIERS["same"])
        verifier = "other"
    if change == "code":
        monkeypatch.setattr(chain, "_code", lambda judges: "another version")
    found = run(tmp_path, prompts, verifier)
    assert len(judged) == (1 if change == "answers" else 16)
    right = dict(zip(found.rates.ids, found.rates.right.tolist(), strict=True))
    assert right["4"] == {"answers": 1, "prompts": 4}.get(change, 0)
    judged.clear()
    run(tmp_path, prompts, verifier)
    assert judged == []


def test_verdicts_without_an_ability_are_made_anew_once_it_is_there(tmp_path, judged, monkeypatch):
    def able(response, prompt):
        judged.append(prompt.id)
        if os.environ.get(ALLOWED) != "1":
            return Finding(Verdict.UNDECIDED, response, "code is off" if prompt.id != "1" else "once")
        return Finding(Verdict.RIGHT if response == prompt.answer else Verdict.WRONG, response)

    monkeypatch.setitem(verifiers.VERIFIERS, "same", able)
    monkeypatch.delenv(ALLOWED, raising=False)
    answer(tmp_path)
    for asked in (16, 0):  # what is known keeps its reason
        judged.clear()
        message = r"0 are never solved, 0 always, 4 could not be judged \(most often: code is off\)\. See to what"
        with pytest.raises(ValueError, match=message):
            run(tmp_path)
        assert len(judged) == asked
    monkeypatch.setenv(ALLOWED, "1")
    assert run(tmp_path).rates.right.tolist() == [4, 2, 2, 0]


def test_weights_are_of_the_pass_rates_of_this_experiment(tmp_path, judged):
    answer(tmp_path)
    found = run(tmp_path)
    depends = {"temperature": 1.0, "default_verifier": "same"}
    assert rates_of_weights(tmp_path, depends, 5).right.tolist() == found.rates.right.tolist()
    message = (
        r"by the pass rates of this student on these prompts, got others: temperature is 1\.0 there and 0\.3 here; "
        r"generation\.seed is 5 there and 6 here\. Run launch\.curate in another --workdir"
    )
    with pytest.raises(ValueError, match=message):
        rates_of_weights(tmp_path, depends | {"temperature": 0.3}, 6)
    write_pass_rates(tmp_path, dataclasses.replace(found.rates, right=found.rates.tried))
    with pytest.raises(ValueError, match=r"must be made of the pass rates beside it, got weights of others"):
        rates_of_weights(tmp_path, depends, 5)


def test_training_takes_the_weights_of_its_own_prompts_and_settings(tmp_path, judged):
    answer(tmp_path)
    settings = Settings(weight="paced", normalise="none")
    run(tmp_path, settings=settings)
    np.testing.assert_allclose(training_weights(tmp_path, ["3", "1", "2"], settings), [1 / 3, 0, 1 / 3])
    with pytest.raises(ValueError, match=r"a weight of every prompt, got none for 1 of 2, the first is 'x'"):
        training_weights(tmp_path, ["1", "x"], settings)
    with pytest.raises(ValueError, match=r"a weight above 0 for one of the prompts, got 0 for all 2"):
        training_weights(tmp_path, ["1", "4"], settings)
    message = (
        r"got others: pass_rates\.beta is 1\.0 there and 2\.0 here; pass_rates\.weight is 'paced' there and 'easy'"
    )
    with pytest.raises(ValueError, match=message):
        training_weights(tmp_path, ["1"], Settings(weight="easy", beta=2.0, normalise="none"))
    settings = Settings(weight="easy")
    run(tmp_path, settings=settings)
    found = training_weights(tmp_path, ["1", "2", "4"], settings)
    np.testing.assert_allclose(found, [4 / 3, 2 / 3, 0])  # of 1, 1/2, 0: those that are kept have mean 1


def test_pass_rates_of_another_seed_are_added_and_earlier_ones_discounted(tmp_path, judged):
    answer(tmp_path / "a")
    answer(tmp_path / "b", {name: name * 4 for name in SAID}, DEPENDS | {"seed": 6, "samples": 8})
    first = run(tmp_path / "a").rates
    both = run(tmp_path / "b", added=[first])
    assert both.rates.right.tolist() == [8, 6, 6, 4]
    assert both.rates.tried.tolist() == [8, 8, 7, 8]
    assert load_pass_rates(tmp_path / "b").seeds == (5, 6)
    with pytest.raises(ValueError, match=r"got generation\.seed=5 in two of them"):
        run(tmp_path / "a", added=[first])
    settings = Settings(weight="easy", estimator="discounted", discount=0.5, normalise="none")
    later = run(tmp_path / "b", earlier=[first], settings=settings)
    a, n = (0.5 * 1 + 4) * 0.5 + 4, (0.5 * 2 + 4) * 0.5 + 4
    assert later.weights.weight[0] == pytest.approx(a / n)
    # Training, which estimates anew, finds the earlier rounds in the files; each is in them once.
    for rates in (load_pass_rates(tmp_path / "b"), run(tmp_path / "b", earlier=[first], settings=settings).rates):
        (right, tried) = rates.of(["2", "1"]).before[0]
        assert (right.tolist(), tried.tolist()) == (first.right[[1, 0]].tolist(), first.tried[[1, 0]].tolist())
        np.testing.assert_array_equal(weigh([rates], settings).weight, later.weights.weight)
    run(tmp_path / "b", settings=settings)
    assert load_pass_rates(tmp_path / "b").before == ()


def test_what_is_missing_is_said(tmp_path, judged):
    with pytest.raises(ValueError, match=r"Name the --out of launch\.generate"):
        run(tmp_path)
    answer(tmp_path, {"1": "1"})
    message = (
        r"must hold answers to all prompts, got none to 3 of 4, the first is '2'\. Run `python -m launch\.generate"
    )
    with pytest.raises(ValueError, match=message):
        run(tmp_path)
    with pytest.raises(ValueError, match=r"prompts\.verifier must be set, got '' and prompt '1' names none"):
        run(tmp_path, PROMPTS[:1], "")
    with pytest.raises(ValueError, match=r"prompts\.verifier must be a known name .*Did you mean 'same'"):
        run(tmp_path, PROMPTS[:1], "sam")


def test_a_prompt_may_name_its_own_verifier(tmp_path, judged):
    answer(tmp_path, {"1": "11 ok"})
    prompts = [Prompt("1", "?", "1", verifier="same")]
    assert run(tmp_path, prompts, "", Settings(weight="easy")).rates.right.tolist() == [2]
