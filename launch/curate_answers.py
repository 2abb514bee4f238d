"""What launch.curate does with prompts.answers='pool': teachers' answers -> verified -> scored -> selected."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import processes

if TYPE_CHECKING:
    from kdjax.build import Built
    from kdjax.config import Experiment
    from kdjax.curation.answers.best_teacher import Rated
    from kdjax.run.answers import AnswerChoice, Choice

MOST = 20  # teachers in the table


def choose_answers(e: "Experiment", workdir: Path, yardstick: int = 0) -> None:
    """The untrained student chooses: files in <workdir>/answers, a summary, a page."""
    processes.join()

    from kdjax import loop, offline
    from kdjax.build import build
    from kdjax.run.answers import AnswerChoice
    from kdjax.run.answers_report import write_report

    loop.claim_workdir(workdir, e)
    built = build(offline.to_answer(e))
    choice = AnswerChoice(built, workdir)
    made = choice(built.student_params)
    if processes.first():
        show(e, choice.admitted.counts, made)
        print(f"page: {write_report(built, workdir)}")
    if yardstick:
        measure(built, choice, workdir, yardstick)
    processes.say(
        f"files: {workdir / 'answers'}: admitted.jsonl, selected.jsonl" + (", scored-*.jsonl" if made.file else "")
    )


def show(e: "Experiment", pool: Mapping[str, Any], made: "Choice") -> None:
    """What the pool holds, what was selected, what it took."""
    counts, reasons = made.counts, pool["reasons"]
    left_out = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in reasons.items() if name and count)
    cut = f", {pool['truncated']:,} of them cut off at data.seq_len" if pool["truncated"] else ""
    print(
        f"pool: {pool['rows']:,} rows, {reasons['']:,} admitted{cut}" + (f"; left out: {left_out}" if left_out else "")
    )
    scores = {} if made.rated is None else made.rated.scores
    head = f"{e.answers.score:>18}" if scores else ""
    print(f"{'teacher':<24}{'rows':>9}{'admitted':>10}{'selected':>10}{head}")
    for name in list(scores or pool["teachers"])[:MOST]:
        of, cell = pool["teachers"][name], f"{scores[name]:>18.5g}" if name in scores else ""
        print(f"{name[:23]:<24}{sum(of.values()):>9,}{of['']:>10,}{counts['teachers'].get(name, 0):>10,}{cell}")
    if len(pool["teachers"]) > MOST:
        print(f"and {len(pool['teachers']) - MOST} more teachers")
    if made.rated is not None:
        print(rated_on(made.rated, e))
    if len(equals := counts.get("taken_teachers", ())) > 1:
        print(f"equally good teachers, of whose answers to a question one is drawn: {', '.join(equals)}")
    if counts["means_of_groups"]:
        print(f"{'group':<8}{'answers':>9}{e.answers.score:>18}{'NLL':>8}{'tokens':>8}   means; 1 is preferred")
        for group, of in counts["means_of_groups"].items():
            print(f"{group:<8}{of['answers']:>9,}{of['score']:>18.4g}{of['answer_nll']:>8.3f}{of['n_answer']:>8.1f}")
    for reason, count in counts["errors"].items():
        print(f"not scored, {reason}: {count:,} answers")
    for reason, count in counts["dropped"].items():
        print(f"without an answer, {reason}: {count:,} questions")
    forced = f", {counts['forced']:,} of them with one answer alone" if counts["forced"] else ""
    print(
        f"selected: {counts['rows']:,} answers to {counts['selected']:,} of {counts['questions']:,} questions{forced}"
    )
    if family := counts.get("same_family"):
        chosen, usable = family["selected"] / counts["rows"], family["admitted"] / counts["admitted"]
        print(f"of the student's family: {chosen:.1%} of the selected answers, {usable:.1%} of the admitted ones")
    if made.file is not None:
        steps = made.places / (3 * e.train.batch_size * e.data.seq_len)
        print(
            f"scored now: {made.scored:,} answers, {made.places:,} tokens with padding in {made.seconds:.1f} s; "
            f"as much arithmetic as {steps:.1f} of the {e.train.steps} training steps"
        )


def rated_on(rated: "Rated", e: "Experiment") -> str:
    """On which questions teachers were rated, and what gradients took."""
    asked, common = len(rated.questions), rated.common
    which = f"of the {common:,} that all teachers have answered" if common > 1 else "not the same for all teachers"
    said = f"teachers were rated on {asked:,} questions, {which}; the best comes first"
    if rated.gradients:
        steps = rated.places / (e.train.batch_size * e.data.seq_len)
        said += (
            f"\ngradients now: {rated.gradients:,} answers, {rated.places:,} tokens with padding in "
            f"{rated.seconds:.1f} s; as much arithmetic as {steps:.1f} of the {e.train.steps} training steps"
        )
    return said


def measure(built: "Built", choice: "AnswerChoice", workdir: Path, questions: int) -> None:
    """Two tables: every score against the exact gradient, and against the gain of a step."""
    from kdjax.curation.answers.correlation import table
    from kdjax.run import yardstick

    found = yardstick.measure(built, built.student_params, choice.admitted, questions)
    if not processes.first():
        return
    yardstick.write(workdir / "answers" / "yardstick.jsonl", found)
    print(f"against ||gradient||^2 of all parameters, {len(found.lines)} answers to {questions} questions")
    print("\n".join(table(found.gradient)))
    print("against the gain on other questions of one step on the answer; 1 = the preferred answer gains most")
    print("\n".join(table(found.gain)))


def explain(e: "Experiment", question: str, workdir: Path | None, out: Path) -> None:
    """A page about one question."""
    from kdjax import offline
    from kdjax.analysis.explain_page import write_explained
    from kdjax.build import build
    from kdjax.run.explain import explain as explained

    built = build(offline.to_answer(e))
    command = shlex.join(["python", "-m", "launch.curate", *sys.argv[1:]])
    print(f"page: {write_explained(out, explained(built, question, built.student_params, workdir, command))}")
