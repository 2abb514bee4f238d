"""What a run would need, before anything is loaded: python -m launch.plan --config=configs/quickstart.py

Rows and targets of the text, parameters, and the memory of the compiled train step, from shapes alone; of training on
own answers also what a block of them takes. --out: the same as a JSON file.

--topology=v5e:4x4 (also v4, v5p, v6e, tpu7x, h100:8; v5e:4x4:2 is two slices) compiles the step for chips that are not
here: HBM of a chip by kind against what it has, bytes sent between chips, FLOPs, an estimate of the time, disk, and
what to change if it does not fit. Needs libtpu, or the CUDA plugin; neither weights nor text.
"""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from kdjax.run_log import write_whole
from launch import app

if TYPE_CHECKING:
    from kdjax.analysis.plan_figures import Program
    from kdjax.config import Experiment
    from kdjax.models import ModelConfig
    from kdjax.sharding import Rules
    from kdjax.step import StepParts

app.define_config()
flags.DEFINE_string("out", None, "A JSON file to write.")
flags.DEFINE_string("topology", None, "Plan for these chips, such as v5e:4x4, h100:8; default: what is here.")


class Step(NamedTuple):
    """A train step as shapes: its parts, and what goes in by kind, in the order of its arguments."""

    parts: "StepParts"
    inputs: dict[str, Any]
    arguments: tuple[Any, ...]


def main() -> None:
    """Config -> shapes -> compiled step -> figures."""
    from kdjax.config import from_config_dict

    experiment = from_config_dict(app.require("config"))
    if flags.FLAGS.topology is not None:
        from kdjax.analysis.plan_text import render

        found = topology_figures(experiment, flags.FLAGS.topology)
        print(render(found), end="")
    else:
        from kdjax.analysis.plan_generation import not_counted

        of_step = step_figures(experiment)  # first, because names that do not exist are found there at once
        found = data_figures(experiment) | of_step
        for name, value in found.items():
            print(f"{name.replace('_', ' '):32}{value:>16,}")
        for note in not_counted(experiment, of_step):
            print(note)
    if flags.FLAGS.out is not None:
        write_whole(Path(flags.FLAGS.out), json.dumps(found) + "\n")


def data_figures(experiment: "Experiment") -> dict[str, int]:
    """Rows, tokens and targets of the training text, before the sample axis leaves any out, and of the held-out.

    With gold answers as the training text its rows are one for each of the train prompts, whatever they will weigh;
    answers of a model may not be there yet, and are left out.
    """
    from kdjax.build.asked import GOLD, load_asked, rows_of_answers
    from kdjax.data import eligible, load_data

    e, tokenizer = experiment, tokenizer_of(experiment)
    summary = load_data(e.data, tokenizer).summary
    names = ("rows", "tokens", "targets")
    train = {name: summary["train"][name] for name in names}
    if e.prompts.answers == GOLD:
        rows = rows_of_answers(e, load_asked(e, tokenizer, None), tokenizer, ())[0]
        counts = len(rows), int((rows.segment_ids > 0).sum()), int(eligible(rows).sum())
        train = dict(zip(names, counts, strict=True))
    elif e.prompts.answers or e.on_policy.fraction == 1:
        train = {}
    return {f"train_{name}": value for name, value in train.items()} | {
        f"heldout_{name}": summary["heldout"][name] for name in names
    }


def tokenizer_of(experiment: "Experiment") -> Any:
    """That of the text."""
    from kdjax.models.tokenizer import load_tokenizer

    e = experiment
    return load_tokenizer(e.data.tokenizer or e.teacher.path or e.student.path, where="data.tokenizer")


def teacher_room(experiment: "Experiment") -> int:
    """How much longer the rows are that a teacher reads which is shown more than the student; 0 without."""
    from kdjax.build.asked import load_asked

    return load_asked(experiment, tokenizer_of(experiment), None).room if experiment.teacher.privileged else 0


