"""PACED: prompts weigh by how often the student solves them; a model learns from itself, which was shown the answers.

Command:   python -m launch.curate --config=configs/paced.py --workdir=runs/p
           python -m launch.train  --config=configs/paced.py --workdir=runs/p
Hardware:  2 CPU cores, 4 GiB of memory (estimated); other models and prompts: --config.teacher.path=...
             --config.student.path=... --config.prompts.path=..., and answers of a teacher instead of the gold ones:
             --config.prompts.answers=<the --out of launch.generate --model=teacher>
Time:      about 5 minutes for the answers and 15 for the steps on idle cores (87 tokens/s at the end of a run)
Result:    runs/p/weights.jsonl, a weight per prompt: of 162 prompts 80 were never solved, 82 are kept, none is always
             solved; and a student trained with them, held-out text unchanged (perplexity 26.4 before, 26.3 after)

SmolLM2-135M-Instruct (dequantised from Q4_1) answers small sums 8 times each; those that it never or always solves are
left out. The first half of the steps is forward KL on the gold answers, the second reverse KL on the student's own.
"""

from ml_collections import ConfigDict

from kdjax.config import default_config


def get_config() -> ConfigDict:
    """The paper's weight p (1 - p) from 8 answers at temperature 1, and its two stages (arXiv 2603.11178)."""
    config = default_config()
    config.name = "paced"
    config.teacher.path = "smollm2-135m"
    config.teacher.privileged = "{question} The answer is {answer}. Say it in your own words."
    config.student.path = "smollm2-135m"
    config.prompts.path = "arith"
    config.prompts.size = 200
    config.prompts.instruction = " Reply with the answer only."
    config.prompts.answers = "gold"
    config.generation.samples = 8
    config.generation.new_tokens = 32
    config.pass_rates.weight = "paced"
    config.data.seq_len = 128
    config.data.max_train_tokens = 20_000
    config.selection.policy = "all"
    config.on_policy.fraction = ("step", 0.0, 1.0, "50%")  # of train.steps
    config.loss.terms = (("forward_kl", ("step", 1.0, 0.0, "50%")), ("reverse_kl", ("step", 0.0, 1.0, "50%")))
    config.loss.reduction = "sample"
    config.train.batch_size = 8
    config.train.steps = 100
    config.optim.learning_rate = 2e-5
    config.optim.warmup = 10
    return config
