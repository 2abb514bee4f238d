"""SCAS's claim on a real model: which right answers it is best to learn from, at equal steps and equal questions.

Command:   python -m launch.compare --config=configs/studies/scas_small.py
Hardware:  2 CPU cores, 6 GiB of memory, 2 GB of disk while it runs
Time:      84 minutes on a busy machine: 3 for the pool, 4 a run
Result:    of 100 held-out questions right before: 9; after: random 22, SCAS 26, H 24, GRAPE 25, shortest 25,
             strongest 24, the costliest fifth 20, means of 3 seeds: no difference to random is seen (README)

The teachers: SmolLM2-135M-Instruct (dequantised from Q4_1) asked in three ways, so three teachers derived from one base
model, of which only right answers count; and five scripts that know the answers and differ in manner alone. They answer
sums, divisors, syllogisms and who of three is the tallest. The student has 24 of the model's 30 layers. Arms differ in
which right answer to a question is trained on. Judged by the verified answers to questions that were held out. The pool
is made once, in runs/pools/arith_logic.
"""

from ml_collections import ConfigDict

from configs.studies._base import base_config
from kdjax.analysis.study import default_study

POOL = "runs/pools/arith_logic"
KINDS = "arith:sum1,arith1,sum2,gcd,syll,order"
SIZE, HELDOUT = 300, 0.4
ASKED_OF = (
    f"--config.prompts.path={KINDS}",
    f"--config.prompts.size={SIZE}",
    f"--config.prompts.heldout_fraction={HELDOUT}",
)
STYLES = ("bare", "sentence", "equation", "words", "steps")
ASKED = {
    "chat": (),
    "short": ("--config.prompts.instruction= Reply with the answer only.",),
    "plain": ("--config.data.chat_template=False", "--config.prompts.instruction=\nA:"),
}
ARMS: dict[str, dict[str, str | int]] = {
    "random": {"answers.policy": "random"},
    "scas": {"answers.policy": "group", "answers.score": "scas"},
    "head_norm": {"answers.policy": "group", "answers.score": "head_norm"},
    "grape": {"answers.policy": "best", "answers.score": "grape"},
    "shortest": {"answers.policy": "shortest"},
    "strongest": {"answers.policy": "strongest"},
    "costliest": {"answers.policy": "group", "answers.score": "scas", "answers.group": 5},
}
SCORED = ("group", "best")


def get_config(full: bool = False) -> ConfigDict:
    """Arms choose anew in the middle of training where they choose by a score."""
    steps = 240 if full else 40
    study = default_study()
    study.name = "scas_full" if full else "scas_small"
    study.base = base(steps)
    study.arms = {
        name: arm | ({"answers.rescore_every": steps // 2} if arm["answers.policy"] in SCORED else {})
        for name, arm in ARMS.items()
    }
    study.reference = "random"
    study.seeds = (0, 1, 2, 3, 4) if full else (0, 1, 2)
    study.seed_fields = ("train.seed", "answers.seed")
    study.equal_time = False
    study.heldout_rows = 0 if full else 16
    study.prepare = commands()
    return study


def commands() -> dict[str, tuple[str, ...]]:
    """The teachers' answers to the train questions."""
    task = ("generate", "--config=configs/tasks/arith.py", *ASKED_OF)
    made: dict[str, tuple[str, ...]] = {
        style: (*task, "--model=scripted", f"--style={style}", "--samples=1", f"--out={POOL}/{style}")
        for style in STYLES
    }
    for name, asked in ASKED.items():
        made[name] = (*task, "--model=teacher", "--samples=2", *asked, f"--out={POOL}/{name}")
    return made


def base(steps: int) -> ConfigDict:
    """Fine-tuning on one right answer to each question."""
    config = base_config()
    config.student.init.kind = "cut"
    config.student.init.layers = 24
    config.data.seq_len = 88  # all but the divisors' steps
    config.data.max_train_tokens = 20_000
    config.prompts.path = KINDS
    config.prompts.size = SIZE
    config.prompts.heldout_fraction = HELDOUT
    config.prompts.instruction = " Reply with the answer only."
    config.prompts.answers = "pool"
    config.answers.pool = (POOL,)
    config.answers.scored = "../.."  # of the study: all runs begin with the same student
    config.generation.new_tokens = 32
    config.generation.batch_size = 30
    config.selection.policy = "all"
    config.loss.terms = (("cross_entropy", 1.0),)
    config.optim.learning_rate = 1e-4
    config.optim.warmup = steps // 10
    config.train.steps = steps
    config.train.batch_size = 8
    config.train.log_every = 5
    config.eval.prompts = 100
    return config