def step_figures(experiment: "Experiment") -> dict[str, int]:
    """Parameters of both models; bytes of the compiled step on one device.

    step_temporary_bytes is what the step needs besides what goes in and out; step_argument_bytes is what goes in:
    weights of both models, optimiser, batch.
    """
    import jax

    from kdjax import models
    from kdjax.analysis.plan_generation import generation_figures
    from kdjax.models.io import load_config
    from kdjax.sharding import make_rules
    from kdjax.step import make_train_step

    student, teacher = shapes(experiment, lambda path, where: load_config(path, where=where))
    rules, room = make_rules(experiment.mesh), teacher_room(experiment)
    step = abstract_step(experiment, student, teacher, rules, room)
    compiled = jax.jit(make_train_step(step.parts), donate_argnums=0).lower(*step.arguments).compile().memory_analysis()
    found = _sizes(student=step.inputs["student parameters"])
    if teacher is not None:
        found |= _sizes(teacher=models.abstract_params(teacher))
    if compiled is not None:  # not every backend says
        found["step_temporary_bytes"] = compiled.temp_size_in_bytes
        found["step_argument_bytes"] = compiled.argument_size_in_bytes
    if room:
        found["teacher_rows_longer_by"] = room
    return found | generation_figures(experiment, student, rules.batch_shards, rules.model_shards)


def topology_figures(experiment: "Experiment", name: str) -> dict[str, Any]:
    """The plan of an experiment for a topology (see kdjax/analysis/plan_figures.py), with those of `step_figures`."""
    from kdjax import aot, models
    from kdjax.analysis import plan_figures, plan_generation, plan_work
    from kdjax.build import build_chooser, build_objective
    from kdjax.models.known_configs import shape_of

    e, topology, notes = experiment, aot.parse_topology(name), []

    def known(path: str, where: str) -> "ModelConfig":
        cfg, note = shape_of(path, where=where)
        if note and note not in notes:
            notes.append(note)
        return cfg

    student, teacher = shapes(e, known)
    rules = target_rules(e, topology)
    of_teacher = rules.of_preset(e.teacher.preset)
    room = teacher_room_if_here(e, notes)
    step = abstract_step(e, student, teacher, rules, room)
    program = compile_step(step, rules)
    ours = plan_work.Side(
        student, plan_work.ITEM_BYTES[e.student.compute_dtype], rules.batch_shards, rules.model_shards
    )
    theirs = None
    if teacher is not None and step.parts.teacher is not None:
        size = plan_work.ITEM_BYTES[e.teacher.dtype]
        theirs = plan_work.Side(teacher, size, of_teacher.batch_shards, of_teacher.model_shards)
    platform = aot.CHIPS[topology.chip].platform
    objective = build_objective(e.loss, e.train.steps)
    work = plan_work.describe(e, ours, theirs, build_chooser(e.selection), objective, platform, room)
    own = plan_generation.generation_figures(e, student, rules.batch_shards, rules.model_shards)
    notes += plan_generation.not_counted(e, own)
    found = plan_figures.figures(e, topology, program, work, rules, of_teacher, notes)
    text = _text_if_here(e)
    sizes = _sizes(student=step.inputs["student parameters"])
    if teacher is not None:
        sizes |= _sizes(teacher=models.abstract_params(teacher))
    if program.analysis is not None:
        sizes["step_temporary_bytes"] = program.analysis.temp_size_in_bytes
        sizes["step_argument_bytes"] = program.analysis.argument_size_in_bytes
    return (text or {}) | sizes | own | found | {"text": text}


def shapes(e: "Experiment", config_of: Any) -> tuple["ModelConfig", "ModelConfig | None"]:
    """(student, teacher) by their paths; config_of(path, where) reads one."""
    from kdjax.models import prune

    teacher = config_of(e.teacher.path, "teacher.path") if e.teacher.path else None
    if e.student.init.kind == "cut" and teacher is not None:
        keep = e.student.init.keep or prune.default_keep(teacher.layers, e.student.init.layers)
        return prune.cut_config(teacher, keep), teacher
    return config_of(e.student.path, "student.path"), teacher


