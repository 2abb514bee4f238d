"""The fields of an experiment: frozen dataclasses. Fractions are in (0, 1]; sizes are in tokens."""

from __future__ import annotations

import dataclasses

ScheduleSpec = float | tuple  # a number, or (name, *arguments); see schedules.py


@dataclasses.dataclass(frozen=True)
class StudentInit:
    """Where the student's weights come from."""

    kind: str = "own"  # own: the weights at student.path | cut: layers of the teacher | random: student.path's shapes
    keep: tuple[int, ...] = ()  # cut: the teacher layers to keep, ascending; () = the default spread of `layers`
    layers: int = 6  # cut: how many, when `keep` is ()


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The model that is distilled."""

    path: str = ""  # HF directory, *.gguf, hub id, or "smollm2-135m" | "synthetic" | "flax:module:attr"
    dtype: str = "float32"  # of the weights in memory
    # live: it runs beside the student | cache: what launch.cache_teacher wrote of it, or of what a server said
    source: str = "live"
    preset: str = ""  # how it is spread over the mesh; "" = as the student, by mesh.preset
    devices: int = 0  # of its own: the last so many, the student has the others; 0 = they share all
    shape: str = ""  # of its own devices, as mesh.shape
    privileged: str = ""  # what it is asked, with {question} and the gold {answer}; "" = what the student is asked


@dataclasses.dataclass(frozen=True)
class Student:
    """The model that is trained."""

    path: str = ""  # as teacher.path; "" with init.kind "cut" = cut from the teacher
    init: StudentInit = StudentInit()
    compute_dtype: str = "float32"  # masters are always float32
    remat: str = "none"  # none | full | dots: what the backward pass recomputes


@dataclasses.dataclass(frozen=True)
class Data:
    """The text, its split, and how it becomes rows."""

    path: str = "factbook"  # factbook | topics | *.txt | *.jsonl | directory of these
    tokenizer: str = ""  # "" = the teacher's
    seq_len: int = 128
    packing: str = "pack"  # pack: documents share rows | row: one example per row
    heldout_fraction: float = 0.05  # of the documents
    seed: int = 0  # of the split
    max_train_tokens: int = 0  # 0 = all; else whole rows are kept until this many tokens
    chat_template: bool = True  # prompt/response and messages go through the tokenizer's template
    system_prompt: str = ""  # "" = whatever the template does by default


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which positions are supervised (`kdjax/selection`)."""

    policy: str = "top_fraction"  # all | top_fraction | random_fraction | ...: see kdjax/selection/policies
    signal: str = "student_entropy"
    fraction: float = 0.2
    weighting: str = "uniform"  # uniform | signal: a selected position counts by its (positive) score
    quota: str = "row"  # top_fraction, random_fraction: row: of its own length | batch: of the batch's mean length
    queue: int = 30000  # threshold: scores of the last positions, over all rows, that the threshold is a quantile of
    slack: float = 2.0  # threshold: room for this many times the fraction; what exceeds it in a row is dropped
    curriculum_steps: int = 4000  # curriculum: from the easiest positions to the hardest
    upper: float = 0.8  # bucket: upper end of the band of quantiles; its width is `fraction`
    corrected: bool = True  # sampled: importance weights, so that the mean over all positions is estimated
    reserve: float = 0.5  # reserve_mix: share of the budget that is drawn at random
    easy_weight: float = 0.2  # easy_hard, easy_hard_means: of easy positions; the hard `fraction` has 1 - easy_weight
    temperature_scale: float = 0.5  # adaptive: how much colder than loss.tau hard positions are, easy ones hotter
    adapt_after: int = 0  # adaptive: updates before the share of the positions follows the loss, down to `fraction`


@dataclasses.dataclass(frozen=True)
class Classes:
    """What the student is shown of the teacher's distribution at a position (`kdjax/teacher/classes.py`)."""

    kind: str = "all"  # all | sampled | renormalised | ghost_tail | zero_tail
    entries: int = 50  # sampled: draws per position | the others: the teacher's largest entries
    power: float = 1.0  # sampled: draws are from p^power; other than 1 with importance weights
    seed: int = 0  # of the draws


@dataclasses.dataclass(frozen=True)
class Samples:
    """Which rows of the training text are used (`kdjax/curation/samples.py`, `launch.curate`)."""

    # of the rows, those with the highest score; 1 = all, no score is needed. Of own answers each block is scored by the
    # student that writes it, for which it asks 1 / fraction times as many prompts (kdjax/run/own_samples.py)
    fraction: float = 1.0
    score: str = "student_entropy"  # of the untrained student | kl | ce_ratio | random
    positions: float = 1.0  # a score is the mean over this random share of a row's positions
    rescore_every: int = 0  # steps after which given rows are chosen anew by the student as it is then; 0 = never
    seed: int = 0  # of random scores and random positions


