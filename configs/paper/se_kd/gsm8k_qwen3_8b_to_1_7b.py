"""The SE-KD paper's table of distillation on GSM8K, off policy: Qwen3-8B into Qwen3-1.7B, a row of it a name.

Command:   python -m launch.train --config=configs/paper/se_kd/gsm8k_qwen3_8b_to_1_7b.py:se_kd --workdir=runs/gsm8k
             --config.data.path=<the train split as *.jsonl, "text" = question, newline, answer>; before it
             launch.curate for rows that choose samples, then launch.cache_teacher for rows with teacher.source=cache
Hardware:  as qwen3_8b_to_1_7b.py
Time:      not measured
Result:    not run here; the paper's figures are with the rows in ROWS: GSM8K accuracy

Its rows on the student's own answers are to come with on-policy distillation. The number of steps is an estimate of one
epoch; set train.steps to rows / 16, which launch.plan prints.
"""

from ml_collections import ConfigDict

from configs.paper.se_kd import qwen3_8b_to_1_7b as paper

# Rows of the other tables that this one has too; their accuracy on GSM8K in the paper.
ROWS = (
    "full_kd",  # 71.6
    "random_20",  # 70.2
    "se_kd",  # 69.5
    "pos_rs_kd",  # 70.5
    "pos_rs_kd_corrected",  # 69.1
    "top_samples",  # 69.0
    "se_kd_top_samples",  # 70.9
    "se_kd_3x",  # 70.2
)
EPOCH = 180  # steps


def get_config(row: str = "se_kd") -> ConfigDict:
    """One row of the table."""
    config = paper.get_config(row)
    config.name = f"gsm8k_qwen3_8b_to_1_7b_{row}"
    config.data.max_train_tokens = 0
    config.data.heldout_fraction = 0.02
    config.train.steps = int(EPOCH * config.samples.fraction)
    config.eval.every = 60
    config.checkpoint.every = 60
    return config