def abstract_step(
    e: "Experiment", student: "ModelConfig", teacher: "ModelConfig | None", rules: "Rules", room: int = 0
) -> Step:
    """The step of an experiment on a mesh, as shapes; room: of `teacher_room`."""
    import jax

    from kdjax import models
    from kdjax.build import DTYPES, build_parts, check_rows
    from kdjax.data import abstract_batch
    from kdjax.step import init_state

    if e.teacher.devices:
        raise ValueError(
            f"teacher.devices must be 0 for launch.plan, got {e.teacher.devices}; it plans steps of which all devices "
            "have a part. Set it to 0, and for a plan teacher.preset instead."
        )
    check_rows(e, rules, rules.of_preset(e.teacher.preset))
    parts = build_parts(e, student, teacher, rules)
    params = models.abstract_params(student, rules)
    teacher_params: Any = ()
    if teacher is not None and parts.teacher is not None:
        teacher_params = models.abstract_params(teacher, rules.of_preset(e.teacher.preset), DTYPES[e.teacher.dtype])
    state = jax.eval_shape(lambda p: init_state(parts, p, 0), params)
    vocab = min(cfg.vocab_size for cfg in (student, teacher) if cfg is not None)
    batch = abstract_batch(e, parts.rules, vocab, room)
    inputs = {"student parameters": params, "optimiser and state": (state.opt_state, state.policy_state)}
    inputs |= {"teacher parameters": teacher_params} if teacher_params else {}
    return Step(parts, inputs | {"batch": batch}, (state, teacher_params, batch))


def target_rules(e: "Experiment", topology: Any) -> "Rules":
    """The rules of an experiment over the devices of a topology; "single" is a mesh of its first one."""
    import dataclasses

    from kdjax.aot import topology_devices
    from kdjax.sharding import make_rules

    devices = topology_devices(topology)
    if e.mesh.preset != "single":
        return make_rules(e.mesh, devices)
    return make_rules(dataclasses.replace(e.mesh, preset="dp", shape=""), devices[:1])


def compile_step(step: Step, rules: "Rules") -> "Program":
    """Compile for the mesh's devices; a program that is too large comes back with the compiler's words."""
    import jax

    from kdjax.analysis.plan_figures import Program
    from kdjax.step import make_train_step

    start = time.perf_counter()
    mesh: Any = rules.mesh  # of devices, which `target_rules` gives it
    with jax.set_mesh(mesh):
        lowered = jax.jit(make_train_step(step.parts), donate_argnums=0).lower(*step.arguments)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return refused_program(step, str(error), time.perf_counter() - start)
    seconds = time.perf_counter() - start
    return Program(step.inputs, compiled.as_text(), compiled.memory_analysis(), "", seconds)


def refused_program(step: Step, message: str, seconds: float) -> "Program":
    """What is left to plan with if the compiler refuses."""
    from kdjax.analysis.plan_figures import Program

    return Program(step.inputs, None, None, message, seconds)


def teacher_room_if_here(e: "Experiment", notes: list[str]) -> int:
    """`teacher_room`, or 0 and a note where prompts or tokenizer are not at hand."""
    try:
        return teacher_room(e)
    except (ValueError, OSError):
        notes.append(
            "the teacher's rows are counted as long as the student's, but with what it is shown they are longer"
        )
        return 0


def _text_if_here(e: "Experiment") -> dict[str, int] | None:
    """`data_figures`, or None where text or tokenizer are not at hand."""
    try:
        return data_figures(e)
    except (ValueError, OSError):
        return None


def _sizes(**trees: Any) -> dict[str, int]:
    import jax

    return {f"{side}_parameters": sum(leaf.size for leaf in jax.tree.leaves(tree)) for side, tree in trees.items()}


if __name__ == "__main__":
    app.run(main)
