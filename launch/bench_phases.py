"""What each axis of selection saves, phase by phase: the suite "phases" of launch/bench.py.

Every phase of SE-KD 3X and the steps that it is compared with are timed in turn on the same rows of real text with real
weights: scoring rows with the student, the teacher's pass into the cache (encoding and writing included), training on
cached entries (reading them included), and the live steps, dense and at 20 % of the positions. With a share l of the
rows kept, a token of the corpus costs: score + l (cache + cached step) at first, and l (cached step) with all of it
there.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

if TYPE_CHECKING:
    from kdjax.build import Built

DENSE, SE_KD, CACHED = "dense step, live teacher", "SE-KD step, live teacher", "3X step, from the cache"
SCORE, CACHE, READ = "scoring", "teacher's pass into the cache", "reading the cache alone"
ORDER = (DENSE, SE_KD, SCORE, CACHE, CACHED, READ)


def run(rounds: int) -> None:
    """Build, time in turn, print."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        programs, scale = _programs(Path(folder))
        times: dict[str, list[float]] = {name: [] for name in ORDER}
        for program in programs.values():
            jax.block_until_ready(program())
        for _ in range(rounds):
            for name in ORDER:
                start = time.perf_counter()
                jax.block_until_ready(programs[name]())
                times[name].append((time.perf_counter() - start) * scale.get(name, 1.0))
    options, kept = flags.FLAGS, flags.FLAGS.kept
    tokens = options.batch * options.seq_len
    print(f"{jax.devices()[0].device_kind}, {options.batch} rows of {options.seq_len} tokens, {rounds} rounds in turn")
    print(f"{'':36}{'ms':>9}{'tokens/s':>10}{'of dense':>10}   lowest, highest of the rounds")

    def line(name: str, each: list[float], timed: bool = True) -> None:
        ratios = [a / b for a, b in zip(each, times[DENSE], strict=True)]
        middle = statistics.median(each)
        speed = f"{1e3 * middle:9.1f}{tokens / middle:10,.0f}" if timed else " " * 19
        print(f"{name:36}{speed}{statistics.median(ratios):10.3f}   {min(ratios):.3f}, {max(ratios):.3f}")

    for name in ORDER:
        line(name, times[name])
    phases = list(zip(times[SCORE], times[CACHE], times[CACHED], strict=True))
    print(f"per token of the corpus, {kept:.0%} of the rows kept:")
    line("3X, scoring and caching included", [s + kept * (c + t) for s, c, t in phases], False)
    line("3X, rows and cache there", [kept * t for *_, t in phases], False)
    share = statistics.median(r / t for r, t in zip(times[READ], times[CACHED], strict=True))
    print(f"reading takes {share:.1%} of a 3X step; in training it runs ahead of it in other threads")


def _programs(folder: Path) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """The phases, and the share of a phase's time that the rows of a batch take if it takes more rows at once."""
    import numpy as np

    from kdjax.build import build
    from kdjax.curation.scores import make_score_step
    from kdjax.curation.teacher_pass import make_recorder, rows_of_a_group
    from kdjax.data import eligible, heldout_batches, take, to_batch
    from kdjax.offline import open_writer, teacher_pass
    from kdjax.teacher.cache import open_cache

    built = build(_experiment(), live_teacher=True)
    rows = take(built.data.train, np.arange(flags.FLAGS.batch))
    group = rows_of_a_group(flags.FLAGS.seq_len)
    grouped = take(built.data.train, np.arange(-(-len(rows) // group) * group))
    columns = next(heldout_batches(rows, len(rows)))
    batch = to_batch(columns)
    writer = open_writer(built, grouped, str(folder / "cache"), "launch.bench")
    recorder = make_recorder(teacher_pass(built), built.teacher_params)
    shard = next(iter(writer.missing()))
    score = make_score_step(built.parts.student, None, built.experiment.samples)

    def cache() -> None:
        for old in (folder / "cache").glob("shard-*"):
            old.unlink()
        writer.write(shard, list(recorder(grouped)))

    cache()
    reader = open_cache(folder / "cache")

    def read() -> dict[str, Any]:
        return reader.columns(rows.row_id, rows.row_hash, eligible(rows))

    def scored() -> Any:
        return score(built.student_params, (), batch)

    cached = _step(built, {"teacher.source": "cache"})
    dense = _step(built, {"selection.policy": "all", "classes.kind": "all"})
    selective = _step(built, {"classes.kind": "all"})
    programs: dict[str, Callable[[], Any]] = {
        DENSE: lambda: dense(batch),
        SE_KD: lambda: selective(batch),
        SCORE: scored,
        CACHE: cache,
        CACHED: lambda: cached(to_batch(columns | {"teacher": read()})),
        READ: read,
    }
    return programs, {CACHE: len(rows) / len(grouped)}


def _experiment(**changes: Any) -> Any:
    """SE-KD 3X as configs/se_kd_3x.py has it, with the flags of this script."""
    from kdjax.config import default_config, from_config_dict

    options, config = flags.FLAGS, default_config()
    fields = {
        "teacher.path": options.teacher,
        "teacher.source": "cache",
        "student.init.kind": "cut",
        "student.init.layers": options.student_layers,
        "data.seq_len": options.seq_len,
        "data.max_train_tokens": max(4 * options.batch * options.seq_len, 8192),
        "samples.fraction": options.kept,
        "samples.positions": options.positions,
        "classes.kind": "sampled",
        "train.batch_size": options.batch,
    }
    config.update_from_flattened_dict(fields | changes)
    return from_config_dict(config)


def _step(built: "Built", changes: dict[str, Any]) -> Callable[[Any], Any]:
    """A compiled train step of this experiment with `changes`, on a state of its own."""
    import jax
    import jax.numpy as jnp

    from kdjax.build import build_parts
    from kdjax.step import init_state, make_train_step

    experiment = _experiment(**{"teacher.source": "live"} | changes)
    cached = experiment.teacher.source == "cache"
    teacher = None if built.teacher is None else built.teacher.cfg
    parts = build_parts(experiment, built.student_cfg, teacher, built.rules)
    state = [init_state(parts, jax.tree.map(jnp.copy, built.student_params), 0)]
    step = jax.jit(make_train_step(parts), donate_argnums=0)

    def call(batch: Any) -> Any:
        micro = jax.tree.map(lambda a: a[None], batch)
        state[0], report = step(state[0], () if cached else built.teacher_params, micro)
        return report

    return call
