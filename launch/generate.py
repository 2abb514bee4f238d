"""Answers to prompts: python -m launch.generate --config=configs/tasks/arith.py --model=student --samples=8 --out=DIR

The prompts are those of prompts.*, the settings those of generation.*. --model: the student of the config, that of a
run (--workdir), the teacher, a served one behind an OpenAI-compatible endpoint (served.*; its key is in the environment
variable that served.api_key_env names), or a script that knows the answers to "arith" (--style). Can be stopped and
started again at any time, also with more --samples or another generation.batch_size: what is there stays, what failed
is tried again.
"""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import app

if TYPE_CHECKING:
    from kdjax.config import Experiment
    from kdjax.data.prompts import Prompt
    from kdjax.generation.generate import Source, Summary

app.define_config()
flags.DEFINE_enum("model", "student", ["student", "teacher", "served", "scripted"], "Who answers.")
flags.DEFINE_string("style", "sentence", "--model=scripted: the manner of the answers, see kdjax/data/styles.py.")
flags.DEFINE_enum("split", "train", ["train", "heldout", "all"], "Which prompts, by prompts.heldout_fraction.")
flags.DEFINE_integer("samples", None, "Answers per prompt; default: generation.samples.", lower_bound=1)
flags.DEFINE_string("step", "", "--workdir: which checkpoint: a step, 'best', or '' for the newest.")
flags.DEFINE_string("out", None, "The directory of rollouts.jsonl and its manifest.")

SHOWN = 5  # reasons of failures


def main() -> int | None:
    """Flags -> prompts -> who answers -> rollouts -> summary; 1 if some failed."""
    from kdjax.config import from_config_dict

    e, out = from_config_dict(app.require("config")), Path(app.require("out"))
    samples = flags.FLAGS.samples or e.generation.samples
    prompts = chosen(e)
    source = who(e, prompts)

    from kdjax.offline import write_answers

    command = shlex.join(["python", "-m", "launch.generate", *sys.argv[1:]])
    try:
        found = write_answers(out, prompts, samples, source, e, command)
    except KeyboardInterrupt:
        print(f"stopped; what was answered is in {out}, the same command goes on from there")
        return 130
    show(found, len(prompts), samples, out, e.generation.temperature)
    return 1 if found.failed else None


def chosen(e: "Experiment") -> list["Prompt"]:
    """The prompts of --split."""
    from kdjax.data.prompts import load_prompts, split_prompts

    prompts = load_prompts(e.prompts)
    if flags.FLAGS.split == "all":
        return prompts
    heldout, train = split_prompts(prompts, e.prompts)
    return heldout if flags.FLAGS.split == "heldout" else train


def who(e: "Experiment", prompts: list["Prompt"]) -> tuple["Source", dict[str, Any], str]:
    """(source of answers, what they depend on, its name for people) of --model."""
    if flags.FLAGS.model == "served":
        from kdjax.generation.generate import identity, of_server

        source = of_server(prompts, e.served, e.generation, e.data)
        depends = identity(f"served: {e.served.model}", "", prompts, e.generation, e.data)
        return source, depends | {"top_logprobs": e.served.top_logprobs}, e.served.model

    if flags.FLAGS.model == "scripted":
        from kdjax.generation.generate import identity, of_script

        name = f"scripted: {flags.FLAGS.style}"
        return of_script(prompts, flags.FLAGS.style), identity(name, "", prompts, e.generation, e.data), name

    from kdjax import offline
    from kdjax.build import build, load_experiment

    workdir = flags.FLAGS.workdir
    if workdir is not None and flags.FLAGS.model == "student":
        from kdjax import loop

        built = build(load_experiment(workdir), Path(workdir))
        state, step = loop.restore(built, Path(workdir), flags.FLAGS.step)
        source, depends, _ = offline.student_answers(built, prompts, e, state.params)
        return source, depends, f"the student of {workdir}, step {step}"
    if flags.FLAGS.model == "teacher":
        return offline.teacher_answers(build(offline.to_answer(e, teacher=True), live_teacher=True), prompts)
    return offline.student_answers(build(offline.to_answer(e)), prompts, e)


def show(found: "Summary", prompts: int, samples: int, out: Path, temperature: float) -> None:
    """What there is now, what it took, what failed and why."""
    failed = sum(found.failed.values())
    print(
        f"{found.answers - failed:,} of {prompts * samples:,} answers to {prompts} prompts: {out}; "
        f"{found.cut_off} cut off at generation.new_tokens"
    )
    if found.added:
        rate = found.tokens / max(found.seconds, 1e-9)
        print(f"now: {found.added:,} asked for, {found.tokens:,} tokens in {found.seconds:.1f} s, {rate:,.0f} tokens/s")
    else:
        print("nothing was missing")
    if temperature > 0 and found.same == found.several > 0:
        print(
            f"note: the answers to each of {found.several} prompts are all the same, at temperature {temperature:g}; a "
            "server that ignores temperature or seed does that"
        )
    for reason, count in list(found.failed.items())[:SHOWN]:
        print(f"failed, {count} x: {reason}")
    if failed:
        print(f"{failed} failed; start again with the same command to try them again")


if __name__ == "__main__":
    app.run(main)
