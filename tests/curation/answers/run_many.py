"""100,000 answers through launch.curate, which is killed in the middle and run again: a script.

    PYTHONPATH=. python tests/curation/answers/run_many.py FOLDER [ANSWERS]

FOLDER has to be new or empty. A pool of sums by eight teachers is made there and scored by a student of one layer. The
process gets SIGKILL when half of the answers are scored; the same command goes on. Prints answers scored and resident
memory on the way. Ends with an error if an answer is scored twice or not at all, or if memory grows: of each of the two
runs, the most of the second half is compared with the most of the first. What comes after the last answer, the choice
and its page, is part of the second half, and is told by itself too. With fewer than about 50,000 answers the first half
is spent on compiling, and the comparison says little. test_run_many.py runs it with few answers.
"""

import collections
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[3]
STYLES = (
    "{a} + {b} = {s}",
    "The answer is {s}.",
    "{s}",
    "I add {a} and {b} and get {s}.",
    "Sum: {s}",
    "{a} plus {b} equals {s}.",
    "So {b} + {a} = {s}, the sum.",
    "Adding {b} to {a} gives {s}.",
)
GROWTH = 1.15  # of resident memory at most, in the second half of a run
SHOWN = 10  # lines of a run


def make_pool(folder, answers):
    """So many answers to an eighth as many questions, or a few more; a text, which a config must name."""
    pool = folder / "pool"
    pool.mkdir(parents=True)
    for number, style in enumerate(STYLES):
        with (pool / f"teacher{number}.jsonl").open("w", encoding="utf-8") as file:
            for at in range(number, answers, len(STYLES)):
                a, b = divmod(at // len(STYLES), 100)
                text = style.format(a=a, b=b, s=a + b)
                row = {"id": f"{a}+{b}", "instruction": f"What is {a} + {b}?", "teacher_output": text}
                file.write(json.dumps(row | {"reference_answer": str(a + b)}) + "\n")
    lines = (json.dumps({"text": f"{number} bottles of beer on the wall; take {number}."}) for number in range(40))
    (folder / "text.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def command(folder):
    values = {
        "teacher.path": "synthetic",
        "student.init.layers": 1,
        "data.path": folder / "text.jsonl",
        "data.max_train_tokens": 0,
        "data.chat_template": False,
        "prompts.path": folder / "pool",
        "prompts.size": 0,
        "prompts.instruction": "",
        "prompts.verifier": "numeric",
        "prompts.heldout_fraction": 0.0,
        "eval.prompts": 0,
        "answers.pool": (str(folder / "pool"),),
    }
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    return [sys.executable, "-m", "launch.curate", "--config=configs/scas.py", f"--workdir={folder / 'run'}", *flags]


def watched(folder, every, kill_at=None):
    """(return code, [(answers scored, resident MiB)]) of a run; kill_at: answers after which it is killed."""
    trace = []
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(command(folder), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        while True:
            try:
                return process.wait(every), trace
            except subprocess.TimeoutExpired:
                trace.append((len(scored(folder)), resident(process.pid)))
            if kill_at is not None and trace[-1][0] >= kill_at:
                process.kill()
                return process.wait(), trace


def scored(folder):
    """The lines of the scores, whole ones."""
    paths = (folder / "run" / "answers").glob("scored-*.jsonl")
    return [line for path in paths for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def resident(process):
    """MiB; 0 of a process that has just ended."""
    try:
        status = pathlib.Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS:")), 0.0)


def growth(trace):
    """The most memory of the second half of the answers, over the most of the first; [(answers, MiB)]."""
    working = [(count, size) for count, size in trace if count > trace[0][0] and size > 0]
    middle = (working[0][0] + working[-1][0]) / 2
    first, second = ([size for count, size in working if (count > middle) == late] for late in (False, True))
    return max(second) / max(first)


def check(folder, answers):
    """Each answer is scored once, and each question has its choice; ends the script otherwise."""
    times = collections.Counter(json.loads(line)["row"] for line in scored(folder))
    if (len(times), times.total()) != (answers, answers):
        sys.exit(f"{answers:,} answers must be scored once each, got {times.total():,} lines of {len(times):,} answers")
    chosen = (folder / "run" / "answers" / "selected.jsonl").read_bytes().count(b"\n")
    if chosen != -(-answers // len(STYLES)):
        sys.exit(f"each of {-(-answers // len(STYLES)):,} questions must have an answer, got {chosen:,}")


def run(folder, answers, every=1.0):
    """The traces of the run that is killed and of the one that goes on, when all is there."""
    folder = folder.absolute()
    make_pool(folder, answers)
    traces = []
    for kill_at, wanted in ((answers // 2, -9), (None, 0)):
        code, trace = watched(folder, every, kill_at)
        traces.append(trace)
        if code != wanted:
            sys.exit(f"the run must end with {wanted}, got {code}; see {folder / 'log.txt'}")
        print(f"{'killed' if wanted else 'ended'}, {len(scored(folder)):,} of {answers:,} answers scored")
    check(folder, answers)
    return traces


def main():
    answers = int(sys.argv[2]) if len(sys.argv) > 2 else 100_000
    for trace in run(pathlib.Path(sys.argv[1]), answers):
        for count, size in trace[:: -(-len(trace) // SHOWN)]:
            print(f"{count:>10,} answers{size:>8.0f} MiB")
        scoring = [(count, size) for count, size in trace if count < answers]
        print(f"memory of the second half, of the first: {growth(trace):.2f}; while scoring: {growth(scoring):.2f}")
        if growth(trace) > GROWTH:
            sys.exit(f"memory must not grow to more than {GROWTH} of what it was, got {growth(trace):.2f}")


if __name__ == "__main__":
    main()
