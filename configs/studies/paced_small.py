"""PACED's claims on a real model that learns from itself: weights by pass rate, and what they are compared with.

Command:   python -m launch.compare --config=configs/studies/paced_small.py
Hardware:  2 CPU cores, 7 GiB of memory, 2 GB of disk while it runs
Time:      about 80 minutes on idle cores: 5 for the pass rates, which all share, and 6 a run
Result:    no difference seen: of 100 held-out questions right 16 before; after uniform 28 [20, 36], hard_filter 30
             [14, 47], paced 33 [19, 47], shuffled weights 37 [28, 45], means of 3 seeds; nothing is forgotten

SmolLM2-135M-Instruct answers questions of arithmetic; a frozen copy of it that was shown the gold answer is its
teacher, reverse KL on the student's own answers. All arms take the same steps over as many answers, and share one set
of pass rates (8 answers a question at temperature 1). Judged by the verified answers to questions that were held out,
and by held-out Factbook text, which shows what was forgotten.
"""

from ml_collections import ConfigDict

from configs.studies._base import base_config
from kdjax.analysis.study import default_study

ARMS = ("uniform", "hard_filter", "paced", "shuffled")


def get_config(full: bool = False) -> ConfigDict:
    """Arms differ in `pass_rates.weight` alone."""
    study = default_study()
    study.name = "paced_full" if full else "paced_small"
    study.base = base(steps=400 if full else 40)
    study.arms = {name: {"pass_rates.weight": name} for name in ARMS}
    study.reference = "uniform"
    study.seeds = (0, 1, 2, 3, 4) if full else (0, 1, 2)
    study.seed_fields = ("train.seed", "pass_rates.seed")
    study.equal_time = False
    study.heldout_rows = 0 if full else 24
    return study


def base(steps: int) -> ConfigDict:
    """Self-distillation on the student's own answers."""
    config = base_config()
    config.teacher.privileged = "{question} (The correct answer is {answer}.)"
    config.student.path = "smollm2-135m"
    config.data.seq_len = 80
    config.data.max_train_tokens = 20_000
    config.prompts.path = "arith"
    config.prompts.size = 500
    config.prompts.instruction = " Reply with the answer only."
    config.generation.samples = 8
    config.generation.new_tokens = 24
    config.generation.batch_size = 32
    config.pass_rates.rollouts = "../../rollouts"  # of the study: all runs have the same student at the start
    config.on_policy.fraction = 1.0
    config.on_policy.block = 4
    config.selection.policy = "all"
    config.loss.terms = (("reverse_kl", 1.0),)
    config.loss.reduction = "sample"
    config.optim.learning_rate = 2e-5
    config.optim.warmup = steps // 10
    config.train.steps = steps
    config.train.batch_size = 8
    config.train.log_every = 2
    config.eval.prompts = 100
    return config