@dataclasses.dataclass(frozen=True)
class Cache:
    """The offline teacher (`kdjax/teacher/cache`, `launch.cache_teacher`)."""

    path: str = ""  # "" = <workdir>/cache; anything that etils.epath opens (gs://...)
    superset: float = 0.0  # 0: all positions | else only this share of a row's, by the untrained student's entropy
    entropy: bool = True  # keep the teacher's entropy, so that the loss is a KL: 1 byte a position
    label_logp: bool = False  # keep the log-probability of the next token, for signals that need it: 2 bytes a position
    rows_per_shard: int = 128  # written and resumed as a whole


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Questions, perhaps with answers that can be checked (`kdjax/data/prompts.py`)."""

    # *.jsonl | a pool of answers | a built-in task such as "arith" or "arith:sum1,gcd" | "reasoning_gym:<generators>"
    path: str = ""
    size: int = 0  # of them, drawn by `seed`; 0 = all
    seed: int = 0  # of the draw and the split
    instruction: str = ""  # follows every question
    verifier: str = ""  # of those that name none (`kdjax/verifiers`)
    heldout_fraction: float = 0.2  # of the questions, kept for evaluation
    # to train on: gold | pool | a directory of launch.generate | "" = data.path's text, or own answers alone
    answers: str = ""


@dataclasses.dataclass(frozen=True)
class Generation:
    """How models answer prompts (`kdjax/generation`)."""

    samples: int = 8  # per prompt
    new_tokens: int = 64  # at most
    temperature: float = 1.0  # 0 = the most likely token
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    min_p: float = 0.0
    stop: tuple[str, ...] = ()  # texts that end an answer, besides the model's own end tokens
    batch_size: int = 16  # answers at a time
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class OnPolicy:
    """Training on the student's own answers to the prompts (`kdjax/run/own_answers.py`)."""

    fraction: ScheduleSpec = 0.0  # share of the steps that do (lambda of GKD), drawn step by step; of the update number
    terms: tuple = ()  # what they minimise, as loss.terms, which is then of the other steps; () = the same
    block: int = 1  # steps whose answers one student writes at once; the last are block - 1 own steps old
    reuse: int = 1  # how often each answer is trained on
    truncated: str = "keep"  # keep | drop: answers that reached generation.new_tokens
    alarms: str = "warn"  # warn | stop | off: when answers collapse


@dataclasses.dataclass(frozen=True)
class PassRates:
    """How often the student is right, and what that makes of a prompt (`kdjax/curation/paced.py`)."""

    weight: str = "uniform"  # uniform | paced | bayes | hard_filter | easy | hard | variance | shuffled | curriculum
    alpha: float = 1.0  # paced, bayes: exponent of the pass rate
    beta: float = 1.0  # paced, bayes: exponent of the failure rate
    normalise: str = "dataset_mean"  # none | dataset_mean | batch_mean | sample
    estimator: str = "raw"  # raw | laplace | discounted | tracker: see kdjax/curation/pass_rates.py
    prior: float = 1.0  # laplace, discounted, bayes: Beta(prior, prior), 1 = all rates are equally likely
    discount: float = 0.5  # discounted: what a round counts after one more round
    every: int = 0  # blocks of own answers after which rates are estimated anew from them as well; 0 = never
    rollouts: str = ""  # answers to count, relative to the workdir; "" = "rollouts", which launch.curate fills
    fallback: str = "error"  # if all weights are 0: error | uniform
    seed: int = 0  # shuffled: of the permutation; normalise "sample": of the draws


@dataclasses.dataclass(frozen=True)
class Answers:
    """Which teacher's verified answer to a question is trained on, with prompts.answers "pool" (`curation/answers`)."""

    pool: tuple[str, ...] = ()  # *.jsonl of a teacher or with a "teacher" column | directories of these, of rollouts
    # group | best | weighted | random | all | shortest | longest | strongest | teacher | best_teacher | mix
    policy: str = "group"
    # what an answer costs the student (curation/answers/scores.py) | with best_teacher: a teacher (teacher_scores.py)
    score: str = "scas"
    question_share: float = 0.5  # scas: lambda, the weight of the answer's part with the question
    groups: int = 5  # of cost, a question's answers are split into
    group: int = 1  # group: which of them an answer is drawn from, 1 = of the lowest cost
    teacher: str = ""  # teacher: whose answers
    teacher_questions: int = 200  # best_teacher: for scores that need gradients, of so many questions at most
    families: tuple[str, ...] = ()  # teachers of the student's family, how their names begin; their share is reported
    small_pool: str = "nearest"  # if the group is empty: nearest: the one next to it that is not | official: no answer
    tap: str = ""  # scas: the activations; "" = of the last block's up-projection
    alignment: str = "token"  # scas: of activations: token: where it is read | predictor: where it is predicted
    trailing: str = "drop"  # what the template writes after an answer: drop | keep
    duplicates: str = "first"  # rows of one teacher for one question: first | all
    identical: str = "first"  # equal texts of several teachers: first | all
    loops: float = 0.5  # an answer with more than this share of repeated words is left out; 1 = none is
    truncated: str = "drop"  # answers that do not fit into data.seq_len: drop | keep, cut off
    scored: str = ""  # where figures are kept, in answers/ of this directory, relative to the workdir; "" = the workdir
    candidates: int = 0  # of each question so many are scored, drawn at random; 0 = all
    rescore_every: int = 0  # steps after which the student as it is then chooses anew; 0 = never
    restart: str = ""  # what begins anew with each choice: "" = nothing | optimiser | weights, and the optimiser
    official: bool = False  # what the released code does otherwise, at once (curation/answers/released.py)
    seed: int = 42  # of the draws


