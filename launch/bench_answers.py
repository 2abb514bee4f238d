"""What scoring answers costs: the suite "answers" of launch/bench.py.

Scoring: so many answers to a question, all of one length, are read by the student with the question shared, and one by
one, each with a question of its own; the step is that of kdjax/curation/answers/scorer.py with all its usual figures.
Head: the exact gradient norms of the same answers (kernels/head_gradient), against the log-probabilities and moments of
the same positions (kernels/linear_stats). The two sides of a ratio are timed in turn: shared machines drift, ratios
within a round do not. FLOPs are those of the programs' matrix products, a multiply and an add each, as often as their
loops turn. Weights and tokens are random: neither speed nor FLOPs depend on them.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import flags

if TYPE_CHECKING:
    from kdjax.models import ModelConfig

SHARED, ALONE = "scoring, shared question", "scoring, one by one"
GRADIENT, STATS = "head_gradient", "linear_stats"
PAIRS = ((SHARED, ALONE), (GRADIENT, STATS))


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled call and the FLOPs of its matrix products."""

    run: Callable[[], Any]
    flops: float


def run(rounds: int) -> None:
    """Build, time in turn, print."""
    import jax

    from kdjax import models

    options, cfg = flags.FLAGS, student_of(flags.FLAGS.layers)
    lengths = [_length(text) for text in options.lengths]
    if options.answers & (options.answers - 1):
        raise ValueError(f"--answers must be a power of two, got {options.answers}; rows of the scorer hold so many.")
    params = models.init_params(cfg, jax.random.key(0))
    print(
        f"{jax.devices()[0].device_kind}, {options.answers} answers a question, each as long as it; {cfg.layers} "
        f"layers of {cfg.width}, vocabulary {cfg.vocab_size}, float32, {rounds} rounds in turn"
    )
    print(
        f"{'':28}{'tokens':>8}{'ms':>10}{'GFLOP':>10}{'ratio':>8}{'of FLOPs':>10}   lowest, highest ratio of the rounds"
    )
    for length in lengths:
        programs = _programs(cfg, params, length, options.answers)
        times = _in_turn(programs, rounds)
        for first, second in PAIRS:
            ratios = [a / b for a, b in zip(times[first], times[second], strict=True)]
            of_flops = programs[first].flops / programs[second].flops
            said = f"{statistics.median(ratios):8.3f}{of_flops:10.3f}   {min(ratios):.3f}, {max(ratios):.3f}"
            for name, more in ((first, said), (second, "")):
                own = f"{1e3 * statistics.median(times[name]):10.1f}{programs[name].flops / 1e9:10.1f}"
                print(f"{name:28}{length:8}{own}{more}", flush=True)


def student_of(layers: int) -> "ModelConfig":
    """So many layers of SmolLM2-135M."""
    from kdjax import models

    return models.ModelConfig("llama", 49152, 576, layers, 9, 3, 64, 1536, rope_theta=1e5, norm_eps=1e-5, tied=True)


def _length(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise ValueError(f"--lengths must be numbers of at least 2, got {text!r}; they are tokens. Set it to 64,128.")
    return int(text)


def _in_turn(programs: dict[str, Program], rounds: int) -> dict[str, list[float]]:
    """Seconds of each program in each round."""
    import jax

    times: dict[str, list[float]] = {name: [] for name in programs}
    for at in range(-1, rounds):  # one to warm up
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program.run())
            times[name] += [time.perf_counter() - start] if at >= 0 else []
    return times


def _programs(cfg: "ModelConfig", params: Any, length: int, answers: int) -> dict[str, Program]:
    """Both pairs at one length: as many questions as a call of the scorer takes, on either side the same answers."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kdjax.build import language_model
    from kdjax.config import Answers
    from kdjax.curation.answers import layout
    from kdjax.curation.answers.scorer import ROOM, USUAL, make_answer_step
    from kdjax.kernels.head_gradient import answer_gradient
    from kdjax.kernels.linear_stats import linear_stats
    from kdjax.sharding import Rules

    model = language_model(cfg, Rules(), cfg.vocab_size, jnp.float32)
    step = make_answer_step(model, Answers(), Rules(), USUAL, False)
    asked = _question(np.random.default_rng(0), cfg.vocab_size, length, answers)

    def scoring(largest: int) -> Program:
        found = layout.groups_of(asked, 2 * length, ROOM, largest)  # all of one shape
        shape, groups = found[0][0], [group for _, group in found] * questions
        batch = jax.tree.map(jnp.asarray, layout.arrays_of(groups, shape, len(groups), True))
        return _compiled(step, params, batch)

    questions = layout.groups_of(asked, 2 * length, ROOM)[0][0].rows
    rows = questions * answers
    hidden = jax.random.normal(jax.random.key(1), (rows + questions, length, cfg.width))
    labels = jax.random.randint(jax.random.key(2), hidden.shape[:2], 0, cfg.vocab_size)
    weights = jnp.full(labels.shape, 1.0 / length)

    def gradient(params: Any, hidden: Any) -> Any:
        told = hidden[rows:], labels[rows:], weights[rows:]
        return answer_gradient(
            hidden[:rows], model.head(params), labels[:rows], weights[:rows], question=told, rank=True
        )

    def stats(params: Any, hidden: Any) -> Any:
        return linear_stats(hidden.reshape(-1, cfg.width), model.head(params), labels.reshape(-1))

    return {
        SHARED: scoring(layout.GROUP),
        ALONE: scoring(1),
        GRADIENT: _compiled(jax.jit(gradient), params, hidden),
        STATS: _compiled(jax.jit(stats), params, hidden),
    }


def _compiled(function: Any, *arguments: Any) -> Program:
    traced = function.trace(*arguments)
    program = traced.lower().compile()
    return Program(lambda: program(*arguments), matmul_flops(traced.jaxpr.jaxpr))


def matmul_flops(jaxpr: Any) -> float:
    """Of all matrix products of a traced program, those in loops as often as they turn; NaN if nothing says how often.

    A compiled program's own count has the body of a loop once.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, of = equation.primitive.name, equation.params
        if name == "dot_general":
            left = equation.invars[0].aval.shape
            summed = [left[axis] for axis in of["dimension_numbers"][0][0]]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(summed)
            continue
        values = (one for each in of.values() for one in (each if isinstance(each, (tuple, list)) else (each,)))
        inner = [matmul_flops(one) for each in values if hasattr(one := getattr(each, "jaxpr", each), "eqns")]
        found = max(inner, default=0.0) if name == "cond" else sum(inner)
        if found:
            total += found * {"scan": of.get("length", 1), "while": math.nan, "pallas_call": math.nan}.get(name, 1)
    return total


def _question(rng: Any, vocab: int, length: int, count: int) -> Any:
    """One with `count` answers, all as long as it is."""
    import numpy as np

    from kdjax.curation.answers.encode import Encoded, EncodedAnswer, Tokens

    def some() -> Tokens:
        return Tokens(rng.integers(0, vocab, length).astype(np.int32), np.ones(length, bool))

    return Encoded("", some(), tuple(EncodedAnswer(str(at), "", some()) for at in range(count)))
