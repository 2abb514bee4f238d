"""Run the teacher once and keep what it says: python -m launch.cache_teacher --config=configs/x.py --workdir=runs/x

Writes the entries that classes.* describes, at the rows that samples.* keeps, to <workdir>/cache or cache.path. Can be
stopped and started again at any time. Several processes can share the work: with a mesh over the devices of all
(launch/processes.py), or each with a teacher of its own and at its own time (--process_index, --process_count).
With a served teacher none runs here. served.prompt_logprobs=K: the training text, whatever it is, is sent to
served.base_url (vLLM) as token ids, and the entries are of the K tokens that it lists at each place. What a kill or a
server at fault costs is the shard under way (cache.rows_per_shard); the rest is not asked for again.
served.top_logprobs, with prompts.answers=<the --out of launch.generate --model=served>: the entries are what the server
listed at the tokens of these answers as it gave them.
--inspect=runs/x/cache [--verify=100]: what a cache holds and takes; with --verify all its bytes are checked, and that
many rows are run through the teacher again and compared.
"""

import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from launch import app, processes

if TYPE_CHECKING:
    import numpy as np

    from kdjax.build import Built
    from kdjax.data import Rows
    from kdjax.teacher.cache import CacheReader, CacheWriter

app.define_config()
processes.define()
flags.DEFINE_integer("process_index", 0, "Which of --process_count processes this is, each with a teacher of its own.")
flags.DEFINE_integer("process_count", 1, "How many such processes share the work.", lower_bound=1)
flags.DEFINE_string("inspect", None, "A cache to describe, instead of writing one.")
flags.DEFINE_integer("verify", 0, "--inspect: rows to run through the teacher again; 0 = none.", lower_bound=0)

ALIKE = 0.999  # share of entries that must be the same on verification: other hardware rounds other draws


def main() -> int | None:
    """Flags -> build -> shards, or a description."""
    if flags.FLAGS.inspect is not None:
        processes.join()
        return inspect(Path(flags.FLAGS.inspect), flags.FLAGS.verify)
    from kdjax.config import from_config_dict

    experiment = from_config_dict(app.require("config"))
    workdir = Path(app.require("workdir"))
    if experiment.teacher.source != "cache":
        raise ValueError(
            "teacher.source must be 'cache', got 'live'; training would not read what is written here. Set it to "
            "'cache' in the config."
        )

    processes.join()
    if flags.FLAGS.process_count > 1 and processes.several():
        raise ValueError(
            f"--process_count must be 1 in a run of several processes, got {flags.FLAGS.process_count}; they share the "
            "work by themselves. Leave it out, or start each with --processes=1."
        )

    from kdjax import loop
    from kdjax.build import build, cache_path, scores_text
    from kdjax.generation import served
    from kdjax.offline import open_writer

    if scores_text(experiment):
        served.check(experiment.served)
    loop.claim_workdir(workdir, experiment)
    built = build(experiment, workdir, live_teacher=True)
    rows = built.data.train if experiment.samples.rescore_every else built.train
    path = cache_path(experiment, workdir)
    writer = open_writer(built, rows, path, shlex.join(["python", "-m", "launch.cache_teacher", *sys.argv[1:]]))
    fill(built, rows, writer)
    if processes.first() and not writer.missing(verify=False):
        print(f"next: {shlex.join(['python', '-m', 'launch.train', *_common(sys.argv[1:])])}")
    return None


