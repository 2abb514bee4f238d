"""A run small enough to be repeated: synthetic teacher, one layer of it as the student, a few lines of text."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OVERRIDES = {
    "teacher.path": "synthetic",
    "student.init.layers": "1",
    "data.seq_len": "32",
    "selection.policy": "random_fraction",  # the draws must come back as well
    "train.batch_size": "4",
    "train.log_every": "1",
    "eval.rows": "4",
    "eval.completions": "0",
    "optim.warmup": "2",
    "checkpoint.every": "2",
    "log.tensorboard": "False",
}


class Run:
    """One work directory and the command that fills it."""

    def __init__(self, folder: Path, text: Path) -> None:
        self.workdir = folder
        self.text = text

    def command(self, **overrides: str) -> list[str]:
        values = OVERRIDES | {"data.path": str(self.text)} | {k.replace("__", "."): v for k, v in overrides.items()}
        flags = [f"--config.{name}={value}" for name, value in values.items()]
        return [
            sys.executable,
            "-m",
            "launch.train",
            f"--config={ROOT}/configs/quickstart.py",
            f"--workdir={self.workdir}",
            *flags,
        ]

    def start(self, **overrides: str) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
        return subprocess.Popen(
            self.command(**overrides),
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def experiment(self, **overrides: str):
        """The same experiment for use in this process."""
        import ast

        from configs import quickstart
        from kdjax.config import from_config_dict

        config = quickstart.get_config()
        values = OVERRIDES | {"data.path": str(self.text)} | {k.replace("__", "."): v for k, v in overrides.items()}
        for name, value in values.items():
            *path, last = name.split(".")
            at = config
            for part in path:
                at = at[part]
            at[last] = value if isinstance(at[last], str) else ast.literal_eval(value)
        return from_config_dict(config)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.jsonl"
    lines = [
        f'{{"text": "{i} bottles of beer on the wall, {i} bottles; take {i % 7} down and pass them around."}}'
        for i in range(60)
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def make_run(tmp_path, text):
    """make_run(name) -> Run in a directory of its own, all on the same text."""
    return lambda name: Run(tmp_path / name, text)
