"""Held-out figures of teacher, student before and student after: python -m launch.evaluate --workdir=runs/mine

--step: another checkpoint than the newest ("best": the lowest held-out KL); --rows: another number of held-out rows.
--out: also write them, with their intervals, to a JSON file; --nobefore: leave out the student before, for speed.
"""

import dataclasses
import json
from pathlib import Path

from absl import flags

from kdjax.run_log import write_whole
from launch import app, processes

flags.DEFINE_string("workdir", None, "The directory of a run.")
flags.DEFINE_string("step", "", "Which checkpoint: a step, 'best', or '' for the newest.")
flags.DEFINE_integer("rows", None, "Held-out rows; 0 = all; default: eval.rows of the run.", lower_bound=0)
flags.DEFINE_bool("before", True, "Evaluate the student before training as well.")
processes.define()
flags.DEFINE_string("out", None, "A JSON file to write: step, before, after.")


def main() -> None:
    """Workdir -> build -> two evaluations -> table."""
    workdir = Path(app.require("workdir"))
    processes.join()

    from kdjax import loop
    from kdjax.build import build, load_experiment
    from kdjax.run.heldout import Heldout
    from launch.tables import table

    experiment = load_experiment(workdir)
    rows = flags.FLAGS.rows
    if rows is not None:
        experiment = dataclasses.replace(experiment, eval=dataclasses.replace(experiment.eval, rows=rows))
    # Prompts have their weights in the workdir; nothing else of it is needed.
    built = build(experiment, workdir if experiment.prompts.path else None, live_teacher=True)
    state, step = loop.restore(built, workdir, flags.FLAGS.step)
    heldout = Heldout(built)
    before = heldout(built.student_params).to_dict() if flags.FLAGS.before else None
    after = heldout(state.params).to_dict()
    if not processes.first():
        return
    print(f"{workdir}, step {step}")
    print(table(before, after))
    if flags.FLAGS.out is not None:
        found = {"step": step, "before": before, "after": after}
        write_whole(Path(flags.FLAGS.out), json.dumps(found) + "\n")


if __name__ == "__main__":
    app.run(main)