def fill(built: "Built", rows: "Rows", writer: "CacheWriter") -> None:
    """Write the shards of this process that are missing, with progress; say what they took."""
    from kdjax.build import scores_text
    from kdjax.curation.teacher_pass import write_shards
    from kdjax.offline import cache_recorder
    from kdjax.run_log import Progress
    from kdjax.teacher.cache import open_cache

    shards, mine = to_do(writer)
    own = range(flags.FLAGS.process_index, writer.header.shards, flags.FLAGS.process_count)
    if not shards:
        processes.say(f"{writer.directory}: nothing to do, all {len(own)} shards are there")
        return
    if len(shards) < len(own):
        processes.say(f"{writer.directory}: {len(own) - len(shards)} of {len(own)} shards are there, the rest follows")
    if scores_text(built.experiment):
        shards = mine  # a server is asked once, by the process that writes the shard
    total = sum(len(writer.rows(shard)) for shard in shards)
    recorder = cache_recorder(built)
    progress, start, done, tokens = Progress(total, unit="row"), time.perf_counter(), 0, 0

    def on_row(count: int) -> None:
        nonlocal done, tokens
        done, tokens = done + 1, tokens + count
        progress.update(done, tokens_per_second=tokens / (time.perf_counter() - start))

    write_shards(writer, rows, recorder, shards, on_row, mine=mine)
    progress.close()
    processes.wait("the shards are written")
    seconds = time.perf_counter() - start
    processes.say(f"{total:,} rows, {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s")
    if processes.first():
        described(open_cache(writer.directory, partial=True))


def to_do(writer: "CacheWriter") -> tuple[list[int], list[int]]:
    """(the shards to compute, those of them to write here); processes that share a mesh compute all of them together.

    Each of these looks at its own part of the files, so that all of them go through the same list.
    """
    import numpy as np

    if not processes.several():
        shards = writer.missing(flags.FLAGS.process_index, flags.FLAGS.process_count)
        for why in writer.damaged.values():
            print(f"written anew: {why}")
        return shards, shards
    mine = writer.missing(*processes.place())
    for why in writer.damaged.values():
        print(f"written anew: {why}")
    missing = np.zeros(writer.header.shards, np.int32)
    missing[mine] = 1
    return np.flatnonzero(processes.gathered(missing).any(0)).tolist(), mine


def described(reader: "CacheReader") -> None:
    """What a cache holds and takes, and what it says of bias and variance."""
    found, header = reader.summary(), reader.header
    print(f"{reader.directory}: {found['rows']:,} rows, {found['positions']:,} positions, ", end="")
    missing = found["missing_shards"]
    print(f"{found['shards'] - missing} of {found['shards']} shards" + (": NOT WHOLE" if missing else ""))
    if not found["positions"]:
        return
    kept = found["bytes"]["data"] + found["bytes"]["offsets"]
    print(f"  {kept:,} bytes (and {found['bytes']['headers']:,} of headers): ", end="")
    print(f"{found['bytes_per_position']:.2f} a position", end="")
    corpus = header.made.get("corpus_tokens")
    print(f", {kept / corpus:.2f} a token of the whole text" if corpus and not missing else "")
    for name, bytes_ in (("dense float16", 2 * header.vocab_size), ("64 slots of 3 bytes", 64 * 3)):
        print(f"  {name} would take {bytes_:,} a position, {bytes_ / found['bytes_per_position']:,.1f} times as much")
    distinct = found["distinct"]
    spread = ", ".join(f"{name}: {value}" for name, value in distinct["quantiles"].items())
    print(f"  distinct ids a position: mean {distinct['mean']:.2f}, quantiles {spread}")
    print(f"  {quality(reader)}")


def quality(reader: "CacheReader") -> str:
    """Bias and variance of the targets, estimated from what is stored.

    Draws: E[c (c - 1)] = N (N - 1) p^2, so sum c (c - 1) / (N (N - 1)) estimates sum p^2 without bias, and the variance
    of the target, summed over the vocabulary, is (1 - sum p^2) / N. Top entries: what they leave out is their bias.
    """
    import numpy as np

    from kdjax.config import Classes
    from kdjax.teacher.classes import make_class_sampler

    header = reader.header
    codes = np.concatenate([codes for _, codes in reader.sample(500)]).astype(np.float64)
    n = header.entries
    if header.counts and n > 1:
        squares = float((codes * (codes - 1)).sum(1).mean() / (n * (n - 1)))
        return (
            f"bias 0; variance of a target, summed over the vocabulary: {(1 - squares) / n:.4f} "
            f"(sum p^2 is {squares:.3f}), its standard deviation {np.sqrt(max(1 - squares, 0) / n):.3f}"
        )
    if header.kind == "sampled":
        return "bias 0; the variance of a target cannot be told from what is stored"
    config = Classes(kind=header.kind, entries=n, power=header.power, seed=header.seed)
    probs = np.asarray(make_class_sampler(config, header.vocab_size).probs(codes.astype(np.uint16)))
    return f"variance 0; bias: {max(0.0, 1 - float(probs.sum(1).mean())):.4f} of the teacher's mass is left out"