@dataclasses.dataclass(frozen=True)
class Served:
    """A teacher behind an OpenAI-compatible endpoint (`kdjax/generation/served.py`)."""

    base_url: str = ""
    model: str = ""  # as the server names it
    api_key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key
    concurrency: int = 8  # requests under way
    timeout: float = 60.0  # seconds that one request may take
    retries: int = 5  # per prompt, with growing pauses
    top_logprobs: int = 0  # of its own answers: so many tokens' log-probabilities a position; a cache can be of them
    prompt_logprobs: int = 0  # or launch.cache_teacher asks for so many of the training text, which vLLM gives


@dataclasses.dataclass(frozen=True)
class Loss:
    """What is minimised at the selected positions (`kdjax/losses`)."""

    terms: tuple = (("forward_kl", 1.0),)  # ((name, weight or schedule), ...)
    tau: ScheduleSpec = 1.0  # temperature of the divergences, which are multiplied by tau^2; cross_entropy is at 1
    beta: float = 0.5  # jsd: weight of the teacher in the mixture, in (0, 1)
    skew: float = 0.1  # skew_kl, skew_reverse_kl: share of the teacher (student) in the mixture, in [0, 1)
    todi_scale: float = 1.0  # todi: how sharply an entry turns from forward to reverse KL
    akl_mu: float = 0.5  # akl: the probability mass that the head holds at most, in (0, 1)
    dkd_beta: float = 8.0  # dkd: weight of the divergence among the entries other than the label
    udkd_gate: str = "unc"  # udkd: of the label's part: unc | teacher_entropy | student_entropy | kl | reverse_kl
    taid_start: float = 0.4  # taid: the teacher's share in the target at the first update, in [0, 1]; 1 at the end
    taid_rate: float = 5e-4  # taid: how fast the share may run ahead of the line between; 0 = it stays on it
    reduction: str = "token"  # token: mean over slots | sample: mean over rows of the row means


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW, its learning-rate schedule and clipping."""

    learning_rate: float = 4e-4
    schedule: str = "cosine"  # constant | linear | cosine, after the warm-up
    warmup: int = 10
    final_fraction: float = 0.1  # of the peak, at the last step
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices only
    clip: float = 1.0  # global gradient norm; 0 = off


@dataclasses.dataclass(frozen=True)
class Train:
    """How long, and how much per step."""

    steps: int = 100
    batch_size: int = 8  # rows per optimiser step, over all devices
    accumulate: int = 1  # micro-batches per step
    seed: int = 0  # of the order of the rows, the draws of positions, random weights
    log_every: int = 5


@dataclasses.dataclass(frozen=True)
class Eval:
    """The held-out figures and completions."""

    every: int = 0  # steps; 0 = only before the first and after the last step
    rows: int = 32  # held-out rows; 0 = all
    batch_size: int = 4
    prompts: int = 0  # held-out prompts that the student answers, the likeliest token each time; verified
    completions: int = 3
    new_tokens: int = 40


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When to save and what to keep."""

    every: int = 100  # steps; the last step is always saved
    keep: int = 2  # newest ones
    keep_best: int = 1  # by held-out KL, among steps that were evaluated; 0 = none


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Over which devices, and how (`kdjax/sharding.py`)."""

    preset: str = "single"  # single | dp | fsdp | tp | fsdp_tp
    shape: str = ""  # "data:4,model:4", also replica:n; one size may be -1; "" = as the devices are wired
    sequence: bool = False  # tp, fsdp_tp: activations between blocks are split along T too
    kernels: str = "auto"  # auto | xla | pallas_tpu | pallas_gpu | reference: who computes over the vocabulary
    attention: str = "auto"  # auto | a name in kdjax/kernels/attention


@dataclasses.dataclass(frozen=True)
class Log:
    """Where figures go besides metrics.jsonl."""

    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "kdjax"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment, whole."""

    name: str = "experiment"
    teacher: Teacher = Teacher()
    student: Student = Student()
    data: Data = Data()
    samples: Samples = Samples()
    selection: Selection = Selection()
    classes: Classes = Classes()
    cache: Cache = Cache()
    prompts: Prompts = Prompts()
    generation: Generation = Generation()
    on_policy: OnPolicy = OnPolicy()
    pass_rates: PassRates = PassRates()
    answers: Answers = Answers()
    served: Served = Served()
    loss: Loss = Loss()
    optim: Optim = Optim()
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    mesh: Mesh = Mesh()
    log: Log = Log()
