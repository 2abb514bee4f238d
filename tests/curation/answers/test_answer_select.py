"""Groups, draws and the other policies on answers that are made up; then the file of a choice, from a pool on disk."""

import collections
import dataclasses
import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from written_pools import QUESTIONS, TEACHERS, admitted, lines_of, right, row, write, write_teachers

from kdjax.config import Answers
from kdjax.curation.answers.released import OFFICIAL, as_released
from kdjax.curation.answers.scored import open_scored
from kdjax.curation.answers.select import (
    DROPPED,
    POLICIES,
    Chosen,
    Dropped,
    ScoredAnswer,
    choose,
    group_of,
)
from kdjax.curation.answers.selected import overlap, read_selected, select, teacher_shares
from kdjax.curation.answers.verify import admitted_answers
from kdjax.data.prompts import Prompt

SCORED = Answers(policy="group", score="grape")


def answers(count, **changed):
    """Answers t0, t1, ... of the scores 0, 1, ..., each as long as its score is high."""
    return [ScoredAnswer(f"{n:016x}", f"t{n:02}", float(n), 10 + n, **changed) for n in range(count)]


def teachers(chosen):
    return [pick.answer.teacher for pick in chosen.picks]


# --- groups: invariants 4 and 5


@pytest.mark.parametrize(
    ("answers", "groups"),
    [
        (1, [5]),
        (3, [2, 4, 5]),
        (5, [1, 2, 3, 4, 5]),
        (7, [1, 2, 3, 3, 4, 5, 5]),
        (9, [1, 2, 2, 3, 3, 4, 4, 5, 5]),
        (10, [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
    ],
)
def test_groups_of_five(answers, groups):
    assert [group_of(rank, answers, 5) for rank in range(1, answers + 1)] == groups


@given(count=st.integers(1, 400), groups=st.integers(1, 40))
def test_groups_are_even_and_in_order(count, groups):
    found = [group_of(rank, count, groups) for rank in range(1, count + 1)]
    assert found == sorted(found)
    assert 1 <= found[0] <= found[-1] == groups
    sizes = [found.count(group) for group in range(1, groups + 1)]
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1
    assert sizes[0] == count // groups, "not ceil(M / G)"


def test_draws_are_those_of_the_released_code():
    """Its loop, written out: items by their JSON ids, a choice from every group that is not empty."""
    draws = random.Random(42)
    sizes = [10, 7, 1, 3, 30, 9, 5]
    expected = []
    for size in sizes:
        ranked = list(range(1, size + 1))
        members = [[r for r in ranked if min(5, max(1, math.ceil(r * 5 / size))) == group] for group in range(1, 6)]
        expected.append([draws.choice(ranks) if ranks else None for ranks in members])
    assert expected[0] == [1, 3, 6, 7, 9]
    for group in range(1, 6):
        settings, ours, found = Answers(group=group, small_pool="official", score="grape"), random.Random(42), []
        for number, size in enumerate(sizes):
            chosen = choose(f"q{number}", answers(size), settings, ours)
            found.append(chosen.picks[0].rank if isinstance(chosen, Chosen) else None)
        assert found == [ranks[group - 1] for ranks in expected]


def test_the_order_of_answers_does_not_matter():
    some, draws = answers(12), random.Random(0)
    tied = [dataclasses.replace(one, score=one.score // 4, length=10, teacher=f"t{int(one.score) % 3}") for one in some]
    for policy in POLICIES:
        settings, few = Answers(policy=policy, score="grape"), {"t1", "t2"}
        first = choose("q", tied, settings, random.Random(1), few)
        assert isinstance(first, Chosen)
        for _ in range(5):
            draws.shuffle(tied)
            assert choose("q", tied, settings, random.Random(1), few) == first, policy


# --- small pools, errors, directions


@pytest.mark.parametrize(("group", "rank"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 3)])
def test_an_empty_group_gives_way_to_the_nearest(group, rank):
    chosen = choose("q", answers(3), Answers(group=group, score="grape"), random.Random(0))
    assert (chosen.picks[0].rank, chosen.forced) == (rank, False)
    dropped = choose("q", answers(3), Answers(group=group, score="grape", small_pool="official"), random.Random(0))
    assert isinstance(dropped, Dropped) == (group in (1, 3))


def test_the_nearest_group_is_not_the_first_one():
    ranks = []
    for group in range(1, 11):  # three answers are in groups 4, 7 and 10
        chosen = choose("q", answers(3), Answers(groups=10, group=group, score="grape"), random.Random(0))
        ranks.append(chosen.picks[0].rank)
    assert ranks == [1, 1, 1, 1, 1, 2, 2, 2, 3, 3]


def test_a_single_answer_is_forced():
    chosen = choose("q", answers(1), SCORED, random.Random(0))
    assert (teachers(chosen), chosen.forced, chosen.picks[0].group) == (["t00"], True, 5)
    official = dataclasses.replace(SCORED, small_pool="official")
    assert choose("q", answers(1), official, random.Random(0)).reason == "small_pool"


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_with_an_error_is_ever_chosen(policy):
    """Invariant 20: and an error takes no place in the ranking."""
    settings, few = Answers(policy=policy, score="grape"), ("t07",)
    good = [*answers(3), ScoredAnswer("f" * 16, "t07", 3.0, 30)]
    bad = [dataclasses.replace(one, row=f"b{one.row[1:]}", score=-9.0, error="special_only") for one in answers(9)]
    bad += [ScoredAnswer("e" * 16, "t99", 0.0, 1, "not_finite")]
    if POLICIES[policy].scores:
        bad += [ScoredAnswer(f"d{n}", "t98", value, 1) for n, value in enumerate((math.nan, math.inf, -math.inf))]
    for seed in range(20):
        found = choose("q", bad + good, settings, random.Random(seed), few)
        assert {pick.answer.row for pick in found.picks} <= {one.row for one in good}
        assert found == choose("q", good, settings, random.Random(seed), few)
    assert choose("q", bad, settings, random.Random(0), few) == Dropped("no_valid_answer")
    assert choose("q", [], settings, random.Random(0)) == Dropped("no_answer")


def test_what_each_policy_takes():
    def taken(policy, seed=0, few=(), **settings):
        settings = Answers(policy=policy, score="grape", **settings)
        return teachers(choose("q", answers(10), settings, random.Random(seed), few))

    assert taken("best") == ["t00"]
    assert taken("group")[0] in ("t00", "t01")
    assert taken("group", group=5)[0] in ("t08", "t09")
    assert taken("all") == [f"t{n:02}" for n in range(10)]
    assert (taken("shortest"), taken("longest")) == (["t00"], ["t09"])
    for policy in ("teacher", "strongest", "best_teacher"):
        assert taken(policy, few=("t04",)) == ["t04"]
        drawn = [taken(policy, seed, ("t04", "t07"))[0] for seed in range(200)]
        assert 70 < drawn.count("t04") == 200 - drawn.count("t07") < 130, "each alike"
    assert len({taken("random", seed)[0] for seed in range(60)}) == 10
    weighted = [taken("weighted", seed)[0] for seed in range(1200)]  # scores 0, 1, 2, the next 3: weights 3, 2, 1 of 6
    assert [round(weighted.count(f"t{n:02}") / 200) for n in range(10)] == [3, 2, 1, 0, 0, 0, 0, 0, 0, 0]
    mixed = [taken("mix", seed) for seed in range(1000)]
    assert {name for (name,) in mixed} == {"t00", "t09"}
    assert 150 < sum(name == ["t09"] for name in mixed) < 250, "one in five is long"
    missing = choose("q", answers(3), Answers(policy="teacher"), random.Random(0), ("t04",))
    assert missing.reason == "other_teachers"


def test_high_scores_are_preferred_where_the_score_says_so():
    for score, first in (("grape", "t00"), ("lark", "t09")):
        for policy, group in (("best", 1), ("group", 1)):
            settings = Answers(policy=policy, score=score, groups=10, group=group)
            assert teachers(choose("q", answers(10), settings, random.Random(0))) == [first]
        weighted = (
            choose("q", answers(10), Answers(policy="weighted", score=score), random.Random(s)) for s in range(99)
        )
        assert collections.Counter(teachers(chosen)[0] for chosen in weighted).most_common(1)[0][0] == first


def test_ties_go_by_teacher_then_row():
    tied = [ScoredAnswer("b", "x", 1.0), ScoredAnswer("a", "x", 1.0), ScoredAnswer("c", "w", 1.0)]
    ranked = choose("q", tied, SCORED, random.Random(0)).ranked
    assert [pick.answer.row for pick in ranked] == ["c", "a", "b"]


def test_bad_requests_are_named():
    for settings, message in (
        (Answers(policy="gruop"), "answers.policy must be a known name .* Did you mean 'group'"),
        (Answers(score="scaz"), "answers.score must be a known name .* Did you mean 'scas'"),
    ):
        with pytest.raises(ValueError, match=message):
            choose("q", answers(2), settings, random.Random(0))
    with pytest.raises(ValueError, match="answers to 'q' must be different rows"):
        choose("q", answers(2) * 2, SCORED, random.Random(0))


def test_official_is_all_released_choices_and_no_other():
    mine = Answers(official=True, seed=3, groups=4, question_share=0.25, loops=0.2, alignment="predictor")
    found = as_released(mine)
    assert {name: getattr(found, name) for name in OFFICIAL} == OFFICIAL
    assert dataclasses.replace(found, **{name: getattr(mine, name) for name in OFFICIAL}) == mine
    assert as_released(found) == found
    assert as_released(Answers(loops=0.2)) == Answers(loops=0.2)
    assert set(OFFICIAL) == set(DOCUMENTED)


DOCUMENTED = [
    line.split("|")[1].strip()
    for line in as_released.__doc__.splitlines()
    if line.strip().startswith("|") and line.split("|")[1].strip() not in ("", "field") and "---" not in line
]


# --- the file


@pytest.fixture
def pool(tmp_path):
    """Three right answers to each of six questions, of 0, 1 and 2 words more; and the workdir."""
    write_teachers(tmp_path / "pool")
    return admitted(tmp_path, tmp_path / "pool")


def score_all(workdir, found, of, name="scored-1", depends=()):
    """Scores by (question id, teacher): a number, or an error."""
    with open_scored(workdir / "answers" / f"{name}.jsonl", dict(depends)) as scored:
        for prompt, answers in admitted_answers(found, Answers()):
            for one in answers:
                value = of(prompt.id, one.teacher)
                if isinstance(value, str):
                    scored.append(one.row, prompt.id, one.teacher, None, value)
                else:
                    figures = {"answer_nll": value, "n_answer": float(len(one.text.split()))}
                    scored.append(one.row, prompt.id, one.teacher, figures)
    return open_scored(workdir / "answers" / f"{name}.jsonl", dict(depends))


def words(candidate):
    return len(candidate.text.split()), ""


def test_the_file_and_its_counts(tmp_path, pool):
    costs = {"ada": 2.0, "bob": 1.0, "cy": 3.0}
    wrong = {("q1", "bob"): "special_only", ("q2", "ada"): "not_finite", ("q2", "bob"): "not_finite"}
    wrong |= {("q3", name): "too_long" for name in TEACHERS} | {("q4", "cy"): math.nan}
    with score_all(tmp_path, pool, lambda question, name: wrong.get((question, name), costs[name])) as scored:
        counts = select(tmp_path, pool, SCORED, scored=scored)
    found = list(read_selected(tmp_path))
    assert [(one.id, one.teacher_name, one.score_value, one.group, one.forced) for one in found] == [
        ("q0", "bob", 1.0, 2, False),
        ("q1", "ada", 2.0, 3, False),
        ("q2", "cy", 3.0, 5, True),
        ("q4", "bob", 1.0, 3, False),
        ("q5", "bob", 1.0, 2, False),
    ]
    assert found[0].text == right(QUESTIONS[0], 1)
    assert {one.score_key for one in found} == {"grape"}
    line = lines_of(tmp_path / "answers" / "selected.jsonl")[0]
    contract = {"id", "teacher_name", "row", "score_key", "score_value", "score_rank", "group", "forced", "text"}
    assert contract <= set(line)
    manifest = json.loads((tmp_path / "answers" / "selected.manifest.json").read_text())
    assert manifest["counts"] == counts
    assert manifest["depends"]["scored"] == "scored-1.jsonl"
    assert counts["selected"] + sum(counts["dropped"].values()) == counts["questions"] == 6
    assert counts["dropped"] == {"no_valid_answer": 1}
    assert counts["dropped_questions"] == {"no_valid_answer": ["q3"]}
    assert counts["rows"] == sum(counts["teachers"].values()) == sum(counts["groups"].values()) == 5
    assert counts["tokens"] == sum(len(one.text.split()) for one in found) > 5
    assert counts["teachers"] == {"ada": 1, "bob": 3, "cy": 1}
    assert counts["errors"] == {"no_score": 1, "not_finite": 2, "special_only": 1, "too_long": 3}
    assert counts["valid"] + sum(counts["errors"].values()) == counts["considered"] == 18
    assert (counts["admitted"], counts["not_drawn"], counts["forced"]) == (18, 0, 1)
    means = counts["means_of_groups"]
    assert sum(of["answers"] for of in means.values()) == counts["valid"]
    assert means["2"] == {"answers": 2, "score": 1.0, "answer_nll": 1.0, "n_answer": pytest.approx(5 + 2)}


def test_shuffled_files_and_lines_give_the_same_selection(tmp_path):
    """Invariants 12 and 18, second half: same figures, same seed, same selection."""
    draws, found = random.Random(0), []
    names = [f"t{number}" for number in range(12)]
    for folder in ("one", "two"):
        workdir = tmp_path / folder
        write_teachers(workdir / "pool", teachers=names)
        paths = [workdir / "pool" / f"{name}.jsonl" for name in names]
        if folder == "two":
            draws.shuffle(paths)
            for path in paths:
                rows = path.read_text().splitlines()
                draws.shuffle(rows)
                write(path, rows)
        pool = admitted(workdir, *paths, train=QUESTIONS if folder == "one" else QUESTIONS[::-1])
        with score_all(workdir, pool, lambda question, name: (int(name[1:]) * 3 + int(question[1:])) % 7 / 2) as scored:
            for settings in (SCORED, dataclasses.replace(SCORED, policy="best")):
                select(workdir, pool, settings, scored=scored)
                found.append((workdir / "answers" / "selected.jsonl").read_bytes())
                select(workdir, pool, settings, scored=scored)
                assert (workdir / "answers" / "selected.jsonl").read_bytes() == found[-1]
        for policy in ("random", "all", "shortest", "mix", "strongest"):
            select(workdir, pool, Answers(policy=policy), measure=words)
            found.append((workdir / "answers" / "selected.jsonl").read_bytes())
    half = len(found) // 2
    assert found[:half] == found[half:]
    assert len(set(found[:half])) == half - 1, "all are right always: the strongest are drawn from as at random"


def test_policies_without_scores_need_no_scores(tmp_path, pool):
    for policy, chosen in (("shortest", "ada"), ("longest", "cy")):
        select(tmp_path, pool, Answers(policy=policy), measure=words)
        assert teacher_shares(read_selected(tmp_path)) == {chosen: 1.0}
    first = next(read_selected(tmp_path))
    assert (first.score_key, first.score_value, first.score_rank, first.group) == ("", None, 0, 0)
    select(tmp_path, pool, Answers(policy="random"))
    counts = select(tmp_path, pool, Answers(policy="all"), measure=lambda one: (9, "too_long" * (one.teacher == "bob")))
    assert counts["teachers"] == {"ada": 6, "cy": 6}
    assert counts["errors"] == {"too_long": 6}
    assert select(tmp_path, pool, Answers(policy="teacher", teacher="bob"))["teachers"] == {"bob": 6}
    counts = select(tmp_path, pool, Answers(policy="all", candidates=2))
    assert (counts["rows"], counts["not_drawn"], counts["considered"]) == (12, 6, 12)


def test_the_strongest_teacher_is_right_most_often(tmp_path):
    write(tmp_path / "p" / "ada.jsonl", [row(QUESTIONS[0], "1"), row(QUESTIONS[1], "7")])
    write(tmp_path / "p" / "bob.jsonl", [row(QUESTIONS[1], "2")])
    write(tmp_path / "p" / "cy.jsonl", [row(question, question.answer) for question in QUESTIONS[1:3]])
    pool = admitted(tmp_path, tmp_path / "p", settings=Answers(identical="all"))
    counts = select(tmp_path, pool, Answers(policy="strongest"))
    assert (counts["teachers"], counts["taken_teachers"]) == ({"cy": 2}, ["cy"])
    assert counts["dropped"] == {"no_answer": 3, "other_teachers": 1}
    assert set(counts["dropped"]) <= set(DROPPED)


def test_equals_of_the_strongest_are_drawn_from(tmp_path):
    """ada and bob are right five times of six, cy four times; one of the two is drawn, whatever their names."""
    wrong = {("ada", "q0"), ("bob", "q5"), ("cy", "q1"), ("cy", "q2")}
    drawn = {}
    for order in (1, -1):
        workdir = tmp_path / str(order)
        for at, name in enumerate(TEACHERS):
            rows = [row(q, "I say 99." if (name, q.id) in wrong else right(q, at)) for q in QUESTIONS]
            write(workdir / "p" / f"{name}.jsonl", rows[::order])
        pool = admitted(workdir, workdir / "p")
        for seed in range(8):
            counts = select(workdir, pool, Answers(policy="strongest", seed=seed))
            assert counts["taken_teachers"] == ["ada", "bob"]
            who = {one.id: one.teacher_name for one in read_selected(workdir)}
            assert (who["q0"], who["q5"], len(who)) == ("bob", "ada", 6)
            assert drawn.setdefault(seed, who) == who, "the order of rows does not matter"
    assert {who["q3"] for who in drawn.values()} == {"ada", "bob"}
    assert len({tuple(who.values()) for who in drawn.values()}) > 4
    assert all("cy" not in who.values() for who in drawn.values())

    write(tmp_path / "1" / "p" / "bob.jsonl", [row(q, right(q, 1)) for q in QUESTIONS])
    pool, found = admitted(tmp_path / "1", tmp_path / "1" / "p"), []
    for settings in (Answers(policy="strongest"), Answers(policy="teacher", teacher="bob")):
        assert select(tmp_path / "1", pool, settings)["taken_teachers"] == ["bob"]
        found.append((tmp_path / "1" / "answers" / "selected.jsonl").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Answers(), "answers.policy='group' must have scores, got none"),
        (Answers(policy="shortest"), "answers.policy='shortest' must have lengths"),
        (
            Answers(policy="teacher", teacher="bobb"),
            "must be a teacher of answers.pool, got 'bobb'. Did you mean 'bob'",
        ),
        (Answers(policy="grup"), "answers.policy must be a known name"),
        (
            Answers(policy="all", families=("ada", "adda")),
            "answers.families must say how names of teachers of answers.pool begin, got 'adda'. Did you mean 'ada'",
        ),
        (Answers(policy="all", families=("",)), "answers.families must say how .* begin, got ''"),
    ],
)
def test_what_is_missing_is_named(tmp_path, pool, settings, message):
    with pytest.raises(ValueError, match=message):
        select(tmp_path, pool, settings)
    assert not (tmp_path / "answers" / "selected.jsonl").exists()


def test_the_share_of_the_students_family_is_counted(tmp_path, pool):
    few = Answers(policy="all", truncated="keep", families=("ad", "cy"))
    counts = select(tmp_path, pool, few, measure=lambda one: (3, "too_long" if one.teacher == "ada" else ""))
    assert counts["same_family"] == {"admitted": 12, "selected": 6}, "ada's and cy's six each, ada's are too long"
    assert "same_family" not in select(tmp_path, pool, Answers(policy="all"), measure=words)


def test_unfinished_scores_and_empty_selections_are_refused(tmp_path, pool):
    message = "scored-2.jsonl must hold the scores of all admitted answers, got none of"
    scored = open_scored(tmp_path / "answers" / "scored-2.jsonl", {})
    with scored, pytest.raises(ValueError, match=message):
        select(tmp_path, pool, SCORED, scored=scored)
    message = "must leave answers to train on, got none with 'group' of 6 questions"
    scored = score_all(tmp_path, pool, lambda question, name: 1.0)
    with scored, pytest.raises(ValueError, match=message):
        select(tmp_path, pool, dataclasses.replace(SCORED, official=True), scored=scored)
    with pytest.raises(ValueError, match="selected.jsonl must hold the selected answers, got none"):
        read_selected(tmp_path)


def test_a_selection_that_was_changed_is_refused(tmp_path, pool):
    select(tmp_path, pool, Answers(policy="random"), name="first")
    path = tmp_path / "answers" / "first.jsonl"
    assert len(list(read_selected(tmp_path, "first"))) == 6
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="first.jsonl must be the file that its manifest is of"):
        read_selected(tmp_path, "first")