def inspect(path: Path, verify: int) -> int | None:
    """Describe a cache; check it."""
    from kdjax.teacher.cache import open_cache

    reader = open_cache(path, partial=True)
    if processes.first():
        described(reader)
        made = reader.header.made
        print(f"  made by kdjax {made.get('kdjax')} at {made.get('at')}: {made.get('command')}")
        for field in dataclasses.fields(reader.header):
            if field.name != "made":
                print(f"  {field.name:16}{getattr(reader.header, field.name)}")
    if verify:
        reader.verify()
        processes.say(f"every byte of {len(reader.present)} shards is as it was written")
        return compare(reader, verify)
    return None


def compare(reader: "CacheReader", wanted: int) -> int:
    """Run `wanted` rows, in the groups that they were written in, through the teacher again; 0 if they are the same."""
    import ml_collections
    import numpy as np

    from kdjax.build import build, cache_identity, scores_text
    from kdjax.config import from_config_dict
    from kdjax.curation.teacher_pass import rows_of_a_group
    from kdjax.data import eligible, take
    from kdjax.offline import cache_recorder
    from kdjax.teacher.cache.header import differences

    config = flags.FLAGS.config or ml_collections.ConfigDict(reader.header.made["config"])
    built = build(from_config_dict(config), live_teacher=True)
    different = differences(reader.header, cache_identity(built))
    if different:
        raise ValueError(f"{reader.directory} must be of this teacher and config: {'; '.join(different)}.")
    if scores_text(built.experiment):
        processes.say("no row is run again: the server would be paid anew, and its numbers differ a little each time")
        return 0
    recorder = cache_recorder(built)
    size = rows_of_a_group(reader.header.seq_len) * built.rules.batch_shards
    groups = _groups(reader, size)
    order = np.random.default_rng(0).permutation(len(groups))
    before = np.cumsum([len(groups[at]) for at in order]) - [len(groups[at]) for at in order]
    chosen = order[before < wanted]
    place = {int(row_id): at for at, row_id in enumerate(built.data.train.row_id)}
    same = total = rows = 0
    for group in sorted(chosen.tolist()):
        part = take(built.data.train, np.array([place[int(row_id)] for row_id in groups[group]]))
        found = reader.columns(part.row_id, part.row_hash, eligible(part))
        for at, record in enumerate(recorder(part)):
            stored = found["stored"][at]
            alike = (found["ids"][at][stored] == np.where(record.codes > 0, record.ids, 0)) & (
                found["codes"][at][stored] == record.codes
            )
            same, total, rows = same + int(alike.all(1).sum()), total + len(alike), rows + 1
    share = same / max(total, 1)
    processes.say(f"{rows} rows run again: {same:,} of {total:,} positions have the same entries ({share:.4%})")
    if share < ALIKE:
        processes.say("WRONG: this is not what the teacher says; the cache must not be used")
        return 2
    return 0


def _groups(reader: "CacheReader", size: int) -> list["np.ndarray"]:
    """Row ids of each group that went through the teacher together, of the shards that are there."""
    ids = reader.row_ids
    shards = [ids[at * reader.header.rows_per_shard :][: reader.header.rows_in(at)] for at in reader.present]
    return [shard[start : start + size] for shard in shards for start in range(0, len(shard), size)]


def _common(arguments: list[str]) -> list[str]:
    """The arguments that launch.train takes too."""
    return [a for a in arguments if not a.lstrip("-").startswith(("process_", "inspect", "verify"))]


if __name__ == "__main__":
    app.run(main)
