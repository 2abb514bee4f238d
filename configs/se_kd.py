"""SE-KD: distil any teacher into any student with its tokenizer, at the 20 % of positions of highest student entropy.

Command:   python -m launch.train --config=configs/se_kd.py --workdir=runs/se_kd --config.teacher.path=<HF dir or id>
             --config.student.path=<HF dir or hub id> --config.data.path=<*.jsonl, *.txt or a directory>
Hardware:  any; add --config.mesh.preset=fsdp for several devices
Time:      depends on the models
Result:    report.html in the workdir

The paper's setting (arXiv 2602.01395): forward KL at temperature 1, no cross-entropy, 16 rows of 512 tokens a step.
The learning rate is ours: with float32 masters 1e-5 is on the low side for small students.
"""

from ml_collections import ConfigDict

from kdjax.config import default_config


def get_config() -> ConfigDict:
    """The paper's recipe; teacher, student and data come from the command line."""
    config = default_config()
    config.name = "se_kd"
    config.data.seq_len = 512
    config.selection.policy = "top_fraction"
    config.selection.signal = "student_entropy"
    config.selection.fraction = 0.2
    config.train.batch_size = 16
    config.train.steps = 1000
    config.train.log_every = 10
    config.optim.learning_rate = 2e-5
    config.optim.warmup = 50
    config.eval.every = 250
    config.checkpoint.every = 250
    return config
