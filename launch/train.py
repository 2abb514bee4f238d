"""Distil: python -m launch.train --config=configs/quickstart.py --workdir=runs/mine [--config.train.steps=200 ...]

Goes on from the newest checkpoint in --workdir if there is one, also with other devices or another number of processes
(launch/processes.py). SIGTERM or Ctrl-C, to any of them: saves, says how to go on, exits 0.
"""

from pathlib import Path

from launch import app, processes

app.define_config()
processes.define()


def main() -> None:
    """Flags -> build -> run."""
    from kdjax.config import from_config_dict

    experiment = from_config_dict(app.require("config"))
    workdir = Path(app.require("workdir"))
    processes.join()

    from kdjax import loop
    from kdjax.build import build
    from launch.tables import figures

    loop.claim_workdir(workdir, experiment)
    outcome = loop.run(build(experiment, workdir), workdir)
    if not processes.first():
        return
    if outcome.interrupted:
        print(f"stopped at step {outcome.step} of {experiment.train.steps}, all saved; run the same command to go on")
        return
    print(figures(workdir))
    print(f"report: {workdir / 'report.html'}")


if __name__ == "__main__":
    app.run(main)
