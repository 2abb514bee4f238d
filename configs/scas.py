"""SCAS: of several teachers' right answers the student is trained on those that cost it least, chosen anew each epoch.

Command:   for style in bare sentence equation words boxed steps tutor; do
             python -m launch.generate --config=configs/tasks/arith.py --model=scripted --style=$style --samples=1 \\
               --out=runs/pool/$style
           done
           python -m launch.generate --config=configs/tasks/arith.py --model=teacher --samples=4 --out=runs/pool/smollm2
           python -m launch.curate   --config=configs/scas.py --workdir=runs/s
           python -m launch.train    --config=configs/scas.py --workdir=runs/s
           python -m launch.curate   --config=configs/scas.py --workdir=runs/s --explain=sum2/11+55 --out=runs/s/x.html
Hardware:  2 CPU cores, 4 GiB of memory (estimated); other models, questions and answers: --config.student.path=...
             --config.prompts.path=..., --config.answers.pool="('gpt.jsonl', 'qwen.jsonl')", a file per teacher
Time:      4.5 minutes for the teacher's answers, 3 for one scoring of 2,312 answers, 15 for the training, with two more
Result:    runs/s/answers/selected.jsonl, one answer to each question, and a student trained on them: of 60 held-out
             questions right before 1, after 16 (0.27 [0.17, 0.39], one seed); perplexity of Factbook text 127, then 128

The questions are those of configs/tasks/arith.py. Seven teachers are scripts that know the answers and differ in manner
alone; the eighth is SmolLM2-135M-Instruct (dequantised from Q4_1), whose right answers count. The student has 24 of its
30 layers. --config.answers.score=head_norm ranks by the exact gradient norm of the head instead.
"""

from ml_collections import ConfigDict

from kdjax.config import default_config

EPOCH = 40  # steps: about 320 train questions in batches of 8


def get_config() -> ConfigDict:
    """The released group, seed and share (arXiv 2605.26872); three rounds, one schedule over all of them."""
    config = default_config()
    config.name = "scas"
    config.teacher.path = "smollm2-135m"
    config.student.init.kind = "cut"
    config.student.init.layers = 24
    config.data.seq_len = 128
    config.data.max_train_tokens = 20_000
    config.prompts.path = "arith"
    config.prompts.size = 400
    config.prompts.instruction = " Reply with the answer only."
    config.prompts.answers = "pool"
    config.answers.pool = ("runs/pool",)
    config.answers.policy = "group"
    config.answers.score = "scas"
    config.answers.rescore_every = EPOCH
    config.generation.new_tokens = 32
    config.selection.policy = "all"
    config.loss.terms = (("cross_entropy", 1.0),)
    config.train.batch_size = 8
    config.train.steps = 3 * EPOCH
    config.optim.learning_rate = 2e-5
    config.optim.warmup = 6
    config.eval.prompts = 60
    return config