def test_overlap_of_selections(tmp_path, pool):
    for name, settings in (
        ("short", Answers(policy="shortest")),
        ("ada", Answers(policy="teacher", teacher="ada")),
        ("bob", Answers(policy="teacher", teacher="bob")),
        ("all", Answers(policy="all")),
    ):
        select(tmp_path, pool, settings, measure=words, name=name)

    def shared(one, other):
        return overlap(read_selected(tmp_path, one), read_selected(tmp_path, other))

    assert (shared("short", "ada"), shared("ada", "bob"), shared("all", "bob")) == (1.0, 0.0, pytest.approx(1 / 3))
    assert math.isnan(overlap([], []))


def test_the_overlap_with_a_rival_is_that_with_its_selection(tmp_path):
    """All answers are equally long, and ties go by teacher; an answer that is not admitted any more has no say."""
    write_teachers(tmp_path / "pool", answer=lambda question, at: f"{TEACHERS[at]} says {question.answer}.")
    pool = admitted(tmp_path, tmp_path / "pool")
    draws = random.Random(3)
    with open_scored(tmp_path / "answers" / "scored-1.jsonl", {}) as scored:
        for prompt, found in admitted_answers(pool, Answers()):
            for one in found:
                figures = {"answer_nll": draws.uniform(1, 2), "n_answer": 3.0, "rank_sum": draws.uniform(3, 30)}
                known = (prompt.id, one.teacher) != ("q5", "ada")
                scored.append(one.row, prompt.id, one.teacher, figures if known else None, "" if known else "altered")
            scored.append(f"{int(prompt.id[1:]):016x}", prompt.id, "gone", dict.fromkeys(figures, 0.5))
        choices = {name: Answers(policy="best", score=name) for name in ("grape", "rsr")}
        choices |= {name: Answers(policy=name) for name in ("all", "random", "shortest")}
        found = {
            name: select(tmp_path, pool, settings, scored=scored, measure=lambda one: (3, ""), name=name)
            for name, settings in choices.items()
        }
    shares = teacher_shares(read_selected(tmp_path, "shortest"))
    assert shares == {"ada": pytest.approx(5 / 6), "bob": pytest.approx(1 / 6)}
    for name, counts in found.items():
        rivals = {"grape", "rsr", "shortest"} - {name}
        expected = {
            rival: pytest.approx(overlap(read_selected(tmp_path, name), read_selected(tmp_path, rival)))
            for rival in rivals
        }
        if name != "random":
            expected["random"] = pytest.approx((5 / 3 + 1 / 2) / 6)  # of three, and of two where one has an error
        assert counts["overlap"] == expected, name
    assert 0 < found["rsr"]["overlap"]["grape"] < 1
    assert select(tmp_path, pool, Answers(policy="all"))["overlap"] == {"random": pytest.approx(1 / 3)}, "no lengths"


def test_ids_are_taken_in_the_order_of_their_json(tmp_path):
    """As released: a quotation mark ends an id, so 'a b' comes before 'a'."""
    asked = [Prompt(name, "?", "1") for name in ("a", "a b", "10", "9", "ä", 'a"')]
    write(tmp_path / "p" / "ada.jsonl", [row(prompt, "1") for prompt in asked])
    pool = admitted(tmp_path, tmp_path / "p", train=asked)
    select(tmp_path, pool, Answers(policy="all"))
    order = [one.id for one in read_selected(tmp_path)]
    assert order == sorted(order, key=lambda name: json.dumps(name, ensure_ascii=False))
    assert order == ["10", "9", "a b", "a", 'a"', "ä"]
