"""The embedded SmolLM2-135M into 12 of its 30 layers on one TPU chip or GPU, SE-KD at 20 % of the positions.

Command:   python -m launch.plan  --config=configs/one_chip.py --topology=v5e:1x1
           python -m launch.train --config=configs/one_chip.py --workdir=runs/one_chip
Hardware:  one chip with 16 GB; compiled for v5e, not run there: 3.1 GiB of it
Time:      not run on a chip; by launch.plan's estimate at least 0.035 s a step
Result:    report.html in the workdir

bfloat16 for both trunks, float32 masters, 16 rows of 512 tokens a step, six epochs of the embedded World Factbook.
"""

from ml_collections import ConfigDict

from kdjax.config import default_config


def get_config() -> ConfigDict:
    """SE-KD on one accelerator; the quickstart's models and text, more layers and more steps."""
    config = default_config()
    config.name = "one_chip"
    config.teacher.path = "smollm2-135m"
    config.teacher.dtype = "bfloat16"
    config.student.init.kind = "cut"
    config.student.init.layers = 12
    config.student.compute_dtype = "bfloat16"
    config.data.path = "factbook"
    config.data.seq_len = 512
    config.selection.policy = "top_fraction"
    config.selection.signal = "student_entropy"
    config.selection.fraction = 0.2
    config.train.batch_size = 16
    config.train.steps = 1000
    config.train.log_every = 10
    config.optim.learning_rate = 5e-4
    config.optim.warmup = 50
    config.eval.every = 250
    config.checkpoint.every = 250
    return config
