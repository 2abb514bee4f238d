"""Distil a real language model on a laptop: SmolLM2-135M-Instruct (dequantised from Q4_1) into 6 of its 30 layers.

Command:   make quickstart     or   python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
Hardware:  2 CPU cores, 3 GiB of memory
Time:      about 5 minutes after the install
Result:    held-out perplexity from 9e5 to about 290, the teacher's is 26 (World Factbook, countries not trained on)
"""

from ml_collections import ConfigDict

from kdjax.config import default_config


def get_config() -> ConfigDict:
    """SE-KD at 20 % of the positions on the embedded World Factbook."""
    config = default_config()
    config.name = "quickstart"
    config.teacher.path = "smollm2-135m"
    config.student.init.kind = "cut"
    config.student.init.layers = 6
    config.data.path = "factbook"
    config.data.seq_len = 128
    config.selection.policy = "top_fraction"
    config.selection.signal = "student_entropy"
    config.selection.fraction = 0.2
    config.train.batch_size = 4
    config.train.steps = 100
    config.optim.learning_rate = 1e-3
    config.optim.warmup = 10
    config.checkpoint.every = 100
    return config
