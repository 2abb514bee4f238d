"""The tables of the SE-KD paper (arXiv 2602.01395): Qwen3-8B into Qwen3-1.7B on FineWeb-Edu, a row of a table a name.

Command:   python -m launch.train --config=configs/paper/se_kd/qwen3_8b_to_1_7b.py:se_kd --workdir=runs/se_kd
             --config.data.path=<FineWeb-Edu as *.jsonl with "text", 80M tokens of it>; before it launch.curate for rows
             that choose samples, then launch.cache_teacher for rows with teacher.source=cache
Hardware:  a TPU slice or GPUs with 16 GB for each of 8 devices or more. Compiled, not run:
             python -m launch.plan --config=<this file>:<row> --config.data.seq_len=2048 --topology=<topology>
             row       topology   mesh by default     GiB a chip   sent GiB, of what is implied   s to compile
             se_kd     v5e:4x4    data:4,model:4      6.1 of 16 GB      22.2, 1.002               126
             se_kd     v6e:4x4    data:4,model:4      6.0 of 32 GB      22.2, 1.000               268
             se_kd     v5p:2x2x4  data:4,model:4      6.1 of 95 GB      22.2, 1.002               222
             se_kd     v5e:2x4:2  replica:2,data:8    7.8 of 16 GB      21.3, 1.014               242
             se_kd     h100:8     data:8              8.3 of 80 GB      20.7, 1.000               74
             se_kd_3x  v5e:2x4    data:8              5.0 of 16 GB       8.4, 1.035               279
             (two slices send 0.5 of it over the network; h100 without cuDNN here, so with XLA's attention; compiling
             on two cores that others used too: alone the first row took 28 s)
Time:      not measured here; the paper: 23 h dense, 4 h for 3X with its cache there, on two RTX 3090
Result:    not run here; the paper's figures are with the rows in ROWS: Acc, its mean over five tasks

80M tokens in windows of 512, 16 a step, one epoch, forward KL at temperature 1, constant learning rate, Adam, clipped.
Ours: float32 masters (the paper's bfloat16 weights hardly move at 1e-5), no 8-bit optimiser state.
"""

from ml_collections import ConfigDict

from kdjax.config import default_config
from kdjax.registry import lookup

POSITIONS = {"selection.policy": "top_fraction", "selection.fraction": 0.2}
SE_KD = POSITIONS | {"selection.signal": "student_entropy"}
SAMPLES = {"samples.fraction": 0.2, "samples.score": "student_entropy"}
DRAWS = {"classes.kind": "sampled", "classes.entries": 50, "teacher.source": "cache"}
SAMPLED = {"selection.policy": "sampled", "selection.signal": "student_entropy", "selection.fraction": 0.2}

# Row -> what it changes of dense distillation, and its Acc in the paper.
ROWS = {
    "full_kd": {},  # 64.4
    "random_20": {"selection.policy": "random_fraction", "selection.fraction": 0.2},  # 64.2
    "at_kd": {  # 63.8
        "selection.policy": "easy_hard",
        "selection.signal": "unc",
        "selection.fraction": 0.5,
        "loss.terms": (("at_kd", 1.0),),
    },
    # positions: which signal
    "se_kd": SE_KD,  # 64.8
    "teacher_entropy": POSITIONS | {"selection.signal": "teacher_entropy"},  # 63.2
    "student_ce": POSITIONS | {"selection.signal": "student_ce"},  # 63.8
    "teacher_ce": POSITIONS | {"selection.signal": "teacher_ce"},  # 63.4
    "kl": POSITIONS | {"selection.signal": "kl"},  # 64.5
    "reverse_kl": POSITIONS | {"selection.signal": "reverse_kl"},  # 64.7
    "ce_ratio": POSITIONS | {"selection.signal": "ce_ratio"},  # 64.6
    "ce_ratio_plus_entropy": POSITIONS | {"selection.signal": "ce_ratio_plus_entropy"},  # 64.6
    "entropy_plus_kl": POSITIONS | {"selection.signal": "entropy_plus_kl"},  # 65.1
    # positions: which policy
    "gls": SE_KD | {"selection.policy": "threshold", "selection.queue": 30_000},  # 64.5
    "curriculum": SE_KD | {"selection.policy": "curriculum", "selection.curriculum_steps": 4000},  # 64.6
    "pos_rs_kd": SAMPLED | {"selection.corrected": False},  # 63.0
    "pos_rs_kd_corrected": SAMPLED | {"selection.corrected": True},  # 63.6
    # samples, classes, and all together
    "random_samples_20": SAMPLES | {"samples.score": "random"},  # 64.0
    "top_samples": SAMPLES,  # 64.2
    "top_samples_kl": SAMPLES | {"samples.score": "kl"},  # 64.2
    "top_samples_ce_ratio": SAMPLES | {"samples.score": "ce_ratio"},  # 64.3
    "rs_kd": DRAWS,  # 64.7
    "top_samples_rs_kd": SAMPLES | DRAWS,  # 64.1
    "se_kd_top_samples": SE_KD | SAMPLES,  # 64.6
    "se_kd_3x": SE_KD | SAMPLES | DRAWS,  # 64.4
}


def get_config(row: str = "se_kd") -> ConfigDict:
    """One row of the paper's tables."""
    config = default_config()
    config.name = f"qwen3_8b_to_1_7b_{row}"
    config.teacher.path = "Qwen/Qwen3-8B"
    config.teacher.dtype = "bfloat16"
    config.student.path = "Qwen/Qwen3-1.7B"
    config.student.compute_dtype = "bfloat16"
    config.student.remat = "full"
    config.data.seq_len = 512
    config.data.max_train_tokens = 80_000_000
    config.data.heldout_fraction = 0.002
    config.selection.policy = "all"
    config.optim.learning_rate = 1e-5
    config.optim.schedule = "constant"
    config.optim.warmup = 0
    config.optim.b2 = 0.999
    config.train.batch_size = 16
    config.train.log_every = 10
    config.eval.every = 1000
    config.checkpoint.every = 500
    config.mesh.preset = "fsdp"
    changes = lookup(ROWS, row, "the row after the config file's colon")
    config.update_from_flattened_dict(changes)
    config.train.steps = int(80_000_000 / 512 / 16 * config.samples.fraction)  # one epoch of what is kept
    return config
