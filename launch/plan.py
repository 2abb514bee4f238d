"""What a run would need, before anything is loaded: python -m launch.plan --config=configs/quickstart.py

Rows and targets of the text, parameters, and the memory of the compiled train step, from shapes alone. --out: the same
as a JSON file.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from kdjax.run_log import write_whole
from launch import app

if TYPE_CHECKING:
    from kdjax.config import Experiment

app.define_config()
flags.DEFINE_string("out", None, "A JSON file to write.")


def main() -> None:
    """Config -> shapes -> compiled step -> figures."""
    from kdjax.config import from_config_dict

    experiment = from_config_dict(app.require("config"))
    of_step = step_figures(experiment)  # first, because names that do not exist are found there at once
    found = data_figures(experiment) | of_step
    for name, value in found.items():
        print(f"{name.replace('_', ' '):28}{value:>16,}")
    if flags.FLAGS.out is not None:
        write_whole(Path(flags.FLAGS.out), json.dumps(found) + "\n")


def data_figures(experiment: "Experiment") -> dict[str, int]:
    """Rows, tokens and targets of the training text, before the sample axis leaves any out, and of the held-out."""
    from kdjax.data import load_data
    from kdjax.models.tokenizer import load_tokenizer

    e = experiment
    source = e.data.tokenizer or e.teacher.path or e.student.path
    summary = load_data(e.data, load_tokenizer(source, where="data.tokenizer")).summary
    return {
        f"{part}_{name}": summary[part][name] for part in ("train", "heldout") for name in ("rows", "tokens", "targets")
    }


def step_figures(experiment: "Experiment") -> dict[str, int]:
    """Parameters of both models; bytes of the compiled step on one device.

    step_temporary_bytes is what the step needs besides what goes in and out; step_argument_bytes is what goes in:
    weights of both models, optimiser, batch.
    """
    import jax

    from kdjax import models
    from kdjax.build import DTYPES, build_parts
    from kdjax.data import abstract_batch
    from kdjax.models import prune
    from kdjax.models.io import load_config
    from kdjax.sharding import make_rules
    from kdjax.step import init_state, make_train_step

    e = experiment
    rules = make_rules(e.mesh.preset, e.mesh.devices, e.mesh.kernels)
    teacher = load_config(e.teacher.path) if e.teacher.path else None
    if e.student.init.kind == "cut" and teacher is not None:
        keep = e.student.init.keep or prune.default_keep(teacher.layers, e.student.init.layers)
        student = prune.cut_config(teacher, keep)
    else:
        student = load_config(e.student.path, where="student.path")
    parts = build_parts(e, student, teacher, rules)
    params = models.abstract_params(student, rules)
    dtype = DTYPES[e.teacher.dtype]
    teacher_params: Any = ()
    if teacher is not None and parts.teacher is not None:
        teacher_params = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, dtype, sharding=a.sharding), models.abstract_params(teacher, rules)
        )
    state = jax.eval_shape(lambda p: init_state(parts, p, 0), params)
    step = jax.jit(make_train_step(parts), donate_argnums=0)
    vocab = min(cfg.vocab_size for cfg in (student, teacher) if cfg is not None)
    compiled = step.lower(state, teacher_params, abstract_batch(e, rules, vocab)).compile().memory_analysis()
    found = {"student_parameters": sum(leaf.size for leaf in jax.tree.leaves(params))}
    if teacher is not None:
        found["teacher_parameters"] = sum(leaf.size for leaf in jax.tree.leaves(models.abstract_params(teacher)))
    if compiled is not None:  # not every backend says
        found["step_temporary_bytes"] = compiled.temp_size_in_bytes
        found["step_argument_bytes"] = compiled.argument_size_in_bytes
    return found


if __name__ == "__main__":
    app.run(main)
