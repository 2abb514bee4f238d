"""Distil on the student's own answers: GKD with lambda 0.5 and reverse KL, on questions of arithmetic.

Command:   python -m launch.train --config=configs/on_policy.py --workdir=runs/on_policy
Hardware:  2 CPU cores, 6 GiB of memory
Time:      14 minutes beside other work
Result:    report.html and own_answers/ in the workdir; metrics.jsonl has the length, variety and likelihood of the
             answers of each block (rollout_*)
"""

from ml_collections import ConfigDict

from kdjax.config import default_config


def get_config() -> ConfigDict:
    """SmolLM2-135M-Instruct into 24 of its 30 layers: half of the steps on its own answers, half on gold answers."""
    config = default_config()
    config.name = "on_policy"
    config.teacher.path = "smollm2-135m"
    config.student.init.kind = "cut"
    config.student.init.keep = (*range(18), *range(24, 30))
    config.data.path = "factbook"  # held-out text, to see what is forgotten
    config.data.seq_len = 96
    config.prompts.path = "arith"
    config.prompts.size = 1000
    config.prompts.instruction = " Reply with the answer only."
    config.prompts.answers = "gold"
    config.generation.new_tokens = 24
    config.generation.batch_size = 16
    config.on_policy.fraction = 0.5
    config.on_policy.block = 2
    config.selection.policy = "all"
    config.loss.terms = (("reverse_kl", 1.0),)
    config.optim.learning_rate = 1e-4
    config.train.steps = 60
    config.train.batch_size = 8
    config.eval.completions = 0
    return config
