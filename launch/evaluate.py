"""Held-out figures of teacher, student before and student after: python -m launch.evaluate --workdir=runs/mine

--step: another checkpoint than the newest ("best": the lowest held-out KL); --rows: another number of held-out rows.
"""

import dataclasses
from pathlib import Path

from absl import flags

from launch import app

flags.DEFINE_string("workdir", None, "The directory of a run.")
flags.DEFINE_string("step", "", "Which checkpoint: a step, 'best', or '' for the newest.")
flags.DEFINE_integer("rows", None, "Held-out rows; 0 = all; default: eval.rows of the run.")


def main() -> None:
    """Workdir -> build -> two evaluations -> table."""
    workdir = Path(app.require("workdir"))

    from kdjax import loop
    from kdjax.build import build, load_experiment
    from launch.tables import table

    experiment = load_experiment(workdir)
    rows = flags.FLAGS.rows
    if rows is not None:
        experiment = dataclasses.replace(experiment, eval=dataclasses.replace(experiment.eval, rows=rows))
    built = build(experiment)
    state, step = loop.restore(built, workdir, flags.FLAGS.step)
    heldout = loop.Heldout(built)
    print(f"{workdir}, step {step}")
    print(table(heldout(built.student_params).to_dict(), heldout(state.params).to_dict()))


if __name__ == "__main__":
    app.run(main)
