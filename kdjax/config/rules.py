"""What the fields of an experiment may be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from kdjax.config.schema import Experiment


def _is_schedule(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, tuple) and value[:1] != () and isinstance(value[0], str))


def _is_share(value: Any) -> bool:
    """A schedule goes from its first argument to its second; of one from elsewhere nothing is known."""
    if not isinstance(value, tuple) or not _is_schedule(value):
        return isinstance(value, float) and 0 <= value <= 1
    levels = () if ":" in value[0] else value[1:3]
    return all(0 <= level <= 1 for level in levels if isinstance(level, (int, float)))


def _is_term(term: Any) -> bool:
    return isinstance(term, tuple) and len(term) == 2 and isinstance(term[0], str) and _is_schedule(term[1])


def _at_least(low: int) -> tuple[Callable[[Any], bool], str]:
    return lambda v: v >= low, f"at least {low}"


def _one_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
    return lambda v: v in choices, " or ".join(map(repr, choices))


_COUNT = (*_at_least(1), "it is a count")
_OR_OFF = (*_at_least(0), "0 switches it off")
_DTYPE = (*_one_of("float32", "bfloat16"), "other types lose too much or are not supported")

# config path -> (does the value do, what it must be, why)
RULES: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "teacher.dtype": _DTYPE,
    "student.compute_dtype": _DTYPE,
    "student.remat": (*_one_of("none", "full", "dots"), "see Student"),
    "student.init.kind": (*_one_of("own", "cut", "random"), "see StudentInit"),
    "student.init.layers": _COUNT,
    "student.init.keep": (
        lambda v: all(layer >= 0 for layer in v) and list(v) == sorted(set(v)),
        "layer numbers of the teacher, each once, ascending",
        "the student has them in this order",
    ),
    "data.seq_len": (*_at_least(2), "a target needs a token before it"),
    "data.packing": (*_one_of("pack", "row"), "see Data"),
    "data.heldout_fraction": (lambda v: 0 < v < 1, "in (0, 1)", "both parts need documents"),
    "data.max_train_tokens": _OR_OFF,
    "selection.fraction": (lambda v: 0 < v <= 1, "in (0, 1]", "it is a fraction, 0.2 means 20 %"),
    "selection.weighting": (*_one_of("uniform", "signal"), "see Selection"),
    "selection.quota": (*_one_of("row", "batch"), "see Selection"),
    "selection.queue": _COUNT,
    "selection.slack": (*_at_least(1), "less would drop positions of an average row"),
    "selection.curriculum_steps": _COUNT,
    "selection.upper": (lambda v: 0 < v <= 1, "in (0, 1]", "it is a quantile"),
    "selection.reserve": (lambda v: 0 <= v <= 1, "in [0, 1]", "it is a share of the budget"),
    "selection.easy_weight": (lambda v: 0 <= v <= 1, "in [0, 1]", "hard positions have the rest of 1"),
    "selection.temperature_scale": (lambda v: -1 <= v <= 1, "in [-1, 1]", "temperatures are within a factor of e"),
    "selection.adapt_after": (*_at_least(0), "0 lets the loss of the first update count"),
    "teacher.devices": (*_at_least(0), "0 lets it share the student's"),
    "teacher.source": (*_one_of("live", "cache"), "see Teacher"),
    "classes.entries": _COUNT,
    "classes.power": (lambda v: 0 < v <= 2, "in (0, 2]", "1 draws from the teacher itself"),
    "samples.fraction": (lambda v: 0 < v <= 1, "in (0, 1]", "it is a fraction, 0.2 means 20 %"),
    "samples.positions": (lambda v: 0 < v <= 1, "in (0, 1]", "it is a fraction, 1 scores all positions"),
    "samples.rescore_every": _OR_OFF,
    "cache.superset": (lambda v: 0 <= v <= 1, "in [0, 1]", "it is a fraction, 0 caches all positions"),
    "cache.rows_per_shard": _COUNT,
    "prompts.size": (*_at_least(0), "0 means all"),
    "prompts.heldout_fraction": (lambda v: 0 <= v < 1, "in [0, 1)", "it is a fraction"),
    "generation.samples": _COUNT,
    "generation.new_tokens": _COUNT,
    "generation.temperature": (*_at_least(0), "0 takes the most likely token"),
    "generation.top_p": (lambda v: 0 < v <= 1, "in (0, 1]", "it is a probability mass, 1 keeps all tokens"),
    "generation.top_k": (*_at_least(0), "0 keeps all tokens"),
    "generation.min_p": (lambda v: 0 <= v < 1, "in [0, 1)", "it is a share of the largest probability"),
    "generation.stop": (all, "texts that are not empty", "the empty text is in every answer"),
    "generation.batch_size": _COUNT,
    "on_policy.fraction": (
        _is_share,
        "in [0, 1] or (name, *arguments) with values there",
        "it is a share of the steps",
    ),
    "on_policy.terms": (
        lambda v: all(map(_is_term, v)),
        "a tuple of (name, weight or schedule)",
        "one term is written ((name, weight),)",
    ),
    "on_policy.block": _COUNT,
    "on_policy.reuse": _COUNT,
    "on_policy.truncated": (*_one_of("keep", "drop"), "see OnPolicy"),
    "on_policy.alarms": (*_one_of("warn", "stop", "off"), "see OnPolicy"),
    "pass_rates.alpha": (*_at_least(0), "a negative exponent has no bound; 0 switches that side off"),
    "pass_rates.beta": (*_at_least(0), "a negative exponent has no bound; 0 switches that side off"),
    "pass_rates.normalise": (*_one_of("none", "dataset_mean", "batch_mean", "sample"), "see PassRates"),
    "pass_rates.every": _OR_OFF,
    "pass_rates.prior": (lambda v: v > 0, "positive", "Beta(0, 0) is no distribution"),
    "pass_rates.discount": (lambda v: 0 <= v <= 1, "in [0, 1]", "it is a factor, 1 counts all rounds alike"),
    "pass_rates.fallback": (*_one_of("error", "uniform"), "see PassRates"),
    "answers.question_share": (lambda v: 0 <= v <= 1, "in [0, 1]", "it is the lambda of SCAS"),
    "answers.groups": _COUNT,
    "answers.group": _COUNT,
    "answers.teacher_questions": (*_at_least(2), "some are compared with the others"),
    "answers.small_pool": (*_one_of("nearest", "official"), "see Answers"),
    "answers.alignment": (*_one_of("token", "predictor"), "see Answers"),
    "answers.trailing": (*_one_of("drop", "keep"), "see Answers"),
    "answers.duplicates": (*_one_of("first", "all"), "see Answers"),
    "answers.identical": (*_one_of("first", "all"), "see Answers"),
    "answers.loops": (lambda v: 0 < v <= 1, "in (0, 1]", "it is a share of the words, 1 leaves none out"),
    "answers.truncated": (*_one_of("drop", "keep"), "see Answers"),
    "answers.candidates": (*_at_least(0), "0 means all"),
    "answers.rescore_every": _OR_OFF,
    "answers.restart": (*_one_of("", "optimiser", "weights"), "see Answers"),
    "served.concurrency": _COUNT,
    "served.timeout": (lambda v: v > 0, "positive", "it is a number of seconds"),
    "served.retries": (*_at_least(0), "0 gives up at once"),
    "served.top_logprobs": (*_at_least(0), "0 asks for none"),
    "served.prompt_logprobs": (*_at_least(0), "0 asks for none"),
    "loss.terms": (
        lambda v: len(v) > 0 and all(map(_is_term, v)),
        "a non-empty tuple of (name, weight or schedule)",
        "one term is written ((name, weight),)",
    ),
    "loss.tau": (
        lambda v: _is_schedule(v) and (isinstance(v, tuple) or v > 0),
        "a positive number or (name, *arguments)",
        "logits are divided by it; see kdjax/schedules.py",
    ),
    "loss.beta": (lambda v: 0 < v < 1, "in (0, 1)", "JSD is 0 at both ends; use forward_kl or reverse_kl there"),
    "loss.skew": (lambda v: 0 <= v < 1, "in [0, 1)", "at 1 both sides of the divergence are equal"),
    "loss.todi_scale": (*_at_least(0), "below 0 forward KL would act where reverse KL should"),
    "loss.akl_mu": (lambda v: 0 < v < 1, "in (0, 1)", "it is a share of the mass; use reverse_kl or forward_kl"),
    "loss.dkd_beta": (*_at_least(0), "0 leaves the label against the rest"),
    "loss.taid_start": (lambda v: 0 <= v <= 1, "in [0, 1]", "it is the teacher's share; 1 is forward KL"),
    "loss.taid_rate": (lambda v: 0 <= v <= 1, "in [0, 1]", "it is a share of the way that is left"),
    "loss.reduction": (*_one_of("token", "sample"), "see Loss"),
    "optim.learning_rate": (lambda v: v > 0, "positive", "nothing would be learned"),
    "optim.warmup": _OR_OFF,
    "optim.final_fraction": (lambda v: 0 <= v <= 1, "in [0, 1]", "it is a fraction of the peak"),
    "optim.b1": (lambda v: 0 <= v < 1, "in [0, 1)", "it is the decay of a running mean"),
    "optim.b2": (lambda v: 0 <= v < 1, "in [0, 1)", "it is the decay of a running mean"),
    "optim.eps": (lambda v: v > 0, "positive", "it keeps a division finite"),
    "optim.weight_decay": _OR_OFF,
    "optim.clip": _OR_OFF,
    "train.steps": _COUNT,
    "train.batch_size": _COUNT,
    "train.accumulate": _COUNT,
    "train.log_every": _COUNT,
    "eval.every": _OR_OFF,
    "eval.rows": (*_at_least(0), "0 means all"),
    "eval.batch_size": _COUNT,
    "eval.prompts": _OR_OFF,
    "eval.completions": _OR_OFF,
    "eval.new_tokens": _COUNT,
    "checkpoint.every": (*_at_least(1), "it is a number of steps"),
    "checkpoint.keep": (*_at_least(1), "the newest checkpoint is what a run resumes from"),
    "checkpoint.keep_best": _OR_OFF,
    "mesh.kernels": (*_one_of("auto", "xla", "pallas_tpu", "pallas_gpu", "reference"), "see kdjax/kernels"),
    "mesh.attention": (*_one_of("auto", "xla", "pallas_tpu", "cudnn", "reference"), "see kdjax/kernels/attention"),
}


def check(experiment: Experiment) -> None:
    """Raises ValueError that names the config path, what it must be, what it is and why."""
    for where, (good, rule, why) in RULES.items():
        value = functools.reduce(getattr, where.split("."), experiment)
        if not good(value):
            raise ValueError(f"{where} must be {rule}, got {value!r}; {why}.")
    rows, parts = experiment.train.batch_size, experiment.train.accumulate
    if rows % parts:
        raise ValueError(
            f"train.batch_size must be a multiple of train.accumulate, got {rows} and {parts}; every micro-batch has "
            "the same number of rows. Change one of them."
        )
    if experiment.teacher.devices and experiment.teacher.source == "cache":
        raise ValueError(
            f"teacher.devices must be 0 with teacher.source='cache', got {experiment.teacher.devices}; no teacher "
            "runs. Set it to 0."
        )
    if experiment.teacher.shape and not experiment.teacher.devices:
        raise ValueError(
            f"teacher.shape must be '' without teacher.devices, got {experiment.teacher.shape!r}; the teacher is on "
            "the student's mesh. Set teacher.devices, or mesh.shape."
        )
    _check_prompts(experiment)
    _check_samples(experiment)


def _check_prompts(e: Experiment) -> None:
    """What needs prompts has them, and what reads the teacher's answers to the student's prompts can."""
    wants = {"on_policy.fraction": e.on_policy.fraction != 0, "prompts.answers": bool(e.prompts.answers)}
    wants["eval.prompts"] = e.eval.prompts > 0
    wants["teacher.privileged"] = bool(e.teacher.privileged)
    wants["pass_rates.weight"] = e.pass_rates.weight != "uniform"
    for name, wanted in wants.items():
        if wanted and not e.prompts.path:
            raise ValueError(f"prompts.path must name prompts, got ''; {name} is set and needs them. Set it.")
    _check_pass_rates(e)
    if e.teacher.source == "cache" and (wants["on_policy.fraction"] or wants["teacher.privileged"]):
        which = "on_policy.fraction" if wants["on_policy.fraction"] else "teacher.privileged"
        raise ValueError(
            f"teacher.source must be 'live' with {which}, got 'cache'; a cache knows the text that it was written for. "
            "Set it to 'live'."
        )
    if e.teacher.privileged and "{answer}" not in e.teacher.privileged:
        raise ValueError(
            f"teacher.privileged must hold {{answer}}, got {e.teacher.privileged!r}; without it the teacher knows no "
            "more than the student. Write {question} and {answer} into it."
        )
    _check_answers(e)
    if e.prompts.path and e.cache.superset:
        raise ValueError(
            f"cache.superset must keep its default with prompts.path, got {e.cache.superset}; a cache of answers holds "
            "all their positions. Leave it out."
        )


def _check_samples(e: Experiment) -> None:
    """There is one choice of the rows, and something is left to choose."""
    s, p = e.samples, e.pass_rates
    if s.rescore_every and s.fraction == 1:
        raise ValueError(
            f"samples.rescore_every must be 0 with samples.fraction=1, got {s.rescore_every}; all rows are used "
            "anyway. Lower samples.fraction."
        )
    if s.rescore_every and e.on_policy.fraction == 1:
        raise ValueError(
            f"samples.rescore_every must be 0 with on_policy.fraction=1, got {s.rescore_every}; each block of own "
            "answers is scored by the student that wrote it. Set it to 0."
        )
    others = {
        "pass_rates.weight": (p.weight != "uniform", "'uniform'", p.weight, "both say what a prompt is worth"),
        "pass_rates.normalise": (p.normalise == "sample", "'dataset_mean'", p.normalise, "both say which are used"),
        "answers.rescore_every": (e.answers.rescore_every > 0, "0", e.answers.rescore_every, "both choose rows anew"),
    }
    for name, (wrong, needed, got, why) in others.items() if s.fraction < 1 else ():
        if wrong:
            raise ValueError(
                f"{name} must be {needed} with samples.fraction below 1, got {got!r}; they are two policies of one "
                f"axis: {why}. Set it so, or samples.fraction to 1."
            )


# weights that cannot follow the student -> why
STANDING = {
    "curriculum": "its order of the prompts is that of launch.curate",
    "hard_filter": "the student may outgrow every prompt, and what is left out is not asked again",
    "bayes": "it reads the counts of one round",
}


def _check_pass_rates(e: Experiment) -> None:
    """What would be ignored, or could not go on, is not asked for."""
    p = e.pass_rates
    if p.weight == "curriculum" and p.normalise == "sample":
        raise ValueError(
            "pass_rates.normalise must not be 'sample' with pass_rates.weight='curriculum', got 'sample'; both say "
            "which prompts are drawn. Set it to 'dataset_mean'."
        )
    if p.weight == "bayes" and p.estimator != "raw":
        raise ValueError(
            f"pass_rates.estimator must be 'raw' with pass_rates.weight='bayes', got {p.estimator!r}; the prior would "
            "count twice. Set it to 'raw'."
        )
    if not p.every:
        return
    if p.weight in STANDING:
        raise ValueError(
            f"pass_rates.every must be 0 with pass_rates.weight={p.weight!r}, got {p.every}; {STANDING[p.weight]}. Set "
            "it to 0, or pass_rates.weight to 'paced'."
        )
    if p.weight == "uniform" or p.estimator not in ("discounted", "tracker") or e.on_policy.fraction == 0:
        raise ValueError(
            "pass_rates.every must be 0 but with own answers, weights by them and an estimator over rounds, got "
            f"{p.every} with on_policy.fraction={e.on_policy.fraction!r}, weight={p.weight!r}, "
            f"estimator={p.estimator!r}. Set the last to 'discounted'."
        )


SCORED_POLICIES = ("group", "best", "weighted", "best_teacher")  # of answers, those that read answers.score


def _check_answers(e: Experiment) -> None:
    """The pool is there where answers are chosen from it."""
    a = e.answers
    if a.group > a.groups:
        raise ValueError(f"answers.group must be at most answers.groups={a.groups}, got {a.group}. Lower it.")
    if e.prompts.answers == "pool" and not a.pool:
        raise ValueError(
            "answers.pool must name files of answers with prompts.answers='pool', got (); there is nothing to choose "
            "from. Set it to the teachers' *.jsonl, or to directories of launch.generate."
        )
    if a.policy == "teacher" and not a.teacher:
        raise ValueError("answers.teacher must be set with answers.policy='teacher', got ''. Name one of the pool.")
    if a.rescore_every and (e.prompts.answers != "pool" or a.policy not in SCORED_POLICIES):
        raise ValueError(
            "answers.rescore_every must be 0 unless answers are chosen from a pool by their score, got "
            f"{a.rescore_every} with prompts.answers={e.prompts.answers!r} and answers.policy={a.policy!r}. Set "
            "it to 0."
        )
    if a.policy == "best_teacher" and a.candidates:
        raise ValueError(
            f"answers.candidates must be 0 with answers.policy='best_teacher', got {a.candidates}; teachers are rated "
            "on all their answers to the same questions. Set it to 0."
        )
    if a.rescore_every and e.teacher.source == "cache":
        raise ValueError(
            f"answers.rescore_every must be 0 with teacher.source='cache', got {a.rescore_every}; a cache knows the "
            "answers that it was written for. Set it to 0, or teacher.source to 'live'."
        )
    if a.restart and not a.rescore_every:
        raise ValueError(
            f"answers.restart must be '' without answers.rescore_every, got {a.restart!r}; there is one choice. Set it."
        )
