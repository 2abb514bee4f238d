"""How fast it is: python -m launch.bench [--suite=step|phases|kernels|generation|answers] [--rounds=5] [--fraction=0.2]

step: one KD step at SmolLM2's shapes and its parts. phases: scoring, caching and training of SE-KD 3X against live
steps, with real weights and text. generation: reading prompts and making tokens. answers: scoring a pool's answers with
the question shared against one by one, and the exact norm of the head's gradient against mere log-probabilities.
kernels: every vocabulary kernel at shapes of real models, timed here and compiled for the TPUs and GPUs that are not
here; a dated CSV is written as well.
Step and kernels compare with a plain matrix product of the same process, generation with a pass over the weights, in
turn with it: shared machines drift, ratios within a round do not.
"""

from absl import flags

from launch import app

flags.DEFINE_enum("suite", "step", ["step", "phases", "kernels", "generation", "answers"], "What is measured.")
flags.DEFINE_integer("rounds", None, "How often everything is timed: 5, kernels 3.", lower_bound=1)

flags.DEFINE_integer("batch", 4, "step, phases: rows.")
flags.DEFINE_integer("seq_len", 256, "step, phases: tokens a row.")
flags.DEFINE_integer("student_layers", 6, "step, phases: of the teacher's, 30 in step.")
flags.DEFINE_float("fraction", 1.0, "step: share of positions, by student entropy; 1 = dense.")

flags.DEFINE_string("teacher", "smollm2-135m", "phases: the teacher, of which the student is cut.")
flags.DEFINE_float("positions", 1.0, "phases: share of the positions that scoring looks at.")
flags.DEFINE_float("kept", 0.2, "phases: share of the rows that are kept.")

flags.DEFINE_integer("layers", 24, "answers: layers of the student, of SmolLM2's 30.", lower_bound=1)
flags.DEFINE_integer("answers", 8, "answers: to a question.", lower_bound=1)
flags.DEFINE_list("lengths", ["64", "128"], "answers: tokens of question and answer.")

flags.DEFINE_list("op", [], "kernels: ops, such as linear_divergence, or only linear_divergence+grad; all.")
flags.DEFINE_list("shape", ["smollm2", "qwen2.5_self"], "kernels: models to time, of kdjax/kernels/shapes.py.")
flags.DEFINE_list("compile_shape", ["qwen2.5_self"], "kernels: models to compile for chips.")
flags.DEFINE_integer("rows", None, "kernels: rows, instead of the shape's own.", lower_bound=1)
flags.DEFINE_list("chip", ["all"], "kernels: chips to compile for, of kdjax/aot.py; all, or none.")
flags.DEFINE_bool("time", True, "kernels: run what runs here; else only compile.")
flags.DEFINE_string("out", "runs/bench", "kernels: the folder of kernels-YYYY-MM-DD.csv.")


def main() -> None:
    """Run the suite."""
    rounds = flags.FLAGS.rounds
    if flags.FLAGS.suite == "step":
        from launch import bench_step

        bench_step.run(rounds or 5)
    elif flags.FLAGS.suite == "phases":
        from launch import bench_phases

        bench_phases.run(rounds or 5)
    elif flags.FLAGS.suite == "generation":
        from launch import bench_generation

        bench_generation.run(rounds or 5)
    elif flags.FLAGS.suite == "answers":
        from launch import bench_answers

        bench_answers.run(rounds or 5)
    else:
        from launch import bench_kernels

        bench_kernels.run(rounds or 3)


if __name__ == "__main__":
    app.run(main)
