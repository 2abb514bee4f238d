"""A student for everybody else: python -m launch.export_hf --workdir=runs/mine --out=my-student

Writes a directory that AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained load.
"""

from pathlib import Path

from absl import flags

from launch import app

flags.DEFINE_string("workdir", None, "The directory of a run.")
flags.DEFINE_string("out", None, "The directory to write; must not exist or be empty.")
flags.DEFINE_string("step", "", "Which checkpoint: a step, 'best', or '' for the newest.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Of the weights in the files.")


def main() -> None:
    """Workdir -> build -> checkpoint -> Hugging Face directory."""
    workdir, out = Path(app.require("workdir")), Path(app.require("out"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):  # before anything slow is loaded
        raise ValueError(f"--out must be a new or empty directory, got {str(out)!r}, which has content. Set another.")

    from kdjax import loop
    from kdjax.build import build, load_experiment
    from kdjax.models.hf_io import save_hf

    experiment = load_experiment(workdir)
    built = build(experiment, workdir if experiment.prompts.path else None)
    state, step = loop.restore(built, workdir, flags.FLAGS.step)
    save_hf(out, built.student_cfg, state.params, built.tokenizer, dtype=flags.FLAGS.dtype)
    print(f"{out}: the student of {workdir} at step {step}")


if __name__ == "__main__":
    app.run(main)
