"""SE-KD's recipe on another pair of models: Llama-3.1-8B into Llama-3.2-1B on FineWeb-Edu.

Command:   python -m launch.plan  --config=configs/paper/se_kd/llama31_8b_to_32_1b.py:se_kd --topology=v5e:4x4
           python -m launch.train --config=configs/paper/se_kd/llama31_8b_to_32_1b.py:se_kd --workdir=runs/llama
             --config.data.path=<FineWeb-Edu as *.jsonl with "text", 80M tokens of it>; se_kd_3x wants launch.curate and
             launch.cache_teacher before it
Hardware:  a TPU slice or GPUs with 16 GB for each of 16 devices; --topology=v5p:2x2x4, v6e:4x4, h100:8 as well.
             Compiled, not run, for v5e:4x4 with --config.data.seq_len=2048: 5.0 GiB of a chip, 19.8 GiB sent a step,
             1.011 of what the sharding implies; 215 s to compile
Time:      not run; launch.plan gives an estimate for a topology
Result:    not run here, and the paper has no such pair

80M tokens in windows of 512, 16 a step, one epoch, forward KL at temperature 1. Both models share one tokenizer.
"""

from ml_collections import ConfigDict

from configs.paper.se_kd import qwen3_8b_to_1_7b as paper
from kdjax.registry import lookup

# Row -> what it changes of dense distillation.
ROWS = {row: paper.ROWS[row] for row in ("full_kd", "random_20", "se_kd", "se_kd_3x")}


def get_config(row: str = "se_kd") -> ConfigDict:
    """Dense distillation, its random control, SE-KD or SE-KD 3X."""
    lookup(ROWS, row, "the row after the config file's colon")
    config = paper.get_config(row)
    config.name = f"llama31_8b_to_32_1b_{row}"
    config.teacher.path = "meta-llama/Llama-3.1-8B"
    config.student.path = "meta-llama/Llama-3.2-1B"
    return config
